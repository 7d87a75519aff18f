"""Small datasets for the tests: pictures, tar shards, folders."""

import io
import struct
import tarfile
import zlib
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


def png(size: tuple[int, int], depth: int, colour: int, rows: list[bytes], **chunks: bytes) -> bytes:
    """A PNG by hand, for what Pillow does not write. colour: the type of IHDR.   chunks: by name, before the pixels."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *((name.encode(), data) for name, data in chunks.items())]
    parts += [(b"IDAT", pixels), (b"IEND", b"")]
    body = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def profile(name: str, *, grey: bool = False) -> bytes:
    """An ICC profile (version 2.4) with sRGB's primaries, adapted to D50, and linear values."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(65536 * value)) for value in values)

    def point(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + fixed(*values)

    white, linear = (0.9642, 1.0, 0.8249), b"curv\0\0\0\0" + struct.pack(">I", 0)
    described = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name.encode() + bytes(79)
    tags = {b"desc": described, b"wtpt": point(*white)}
    if grey:
        tags[b"kTRC"] = linear
    else:
        primaries = ((0.43607, 0.22250, 0.01393), (0.38506, 0.71688, 0.09710), (0.14308, 0.06062, 0.71417))
        for channel, primary in zip("rgb", primaries, strict=True):
            tags |= {f"{channel}XYZ".encode(): point(*primary), f"{channel}TRC".encode(): linear}
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, data in tags.items():
        table += tag + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(
        ">I4sI4s4s4s", start + len(body), b"", 0x02400000, b"mntr", b"GRAY" if grey else b"RGB ", b"XYZ "
    )
    header += struct.pack(">6H4s", 2020, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + fixed(*white) + bytes(48)
    return header + table + body
