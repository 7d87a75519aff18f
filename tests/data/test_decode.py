"""Pictures and captions of every kind: golden pixels, limits, refusals."""

import contextlib
import random

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from ldm.data.decode import MAX_CAPTION, BadSample, decode_caption, decode_image, to_rgb, upright_size
from tests.data.making import encoded, picture


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
