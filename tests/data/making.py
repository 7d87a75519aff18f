"""Small datasets for the tests: pictures, tar shards, folders."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def shared(name: str) -> Path:
    """A folder of the development data, or a skip."""
    if not (SHARED / name).exists():
        pytest.skip(f"needs the development data in ../shared/data/{name}")
    return SHARED / name


def picture(seed: int = 0, size: tuple[int, int] = (8, 8), form: str = "PNG", **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), form, **options)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(number: int, size: tuple[int, int] = (8, 8)) -> list[tuple[str, bytes]]:
    key = f"s{number:05d}"
    return [(f"{key}.png", picture(number, size)), (f"{key}.txt", f"caption {number}".encode())]


def write_shards(folder: Path, lengths: list[int], prefix: str = "train") -> Path:
    """Shards with consecutively numbered samples `s00000`, ...; the caption of sample n is `caption n`."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for shard, length in enumerate(lengths):
        write_tar(folder / f"{prefix}-{shard:06d}.tar", [m for n in range(first, first + length) for m in sample(n)])
        first += length
    return folder
