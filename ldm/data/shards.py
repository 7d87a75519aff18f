"""The index of a dataset: where every sample's bytes lie, what they should hash to, and what is wrong with the rest.

A dataset is a set of plain tar shards in the img2dataset layout (`key.jpg`, `key.txt`, `key.json`) or a folder of
pictures with `.txt` files beside them. Each shard is read once in full; the result is kept as one npz file per shard
and compared by size and time afterwards. Needs the standard library, numpy and Pillow: errors appear before torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.data import paths, tar
from ldm.data.decode import MAX_BYTES, BadSample, decode_caption, upright_size
from ldm.errors import LdmError

PICTURES = ("jpg", "png", "webp")  # of two pictures under one key the first in this order is taken
FIELDS = ("image", "txt", "json")
_SUFFIXES = {**{s: s for s in PICTURES}, "jpeg": "jpg", "txt": "txt", "caption": "txt", "json": "json"}
_VERSION = 1
_SHOWN = 10  # examples kept per kind of problem

BAD_KINDS = (
    "decode",
    "truncated_shard",
    "size_policy",
    "unsupported_mode",
    "caption_missing",
    "caption_encoding",
    "image_missing",
    "member_type",
    "fetch",
)
"""Classes of samples that cannot be used. Other kinds of problems are remarks about members."""


class Problem(NamedTuple):
    kind: str
    shard: str
    key: str
    reason: str


@dataclass
class Index:
    """What one pass over a shard found.

    members: [N, 3, 3] int64, for image, txt and json: offset (in a folder: number in `files`), size, crc32; -1 = none.
    sizes: [N, 2], upright width and height.   damage: how a truncated tar ends.   unusable: why nothing was read.
    """

    keys: list[str] = field(default_factory=list)
    members: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 3, 3), np.int64))
    sizes: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))
    files: list[str] = field(default_factory=list)
    sha256: str = ""
    signature: str = ""
    problems: Counter[str] = field(default_factory=Counter)
    examples: list[Problem] = field(default_factory=list)
    damage: str = ""
    unusable: str = ""

    def report(self, kind: str, shard: str, key: str, reason: str) -> None:
        self.problems[kind] += 1
        if self.problems[kind] <= _SHOWN:
            self.examples.append(Problem(kind, shard, key, reason))


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
    indexes = _index_all(shards, Path(index_dir) if index_dir else None)
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


# ---- one pass over a shard -------------------------------------------------------------------------------------


def _index_all(shards: list[Path], index_dir: Path | None) -> list[Index]:
    """Saved indexes where they still fit, new ones elsewhere, in parallel."""
    began, built = time.monotonic(), []

    def one(shard: Path) -> Index:
        signature = _signature(shard)
        saved = _load(shard, index_dir, signature)
        if saved is not None:
            return saved
        built.append(shard)
        index = _index_folder(shard) if shard.is_dir() else _index_tar(shard)
        index.signature = signature
        if not index.unusable:
            _save(index, shard, index_dir)
        return index

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        indexes = list(pool.map(one, shards))
    if built:
        samples = sum(len(index.keys) for index in indexes)
        seconds = time.monotonic() - began
        print(f"indexed {len(built)} of {len(shards)} shards, {samples} samples, {seconds:.1f} s", file=sys.stderr)
    return indexes


def _signature(shard: Path) -> str:
    """Changes whenever a file of the shard is replaced or rewritten."""
    if not shard.exists():
        return "missing"
    if shard.is_dir():
        stats = ((name, (shard / name).stat()) for name in paths.files_below(shard))
        listing = [(name, s.st_size, s.st_mtime_ns) for name, s in stats]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    stat = shard.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"


@dataclass
class _Group:
    """Members of one key. run: number of the stretch of consecutive members in which the key was first seen.

    parts: suffix -> (offset, size), from that stretch.   late: further suffixes from later ones.
    """

    run: int
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    late: dict[str, tuple[int, int]] = field(default_factory=dict)
    refused: BadSample | None = None


def _index_tar(shard: Path) -> Index:
    index = Index()
    try:
        with open(shard, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            groups = _group_tar(file, size, index, shard.name)
            if index.unusable:
                return index

            def read(offset: int, count: int) -> bytes:
                file.seek(offset)
                return file.read(count)

            _describe_samples(index, groups, read, shard.name)
            file.seek(0)
            index.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        index.unusable = "missing" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
    return index


def _group_tar(file: io.BufferedReader, size: int, index: Index, shard: str) -> dict[str, _Group]:
    groups: dict[str, _Group] = {}
    run, previous, end, seen = 0, "", 0, 0
    duplicated: set[str] = set()  # what lies apart may then belong to another sample of that key
    try:
        for member in tar.members(file, size):
            seen, end = seen + 1, member.offset + -(-member.size // tar.BLOCK) * tar.BLOCK
            if member.directory:
                continue
            key, suffix = _split_name(member.name)
            if suffix is None:
                index.report("unknown_suffix", shard, member.name, "not a jpg, png, webp, txt or json")
                continue
            if key != previous:
                run, previous = run + 1, key
            group = groups.setdefault(key, _Group(run))
            if not member.regular:
                group.refused = BadSample("member_type", f"{member.name}: a link, device or sparse file")
            elif suffix in group.parts or suffix in group.late:
                index.report("duplicate_key", shard, key, f"{member.name} occurs again; the first is taken")
                duplicated.add(key)
            else:
                parts = group.parts if group.run == run else group.late
                parts[suffix] = (member.offset, member.size)
        if tar.has_trailing_data(file, end):
            index.report("trailing_data", shard, "", f"data after the end of the archive at byte {end} is ignored")
    except tar.Damage as damage:
        if not seen:
            file.seek(0)
            index.unusable = tar.describe(file.read(64)) if damage.byte == 0 or size < tar.BLOCK else str(damage.reason)
            return groups
        index.damage = f"truncated at byte {damage.byte} ({damage.reason})"
        last = groups.get(previous)
        if last is not None and ("txt" not in last.parts or not _picture(last)):
            last.refused = BadSample("truncated_shard", index.damage)
    for key, group in groups.items():
        if group.late and key not in duplicated:
            index.report("interleaved", shard, key, "its members lie apart; pack with tar --sort=name")
            group.parts.update(group.late)
    if not seen:
        index.report("empty_shard", shard, "", "a tar without members")
    return groups


def _index_folder(folder: Path) -> Index:
    """A folder of pictures as one shard, its samples in an order given by the hash of their keys."""
    index = Index(files=list(paths.files_below(folder)))
    groups: dict[str, _Group] = {}
    for number, name in enumerate(index.files):
        key, suffix = _split_name(name)
        if suffix is None:
            index.report("unknown_suffix", folder.name, name, "not a jpg, png, webp, txt or json")
            continue
        group = groups.setdefault(key, _Group(0))
        if suffix in group.parts:
            index.report("duplicate_key", folder.name, key, f"{name}: the first file for this key is taken")
        else:
            group.parts[suffix] = (number, (folder / name).stat().st_size)
    for key in [k for k, g in groups.items() if not _picture(g)]:  # a lone text file is not a sample
        index.report("unknown_suffix", folder.name, key, "no picture of this name")
        del groups[key]
    contents = hashlib.sha256()

    def read(number: int, size: int) -> bytes:
        data = (folder / index.files[number]).read_bytes()
        contents.update(f"{index.files[number]}\0{len(data)}\0".encode("utf-8", "surrogateescape") + data)
        return data

    ordered = sorted(groups.items(), key=lambda item: hashlib.sha256(item[0].encode("utf-8", "replace")).digest())
    _describe_samples(index, dict(ordered), read, folder.name)
    index.sha256 = contents.hexdigest()
    return index


def _split_name(name: str) -> tuple[str, str | None]:
    """Key and normalised suffix. The key ends at the last dot, so that `photo.v1.2.jpg` keeps its own name."""
    key, dot, suffix = name.rpartition(".")
    base = key.rpartition("/")[2]
    if not dot or not base or base.startswith("."):  # `._photo.jpg` is what a Mac leaves beside photo.jpg
        return name, None
    return key, _SUFFIXES.get(suffix.lower())


def _picture(group: _Group) -> str | None:
    return next((suffix for suffix in PICTURES if suffix in group.parts), None)


def _describe_samples(index: Index, groups: dict[str, _Group], read: Callable[[int, int], bytes], shard: str) -> None:
    """Read every member of every key once; keep what makes a sample, report what does not."""
    members, sizes = [], []
    for key, group in groups.items():
        try:
            row, size = _describe_sample(key, group, groups, read)
        except BadSample as bad:
            index.report(bad.kind, shard, key, bad.reason)
            continue
        if sum(suffix in group.parts for suffix in PICTURES) > 1:
            index.report("second_image", shard, key, "several pictures; taken in the order " + ", ".join(PICTURES))
        if row[1][0] < 0:
            index.report("caption_missing", shard, key, "no .txt, or only blanks in it")
        index.keys.append(key)
        members.append(row)
        sizes.append(size)
    index.members = np.array(members, dtype=np.int64).reshape(-1, 3, 3)
    index.sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)


def _describe_sample(
    key: str, group: _Group, groups: dict[str, _Group], read: Callable[[int, int], bytes]
) -> tuple[list[tuple[int, int, int]], tuple[int, int]]:
    if group.refused:
        raise group.refused
    suffix = _picture(group)
    if suffix is None:
        raise BadSample("image_missing", "no picture under this key")
    folder, _, base = key.rpartition("/")
    parent = f"{folder}/{base.split('.')[0]}".lstrip("/")
    if "." in base and "txt" not in group.parts and parent in groups:
        raise BadSample("unknown_suffix", f"a further picture of {parent}")
    row, size = [], (0, 0)
    for name in (suffix, "txt", "json"):
        if name not in group.parts:
            row.append((-1, 0, 0))
            continue
        offset, count = group.parts[name]
        if count > MAX_BYTES:
            raise BadSample("size_policy", f"{name} of {count} bytes, limit {MAX_BYTES}")
        data = read(offset, count)
        if name == suffix:
            size = upright_size(data)
        empty = name == "txt" and not decode_caption(data)
        row.append((-1, 0, 0) if empty else (offset, len(data), zlib.crc32(data)))
    return row, size


# ---- saved indexes ---------------------------------------------------------------------------------------------


def _index_files(shard: Path, index_dir: Path | None) -> list[Path]:
    """Where the index of a shard may lie, best first."""
    foreign = f"{hashlib.sha256(str(shard.absolute()).encode('utf-8', 'surrogateescape')).hexdigest()[:24]}.npz"
    if index_dir is not None:
        return [index_dir / foreign]
    beside = shard if shard.is_dir() else shard.parent
    local = "folder.npz" if shard.is_dir() else f"{shard.name}.npz"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm" / "index"
    return [beside / ".ldm-index" / local, cache / foreign]


def _save(index: Index, shard: Path, index_dir: Path | None) -> None:
    header = {
        "version": _VERSION,
        "signature": index.signature,
        "sha256": index.sha256,
        "keys": index.keys,
        "files": index.files,
        "problems": index.problems,
        "examples": index.examples,
        "damage": index.damage,
    }
    text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    for path in _index_files(shard, index_dir):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
                np.savez(file, header=text, members=index.members, sizes=index.sizes, allow_pickle=False)
            os.replace(file.name, path)
            return
        except OSError:  # read-only or full: the next place; without any, the index is built again next time
            continue


def _load(shard: Path, index_dir: Path | None, signature: str) -> Index | None:
    for path in _index_files(shard, index_dir):
        try:
            with np.load(path, allow_pickle=False) as saved:
                header = json.loads(saved["header"].tobytes())
                index = Index(
                    keys=header["keys"],
                    members=saved["members"],
                    sizes=saved["sizes"],
                    files=header["files"],
                    sha256=header["sha256"],
                    signature=header["signature"],
                    problems=Counter(header["problems"]),
                    examples=[Problem(*row) for row in header["examples"]],
                    damage=header["damage"],
                )
                version = header["version"]
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            continue
        fits = index.members.shape == (len(index.keys), 3, 3) and index.sizes.shape == (len(index.keys), 2)
        bounded = bool((index.members[:, :, 1] <= MAX_BYTES).all())
        if version == _VERSION and index.signature == signature and fits and bounded:
            return index
    return None
