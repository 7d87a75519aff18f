"""The samples of a dataset, read by number.

A dataset is a set of plain tar shards in the img2dataset layout (`key.jpg`, `key.txt`, `key.json`) or a folder of
pictures with `.txt` files beside them. Needs the standard library, numpy and Pillow: errors appear before torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldm.data import paths
from ldm.data.decode import BadSample
from ldm.data.index import BAD_KINDS, FIELDS, Index, Problem, index_all
from ldm.errors import LdmError


class Dataset:
    """Valid samples in a fixed order, read by number.

    keys: [N].   members, image sizes: as in `Index`.   shard_of: [N], index into `shards`.
    manifest: (name, sha256) per shard.   problems: how many members and samples were left out, by kind.
    """

    def __init__(
        self,
        shards: list[Path],
        indexes: list[Index],
        *,
        problems: Counter[str] | None = None,
        examples: list[Problem] | None = None,
    ) -> None:
        self.shards = shards
        self.manifest = [(shard.name, index.sha256) for shard, index in zip(shards, indexes, strict=True)]
        self.keys = [key for index in indexes for key in index.keys]
        self.members = np.concatenate([index.members for index in indexes])
        self.image_sizes = np.concatenate([index.sizes for index in indexes])
        self.shard_of = np.repeat(np.arange(len(shards)), [len(index.keys) for index in indexes])
        self.problems = problems or Counter()
        self.examples = examples or []
        self._files = [index.files for index in indexes]
        self._handles = _Handles()

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """[N], bytes of each sample."""
        return np.maximum(self.members[:, :, 1], 0).sum(axis=1)

    @property
    def widths(self) -> NDArray[np.int64]:
        return self.image_sizes[:, 0]

    @property
    def heights(self) -> NDArray[np.int64]:
        return self.image_sizes[:, 1]

    @property
    def shard_lengths(self) -> NDArray[np.int64]:
        return np.bincount(self.shard_of, minlength=len(self.shards))

    @property
    def manifest_hash(self) -> str:
        return hashlib.sha256(json.dumps(self.manifest).encode()).hexdigest()

    @property
    def num_rejected(self) -> int:
        """Samples of the shards that are not in this dataset because something is wrong with them."""
        return sum(self.problems[kind] for kind in BAD_KINDS)

    def shard_name(self, sample_id: int) -> str:
        return self.shards[self.shard_of[sample_id]].name

    def read(self, sample_id: int, fields: Iterable[str] = FIELDS) -> dict[str, bytes]:
        """The bytes of those of `fields` (image, txt, json) that the sample has, compared with their checksums.

        Raises BadSample: `fetch` if the file cannot be read, `truncated_shard` if it became shorter, `decode` if its
        bytes changed since the index was made.
        """
        shard = int(self.shard_of[sample_id])
        found = {}
        for name in fields:
            offset, size, crc = (int(v) for v in self.members[sample_id, FIELDS.index(name)])
            if offset < 0:
                continue
            data = self._bytes(shard, offset, size)
            if len(data) != size:
                raise BadSample("truncated_shard", f"{name}: {len(data)} of {size} bytes are left")
            if zlib.crc32(data) != crc:
                raise BadSample("decode", f"{name}: the bytes differ from the index")
            found[name] = data
        return found

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        try:
            if self._files[shard]:
                with open(self.shards[shard] / self._files[shard][offset], "rb") as file:
                    return file.read(size + 1)
            return os.pread(self._handles.get(self.shards[shard]), size, offset)
        except OSError as error:
            raise BadSample("fetch", f"{type(error).__name__}: {error.strerror}") from error

    def take(self, ids: Sequence[int] | NDArray[np.int64]) -> Dataset:
        """The same shards with the samples `ids` (increasing) only."""
        rows = np.asarray(ids, dtype=np.int64)
        part = Dataset.__new__(Dataset)
        part.__dict__.update(self.__dict__, keys=[self.keys[i] for i in rows], _handles=_Handles())
        part.members, part.image_sizes, part.shard_of = self.members[rows], self.image_sizes[rows], self.shard_of[rows]
        return part


class _Handles:
    """Open files, a bounded number per process. `pread` moves no shared position, so forks may share them."""

    def __init__(self, limit: int = 128) -> None:
        self._limit = limit
        self._open: OrderedDict[Path, io.FileIO] = OrderedDict()

    def get(self, path: Path) -> int:
        if path not in self._open:
            self._open[path] = io.FileIO(path)
            if len(self._open) > self._limit:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(path)
        return self._open[path].fileno()

    def __reduce__(self):  # another process opens its own
        return _Handles, (self._limit,)


def open_dataset(
    path: str | Sequence[str],
    *,
    split: str | None = None,
    index_dir: str | None = None,
    on_missing_caption: str = "skip",
    on_truncated: str = "refuse",
    where: str = "data.path",
) -> Dataset:
    """Index everything under `path` and return its valid samples.

    path: a folder of tar shards, a folder of pictures, one tar, a glob, a brace expansion, or a list of these.
    split: "train" or "val" chooses among `train-*.tar` and `val-*.tar` of a folder; None takes everything.
    index_dir: default `.ldm-index` beside the shards, or the user's cache where that cannot be written.
    on_missing_caption: "skip", "empty" or "error".   on_truncated: "refuse" or "use" what is complete.
    Raises LdmError that names every shard that cannot be used, in one report.
    """
    _choose("data.on_missing_caption", on_missing_caption, ("skip", "empty", "error"))
    _choose("data.on_truncated", on_truncated, ("refuse", "use"))
    shards = paths.expand(path, split=split, where=where)
    indexes = index_all(shards, Path(index_dir) if index_dir else None)
    _refuse_unusable(shards, indexes, on_truncated, where)
    problems, examples = Counter[str](), []
    for index in indexes:
        problems.update(index.problems)
        examples.extend(index.examples)
    indexes = [_with_captions(index, on_missing_caption) for index in indexes]
    dataset = Dataset(shards, indexes, problems=problems, examples=examples)
    if on_missing_caption == "error" and problems["caption_missing"]:
        raise _caption_error(dataset, where)
    if on_missing_caption == "empty":
        del problems["caption_missing"]
    if not dataset.num_samples:
        raise _empty_error(dataset, where)
    problems["duplicate_key"] += dataset.num_samples - len(set(dataset.keys))
    dataset.problems = +problems
    return dataset


def _choose(where: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise LdmError("CONFIG", f"unknown value {value!r}", where=where, next="one of: " + ", ".join(allowed))


def _with_captions(index: Index, policy: str) -> Index:
    if policy == "empty":
        return index
    rows = np.flatnonzero(index.members[:, 1, 0] >= 0)
    keys = [index.keys[i] for i in rows]
    return Index(keys, index.members[rows], index.sizes[rows], index.files, index.sha256)


def _refuse_unusable(shards: list[Path], indexes: list[Index], on_truncated: str, where: str) -> None:
    unusable = [(s, i.unusable) for s, i in zip(shards, indexes, strict=True) if i.unusable]
    cut = [
        (s, f"{i.damage}, {len(i.keys)} complete samples before it")
        for s, i in zip(shards, indexes, strict=True)
        if i.damage and on_truncated == "refuse"
    ]
    if unusable or cut:
        listed = [f"{shard.name}: {reason}" for shard, reason in (unusable + cut)[:20]]
        more = len(unusable) + len(cut) - len(listed)
        advice = "copy or download them again, or take them out of the path"
        raise LdmError(
            "DATA",
            f"{len(unusable) + len(cut)} of {len(shards)} shards cannot be used",
            where=" | ".join(listed) + (f" | and {more} more" if more else ""),
            limit=f"{where}: {shards[0].parent}",
            next=advice + ("; data.on_truncated=use keeps what is complete" if cut and not unusable else ""),
        )


def _caption_error(dataset: Dataset, where: str) -> LdmError:
    missing = [p for p in dataset.examples if p.kind == "caption_missing"]
    return LdmError(
        "DATA",
        f"{dataset.problems['caption_missing']} pictures have no caption",
        where=", ".join(f"{p.shard}: {p.key}" for p in missing[:5]),
        limit="data.on_missing_caption=error",
        next="add KEY.txt for each, or set data.on_missing_caption to skip or empty",
    )


def _empty_error(dataset: Dataset, where: str) -> LdmError:
    reasons = ", ".join(f"{count} {kind}" for kind, count in dataset.problems.most_common())
    if dataset.problems["caption_missing"]:
        advice = "write the caption of x.jpg into x.txt beside it, or set data.on_missing_caption=empty"
    else:
        advice = "pictures are KEY.jpg, KEY.png or KEY.webp, captions KEY.txt"
    return LdmError(
        "DATA",
        "no usable sample",
        where=f"{where}: {dataset.shards[0]}",
        limit=f"found: {reasons or 'nothing'}",
        next=advice,
    )
