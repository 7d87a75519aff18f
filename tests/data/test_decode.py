"""Pictures and captions of every kind: golden pixels, limits, refusals."""

import contextlib
import io
import random
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile

from ldm.data.decode import (
    MAX_CAPTION,
    MAX_JSON,
    BadSample,
    decode_caption,
    decode_columns,
    decode_image,
    read_header,
    to_rgb,
    upright_size,
)
from ldm.data.transforms import Transform
from tests.data.making import encoded, picture, png, profile


def bad(data):
    with pytest.raises(BadSample) as caught:
        decode_image(data)
    return caught.value.kind


def test_sixteen_bit_ramp_is_scaled_not_clipped():
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    out = np.asarray(decode_image(encoded(Image.fromarray(ramp))))
    assert np.abs(out[..., 0] - ramp / 257).max() <= 0.5
    assert out.mean() == pytest.approx(127.5, abs=0.1)  # the plain conversion gives 254.5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_hidden_colours_under_transparency_show_the_background(mode):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    options = {}
    if mode == "LA":
        image = image.convert("LA")
    if mode == "P":
        image, options = Image.new("P", (4, 4), 0), {"transparency": 0}
        image.putpalette([255, 0, 0])
    data = encoded(image, **options)
    assert np.asarray(decode_image(data))[0, 0].tolist() == [255, 255, 255]
    assert np.asarray(decode_image(data, background=(0, 0, 9)))[0, 0].tolist() == [0, 0, 9]


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I;16"]
)
def test_every_mode_becomes_rgb_of_the_same_size(mode):
    chain = {"PA": ("LA",), "La": ("LA",), "RGBa": ("RGBA",), "I;16": ("I",)}
    image = Image.new("RGB", (3, 5), (10, 200, 30))
    for step in chain.get(mode, ()):
        image = image.convert(step)
    out = to_rgb(image.convert(mode))
    assert (out.mode, out.size) == ("RGB", (3, 5))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_of_unknown_range_are_refused(mode):
    with pytest.raises(BadSample) as caught:
        to_rgb(Image.new(mode, (2, 2)))
    assert caught.value.kind == "unsupported_mode"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, form):
    upright = Image.new("RGB", (32, 16))
    upright.paste((255, 255, 255), (0, 0, 16, 8))  # top left is bright
    inverse = [None, None, 0, 3, 1, 5, 2, 6, 4][orientation]  # Image.Transpose that a camera would have applied
    stored = upright if inverse is None else upright.transpose(Image.Transpose(inverse))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, form, exif=exif)
    assert upright_size(data) == (32, 16)
    out = np.asarray(decode_image(data)).astype(int)
    assert out.shape == (16, 32, 3)
    assert out[:6, :14].min() > 200 and out[10:].max() < 60 and out[:, 18:].max() < 60


def test_cmyk_and_profiles():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = np.asarray(decode_image(encoded(cmyk, "JPEG")))[4, 4]
    assert red[0] > 240 and red[1:].max() < 20
    adobe = decode_image(encoded(Image.new("RGB", (8, 8), (200, 30, 30)), icc_profile=b"not a profile"))
    assert np.asarray(adobe)[0, 0].tolist() == [200, 30, 30]  # an invalid profile is no profile
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = decode_image(encoded(Image.new("RGB", (8, 8), (200, 30, 30)), icc_profile=srgb))
    assert np.asarray(same)[0, 0].tolist() == [200, 30, 30]
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    assert decode_image(encoded(Image.new("RGB", (8, 8), (200, 30, 30)), icc_profile=lab)).mode == "RGB"


def test_the_first_frame_is_taken():
    frames = [Image.new("RGB", (8, 8), c) for c in ((255, 0, 0), (0, 255, 0))]
    for form in ("PNG", "WEBP"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
        assert np.asarray(decode_image(data))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_every_truncation_is_refused(form):
    data = picture(3, (64, 64), form)
    assert decode_image(data).size == (64, 64)  # the control
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    for share in (0.02, 0.3, 0.6, 0.9):
        assert bad(data[: int(len(data) * share)]) == "decode"


def test_noise_never_raises_anything_else():
    rng = random.Random(0)
    for form in ("JPEG", "PNG", "WEBP"):
        clean = picture(1, (24, 24), form)
        for _ in range(150):
            data = bytearray(clean)
            for _ in range(8):
                data[rng.randrange(len(data))] = rng.randrange(256)
            with contextlib.suppress(BadSample):
                assert decode_image(bytes(data)).mode == "RGB"


def chunks_of(data):
    at = 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        at += 12 + length


def as_png(chunks):
    body = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_broken_chunks_with_right_checksums_never_raise_anything_else():
    """Every chunk left out, doubled, cut, renamed and filled with ones, in pictures that use most of the format."""
    image, exif = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)), Image.Exif()
    exif[0x0112] = 6
    whole = [
        encoded(image.convert("P"), transparency=3, exif=exif, icc_profile=profile("x")),
        encoded(image, save_all=True, append_images=[image.rotate(90)]),
        encoded(image.convert("L"), transparency=4, dpi=(72, 72)),
        encoded(image.convert("P")),
    ]
    seen = {"came": 0, "refused": 0}
    for data in whole:
        assert as_png(chunks_of(data)) == data  # the control
        chunks = list(chunks_of(data))
        for i, (name, content) in enumerate(chunks):
            half, ones = content[: len(content) // 2], b"\xff" * len(content)
            for instead in (
                [],
                [chunks[i]] * 2,
                [(name, half)],
                [(name, ones)],
                [(b"tRNS", content)],
                [(b"iCCP", content)],
            ):
                broken = as_png([*chunks[:i], *instead, *chunks[i + 1 :]])
                for read in (read_header, decode_image):
                    try:
                        read(broken)
                        seen["came"] += 1
                    except BadSample:
                        seen["refused"] += 1
    assert min(seen.values()) > 50


def test_sizes_are_refused_from_the_header(monkeypatch):
    def never(*_):
        raise AssertionError("pixels were decoded")

    huge, long = encoded(Image.new("1", (9000, 9000))), encoded(Image.new("1", (1, 60000)))
    thin = encoded(Image.new("1", (1000, 40)))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    assert bad(huge) == bad(long) == bad(thin) == "size_policy"


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "EPS", "PPM"])
def test_other_formats_are_refused_whatever_their_name(form):
    assert bad(encoded(Image.new("RGB", (8, 8)), form)) == "decode"


def test_large_jpegs_are_decoded_at_a_fraction_that_is_large_enough():
    data = picture(0, (800, 640), "JPEG")
    assert decode_image(data).size == (800, 640)
    assert decode_image(data, at_least=64).size == (200, 160)
    assert decode_image(data, at_least=600).size == (800, 640)


def test_text_chunk_bomb_stays_bounded():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("x", "a" * 20_000_000, zip=True)
    assert bad(encoded(Image.new("RGB", (8, 8)), pnginfo=info)) == "decode"


@pytest.mark.parametrize(
    "data,text",
    [
        (b"a cat", "a cat"),
        ("\ufeffa cat".encode(), "a cat"),
        (b"  a\r\n\tcat \n", "a cat"),
        (b"a\x00\x07\x1b[31m cat", "a [31m cat"),
        ("👨‍👩‍👧 \u202eעברית".encode(), "👨‍👩‍👧 \u202eעברית"),
        (b"${x} {0} $(ls) <|endoftext|>", "${x} {0} $(ls) <|endoftext|>"),
        (b"\n \t", ""),
    ],
)
def test_captions(data, text):
    assert decode_caption(data) == text


def test_captions_are_capped_quickly_and_never_guessed():
    assert len(decode_caption(b"x" * 1_000_000)) == MAX_CAPTION
    for data in ("café".encode("latin-1"), "a cat".encode("utf-16"), b"\x92"):
        with pytest.raises(BadSample) as caught:
            decode_caption(data)
        assert caught.value.kind == "caption_encoding" and "0x" in caught.value.reason


# ---- against formulas


def grey_rows(depth, values):
    """One row of the values, packed as PNG packs them."""
    bits = "".join(f"{value:0{depth}b}" for value in values)
    bits += "0" * (-len(bits) % 8)
    return [int(bits, 2).to_bytes(len(bits) // 8, "big")]


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_one_of_the_files_own_depth(depth):
    """PNG 2003, 11.3.2.1: tRNS holds a value of the file's depth, and no other value is transparent."""
    levels = 2**depth
    values = [0, 1] if depth == 1 else [0, 1, 2, levels // 3, levels - 2, levels - 1]
    for transparent in values:
        data = png((len(values), 1), depth, 0, grey_rows(depth, values), tRNS=struct.pack(">H", transparent))
        out = np.asarray(decode_image(data, background=(255, 0, 7)))[0]
        for value, pixel in zip(values, out.tolist(), strict=True):
            grey = 255 * value / (levels - 1)
            assert pixel == [255, 0, 7] if value == transparent else np.abs(np.array(pixel) - grey).max() <= 0.5


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_is_one_of_the_files_own_depth(depth):
    top, form = 2**depth - 1, ">3B" if depth == 8 else ">3H"
    colours = [(top, 0, top // 2), (top - top // 9, 0, top // 2), (0, top, 0)]
    rows = [b"".join(struct.pack(form, *colour) for colour in colours)]
    out = np.asarray(
        decode_image(png((3, 1), depth, 2, rows, tRNS=struct.pack(">3H", *colours[0])), background=(9, 9, 9))
    )
    assert out[0, 0].tolist() == [9, 9, 9]
    assert np.abs(out[0, 1:] - 255 * np.array(colours[1:]) / top).max() < 1


@pytest.mark.parametrize("channels,colour", [(2, 4), (3, 2), (4, 6)])
def test_sixteen_bits_of_every_layout(channels, colour):
    """Pillow keeps the upper byte of grey with alpha and of colours: less than one level of 255 off, never clipped."""
    values = np.linspace(0, 65535, 64).astype(">u2").reshape(8, 8)
    wide = np.repeat(values[..., None], channels, axis=2)
    if channels in (2, 4):
        wide[..., -1] = 65535
    data = png((8, 8), 16, colour, [row.tobytes() for row in wide])
    out = np.asarray(decode_image(data)).astype(float)
    assert np.abs(out - values[..., None] / 257).max() < 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_compositing_is_the_formula(mode):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 32, 4), dtype=np.uint8)
    background = np.array([250, 3, 100])
    options = {}
    if mode == "P":
        numbers = rng.integers(0, 256, (32, 32), dtype=np.uint8)
        palette, alphas = rng.integers(0, 256, (256, 3), dtype=np.uint8), rng.integers(0, 256, 256, dtype=np.uint8)
        image = Image.fromarray(numbers)
        image = image.convert("P") if image.mode == "P" else Image.frombytes("P", (32, 32), numbers.tobytes())
        image.putpalette(palette.tobytes())
        options = {"transparency": alphas.tobytes()}
        colours, alpha = palette[numbers].astype(float), alphas[numbers].astype(float)
    elif mode == "LA":
        image = Image.merge("LA", [Image.fromarray(pixels[..., i].copy()) for i in (0, 3)])
        colours, alpha = np.repeat(pixels[..., :1], 3, axis=2).astype(float), pixels[..., 3].astype(float)
    else:
        image, colours, alpha = Image.fromarray(pixels), pixels[..., :3].astype(float), pixels[..., 3].astype(float)
    out = np.asarray(decode_image(encoded(image, **options), background=tuple(background.tolist())))
    share = alpha[..., None] / 255
    assert np.abs(out - (share * colours + (1 - share) * background)).max() <= 0.5 + 1e-9  # rounded once


def test_cmyk_is_the_plain_formula():
    ink = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    out = np.asarray(to_rgb(Image.frombytes("CMYK", (16, 16), ink.tobytes())))
    c, k = ink[..., :3] / 255, ink[..., 3:] / 255
    assert np.abs(out - 255 * (1 - c) * (1 - k)).max() <= 1


def srgb_of_linear(share):
    """IEC 61966-2-1."""
    return 255 * np.where(share <= 0.0031308, 12.92 * share, 1.055 * share ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "I;16"])
def test_embedded_profiles_are_applied_whatever_they_call_themselves(mode):
    """A profile called sRGB whose values are linear, on every layout, transparency included."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = mode in ("L", "LA", "I;16")
    image = Image.fromarray(ramp)
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode == "LA":
        image.putalpha(128)
    elif mode == "P":
        image = image.convert("P")
    elif not grey:
        image = Image.merge("RGB", [image, image, Image.new("L", (16, 16), 0)]).convert(mode)
        if mode == "RGBA":
            image.putalpha(128)
    share = 128 / 255 if mode in ("RGBA", "LA") else 1
    data = encoded(image, icc_profile=profile("linear sRGB", grey=grey))
    out = np.asarray(decode_image(data, background=(0, 0, 0)))[..., 0]
    expected = share * srgb_of_linear(ramp / 255)
    assert np.abs(out - expected).max() <= 2  # 8-bit tables of the colour engine
    assert np.abs(out - share * ramp).max() > 30  # the control: ignoring the profile is far off
    assert read_header(data)[1] == {}


def test_a_profile_that_does_not_fit_is_remarked():
    picture_of = Image.new("RGB", (8, 8), (200, 30, 30))
    for unusable in (
        b"not a profile",
        profile("x", grey=True),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes(),
    ):
        data = encoded(picture_of, icc_profile=unusable)
        assert set(read_header(data)[1]) == {"unusable_profile"}
        assert np.asarray(decode_image(data))[0, 0].tolist() == [200, 30, 30]
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert read_header(encoded(picture_of, icc_profile=srgb)) == ((8, 8), {})


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_further_frames_are_remarked(form):
    frames = [Image.new("RGB", (8, 8), c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
    assert read_header(data) == ((8, 8), {"further_frames": "the first of 3 frames is used"})
    assert read_header(encoded(frames[0], form))[1] == {}


def test_a_phones_jpeg_with_a_preview_is_a_jpeg():
    shots = [Image.new("RGB", (400, 400), c) for c in ((250, 0, 0), (0, 250, 0))]
    data = encoded(shots[0], "MPO", save_all=True, append_images=shots[1:])
    assert read_header(data) == ((400, 400), {})
    assert np.asarray(decode_image(data))[0, 0, 0] > 240
    assert decode_image(data, at_least=40).size == (100, 100)


def test_a_fraction_of_a_jpeg_gives_the_pixels_of_the_whole():
    """Halved while decoding and still twice the target: within a few levels of decoding everything."""
    rng = np.random.default_rng(0)
    layers = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (4, 16, 64)]
    resized = [
        np.asarray(Image.fromarray(layer).resize((512, 512), Image.Resampling.BICUBIC), float) for layer in layers
    ]
    data = encoded(Image.fromarray(np.mean(resized, axis=0).astype(np.uint8)), "JPEG", quality=90)
    target = Transform(64)
    draw = target.draws(torch.tensor([0]))[0]
    whole, part = (target(decode_image(data, at_least=side), draw).astype(int) for side in (0, 64))
    assert decode_image(data, at_least=64).size == (128, 128)
    assert np.abs(whole - part).max() <= 6 and np.abs(whole - part).mean() < 1
    nearest = np.asarray(Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.NEAREST)).astype(int)
    assert np.abs(whole - nearest).mean() > 2  # the control


def test_a_palette_picture_without_its_palette_is_refused():
    assert bad(png((2, 1), 8, 3, [b"\0\1"])) == "decode"


BOMBS = """
import re, struct, sys
from ldm.data.decode import BadSample, decode_image, read_header
from tests.data.making import png
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
square = png((30_000, 30_000), 8, 2, [b""])
canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + 2 * (16_382).to_bytes(3, "little")
webp = b"RIFF" + struct.pack("<I", len(canvas) + 4) + b"WEBP" + canvas
import zlib
text = png((8, 8), 8, 0, [bytes(8)] * 8, zTXt=b"a\\0\\0" + zlib.compress(bytes(200_000_000)))
colours = png((8, 8), 8, 0, [bytes(8)] * 8, iCCP=b"a\\0\\0" + zlib.compress(bytes(200_000_000)))
open("/proc/self/clear_refs", "w").write("5")
before = peak()
for data in (square, webp, text, colours):
    for read in (read_header, decode_image):
        try:
            read(data)
            sys.exit("came through")
        except BadSample as refused:
            print(refused.kind)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_bombs_are_refused_before_they_grow():
    """2.7 GB of pixels, 1 GB of canvas, 200 MB of text and of profile: measured in a process of its own."""
    done = subprocess.run([sys.executable, "-c", BOMBS], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    *kinds, grown = done.stdout.split()
    assert kinds == ["size_policy"] * 4 + ["decode"] * 4, done.stderr
    assert int(grown) < 30  # MB


# ---- text


def test_what_is_not_utf8_is_named_with_its_remedy():
    for text, said in (
        ("don’t".encode("cp1252"), "byte 0x92 at 3 .*iconv -f CP1252"),
        ("a".encode("utf-16"), "UTF-16"),
    ):
        with pytest.raises(BadSample) as caught:
            decode_caption(text)
        assert re.search(said, caught.value.reason)


@pytest.mark.parametrize(
    "data",
    [
        *(b"[" * 100_000, b'{"a": ' * 100_000, b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e999}', b'{"a": null}'),
        *(b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 1}' + b" " * MAX_JSON, b"\xff\xfe", b"", b"[1]", b'{"b": 1}'),
    ],
    ids=range(12),
)
def test_json_that_holds_no_value(data):
    with pytest.raises(BadSample) as caught:
        decode_columns(data, {"x": "a"})
    assert caught.value.kind == "column_missing" and len(caught.value.reason) < 250
    assert decode_columns(b'{"a": 1}', {"x": "a"}) == {"x": 1}  # the control
