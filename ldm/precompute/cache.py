"""Data set + autoencoder, and text encoders, -> the files of a cache (`ldm.data.cache`).

The work is cut into pieces: some samples of one shard and of one size, or some texts. A piece is a file, which is
written under another name until it is whole, and then its record. Which pieces there are, and what is in them, depends
on nothing but data and settings; so whoever is free may write them, one process or several that know nothing of each
other, and whoever comes last writes cache.json.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import ldm
from ldm.checkpoints import files
from ldm.checkpoints.tensorfile import write_tensors
from ldm.data.cache import (
    DTYPES,
    FILE,
    FORMAT,
    by_shard,
    preprocessing_of,
    refuse_chance,
    row_sums,
    sample_digests,
    seal,
    sources_of,
)
from ldm.data.datamodule import DataModule
from ldm.data.order import Ids
from ldm.errors import LdmError, raise_all
from ldm.model import Autoencoder
from ldm.types import Batch

Record = dict[str, Any]
RECORDS = ".pieces"  # the folder of what is known of each finished piece; cache.json can be made of it again
_OF_A_RECORD = {"kind", "count", "bytes", "sha256"}


class Piece(Protocol):
    """A file to be written. count: of its rows.   fingerprint: what tells its samples or texts from others."""

    @property
    def name(self) -> str: ...

    @property
    def count(self) -> int: ...

    @property
    def fingerprint(self) -> bytes: ...

    def write(self) -> tuple[dict[str, Tensor], Record]:
        """The tensors of the file, and what cache.json says of it."""
        ...


# ---- latents


@dataclass(frozen=True)
class MomentsPiece:
    """Samples of one shard and one size. source: the shard's, see `sources_of`.   keys, digests: of the samples.

    batches: opens a stream of them, slots 0, 1, ...
    """

    name: str
    source: str
    keys: Sequence[str]
    digests: Ids
    batches: Callable[[], Iterable[Batch]]
    autoencoder: Autoencoder
    dtype: str
    flipped: bool

    @property
    def count(self) -> int:
        return len(self.keys)

    @property
    def fingerprint(self) -> bytes:
        return self.digests.tobytes()

    def write(self) -> tuple[dict[str, Tensor], Record]:
        tensors, record = encode(self)
        tensors["digests"] = torch.from_numpy(self.digests)
        tensors["keys"] = torch.frombuffer(bytearray(json.dumps(list(self.keys)).encode()), dtype=torch.uint8)
        return tensors, {"kind": "moments", "source": self.source, "count": self.count, **record}


@torch.no_grad()
def encode(piece: MomentsPiece) -> tuple[dict[str, Tensor], Record]:
    """Moments of the pictures and, if asked for, of their mirror images, with the sums of their rows; how many pictures
    could be read, and the squared error of rounding to `dtype`, in units of the latents' standard deviation.

    Raises LdmError, `LATENTS`, for moments that are not finite.
    """
    autoencoder, dtype = piece.autoencoder, DTYPES[piece.dtype]
    variants: dict[str, Callable[[Tensor], Tensor]] = {"moments": lambda images: images}
    if piece.flipped:
        variants["mirrored_moments"] = lambda images: images.flip(-1)
    device, std = autoencoder.statistics.std.device, autoencoder.statistics.std.double()
    tables: dict[str, Tensor] = {}
    usable = torch.zeros(piece.count, dtype=torch.bool)
    squares, numbers = [0.0, 0.0], 0
    for batch in piece.batches():
        good, slots = batch.valid.cpu(), batch.slots.cpu()
        usable[slots] = good
        for name, change in variants.items():
            exact = autoencoder.moments(change(batch.images.to(device))).float()  # type: ignore[union-attr]
            exact[~good.to(device)] = 0
            stored = exact.to(dtype)
            _refuse_non_finite(exact, stored, [piece.keys[slot] for slot in slots.tolist()], piece.dtype)
            if name not in tables:
                tables[name] = torch.zeros(piece.count, *exact.shape[1:], dtype=dtype)
            tables[name][slots] = stored.cpu()
            for i, error in enumerate(_errors(exact.double(), stored.double(), std[:, None, None])):
                squares[i] += float(error)
            numbers += std.numel() * exact[0, 0].numel() * int(good.sum())
    sums = {name.replace("moments", "sums"): row_sums(table) for name, table in tables.items()}
    record = {"usable": int(usable.sum()), "numbers": numbers, "squares": squares, "shape": list(exact.shape[1:])}
    return {**tables, **sums, "usable": usable}, record


def _errors(exact: Tensor, stored: Tensor, std: Tensor) -> Iterator[Tensor]:
    """Summed squares: of the posterior's mean, and of its standard deviation where there is one."""
    channels = len(std)
    yield ((stored[:, :channels] - exact[:, :channels]) / std).square().sum()
    if exact.shape[1] > channels:
        deviations = [(0.5 * x[:, channels:]).exp() for x in (stored, exact)]
        yield ((deviations[0] - deviations[1]) / std).square().sum()


def _refuse_non_finite(exact: Tensor, stored: Tensor, keys: Sequence[str], dtype: str) -> None:
    finite = stored.isfinite().flatten(1).all(1)
    if bool(finite.all()):
        return
    hint = "train the autoencoder anew with precision 32 or a lower learning rate"
    if bool(exact.isfinite().all()):
        hint = f"they are too large for dtype={dtype}: dtype=bfloat16 or float32"
    first = keys[int((~finite).nonzero()[0])]
    raise LdmError("LATENTS", "the autoencoder gives latents that are not finite", where=f"sample {first}", next=hint)


def cut_rows(ids: Ids, row_bytes: int, piece_mb: float) -> list[Ids]:
    """Runs of nearly equal length, of at most about `piece_mb` megabytes, and of one row at least."""
    return np.array_split(ids, min(len(ids), math.ceil(len(ids) * row_bytes / (piece_mb * 2**20))))


# ---- the folder


@dataclass(frozen=True)
class Folder:
    """The place of a cache. identity: all that its content depends on; the rest of cache.json follows from it."""

    path: Path
    identity: Mapping[str, Any]

    def claim(self) -> None:
        """Make the folder, and remove what processes of this host that were killed left in it.

        Raises LdmError, `EXISTS`, if it holds anything else, with a line for each difference.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        plan = json.loads(json.dumps(self.identity))
        found = self._finished() or _mapping(self.path / RECORDS / "plan.json")
        if found:
            other = [key for key in plan if found.get(key) != plan[key]]
            raise_all([self._another(key, found.get(key), plan[key]) for key in other])
            for folder in (self.path, self.path / RECORDS):
                if folder.is_dir():
                    files.remove_leftovers(folder, locked=False)
            return
        if there := sorted(entry.name for entry in self.path.iterdir() if entry.name != RECORDS):
            what = f"OUT is not empty: {', '.join(there[:3])}"
            raise LdmError("EXISTS", what, where=str(self.path), next="choose another OUT")
        (self.path / RECORDS).mkdir(exist_ok=True)
        files.replace_file(self.path / RECORDS / "plan.json", files.json_bytes(plan))

    def _finished(self) -> Record:
        """The content of cache.json; empty unless it is as it was written."""
        found = _mapping(self.path / FILE)
        return found if seal({key: value for key, value in found.items() if key != "digest"}) == found else {}

    def _another(self, key: str, found: Any, wanted: Any) -> LdmError:
        shown = [text if len(text) < 100 else f"{text[:97]}..." for text in (json.dumps(found), json.dumps(wanted))]
        what = f"OUT holds another cache: {key} was {shown[0]}, now {shown[1]}"
        return LdmError("EXISTS", what, where=str(self.path), next="choose another OUT, or remove it yourself")

    def records(self, pieces: Sequence[Piece]) -> dict[str, Record]:
        """What is known of finished pieces, in their order."""
        known: dict[str, Record] = dict(self._finished().get("files", {}))
        for piece in pieces:
            record = _mapping(self._record(piece.name))
            if record.keys() >= _OF_A_RECORD:
                known[piece.name] = record
        return {piece.name: known[piece.name] for piece in pieces if piece.name in known}

    def _record(self, name: str) -> Path:
        return self.path / RECORDS / f"{name}.json"

    def is_whole(self, name: str, record: Record | None) -> bool:
        """Whether the file is the one that was written, byte for byte."""
        path = self.path / name
        if record is None or not path.is_file() or path.stat().st_size != record["bytes"]:
            return False
        return files.sha256_of(path) == record["sha256"]

    def write(self, piece: Piece) -> None:
        tensors, record = piece.write()
        path = self.path / piece.name
        temporary = files.temporary(path)
        temporary.unlink(missing_ok=True)
        try:
            with files.new_file(temporary) as file:
                write_tensors(file, tensors)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        files.sync_folder(self.path)
        (self.path / RECORDS).mkdir(exist_ok=True)
        record = {**record, "bytes": file.size, "sha256": file.sha256}
        files.replace_file(self._record(piece.name), files.json_bytes(record))

    def finish(self, pieces: Sequence[Piece]) -> Record | None:
        """Write cache.json if no piece is missing, and return its content; else None: other processes are at work."""
        records = self.records(pieces)
        if len(records) < len(pieces):
            return None
        about = seal({**json.loads(json.dumps(self.identity)), **_totals(records.values()), "files": records})
        files.replace_file(self.path / FILE, files.json_bytes(about))
        return about


def _mapping(path: Path) -> Record:
    """A JSON object; empty where there is none that can be read."""
    with suppress(OSError, ValueError):
        found = files.read_json(path)
        return found if isinstance(found, dict) else {}
    return {}


def _totals(records: Iterable[Record]) -> Record:
    moments = [record for record in records if record["kind"] == "moments"]
    numbers = sum(record["numbers"] for record in moments)
    squares = [sum(record["squares"][i] for record in moments) for i in range(2)]
    mean, std = ((square / numbers) ** 0.5 if numbers else 0.0 for square in squares)
    return {
        "count": sum(record["count"] for record in moments),
        "usable": sum(record["usable"] for record in moments),
        "finite": True,  # what is not was never written
        "rounding_error": {"mean": mean, "std": std, "unit": "standard deviation of the latents, root mean square"},
    }


def write_cache(
    folder: Folder,
    pieces: Sequence[Piece],
    *,
    rank: int = 0,
    world_size: int = 1,
    done: Callable[[int], None] = lambda count: None,
) -> tuple[Record | None, int]:
    """Write the pieces rank, rank + world_size, ... that are not there or are damaged; then cache.json, if this was the
    last of all. Returns its content, else None, and how many pieces were written here.

    Raises LdmError, `EXISTS`, if the folder holds something else.
    """
    folder.claim()
    records, written = folder.records(pieces), 0
    for piece in pieces[rank::world_size]:
        if not folder.is_whole(piece.name, records.get(piece.name)):
            folder.write(piece)
            written += 1
        done(piece.count)
    return folder.finish(pieces), written


@dataclass(frozen=True)
class Settings:
    """How a cache is written. piece_mb: size of a file, about."""

    dtype: str = "float32"
    flipped: bool = False
    batch_size: int = 32
    piece_mb: float = 256.0


def moments_pieces(data: DataModule, autoencoder: Autoencoder, settings: Settings) -> Iterator[MomentsPiece]:
    """Training and validation set, shard by shard; with buckets, bucket by bucket in every shard.

    Raises LdmError, `CACHE`, for crops that are drawn.
    """
    refuse_chance(data.transform)
    values = autoencoder.moment_channels * DTYPES[settings.dtype].itemsize * (1 + settings.flipped)
    number = count()
    for split in ("train", "val") if data.num_val else ("train",):
        dataset, assigned = data.dataset(split), data.assigned(split)
        digests, sources = sample_digests(dataset), sources_of(dataset)
        for shard, ids in by_shard(dataset):
            for bucket in range(1 if assigned is None else len(assigned)):
                mine = ids if assigned is None else ids[assigned.of[ids] == bucket]
                if not len(mine):
                    continue
                width, height = data.transform.square if assigned is None else assigned.size(bucket)
                row_bytes = values * (width // autoencoder.downsampling) * (height // autoencoder.downsampling)
                for rows in cut_rows(mine, row_bytes, settings.piece_mb):
                    yield MomentsPiece(
                        name=f"moments-{next(number):06d}.safetensors",
                        source=sources[shard][1],
                        keys=[dataset.keys[i] for i in rows.tolist()],
                        digests=digests[rows],
                        batches=partial(data.encode_dataloader, split, settings.batch_size, chosen=rows),
                        autoencoder=autoencoder,
                        dtype=settings.dtype,
                        flipped=settings.flipped,
                    )


def identity(
    data: DataModule,
    autoencoder: Autoencoder,
    pieces: Sequence[Piece],
    settings: Settings,
    text: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All that the bytes of a cache depend on, but for the hardware."""
    sets = [data.dataset(split) for split in (("train", "val") if data.num_val else ("train",))]
    sources = dict.fromkeys(row for dataset in sets for row in sources_of(dataset))
    samples = hashlib.sha256()
    for piece in pieces:
        samples.update(piece.fingerprint)  # however they are cut into files
    return {
        "format": FORMAT,
        "latent_id": autoencoder.latent_id(),
        "preprocessing": preprocessing_of(data.transform, data.buckets),
        "dtype": settings.dtype,
        "flipped": settings.flipped,
        "batch_size": settings.batch_size,
        "piece_mb": settings.piece_mb,
        "sources": [{"name": name, "sha256": sha256} for name, sha256 in sources],
        "samples": samples.hexdigest(),
        "text": text,
        "versions": {"ldm": ldm.__version__, "torch": torch.__version__},
    }
