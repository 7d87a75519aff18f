"""Latents and text embeddings that were computed before: what a cache holds, and how streams read it.

    cache.json                     what it was made from, and size and sha256 of every file; written last
    moments-000000.safetensors     of some samples of one shard: moments [n, 2C, h, w], usable [n], sums [n] (each row's
                                   words added up), keys (JSON), digests [n] (the keys' hashes); mirrored_moments and
                                   mirrored_sums if asked for
    text-000000.safetensors        of some texts: hashes [n], and by text encoder NAME.tokens [n, L, D], NAME.vector
                                   [n, E], each with its sums, NAME.tokens.sums [n]

`python -m ldm cache` writes it (`ldm.precompute.cache`). A row is read by its place, alone, in one call, into the
batch; its sum tells whether it is the one that was written. Nothing here imports a model.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.captions import Captions
from ldm.data.index import FIELDS
from ldm.data.order import Ids
from ldm.data.shards import Dataset, Handles
from ldm.data.transforms import PIXELS, Transform
from ldm.errors import UNCLASSIFIED, LdmError, raise_all
from ldm.types import Conditioning

FILE, FORMAT = "cache.json", 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_CODES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER = 2**20
_NAME = re.compile(r"(moments|text)-\d{6,}\.safetensors")
_LISTED = 10  # differences that are named
_OF_A_RUN = ("flip_prob", "key")  # of a Transform: what does not change the stored rows
_AGAIN = "run the command that wrote it again: it verifies every file and mends what is damaged"


# ---- one file


@dataclass(frozen=True)
class Table:
    """A tensor of a file, [n, ...]. start: its first byte.   code: its type, as safetensors writes it."""

    path: Path
    code: str
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        return _CODES[self.code]

    def read(self) -> NDArray[Any]:
        """All of it, for tables of whole numbers, truth values and bytes."""
        kind = str(self.dtype).removeprefix("torch.")
        found = np.fromfile(self.path, kind, prod(self.shape), offset=self.start)
        return found.reshape(self.shape)


def tables_of(path: Path) -> dict[str, Table]:
    """The tensors of a safetensors file, by name. Raises LdmError, `CACHE`, if it is none, or says what cannot be."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= _MAX_HEADER else {}
            size = file.seek(0, os.SEEK_END)
        tables = {
            name: Table(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }
        whole = all(
            table.start >= 8 + length
            and all(type(n) is int and n >= 0 for n in table.shape)
            and table.start + table.shape[0] * table.row_bytes <= size
            for table in tables.values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(path, f"{type(error).__name__}: it cannot be read as safetensors") from error
    if not whole or not tables:
        raise _damaged(path, "its header does not fit to its size")
    return tables


def row_sums(rows: Tensor) -> Tensor:
    """[n] int64: the words of each row, as stored, added up modulo 2^64."""
    flat = rows.contiguous().view(len(rows), -1).view(torch.uint8)
    return torch.from_numpy(_sums(flat.numpy()))


def _sums(rows: NDArray[np.uint8]) -> NDArray[np.int64]:
    word = next(size for size in (8, 4, 2, 1) if rows.shape[1] % size == 0)
    return rows.view(f"i{word}").sum(axis=1, dtype=np.int64)


def _damaged(path: Path, what: str, exit_code: int = 2) -> LdmError:
    return LdmError("CACHE", "the cache is damaged", where=str(path), limit=what, next=_AGAIN, exit_code=exit_code)


# ---- rows by sample, rows by text


class Rows:
    """Rows of one shape in several files, by place. Forked workers share it: `pread` moves no position."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = list(tables)
        self._starts = np.array([table.start for table in tables], dtype=np.int64)
        self._handles = Handles()
        self._announced: set[Path] = set()

    def _opened(self, path: Path) -> int:
        file = self._handles.get(path)
        if path not in self._announced and hasattr(os, "posix_fadvise"):
            # rows come in shuffled windows, which the disk would fetch one by one: it may as well bring the whole file
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
        self._announced.add(path)
        return file

    def read(self, files: Ids, rows: Ids, sums: NDArray[np.int64] | None = None) -> Tensor:
        """[B, ...] as stored, of row `rows` of file `files`, [B] each.

        Raises LdmError, `CACHE`, for a row that is cut off or whose sum is another than in `sums`.
        """
        first = self.tables[files[0]]
        if any(self.tables[file].shape[1:] != first.shape[1:] for file in set(files.tolist())):
            raise ValueError("a batch holds samples of several sizes")
        size = first.row_bytes
        found = torch.empty((len(rows), *first.shape[1:]), dtype=first.dtype)
        buffer = found.view(len(rows), -1).view(torch.uint8).numpy()
        places = self._starts[files] + rows * size
        for row, file, place in zip(buffer, files.tolist(), places.tolist(), strict=True):
            path = self.tables[file].path
            try:
                count = os.preadv(self._opened(path), [row], place)
            except OSError as error:
                raise _damaged(path, f"{error.strerror}", UNCLASSIFIED) from error
            if count != size:
                raise _damaged(path, f"{count} of {size} bytes are left at byte {place}", UNCLASSIFIED)
        if sums is not None and (wrong := np.flatnonzero(_sums(buffer) != sums)).size:
            path = self.tables[files[wrong[0]]].path
            raise _damaged(path, f"row {rows[wrong[0]]} is not what was written", UNCLASSIFIED)
        return found


@dataclass(frozen=True)
class CachedMoments:
    """The `ldm.data.moments.Moments` of a dataset in the files of a cache.

    stored: the moments of every file, then, where there are some, the mirror images of every file.
    files, rows, usable: [N], where each sample's row lies.   sums: [N, 1 or 2], of the row and of its mirror image.
    """

    stored: Rows
    files: NDArray[np.int32]
    rows: NDArray[np.int32]
    sums: NDArray[np.int64]
    usable: NDArray[np.bool_]

    def take(self, ids: Ids, mirrored: NDArray[np.bool_]) -> Tensor:
        variant, variants = mirrored.astype(np.int64), self.sums.shape[1]
        if variants == 1 and mirrored.any():
            raise ValueError("the cache holds no mirror images")
        files = self.files[ids] + variant * (len(self.stored.tables) // variants)
        return self.stored.read(files, self.rows[ids].astype(np.int64), self.sums[ids, variant])


def text_hash(text: str) -> int:
    """63 bits that stand for a text."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class CachedText:
    """Embeddings by text. hashes: [n], increasing; files, rows, sums: [n].   fields: by `PART.FIELD`."""

    hashes: NDArray[np.int64]
    files: NDArray[np.int32]
    rows: NDArray[np.int32]
    fields: Mapping[str, tuple[Rows, NDArray[np.int64]]]

    def find(self, part: str, texts: Sequence[str]) -> Conditioning | None:
        """What the text encoder `part` gives for B texts, as stored; None unless all of them are in the cache."""
        wanted = np.array([text_hash(text) for text in texts], dtype=np.int64)
        places = np.searchsorted(self.hashes, wanted).clip(max=len(self.hashes) - 1)
        if (self.hashes[places] != wanted).any():
            return None
        files, rows = self.files[places], self.rows[places].astype(np.int64)
        found = {
            name.rpartition(".")[2]: stored.read(files, rows, sums[places])
            for name, (stored, sums) in self.fields.items()
            if name.rpartition(".")[0] == part
        }
        return Conditioning(**found)  # type: ignore[arg-type]


# ---- the whole


def preprocessing_of(transform: Transform, buckets: Any = None) -> dict[str, Any]:
    """What the stored rows depend on, as plain values; the same for training and encoding.

    buckets: the dataclass of their settings, or None.
    """
    values = {key: value for key, value in asdict(transform).items() if key not in _OF_A_RUN}
    return _plain({"pixels": PIXELS, **values, "bucket": None if buckets is None else asdict(buckets)})


def refuse_chance(transform: Transform) -> None:
    """A crop that is drawn anew each time has no latents to keep."""
    if transform.crop == "random":
        raise LdmError(
            "CACHE",
            "random crops cannot be cached: every use of a picture has other latents",
            where="data.crop=random",
            next="data.crop=center or pad, or train without a cache: data.cache=null",
        )


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with the digest of itself."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return {**content, "digest": hashlib.sha256(text.encode()).hexdigest()}


@dataclass(frozen=True)
class Cache:
    """A finished cache. about: the content of cache.json."""

    folder: Path
    about: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Cache:
        """Raises LdmError, `CACHE`, if it is not whole: everything but the bytes inside of the files is compared."""
        folder = Path(folder).expanduser()
        path = folder / FILE
        try:
            about = json.loads(path.read_bytes())
            version = about["format"]
            sealed = seal({key: value for key, value in about.items() if key != "digest"}) == about
        except FileNotFoundError as error:
            what = "the cache is not finished" if folder.is_dir() else "there is no such cache"
            hint = "python -m ldm cache writes it; the same command again goes on with one that was stopped"
            raise LdmError("CACHE", what, where=str(path), next=hint) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, f"{type(error).__name__}: it cannot be read") from error
        if version != FORMAT:
            raise LdmError("CACHE", f"its format is {version}", where=str(path), limit=f"this ldm reads {FORMAT}")
        if not sealed:
            raise _damaged(path, "it does not match its digest")
        if not about["finite"]:
            raise LdmError("CACHE", "the cache holds latents that are not finite", where=str(path))
        problems = []
        for name, entry in about["files"].items():
            if not _NAME.fullmatch(name):
                raise _damaged(path, f"{name!r} is no name of its files")
            try:
                size = (folder / name).stat().st_size
            except OSError:
                problems.append(_damaged(folder / name, "the file is missing"))
                continue
            if size != entry["bytes"]:
                problems.append(_damaged(folder / name, f"{size} bytes instead of {entry['bytes']}"))
        raise_all(problems[:_LISTED])
        return cls(folder, about)

    def check(self, latent_id: str, transform: Transform, buckets: Any = None) -> None:
        """Refuses a cache of other latents or of pictures that were prepared differently, a line for each."""
        refuse_chance(transform)
        found, now = self.about["preprocessing"], preprocessing_of(transform, buckets)
        defaults = {f.name: _plain(f.default) for f in fields(transform) if f.default is not MISSING}
        rows: list[tuple[str, Any, Any]] = [("latent_id", self.about["latent_id"][:12], latent_id[:12])]
        names = {"pixels": "the version of decoding and resizing"}
        rows += [(names.get(k, f"data.{k}"), found.get(k, defaults.get(k)), value) for k, value in now.items()]
        rows += [("flipped (data.flip_prob needs it)", self.about["flipped"], True)] if transform.flip_prob else []
        raise_all([self._differs(key, *values) for key, *values in rows if values[0] != values[1]])

    def check_text(self, ids: Mapping[str, str], captions: Captions) -> None:
        """Refuses embeddings by other encoders, or of captions that were chosen differently. ids: by part."""
        text = self.about["text"]
        names = sorted({*text["ids"], *ids})
        rows = [(f"text encoder {k!r}", text["ids"].get(k, "none")[:12], ids.get(k, "none")[:12]) for k in names]
        rows += [(f"data.{key}", text["captions"].get(key), value) for key, value in asdict(captions).items()]
        raise_all([self._differs(key, *values) for key, *values in rows if values[0] != values[1]])

    def _differs(self, key: str, cached: Any, now: Any) -> LdmError:
        shown = [value if isinstance(value, str) else json.dumps(value) for value in (cached, now)]
        hint = "make a cache for these settings: python -m ldm cache; or train without one: data.cache=null"
        what = f"the cache was made by something else: {key} was {shown[0]}, now {shown[1]}"
        return LdmError("CACHE", what, where=str(self.folder), next=hint)

    @cached_property
    def _of_shard(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, entry in self.about["files"].items():
            if entry["kind"] == "moments":
                found.setdefault(entry["source"], []).append(name)
        return found

    def moments(self, dataset: Dataset) -> CachedMoments:
        """The rows of all samples. Raises LdmError with a line for each shard of which something is missing."""
        names = [name for name, entry in self.about["files"].items() if entry["kind"] == "moments"]
        number = {name: i for i, name in enumerate(names)}
        tables = [tables_of(self.folder / name) for name in names]
        count, digests, sources = dataset.num_samples, sample_digests(dataset), sources_of(dataset)
        files, rows = (np.full(count, -1, dtype=np.int32) for _ in range(2))
        variants = ("", "mirrored_") if self.about["flipped"] else ("",)
        sums = np.zeros((count, len(variants)), dtype=np.int64)
        usable = np.zeros(count, dtype=np.bool_)
        problems = []
        for shard, ids in by_shard(dataset):
            title, source = sources[shard]
            for name in self._of_shard.get(source, []):
                entry = tables[number[name]]
                places, theirs = _find(digests[ids], entry)
                mine = ids[places]
                files[mine], rows[mine] = number[name], theirs
                usable[mine] = entry["usable"].read()[theirs]
                for column, variant in enumerate(variants):
                    sums[mine, column] = entry[f"{variant}sums"].read()[theirs]
            lost = ids[files[ids] < 0]
            if len(lost):
                problems.append(self._lacks(title, source, len(lost), len(ids), dataset.keys[int(lost[0])]))
        if len(problems) > _LISTED:
            problems = [*problems[:_LISTED], LdmError("CACHE", f"and {len(problems) - _LISTED} more shards like these")]
        raise_all(problems)
        stored = Rows([table[f"{variant}moments"] for variant in variants for table in tables])
        return CachedMoments(stored, files, rows, sums, usable)

    def _lacks(self, title: str, source: str, lost: int, of: int, key: str) -> LdmError:
        known = any(entry["name"] == title for entry in self.about["sources"])
        if source in self._of_shard:
            what = f"{lost} of {of} samples of {title} are not in the cache, the first is {key}"
        else:
            other = "the cache was made of another version of it" if known else "the cache was made without it"
            what = f"{title} is not in the cache: {other}"
        return LdmError("CACHE", what, where=str(self.folder), next="write one of these data: python -m ldm cache")

    def text(self) -> CachedText | None:
        """The embeddings, or None where the cache holds none."""
        if self.about["text"] is None:
            return None
        names = [name for name, entry in self.about["files"].items() if entry["kind"] == "text"]
        tables = [tables_of(self.folder / name) for name in names]
        hashes = [table["hashes"].read() for table in tables]
        order = np.argsort(np.concatenate(hashes), kind="stable")
        files = np.repeat(np.arange(len(names), dtype=np.int32), [len(part) for part in hashes])
        rows = np.concatenate([np.arange(len(part), dtype=np.int32) for part in hashes])
        stored = {
            name: (
                Rows([table[name] for table in tables]),
                np.concatenate([table[f"{name}.sums"].read() for table in tables])[order],
            )
            for name in self.about["text"]["fields"]
        }
        return CachedText(np.concatenate(hashes)[order], files[order], rows[order], stored)


def sample_digests(dataset: Dataset) -> Ids:
    """[N] int64, a hash of each sample's key: within a shard it tells samples apart."""
    return dataset.digests.view(np.int64)


def sources_of(dataset: Dataset) -> list[tuple[str, str]]:
    """(name, sha256) of every shard, of what latents depend on: its pictures' keys, sizes and checksums."""
    found = []
    for (name, _), index in zip(dataset.manifest, dataset.indexes, strict=True):
        pictures = index.members[:, FIELDS.index("image")]
        digest = hashlib.sha256(index.digests.tobytes())
        digest.update(pictures["size"].tobytes() + pictures["crc"].tobytes())
        found.append((name, digest.hexdigest()))
    return found


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def by_shard(dataset: Dataset) -> Iterator[tuple[int, Ids]]:
    """(shard, its samples) of every shard that has some."""
    ends = np.cumsum(dataset.shard_lengths)
    for shard, (end, length) in enumerate(zip(ends.tolist(), dataset.shard_lengths.tolist(), strict=True)):
        if length:
            yield shard, np.arange(end - length, end)


def _find(digests: Ids, tables: Mapping[str, Table]) -> tuple[Ids, Ids]:
    """(places in `digests`, rows of the file) of the samples that are in both."""
    theirs = tables["digests"].read()
    order = np.argsort(theirs, kind="stable")
    places = np.searchsorted(theirs[order], digests).clip(max=len(theirs) - 1)
    rows = order[places]
    mine = np.flatnonzero(theirs[rows] == digests)
    return mine, rows[mine]
