"""The samples of a dataset, read by number.

A dataset is a set of plain tar shards in the img2dataset layout (`key.jpg`, `key.txt`, `key.json`), a folder of
pictures, or several of these. Needs the standard library, numpy and Pillow: errors appear before torch.
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
from ldm.data.captions import FILENAME, SOURCES, TEXT_FIELDS, Captions, words_of
from ldm.data.decode import BadSample
from ldm.data.index import BAD_KINDS, FIELDS, PICTURES, RECORDS, Index, Problem, index_all
from ldm.data.metadata import TABLES, class_of, repeated
from ldm.errors import LdmError, nearest

_SHOWN = 10  # examples of a kind
_MAX_REPEATS = 99_999


class Dataset:
    """Valid samples in a fixed order, read by number.

    keys: [N].   members, image sizes: as in `Index`.   shard_of: [N], index into `shards`.
    repeats: [N], how often an epoch uses each sample.   manifest: (name, sha256) per shard.
    problems: how many members and samples were left out, by kind.   remarks: what was inferred, sentences for a person.
    """

    def __init__(
        self,
        shards: list[Path],
        indexes: list[Index],
        *,
        problems: Counter[str] | None = None,
        examples: list[Problem] | None = None,
        repeats: NDArray[np.int64] | None = None,
        remarks: Sequence[str] = (),
    ) -> None:
        self.shards = shards
        self.manifest = [(shard.name, index.sha256) for shard, index in zip(shards, indexes, strict=True)]
        self.keys = [key for index in indexes for key in index.keys]
        self.members = np.concatenate([index.members for index in indexes])
        self.image_sizes = np.concatenate([index.sizes for index in indexes])
        self.shard_of = np.repeat(np.arange(len(shards)), [len(index.keys) for index in indexes])
        self.problems = problems or Counter()
        self.examples = examples or []
        self.repeats = np.ones(len(self.keys), dtype=np.int64) if repeats is None else repeats
        self.remarks = list(remarks)
        self._files = [index.files for index in indexes]
        self._records = [index.records for index in indexes]
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

    def json_for(self, captions: Captions) -> bool:
        """Whether captions need the JSON: that of a sample with a .txt is not read for them."""
        return "json" in captions.members and ("txt" not in captions.members or bool((self.members[:, 1, 0] < 0).any()))

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
        if offset >= RECORDS:
            return self._records[shard][offset - RECORDS :][:size]
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
        part.members, part.image_sizes = self.members[rows], self.image_sizes[rows]
        part.shard_of, part.repeats = self.shard_of[rows], self.repeats[rows]
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
    caption: str = "auto",
    repeats: int | Sequence[int] | None = None,
    on_missing_caption: str = "skip",
    on_truncated: str = "refuse",
    where: str = "data.path",
) -> Dataset:
    """Index everything under `path` and return its valid samples.

    path: a folder of tar shards, a folder of pictures, one tar, a glob, a brace expansion, or a list of these.
    split: "train" or "val" chooses among `train-*.tar` and `val-*.tar` of a folder; None takes everything.
    index_dir: default `.ldm-index` beside the shards, or the user's cache where that cannot be written.
    caption: where captions come from, see `ldm.data.captions.Captions`.
    repeats: how often an epoch uses each sample, one number or one for each item of `path`; None = as the folders'
        names say (`10_fox`), else once.
    on_missing_caption: "skip", "empty" or "error".   on_truncated: "refuse" or "use" what is complete.
    Raises LdmError that names every shard that cannot be used, in one report.
    """
    _choose("data.on_missing_caption", on_missing_caption, ("skip", "empty", "error"))
    _choose("data.on_truncated", on_truncated, ("refuse", "use"))
    captions = Captions(caption)
    numbers = _per_item(repeats, len(paths.items_of(path)))
    sets = paths.sets_of(path, split=split, where=where)
    shards = list(sets)
    indexes = index_all(shards, Path(index_dir) if index_dir else None)
    _refuse_unusable(shards, indexes, on_truncated, where)
    _refuse_unknown_fields(captions, indexes)
    problems, examples = Counter[str](), []
    for number, (shard, index) in enumerate(zip(shards, indexes, strict=True)):
        problems.update(index.problems)
        examples.extend(index.examples)
        if on_missing_caption != "empty":
            has = _captioned(index, captions)
            missing = [index.keys[i] for i in np.flatnonzero(~has)]
            problems["caption_missing"] += len(missing)
            examples += [Problem("caption_missing", shard.name, key, _looked_for(caption)) for key in missing[:_SHOWN]]
            if missing:
                indexes[number] = index.take(np.flatnonzero(has))
    remarks: list[str] = []
    if problems["caption_missing"]:
        if on_missing_caption == "error" or not any(index.keys for index in indexes):
            raise _caption_error(shards, indexes, problems, examples, caption, where)
        remarks.append(
            f"without a caption and left out: {problems['caption_missing']} pictures ({_looked_for(caption)}); "
            "data.on_missing_caption=empty keeps them"
        )
    if not any(index.keys for index in indexes):
        raise _empty_error(shards, indexes, problems, where)
    times = [
        _repeats(index, numbers[sets[shard]] if numbers else None, remarks)
        for shard, index in zip(shards, indexes, strict=True)
    ]
    keys = [key for index in indexes if not index.files for key in index.keys]  # every folder names its own pictures
    problems["duplicate_key"] += len(keys) - len(set(keys))
    return Dataset(
        shards, indexes, repeats=np.concatenate(times), problems=+problems, examples=examples, remarks=remarks
    )


def _choose(where: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise LdmError("CONFIG", f"unknown value {value!r}", where=where, next="one of: " + ", ".join(allowed))


def _per_item(repeats: int | Sequence[int] | None, items: int) -> list[int] | None:
    if repeats is None:
        return None
    numbers = [repeats] * items if isinstance(repeats, int) else list(repeats)
    if len(numbers) != items or not all(type(n) is int and 1 <= n <= _MAX_REPEATS for n in numbers):
        raise LdmError(
            "CONFIG",
            f"repeats={repeats!r} for {items} sets",
            where="data.repeats",
            limit=f"whole numbers from 1 to {_MAX_REPEATS}, one for all or one for each item of data.path",
        )
    return numbers


def _repeats(index: Index, number: int | None, remarks: list[str]) -> NDArray[np.int64]:
    """[N], how often an epoch uses each sample of a shard."""
    if number is not None or not index.files:
        return np.full(len(index.keys), number or 1, dtype=np.int64)
    folders = [key.rpartition("/")[0] for key in index.keys]
    pictures = Counter(folders)
    times = {folder: repeated(folder.rpartition("/")[2]) for folder in pictures}
    said = sorted(f"{folder}: {found[0]} x {pictures[folder]} pictures" for folder, found in times.items() if found)
    if said:
        listed = ", ".join(said[:8]) + (", ..." if len(said) > 8 else "")
        remarks.append(f"repeats from the names of folders ({listed}); data.repeats=1 turns them off")
    return np.array([(times[folder] or (1, ""))[0] for folder in folders], dtype=np.int64)


def _captioned(index: Index, captions: Captions) -> NDArray[np.bool_]:
    """[N], whether a sample has a caption. Fields of a template are looked for when a sample is read."""
    if captions.caption not in SOURCES:
        return np.ones(len(index.keys), dtype=np.bool_)
    if captions.caption == "filename":
        return np.array([bool(words_of(key)) for key in index.keys], dtype=np.bool_)
    found = {"txt": index.members[:, 1, 0] >= 0, "json": index.json_captions}
    return np.logical_or.reduce([found[member] for member in captions.members])


def _refuse_unknown_fields(captions: Captions, indexes: list[Index]) -> None:
    """A template whose field no sample has is a typo."""
    known = sum((index.fields for index in indexes), Counter[str]())
    for path in captions.fields:
        if path.split(".")[0] not in known:
            what = f"no sample has the field {path!r} that the template names"
            hint = nearest(path, [*known, FILENAME]) if known else f"no sample has a JSON; known: {FILENAME}"
            raise LdmError("DATA", what, where="data.caption", limit=repr(captions.caption), next=hint)


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


def _looked_for(caption: str) -> str:
    """Where a caption was looked for, in words."""
    sidecar = "KEY.txt or KEY.caption beside KEY.jpg"
    table = f"{', '.join(TEXT_FIELDS)} in KEY.json, {' or '.join(TABLES)}"
    words = {"sidecar": sidecar, "metadata": table, "filename": "words in the file's name"}
    return "looked for " + words.get(caption, f"{sidecar}; {table}")


def _caption_error(
    shards: list[Path], indexes: list[Index], problems: Counter[str], examples: list[Problem], caption: str, where: str
) -> LdmError:
    """What was looked for, what was found, and the key that would help."""
    missing = [p for p in examples if p.kind == "caption_missing"]
    tables = [p for p in examples if p.kind == "metadata"]
    others = ", ".join(f"{count} {kind}" for kind, count in problems.most_common())
    found = f"found: {others}; " + (f"{tables[0].key}: {tables[0].reason}; " if tables else "")
    known = sum((index.fields for index in indexes), Counter[str]())
    ways = []
    if caption != "filename" and (words := next(filter(None, (words_of(p.key) for p in missing)), "")):
        ways.append(f"data.caption=filename gives {words!r}")
    if "class" in known and (name := next(filter(None, (class_of(p.key) for p in missing)), None)):
        ways.append(f"data.caption={{class}} gives {name!r}")
    if fields := [name for name in known if name != "class"][:8]:
        ways.append(f"a template can name the fields {', '.join(fields)}")
    ways.append("data.on_missing_caption=empty trains without")
    return LdmError(
        "DATA",
        f"{problems['caption_missing']} pictures have no caption",
        where=f"{where}: " + ", ".join(f"{p.shard}: {p.key}" for p in missing[:5]),
        limit=found + _looked_for(caption),
        next=f"write captions beside the pictures, as {missing[0].key}.txt, or: " + "; ".join(ways),
    )


def _empty_error(shards: list[Path], indexes: list[Index], problems: Counter[str], where: str) -> LdmError:
    suffixes = Counter(Path(name).suffix.lower() or "no suffix" for index in indexes for name in index.files)
    found = [f"{count} {kind}" for kind, count in problems.most_common()]
    found += [f"{count} files with {suffix}" for suffix, count in suffixes.most_common(8)]
    pictures = ", ".join(f"KEY.{suffix}" for suffix in PICTURES)
    return LdmError(
        "DATA",
        "no usable sample",
        where=f"{where}: {shards[0]}" if shards else where,
        limit=f"found: {', '.join(found) or 'nothing'}" if shards else "found no train-*.tar, only val-*.tar",
        next=f"looked for pictures {pictures} with captions KEY.txt, and for tar shards of these; "
        f"set {where} to a folder that holds them",
    )
