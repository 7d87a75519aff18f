"""Small folders of pictures that differ clearly from one another."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def mosaic(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A picture with structure of its own: noise of 7 x 7, enlarged."""
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def write_folder(folder: Path, count: int, first: int = 0, size: tuple[int, int] = (48, 40)) -> Path:
    """`p000.png`, `p000.txt`, ...; the caption of picture n is `picture n`."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(first, first + count):
        (folder / f"p{n:03d}.png").write_bytes(encoded(mosaic(n, size)))
        (folder / f"p{n:03d}.txt").write_text(f"picture {n}\n")
    return folder
