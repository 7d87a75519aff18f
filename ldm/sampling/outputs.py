"""Pictures to files: PNG with the recipe inside, and grids with captions that a person can read."""

from __future__ import annotations

import json
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

RECIPE_KEY = "ldm"
INK, PAPER = (38, 38, 38), (255, 255, 255)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def to_uint8(images: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [-1, 1] to pictures."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(p.permute(1, 2, 0).cpu().numpy()) for p in pixels]


def save_png(image: Image.Image, path: Path, recipe: Mapping[str, Any]) -> None:
    """Writes the PNG; `recipe` goes as JSON into its text chunk `ldm`, where `read_recipe` finds it."""
    info = PngInfo()
    info.add_itxt(RECIPE_KEY, json.dumps(recipe, ensure_ascii=False))
    image.save(path, pnginfo=info)


def read_recipe(path: Path) -> dict[str, Any] | None:
    """The recipe inside a picture of ours, or None."""
    with Image.open(path, formats=["PNG"]) as image:
        text = getattr(image, "text", {}).get(RECIPE_KEY)
    return None if text is None else json.loads(text)


def captioned_grid(
    images: Sequence[Image.Image | None], captions: Sequence[str], columns: int | None = None, *, cell: int = 160
) -> Image.Image:
    """Pictures in rows with their captions below; small ones are enlarged in whole steps, so pixels stay crisp.

    None leaves a cell empty. What no font of this machine can write is escaped.
    """
    columns = columns or min(len(images), 8 if len(images) > 12 else 4)
    width, height = next(image.size for image in images if image is not None)
    zoom = max(1, round(cell / width))
    width, height = width * zoom, height * zoom
    texts = [writable(caption) for caption in captions]
    lines = [textwrap.wrap(text, max(8, int(width / _width_of(text, font))))[:4] for text, font in texts]
    text_height = 16 * max((len(x) for x in lines), default=0) + 8
    pad = 12
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + pad) + pad, rows * (height + text_height + pad) + pad), PAPER)
    draw = ImageDraw.Draw(grid)
    for i, (image, words, (_, font)) in enumerate(zip(images, lines, texts, strict=True)):
        if image is None:
            continue
        x = pad + i % columns * (width + pad)
        y = pad + i // columns * (height + text_height + pad)
        grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline=(225, 225, 225))
        for j, line in enumerate(words):
            draw.text((x, y + height + 4 + 16 * j), line, fill=INK, font=font)
    return grid


def grid_of_prompts(pictures: Sequence[Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """The same number of pictures for each caption: a row for each, or several where it has more than `_WIDEST`.

    One picture each goes on from row to row.
    """
    count = len(pictures[0])
    if count == 1:
        return captioned_grid([row[0] for row in pictures], captions)
    columns = -(-count // -(-count // _WIDEST))  # 9 pictures: 5 and 4, not 8 and 1
    blank = -count % columns
    cells = [picture for row in pictures for picture in [*row, *[None] * blank]]
    return captioned_grid(cells, [caption for caption in captions for _ in range(count + blank)], columns)


def strip(images: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """Pictures side by side: the way from noise to picture."""
    return captioned_grid(images, labels, columns=len(images), cell=128)


# ---- text in pictures

_WIDEST = 8  # pictures in a row
_FONTS = (  # looked for among the fonts of the machine, wide ones last; Pillow's own has little more than ASCII
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-zenhei.ttc",
    "wqy-microhei.ttc",
    "msyh.ttc",
    "YuGothM.ttc",
)
_UNASSIGNED = "\U0010ffff"


def writable(text: str) -> tuple[str, Font]:
    """The text as it can be written, and the font that lacks least of it.

    Control and direction characters are spaces: a caption is shown, never obeyed. Of what the font lacks, accents are
    dropped, and the rest is escaped, so that prompts can still be told apart.
    """
    text = "".join(c if c.isprintable() else " " for c in text)
    font = _own_font()
    if all(_has(font, c) for c in text):
        return text, font
    font = min(_fonts(), key=lambda f: sum(not _has(f, c) for c in text))
    return "".join(c if _has(font, c) else _replaced(c, font) for c in text), font


def _replaced(character: str, font: Font) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c))
    if all(_has(font, c) for c in plain):
        return plain
    return character.encode("unicode_escape").decode("ascii")


@cache
def _own_font() -> Font:
    return ImageFont.load_default(12)


@cache
def _fonts() -> tuple[Font, ...]:
    found: list[Font] = [_own_font()]
    for name in _FONTS:
        with suppress(OSError):
            found.append(ImageFont.truetype(name, 12))
    return tuple(found)


@cache
def _has(font: Font, character: str) -> bool:
    """Whether the font draws it otherwise than what it has nothing for."""
    return character == " " or bytes(font.getmask(character)) != bytes(font.getmask(_UNASSIGNED))


def _width_of(text: str, font: Font) -> float:
    """Pixels that a character takes, about: letters of some scripts are twice as wide as others."""
    return max(6.2, font.getlength(text) / max(1, len(text)))
