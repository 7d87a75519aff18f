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
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageCms

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64_000_000  # below Pillow's own warning
MAX_SIDE = 16_384
MAX_ASPECT = 20
MAX_CAPTION = 8192  # characters: many times what any text encoder reads
MAX_PROFILE = 4 * 2**20  # bytes

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


class BadSample(Exception):
    """A sample that cannot be used. kind: the class under which it is counted.   reason: for a person."""

    def __init__(self, kind: str, reason: str) -> None:
        self.kind, self.reason = kind, reason
        super().__init__(kind, reason)


def decode_image(data: bytes, *, background: tuple[int, int, int] = (255, 255, 255), at_least: int = 0) -> Image.Image:
    """The first frame, upright, in sRGB, transparency laid on `background`: mode RGB.

    at_least: short side in pixels that the caller needs; a JPEG more than twice as large is decoded at a fraction.
    """
    image = open_image(data)
    if at_least and image.format == "JPEG":
        image.draft(None, (2 * at_least, 2 * at_least))
    try:
        image.load()
        orientation = _orientation(image)
        image = to_rgb(image, background)
    except _MALFORMED as error:
        raise BadSample("decode", _words(error)) from error
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


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
    return image


def upright_size(data: bytes) -> tuple[int, int]:
    """Width and height after the EXIF rotation, from the header alone."""
    image = open_image(data)
    # A PNG may carry EXIF behind its pixels, and Pillow then decodes them: only where the chunk exists at all.
    rotated = (image.format != "PNG" or b"eXIf" in data) and _orientation(image) in (5, 6, 7, 8)
    width, height = image.size
    return (height, width) if rotated else (width, height)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _MALFORMED:  # broken metadata beside good pixels
        return 1


def to_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Any mode that a picture can have, as RGB: 16 bits scaled, colours in sRGB, transparency on `background`."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise BadSample("unsupported_mode", f"mode {image.mode}: the range of its values is not known")
    elif image.mode == "La":  # premultiplied
        image = image.convert("LA")
    if image.has_transparency_data or image.mode in ("LA", "PA", "RGBa"):
        image = _to_srgb(image.convert("RGBA"), profile)
        ground = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    if image.mode in ("1", "P"):
        image = image.convert("RGB")
    return _to_srgb(image, profile).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours in sRGB where the embedded profile is valid and fits the mode; otherwise they count as sRGB already."""
    if not profile or len(profile) > MAX_PROFILE:
        return image
    transform = _colour_transform(profile, image.mode)
    return transform.apply(image) if transform else image


@lru_cache(maxsize=16)
def _colour_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    target = "RGBA" if mode == "RGBA" else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        return ImageCms.ImageCmsTransform(source, srgb, mode, target)
    except (ImageCms.PyCMSError, *_MALFORMED):
        return None


def decode_caption(data: bytes) -> str:
    """UTF-8 text on one line: byte-order mark, control characters and outer blanks removed, length capped."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("caption_encoding", f"byte 0x{data[error.start]:02x} at {error.start} is not UTF-8") from error
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", text[: 4 * MAX_CAPTION])
    return " ".join(text.split())[:MAX_CAPTION].rstrip()


def decode_columns(data: bytes | None, fields: Mapping[str, str]) -> dict[str, str | int | float | bool]:
    """The values of a sample's JSON that `fields` names: a column's name -> its dotted path, `marks.0.shape`.

    Raises BadSample, `column_missing`, if there is no JSON, no such field, or no single text, number or truth value.
    """
    if not fields:
        return {}
    if data is None:
        raise BadSample("column_missing", "the sample has no .json")
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("column_missing", f"the .json cannot be read: {_words(error)}") from error
    return {name: _field(tree, path) for name, path in fields.items()}


def _field(tree: Any, path: str) -> str | int | float | bool:
    value = tree
    for step in path.split("."):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise BadSample("column_missing", f"the .json has no field {path!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadSample("column_missing", f"the field {path!r} is not a finite number")
    if not isinstance(value, str | int | float | bool) or (isinstance(value, str) and len(value) > MAX_CAPTION):
        raise BadSample("column_missing", f"the field {path!r} is not a single text, number or truth value")
    return value


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]
