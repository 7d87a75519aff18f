"""Pictures to files: PNG with the recipe inside, and grids with captions that a person can read."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

RECIPE_KEY = "ldm"
INK, PAPER = (38, 38, 38), (255, 255, 255)


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
    images: Sequence[Image.Image], captions: Sequence[str], columns: int | None = None, *, cell: int = 160
) -> Image.Image:
    """Pictures in rows with their captions below; small ones are enlarged in whole steps, so pixels stay crisp."""
    columns = columns or min(len(images), 8 if len(images) > 12 else 4)
    width, height = images[0].size
    zoom = max(1, round(cell / width))
    width, height = width * zoom, height * zoom
    font = ImageFont.load_default(12)
    characters = max(8, int(width / 6.2))
    lines = [textwrap.wrap(_printable(c), characters)[:4] for c in captions]
    text_height = 16 * max((len(x) for x in lines), default=0) + 8
    pad = 12
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + pad) + pad, rows * (height + text_height + pad) + pad), PAPER)
    draw = ImageDraw.Draw(grid)
    for i, (image, words) in enumerate(zip(images, lines, strict=True)):
        x = pad + i % columns * (width + pad)
        y = pad + i // columns * (height + text_height + pad)
        grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline=(225, 225, 225))
        for j, line in enumerate(words):
            draw.text((x, y + height + 4 + 16 * j), line, fill=INK, font=font)
    return grid


def strip(images: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """Pictures side by side: the way from noise to picture."""
    return captioned_grid(images, labels, columns=len(images), cell=128)


def _printable(text: str) -> str:
    """Control and direction characters as spaces: a caption is shown, never obeyed."""
    return "".join(c if c.isprintable() else " " for c in text)
