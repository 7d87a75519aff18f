"""Reading captioned pictures: our stream beside a bare decoding loop, plain webdataset and torchvision's ImageFolder.

    python -m benchmarks.loader [path=FOLDER] [size=256] [samples=768] [workers=0,1,2] [batch=32] [rounds=5]
                                [latents=20000]

The arms read the same pictures and end with the same batches, [B, 3, size, size] in [-1, 1] and B captions; they take
turns within every round, so that a machine whose speed drifts slows all of them. Figures are medians over the rounds.
path: a folder of tar shards with JPEG pictures; without it, `samples` pictures of 512 x 384 are drawn, in four shards.
workers: processes that read; every number is an arm of its own.   rounds: of each arm.
latents: so many cached moments, [8, size / 8, size / 8] in float16: a stream of them beside a sequential read of the
    same files, from the page cache and, where the files are dropped from it first, from the disk. 0 leaves them out.

raw: decode, resize and crop, from bytes that lie in memory, no batches: the speed that cores permit.
share: images/s over those of raw in one process x max(1, min(workers, cores)).   of raw: over those of raw in as many
    processes at once, which is less where "cores" are threads of one core or share its clock.
A pass is one epoch; starting the workers is counted.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv[1:]}:
    sys.exit(print(__doc__))  # before torch is imported

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks._options import read_options, run_main
from ldm.data.cache import Cache
from ldm.data.datamodule import DataModule
from ldm.data.decode import decode_image
from ldm.data.shards import Dataset, open_dataset
from ldm.data.transforms import Transform
from ldm.errors import check
from ldm.models.autoencoder.statistics import LatentStatistics
from ldm.precompute.cache import Folder, Settings, identity, moments_pieces, write_cache

OPTIONS: dict[str, Any] = {
    "path": "",
    "size": 256,
    "samples": 768,
    "workers": "0,1,2",
    "batch": 32,
    "rounds": 5,
    "latents": 20_000,
}
Arm = Callable[[], Iterable[Any]]
"""Starts one pass over the set and gives its batches."""


def draw_shards(folder: Path, samples: int) -> None:
    """Four shards of JPEG pictures that are neither flat nor noise: smooth fields with some grain."""
    import webdataset

    rng = np.random.default_rng(0)
    for shard in range(4):
        with open(folder / f"train-{shard}.tar", "wb") as file, webdataset.TarWriter(file, encoder=False) as writer:
            for number in range(shard, samples, 4):
                coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
                pixels = np.asarray(coarse.resize((512, 384), Image.Resampling.BICUBIC), dtype=np.int16)
                grain = rng.integers(-12, 13, pixels.shape, dtype=np.int16)
                jpeg = BytesIO()
                Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)).save(jpeg, "JPEG", quality=90)
                writer.write({"__key__": f"{number:06d}", "jpg": jpeg.getvalue(), "txt": b"a field of colours"})


def unpack(dataset: Dataset, folder: Path) -> None:
    """The same pictures as files in one class folder: what ImageFolder reads."""
    (folder / "class").mkdir()
    for sample in range(dataset.num_samples):
        (folder / "class" / f"{sample:06d}.jpg").write_bytes(dataset.read(sample, ("image",))["image"])


# ---- arms ------------------------------------------------------------------------------------------------------


def ours(path: Path, size: int, batch: int, workers: int, index_dir: Path) -> Arm:
    """The training stream, one epoch of it; its workers go on reading beyond what a pass takes."""
    data = DataModule(str(path), image_size=size, index_dir=str(index_dir)).open()
    steps = data.num_train // batch

    def batches() -> Iterator[Any]:
        data.configure(seed=0, batch_size=batch, num_workers=workers)
        stream = data.train_dataloader()
        for _, found in zip(range(steps), stream, strict=False):
            yield found
        stream.close()

    return batches


def _transforms(size: int) -> Callable[[Image.Image], torch.Tensor]:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(0.5, 0.5),
        ]
    )


def plain_webdataset(shards: Sequence[Path], size: int, batch: int, workers: int) -> Arm:
    """webdataset as its documentation shows it: its decoder, torchvision's resize and crop, batched by the worker."""
    import webdataset

    prepare = _transforms(size)

    def batches() -> Iterator[Any]:
        stages = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False, empty_check=False)
        stages = stages.shuffle(1000).decode("pil").to_tuple("jpg;png;webp", "txt").map_tuple(prepare, str)
        loader = webdataset.WebLoader(stages.batched(batch, partial=False), batch_size=None, num_workers=workers)
        return iter(loader)

    return batches


def image_folder(folder: Path, size: int, batch: int, workers: int) -> Arm:
    from torchvision import datasets

    pictures = datasets.ImageFolder(str(folder), _transforms(size))

    def batches() -> Iterator[Any]:
        return iter(torch.utils.data.DataLoader(pictures, batch, shuffle=True, num_workers=workers, drop_last=True))

    return batches


def raw(dataset: Dataset, size: int) -> Callable[[int], float]:
    """Images/s of decoding and resizing alone, by our own decoder, from memory: in so many processes at once."""
    transform = Transform(size)
    images = [dataset.read(sample, ("image",))["image"] for sample in range(min(dataset.num_samples, 256))]
    draw = np.full(3, 0.5, dtype=np.float32)

    def once() -> None:
        for image in images:
            transform(decode_image(image, at_least=size), draw)

    def measure(processes: int) -> float:
        others = [multiprocessing.get_context("fork").Process(target=once) for _ in range(processes - 1)]
        began = time.perf_counter()
        for other in others:
            other.start()
        once()
        for other in others:
            other.join()
        return processes * len(images) / (time.perf_counter() - began)

    return measure


def speed(arm: Arm) -> float:
    """Images/s of a whole pass, the start of its workers included."""
    began, count = time.perf_counter(), 0
    for batch in arm():
        count += len(batch) if hasattr(batch, "slots") else len(batch[0])
    return count / (time.perf_counter() - began)


# ---- cached latents --------------------------------------------------------------------------------------------


class Synthetic:
    """In place of an autoencoder: noise of the shape that Stable Diffusion's gives."""

    moment_channels, latent_channels, downsampling = 8, 4, 1

    def __init__(self) -> None:
        self.statistics = LatentStatistics(self.latent_channels)
        self._generator = torch.Generator().manual_seed(0)

    def moments(self, images: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(images), self.moment_channels, *images.shape[2:], generator=self._generator)

    def latent_id(self) -> str:
        return "0" * 64


def cached(folder: Path, side: int, count: int) -> tuple[DataModule, Cache]:
    """Captioned pictures in four shards, and a cache of them."""
    import webdataset

    (folder / "data").mkdir(parents=True)
    png = BytesIO()
    Image.new("RGB", (side, side)).save(png, "PNG")
    for shard in range(4):
        path = folder / "data" / f"{shard}.tar"
        with open(path, "wb") as file, webdataset.TarWriter(file, encoder=False) as writer:
            for number in range(shard, count, 4):
                writer.write({"__key__": f"{number:08d}", "png": png.getvalue(), "txt": b"a field of colours"})
    data = DataModule(str(folder / "data"), image_size=side).open()
    data.configure(seed=0, batch_size=4)
    settings = Settings(dtype="float16", batch_size=256)
    pieces = list(moments_pieces(data, Synthetic(), settings))  # type: ignore[arg-type]
    write_cache(Folder(folder / "cache", identity(data, Synthetic(), pieces, settings, None)), pieces)  # type: ignore[arg-type]
    return data, Cache.open(folder / "cache")


def read_through(files: Sequence[Path]) -> None:
    buffer = bytearray(2**20)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def forget(files: Sequence[Path]) -> None:
    """Drop files from the page cache (Linux; needs no right)."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def latents_table(folder: Path, options: dict[str, Any]) -> None:
    data, cache = cached(folder, options["size"] // 8, options["latents"])
    files = sorted((folder / "cache").glob("*.safetensors"))
    moments = cache.moments(data.dataset("train"))
    steps = data.num_train // options["batch"]

    def stream(workers: int) -> None:
        data.configure(seed=0, batch_size=options["batch"], num_workers=workers)
        data.use_moments(moments)
        batches = data.train_dataloader()
        for _ in zip(range(steps), batches, strict=False):
            pass
        batches.close()

    arms: dict[str, Callable[[], None]] = {"raw": lambda: read_through(files)}
    arms |= {f"ours, {n} workers": lambda n=n: stream(n) for n in options["workers"]}  # type: ignore[misc]
    places = ["page cache", *(["disk"] if hasattr(os, "posix_fadvise") else [])]
    found: dict[tuple[str, str], list[float]] = {(name, place): [] for place in places for name in arms}
    for _ in range(options["rounds"]):
        for (name, place), speeds in found.items():
            forget(files) if place == "disk" else read_through(files)
            moments = cache.moments(data.dataset("train"))
            began = time.perf_counter()
            arms[name]()
            speeds.append(steps * options["batch"] / (time.perf_counter() - began))
    size = sum(path.stat().st_size for path in files) / data.num_train
    print(f"\ncached latents: {data.num_train} of {size / 1024:.0f} KiB, batches of {options['batch']}")
    print(f"{'':>18} {'from':>11} {'images/s':>10} {'of raw':>8}")
    for (name, place), speeds in found.items():
        ratio = statistics.median(mine / bare for mine, bare in zip(speeds, found["raw", place], strict=True))
        print(f"{name:>18} {place:>11} {statistics.median(speeds):>10.0f} {ratio:>8.3f}")


# ---- the table -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    size, batch, rounds = options["size"], options["batch"], options["rounds"]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        path = Path(options["path"]) if options["path"] else scratch / "shards"
        if not options["path"]:
            path.mkdir()
            draw_shards(path, options["samples"])
        dataset = open_dataset(str(path), index_dir=str(scratch / "index"))
        check(dataset.num_samples >= batch, "DATA", f"{dataset.num_samples} samples, less than a batch of {batch}")
        (scratch / "folder").mkdir()
        unpack(dataset, scratch / "folder")
        bare = raw(dataset, size)
        arms: dict[tuple[str, int], Arm] = {}
        for workers in options["workers"]:
            arms["ours", workers] = ours(path, size, batch, workers, scratch / "index")
            arms["webdataset", workers] = plain_webdataset(dataset.shards, size, batch, workers)
            arms["ImageFolder", workers] = image_folder(scratch / "folder", size, batch, workers)
        bares = [("raw", n) for n in sorted({1, *(min(n, cores()) for n in options["workers"] if n)})]
        found: dict[tuple[str, int], list[float]] = {name: [] for name in [*bares, *arms]}
        for turn in range(rounds + 1):  # the first fills the page cache
            order = list(arms) if turn % 2 else list(arms)[::-1]
            for name in [*bares, *order]:
                value = bare(name[1]) if name[0] == "raw" else speed(arms[name])
                if turn:
                    found[name].append(value)
        print_table(found, dataset, size, batch)
        if options["latents"]:
            latents_table(scratch / "latents", options)


def print_table(found: dict[tuple[str, int], list[float]], dataset: Dataset, size: int, batch: int) -> None:
    print(
        f"{cores()} cores; torch {torch.__version__}; {dataset.num_samples} pictures to {size} px, batches of {batch}"
    )
    print(f"{'':>12} {'workers':>8} {'images/s':>9} {'share':>7} {'of raw':>7} {'of ours':>8}")
    for (arm, workers), speeds in found.items():
        at_once = max(1, min(workers, cores()))
        limits = [value * at_once for value in found["raw", 1]]
        share = statistics.median(value / limit for value, limit in zip(speeds, limits, strict=True))
        same = statistics.median(value / bare for value, bare in zip(speeds, found["raw", at_once], strict=True))
        beside = ""
        if arm in ("webdataset", "ImageFolder"):
            pairs = zip(speeds, found["ours", workers], strict=True)
            beside = f"{statistics.median(value / mine for value, mine in pairs):.2f} x"
        print(f"{arm:>12} {workers:>8} {statistics.median(speeds):>9.1f} {share:>7.1%} {same:>7.1%} {beside:>8}")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    options = read_options(arguments, OPTIONS)
    numbers = str(options["workers"]).split(",")
    check(all(n.isdecimal() for n in numbers), "CONFIG", f"workers={options['workers']}", next="as workers=0,1,2")
    options["workers"] = [int(n) for n in numbers]
    for key in ("size", "samples", "batch", "rounds"):
        check(options[key] >= 1, "CONFIG", f"{key} must be at least 1", limit=f"given {options[key]}")
    return options


if __name__ == "__main__":
    run_main(main)
