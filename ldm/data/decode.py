"""Bytes to pictures, captions and columns: the only place where untrusted bytes are decoded.

Needs Pillow and numpy only.

Formats are JPEG, PNG and WebP whatever the file's name says; sizes are checked from the header before any pixel is
decoded. What cannot be decoded faithfully raises `BadSample`; nothing is guessed, repaired or half decoded.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from io import BytesIO
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64_000_000  # below Pillow's own warning
MAX_SIDE = 16_384
MAX_ASPECT = 20
MAX_CAPTION = 8192  # characters: many times what any text encoder reads
MAX_PROFILE = 4 * 2**20  # bytes
MAX_JSON = 2**20  # bytes: a tree in memory is many times its text
MAX_ARRAY = 4 * 2**20  # bytes of a .npy
SAME_COLOURS = 2  # levels of 255: a profile that moves no colour further than this counts as sRGB

# Everything that Pillow's readers raise on malformed input.
_MALFORMED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    ArithmeticError,
    EOFError,
    AssertionError,
    struct.error,
)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_ARRAY_HEADER = re.compile(
    rb"\{'descr': '([<>|](?:f[248]|[iu][1248]|b1))', 'fortran_order': (True|False), "
    rb"'shape': \((\d{1,9},|\d{1,9}(?:, \d{1,9}){1,2})\), \}\s*"
)
_ToSrgb = Callable[[Image.Image], Image.Image]


class BadSample(Exception):
    """A sample that cannot be used. kind: the class under which it is counted.   reason: for a person."""

    def __init__(self, kind: str, reason: str) -> None:
        self.kind, self.reason = kind, reason
        super().__init__(kind, reason)


def decode_image(
    data: bytes, *, background: tuple[int, int, int] = (255, 255, 255), at_least: int = 0, profile: bool = True
) -> Image.Image:
    """The first frame, upright, in sRGB, transparency laid on `background`: mode RGB.

    at_least: short side in pixels that the caller needs; a JPEG more than twice as large is decoded at a fraction.
    profile: whether an embedded one is applied.
    """
    image = open_image(data)
    if not profile:
        image.info.pop("icc_profile", None)
    if at_least and image.format in ("JPEG", "MPO"):
        image.draft(None, (2 * at_least, 2 * at_least))
    try:
        image.load()
        orientation = _orientation(image)
        image = to_rgb(image, background)
    except _MALFORMED as error:
        raise BadSample("decode", _words(error)) from error
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def decode_mask(data: bytes, *, at_least: int = 0) -> Image.Image:
    """A picture whose luminance is a mask, upright: mode L, 255 = counts. What is transparent does not count.

    Its values are data, not colours: an embedded profile is not applied.
    """
    return decode_image(data, background=(0, 0, 0), at_least=at_least, profile=False).convert("L")


def decode_array(data: bytes) -> NDArray[np.float32]:
    """Finite numbers of a .npy, float32 in its shape. Raises BadSample, `decode`; see `read_array_header`."""
    shape, columns_first, kind, start = read_array_header(data)
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
        values = np.frombuffer(data, dtype=kind, offset=start).astype(np.float32)
    if not np.isfinite(values).all():
        raise BadSample("decode", "the array holds numbers that are not finite in float32")
    return np.ascontiguousarray(values.reshape(shape, order="F" if columns_first else "C"))


def read_array_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether columns come first, type and first byte of a .npy of plain numbers with 1 to 3 dimensions.

    The file must have just the bytes that its header announces. The header is matched, not evaluated; what numpy
    would unpickle, an array of objects, does not match.
    Source: the description of the format in numpy.lib.format.
    """
    if len(data) > MAX_ARRAY:
        raise BadSample("size_policy", f"{len(data)} bytes, limit of an array {MAX_ARRAY}")
    announced = int.from_bytes(data[8:10], "little")
    header = _ARRAY_HEADER.fullmatch(data[10 : 10 + announced])
    if data[:8] != b"\x93NUMPY\x01\x00" or header is None:
        raise BadSample("decode", f"no .npy of plain numbers in 1 to 3 dimensions; its header: {data[10:80]!r}")
    kind, start = np.dtype(header[1].decode("ascii")), 10 + announced
    shape = tuple(int(length) for length in re.findall(rb"\d+", header[3]))
    if min(shape) < 1 or math.prod(shape) * kind.itemsize != len(data) - start:
        raise BadSample("decode", f"{kind} {list(shape)} in {len(data) - start} bytes")
    return shape, header[2] == b"True", kind, start


def open_image(data: bytes) -> Image.Image:
    """The picture behind its header, no pixel decoded yet, within the limits of this module."""
    if not data:
        raise BadSample("decode", "0 bytes")
    if len(data) > MAX_BYTES:
        raise BadSample("size_policy", f"{len(data)} bytes, limit {MAX_BYTES}")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSample("size_policy", _words(error)) from error
    except Image.UnidentifiedImageError as error:
        raise BadSample("decode", f"not a {', '.join(FORMATS)} picture; starts with {data[:12]!r}") from error
    except _MALFORMED as error:
        raise BadSample("decode", _words(error)) from error
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadSample("size_policy", f"{width}x{height}, limits {MAX_PIXELS} pixels and side {MAX_SIDE}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSample("size_policy", f"{width}x{height}, limit of the aspect ratio {MAX_ASPECT}")
    if image.format == "PNG":
        _scale_transparency(image)
    return image


def read_header(data: bytes) -> tuple[tuple[int, int], dict[str, str]]:
    """Width and height after the EXIF rotation, and remarks by kind, from the header alone.

    Remarks are about pictures that are used, but not wholly: `further_frames` of an animation, `unusable_profile`
    where the colours are taken for sRGB.
    """
    image = open_image(data)
    # A PNG may carry EXIF behind its pixels, and Pillow then decodes them: only where the chunk exists at all.
    rotated = (image.format != "PNG" or b"eXIf" in data) and _orientation(image) in (5, 6, 7, 8)
    width, height = image.size
    remarks = {}
    if image.format != "MPO" and getattr(image, "is_animated", False):  # phones keep previews in MPO
        remarks["further_frames"] = f"the first of {image.n_frames} frames is used"  # type: ignore[attr-defined]
    profile = image.info.get("icc_profile")
    if profile and _colour_transform(profile, _COLOURS.get(image.mode, "RGB")) == "unusable":
        remarks["unusable_profile"] = f"the colour profile cannot be applied to {image.mode}; taken for sRGB"
    return ((height, width) if rotated else (width, height)), remarks


def upright_size(data: bytes) -> tuple[int, int]:
    """Width and height after the EXIF rotation, from the header alone."""
    return read_header(data)[0]


def _scale_transparency(image: ImageFile.ImageFile) -> None:
    """PNG names its transparent grey or colour in the file's own depth (PNG 2003, 11.3.2.1), Pillow reads it as 8 bits.

    Of 16 bits a channel Pillow keeps the upper eight, so that colours which differ below them become transparent too.
    """
    transparent, raw_mode = image.info.get("transparency"), image.tile[0].args if image.tile else None
    if isinstance(transparent, int) and raw_mode in ("L;2", "L;4"):
        bits = int(raw_mode[-1])
        image.info["transparency"] = (transparent % 2**bits) * 255 // (2**bits - 1)
    elif isinstance(transparent, tuple) and raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _MALFORMED:  # broken metadata beside good pixels
        return 1


def to_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Any mode that a picture can have, as RGB: 16 bits scaled, colours in sRGB, transparency on `background`.

    Colours whose profile is invalid or does not fit the mode count as sRGB. Transparency is mixed in sRGB's values, as
    browsers do: alpha * colour + (1 - alpha) * background, rounded.
    """
    colours, alpha = _split(image)
    profile = image.info.get("icc_profile")
    transform = _colour_transform(profile, colours.mode) if profile else "same"
    if not isinstance(transform, str):
        colours = transform(colours)
    colours = colours.convert("RGB")
    return colours if alpha is None else Image.composite(colours, Image.new("RGB", colours.size, background), alpha)


# Modes whose colours are not RGB; those of a picture with a palette or of one bit are.
_COLOURS = {"L": "L", "LA": "L", "La": "L", "I;16": "L", "I;16B": "L", "I;16L": "L", "CMYK": "CMYK"}


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours of 8 bits, in L, RGB or CMYK, and alpha in L, or None where nothing is transparent."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        grey = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
        clear = None if transparent is None else Image.fromarray(np.where(wide == transparent, 0, 255).astype(np.uint8))
        return grey, clear
    if image.mode in ("I", "F"):
        raise BadSample("unsupported_mode", f"mode {image.mode}: the range of its values is not known")
    if image.mode == "P" and image.palette is None:
        raise BadSample("decode", "a picture of a palette without the palette")
    mode = _COLOURS.get(image.mode, "RGB")
    if image.has_transparency_data:
        image = image.convert("LA" if mode == "L" else "RGBA")
        return image.convert(mode), image.getchannel("A")
    return image if image.mode == mode else image.convert(mode), None


@lru_cache(maxsize=16)
def _colour_transform(profile: bytes, mode: str) -> _ToSrgb | Literal["same", "unusable"]:
    """From `mode` with its profile to sRGB, by perceptual intent; "same" where that would change nothing visible."""
    if len(profile) > MAX_PROFILE:
        return "unusable"
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        # of one channel the engine's own tables are coarse, up to ten levels off in the dark
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        transform = ImageCms.ImageCmsTransform(source, srgb, mode, "RGB", flags=flags)
    except (ImageCms.PyCMSError, *_MALFORMED):
        return "unusable"
    if mode == "L":  # exact and therefore slow: once for each of the 256 greys
        return partial(_look_up, transform.apply(Image.frombytes("L", (256, 1), bytes(range(256)))).tobytes())
    if mode == "RGB":  # measured, for what a profile calls itself proves nothing: "linear sRGB" is far from sRGB
        steps = np.arange(0, 256, 15, dtype=np.uint8)
        probe = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
        moved = np.asarray(transform.apply(Image.fromarray(probe))).astype(int) - probe
        if np.abs(moved).max() <= SAME_COLOURS:
            return "same"
    return transform.apply


def _look_up(table: bytes, grey: Image.Image) -> Image.Image:
    indexed = grey.copy()
    indexed.putpalette(table)
    return indexed.convert("RGB")


def decode_caption(data: bytes) -> str:
    """UTF-8 text on one line: byte-order mark, control characters and outer blanks removed, length capped."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at {error.start} is not UTF-8"
        likely = "UTF-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "CP1252"
        raise BadSample("caption_encoding", f"{where}; convert with: iconv -f {likely} -t UTF-8") from error
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", text[: 4 * MAX_CAPTION])
    return " ".join(text.split())[:MAX_CAPTION].rstrip()


Value = str | int | float | bool | NDArray[np.float32]


def decode_columns(data: bytes | None, fields: Mapping[str, str]) -> dict[str, Value]:
    """The values of a sample's JSON that `fields` names: a column's name -> its dotted path, `marks.0.shape`.

    A list of numbers is a vector, float32. Raises BadSample, `column_missing`, if there is no JSON, no such field, or
    it holds no text, number, truth value or vector.
    """
    if not fields:
        return {}
    if data is None:
        raise BadSample("column_missing", "the sample has no .json")
    if len(data) > MAX_JSON:
        raise BadSample("column_missing", f"the .json has {len(data)} bytes, limit {MAX_JSON}")
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("column_missing", f"the .json cannot be read: {_words(error)}") from error
    return {name: _field(tree, path) for name, path in fields.items()}


def _field(tree: Any, path: str) -> Value:
    value = tree
    for step in path.split("."):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise BadSample("column_missing", f"the .json has no field {path!r}")
    if isinstance(value, list) and value and all(type(number) in (int, float) for number in value):
        return _vector(value, path)
    if isinstance(value, float) and not math.isfinite(value):
        raise BadSample("column_missing", f"the field {path!r} is not a finite number")
    if not isinstance(value, str | int | float | bool) or (isinstance(value, str) and len(value) > MAX_CAPTION):
        raise BadSample("column_missing", f"the field {path!r} is no text, number, truth value or list of numbers")
    return value


def _vector(numbers: list[int | float], path: str) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):
            vector = np.array([float(number) for number in numbers]).astype(np.float32)
        finite = bool(np.isfinite(vector).all())
    except OverflowError:
        finite = False
    if not finite:
        raise BadSample("column_missing", f"the field {path!r} holds numbers that are not finite in float32")
    return vector


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]
