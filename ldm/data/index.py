"""One pass over each shard: where every sample's bytes lie, what they hash to, and what is wrong with the rest.

The result is kept as one npz file per shard and compared by size and time at the next start. Needs the standard
library, numpy and Pillow.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from ldm.data import metadata, paths, tar
from ldm.data.captions import captions_in, read_fields, words_of
from ldm.data.columns import is_member
from ldm.data.decode import MAX_BYTES, MAX_CAPTION, BadSample, decode_caption, read_array_header, read_header
from ldm.data.packed import Strings
from ldm.data.remote import Remote
from ldm.data.web import Unreachable

PICTURES = ("jpg", "png", "webp")  # of two pictures under one key the first in this order is taken
FIELDS = ("image", "txt", "json")
ARRAY = "npy"
_SUFFIXES = {**{s: s for s in (*PICTURES, ARRAY)}, "jpeg": "jpg", "txt": "txt", "caption": "txt", "json": "json"}
_KNOWN = "not a jpg, png, webp, txt, json or npy"
_VERSION = 5
SHOWN = 10  # examples kept per kind of problem
MAX_FIELDS = 1000  # names of JSON fields that are counted
RECORDS = 1 << 60  # an offset from here on counts bytes of `Index.records`

MEMBER = np.dtype([("offset", "<i8"), ("size", "<i4"), ("crc", "<u4")])
"""Where a member lies. offset: in a folder its number in `Index.files`; or see RECORDS; -1 = there is none."""
FURTHER = np.dtype([("name", "<i4"), ("width", "<i4"), ("height", "<i4"), ("place", MEMBER)])
"""A further member. name: its number in `Index.further_names`.   width, height: upright; 0 of an array."""

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

    keys: [N].   digests: [N] uint64, the first eight bytes of each key's sha256, as a big-endian number.
    members: [N, 3] MEMBER, image, txt and json.   records: bytes, JSON that a folder's tables and names gave.
    sizes: [N, 2] int32, upright width and height.   files: of a folder.
    json_captions, named: [N] bool, whether the JSON has a caption, and the file's name words.
    further: [M] FURTHER, other pictures and arrays of the samples.   further_of: [M] int32, rising, the row of each
        one's sample.   further_names: what follows the key in their names, such as `.mask.png`.
    fields: how many samples have each name at the top of their JSON.   texts: by dotted path, [N] bool, whether a
        template can name it; of those that were asked for.
    damage: how a truncated tar ends.   unusable: why nothing was read.
    unread: some could not be read just now. That may be mended without the shard's dates changing, so such an index is
        not kept.
    """

    keys: Strings = field(default_factory=lambda: Strings.of(()))
    digests: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    members: NDArray[np.void] = field(default_factory=lambda: np.empty((0, len(FIELDS)), MEMBER))
    sizes: NDArray[np.int32] = field(default_factory=lambda: np.empty((0, 2), np.int32))
    json_captions: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    named: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    further: NDArray[np.void] = field(default_factory=lambda: np.empty(0, FURTHER))
    further_of: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    further_names: list[str] = field(default_factory=list)
    records: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    fields: Counter[str] = field(default_factory=Counter)
    texts: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    files: Sequence[str] = ()
    sha256: str = ""
    signature: str = ""
    problems: Counter[str] = field(default_factory=Counter)
    examples: list[Problem] = field(default_factory=list)
    damage: str = ""
    unusable: str = ""
    unread: bool = False

    def report(self, kind: str, shard: str, key: str, reason: str) -> None:
        self.unread |= kind == "fetch"
        self.problems[kind] += 1
        if self.problems[kind] <= SHOWN:
            self.examples.append(Problem(kind, shard, key, reason))

    def place(self, row: int, name: str) -> tuple[int, int, int] | None:
        """Offset, size and crc32 of a sample's image, txt, json or one of `further_names`; None where it has none."""
        if name in FIELDS:
            found = self.members[row, FIELDS.index(name)]
            return found.item() if found["offset"] >= 0 else None
        places = {self.further_names[other["name"]]: other["place"] for other in self.further_rows(row)}
        return places[name].item() if name in places else None

    def further_rows(self, row: int) -> NDArray[np.void]:
        """A sample's part of `further`."""
        first, last = np.searchsorted(self.further_of, (row, row + 1))
        return self.further[first:last]


_held: WeakValueDictionary[tuple[Path, Path | None, str], Index] = WeakValueDictionary()
"""Indexes that this process has in use, by shard, `index_dir` and signature: opened again, they are not read again."""


def index_all(shards: list[Path], index_dir: Path | None, remote: Remote | None = None) -> list[Index]:
    """Saved indexes where they still fit, new ones elsewhere, in parallel. remote: fetches those that are its own."""
    began, built = time.monotonic(), []

    def one(shard: Path) -> Index:
        away = remote if remote and remote.holds(shard) else None
        signature = away.signature(shard) if away else _signature(shard)
        known = (shard.absolute(), index_dir, signature)
        index = _held.get(known) or _load(shard, index_dir, signature)
        if away and (index is None or away.keeps_all):
            try:
                away.ensure(shard)
            except Unreachable as error:
                return Index(unusable=str(error))
        if index is None:
            built.append(shard)
            index = _index_folder(shard) if shard.is_dir() else _index_tar(shard)
            index.signature = signature
            save(index, shard, index_dir)
        if not index.unusable and not index.unread:  # what may be mended is looked at again
            _held[known] = index
        return index

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        try:
            indexes = list(pool.map(one, shards))
        except BaseException:  # Ctrl-C: the pool waits for what runs, and a shard may take long to come
            if remote:
                remote.stop()
            raise
    if built:
        samples = sum(len(index.keys) for index in indexes)
        seconds = time.monotonic() - began
        found = sum((index.problems for index in indexes), Counter())
        remarks = "".join(f", {count} {kind}" for kind, count in found.most_common())
        line = f"indexed {len(built)} of {len(shards)} shards in {seconds:.1f} s: {samples} samples{remarks}"
        print(line, file=sys.stderr)
    return indexes


def _signature(shard: Path) -> str:
    """Changes whenever a file of the shard is replaced or rewritten."""
    if not shard.exists():
        return "missing"
    if shard.is_dir():
        listing = [(name, *_stat(os.path.join(shard, name))) for name in paths.files_below(shard)]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    size, changed = _stat(shard)
    return f"{size}-{changed}"


def _stat(path: str | Path) -> tuple[int, int]:
    """Size and time; (0, 0) of a file that cannot be looked at, which reading it will tell."""
    try:
        stat = os.stat(path)
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


@dataclass
class _Group:
    """Members of one key. run: number of the stretch of consecutive members in which the key was first seen.

    parts: suffix -> (offset, size), from that stretch.   late: further suffixes from later ones.
    further: of another picture or an array, what follows the key in its name -> (offset, size).
    """

    run: int
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    late: dict[str, tuple[int, int]] = field(default_factory=dict)
    further: dict[str, tuple[int, int]] = field(default_factory=dict)
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

            _gather_further(groups, index, shard.name, lambda group: _has_own_text(group, read))
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
                index.report("unknown_suffix", shard, member.name, _KNOWN)
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
        last = groups.get(_owner(previous, groups) or previous)
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
    index = Index()
    index.files = list(paths.files_below(folder, lambda name, reason: index.report("fetch", folder.name, name, reason)))
    groups: dict[str, _Group] = {}

    def remark(name: str, reason: str) -> None:
        index.report("metadata", folder.name, name, reason)

    try:
        tables = metadata.rows_below(folder, index.files, remark)
    except OSError as error:  # all that is known of the pictures may be in it
        index.unusable = f"{Path(error.filename or 'a table').name} cannot be read: {error.strerror}"
        return index
    records = bytearray()
    for number, name in enumerate(index.files):
        if name.rpartition("/")[2] in metadata.TABLES:
            continue
        key, suffix = _split_name(name)
        if suffix is None:
            index.report("unknown_suffix", folder.name, name, _KNOWN)
            continue
        group = groups.setdefault(key, _Group(0))
        if suffix in group.parts:
            index.report("duplicate_key", folder.name, key, f"{name}: the first file for this key is taken")
        else:
            group.parts[suffix] = (number, _stat(folder / name)[0])

    contents = hashlib.sha256(json.dumps(tables, sort_keys=True).encode() if tables else b"")

    def read(number: int, size: int) -> bytes:
        if number >= RECORDS:
            return bytes(records[number - RECORDS : number - RECORDS + size])
        name = index.files[number]
        try:
            data = (folder / name).read_bytes()
        except OSError as error:
            raise BadSample("fetch", f"{name}: {error.strerror}") from error
        contents.update(f"{name}\0{len(data)}\0".encode("utf-8", "surrogateescape") + data)
        return data

    def is_sample(group: _Group) -> bool:
        has_row = any(index.files[part[0]] in tables for suffix, part in group.parts.items() if suffix in PICTURES)
        return has_row or _has_own_text(group, read)

    _gather_named(groups, index.files, tables, remark)
    _gather_further(groups, index, folder.name, is_sample)
    for key in [k for k, g in groups.items() if not _picture(g)]:  # a lone text file is not a sample
        index.report("unknown_suffix", folder.name, key, "no picture of this name")
        del groups[key]
    classes = classes_of(index)
    for key, group in groups.items():
        picture = group.parts[_picture(group) or ""][0]
        about = classes[key.rpartition("/")[0]]
        try:
            record = _record(key, group, tables.get(index.files[picture], {}), about, read, remark)
        except BadSample as bad:
            group.refused = bad
            continue
        if record:
            group.parts["json"] = (RECORDS + len(records), len(record))
            records += record
    ordered = sorted(groups.items(), key=lambda item: hashlib.sha256(item[0].encode("utf-8", "replace")).digest())
    _describe_samples(index, dict(ordered), read, folder.name)
    index.sha256, index.records = contents.hexdigest(), np.frombuffer(bytes(records), dtype=np.uint8)
    index.files = Strings.of(index.files)
    return index


def classes_of(index: Index) -> dict[str, metadata.Class]:
    """What the folders of a folder of pictures stand for: a class, and how often its pictures are used."""
    split = map(_split_name, index.files)
    return metadata.classes_of({key.rpartition("/")[0] for key, suffix in split if suffix in PICTURES})


def _record(
    key: str,
    group: _Group,
    row: metadata.Row,
    about: metadata.Class,
    read: Callable[[int, int], bytes],
    remark: metadata.Remark,
) -> bytes:
    """What a sample's JSON holds: its own .json, the row of the table and its class, the first of these first.

    A picture without any text in one of kohya's folders, `10_fox`, has the folder's name for its caption, as there.
    Its own .json that cannot be read takes nothing from the others and is remarked. Empty where there is nothing but
    a .json: that is the sample's JSON as it stands.
    """
    added = ({"class": about.name} if about.name else {}) | row
    number, size = group.parts.get("json", (-1, 0))
    if not added or size > MAX_BYTES:
        return b""
    own = {}
    if number >= 0:
        try:
            own = read_fields(read(number, size))
        except ValueError as error:
            remark(f"{key}.json", f"is left out, it cannot be read: {error}"[:200])
    tree = added | own
    if about.repeats and "txt" not in group.parts and not captions_in(tree):
        tree["caption"] = about.name
    return json.dumps(tree).encode()


def _split_name(name: str) -> tuple[str, str | None]:
    """Key and normalised suffix. The key ends at the last dot, so that `photo.v1.2.jpg` keeps its own name."""
    key, dot, suffix = name.rpartition(".")
    base = key.rpartition("/")[2]
    if not dot or not base or base.startswith("."):  # `._photo.jpg` is what a Mac leaves beside photo.jpg
        return name, None
    return key, _SUFFIXES.get(suffix.lower())


def _picture(group: _Group) -> str | None:
    return next((suffix for suffix in PICTURES if suffix in group.parts), None)


def _owner(key: str, groups: dict[str, _Group]) -> str | None:
    """The sample that members of `key` belong to, `a` of `a.mask.png`: the longest of those that there are."""
    owner, dot, last = key.rpartition(".")
    while dot and "/" not in last:
        if owner in groups and _picture(groups[owner]):
            return owner
        owner, dot, last = owner.rpartition(".")
    return None


def _has_own_text(group: _Group, read: Callable[[int, int], bytes]) -> bool:
    """Whether members have a caption of their own, which makes them a sample and no further members of another.

    A .json that cannot be read just now refuses the group: nobody knows what it is.
    """
    if "txt" in group.parts or (group.refused and not group.parts):
        return True
    number, size = group.parts.get("json", (-1, 0))
    if number < 0 or size > MAX_BYTES or not _picture(group):
        return False
    try:
        return bool(captions_in(read_fields(read(number, size))))
    except ValueError:
        return False
    except BadSample as bad:
        group.refused = bad
        return True


def _gather_further(groups: dict[str, _Group], index: Index, shard: str, is_sample: Callable[[_Group], bool]) -> None:
    """Give pictures and arrays to the sample that they belong to, unless they are one themselves."""
    for key, group in sorted(groups.items(), key=lambda item: len(item[0])):  # an owner before what it owns
        used = _picture(group)
        for suffix in [s for s in group.parts if s in (*PICTURES, ARRAY) and s != used]:
            group.further[f".{suffix}"] = group.parts[suffix]
        owner = _owner(key, groups)
        if owner is not None and not is_sample(group):
            part = key.removeprefix(owner)
            for name, place in {f".{s}": p for s, p in group.parts.items() if s in (*PICTURES, ARRAY)}.items():
                groups[owner].further.setdefault(part + name, place)
            del groups[key]
        elif used is None and ARRAY in group.parts:
            index.report("unknown_suffix", shard, key, "an array of numbers, and no picture of this name")
            if len(group.parts) == 1:
                del groups[key]


def _gather_named(
    groups: dict[str, _Group], files: Sequence[str], tables: Mapping[str, metadata.Row], remark: metadata.Remark
) -> None:
    """Give files that a table names, `mask_file_name`, to their pictures, as `.mask.png`.

    They are no samples, unless they have a row or a caption of their own; of the picture's own name they never are.
    """
    named = [(p, c, o) for p, row in tables.items() for c, o in row.items() if c.endswith(metadata.FURTHER)]
    for column in dict.fromkeys(column for _, column, _ in named if not is_member(_name_of(column, ARRAY))):
        remark(column[:100], "the column names no member that there can be: letters, not / or two dots")
    named = [(p, c, o) for p, c, o in named if is_member(_name_of(c, ARRAY))]
    numbers = {name: number for number, name in enumerate(files)} if named else {}
    taken: set[tuple[str, str]] = set()
    for picture, column, other in named:
        if not isinstance(other, str) or other not in numbers or other == picture:
            continue
        (key, own), (other_key, suffix) = _split_name(picture), _split_name(other)
        if (key, own) in taken:  # a mask, by another row
            continue
        place = groups[other_key].parts.get(suffix) if suffix in (*PICTURES, ARRAY) else None
        if place is not None and place[0] == numbers[other] and key in groups:
            groups[key].further[_name_of(column, str(suffix))] = place
            if other_key == key or (other not in tables and "txt" not in groups[other_key].parts):
                taken.add((other_key, str(suffix)))
    for key, suffix in taken:
        del groups[key].parts[suffix]
        if not groups[key].parts:
            del groups[key]


def _name_of(column: str, suffix: str) -> str:
    """`mask_file_name` to `.mask.png`."""
    return f".{column.removesuffix(metadata.FURTHER)}.{suffix}"


def _describe_samples(index: Index, groups: dict[str, _Group], read: Callable[[int, int], bytes], shard: str) -> None:
    """Read every member of every key once; keep what makes a sample, report what does not."""
    keys: list[str] = []
    members, sizes, json_captions = [], [], []
    further: list[tuple[int, int, int, tuple[int, int, int]]] = []
    further_of: list[int] = []
    names: dict[str, int] = {}
    for key, group in groups.items():
        try:
            row, size, tree, remarks = _describe_sample(group, read)
        except BadSample as bad:
            index.report(bad.kind, shard, key, bad.reason)
            continue
        if sum(suffix in group.parts for suffix in PICTURES) > 1:
            index.report("second_image", shard, key, "several pictures; taken in the order " + ", ".join(PICTURES))
        for kind, reason in remarks.items():
            index.report(kind, shard, key, reason)
        for name, (offset, count) in group.further.items():
            try:
                size_of, place = _describe_further(name, offset, count, read)
            except BadSample as bad:
                index.report("unusable_member", shard, key + name[:100], f"{bad.kind}: {bad.reason}")
                index.unread |= bad.kind == "fetch"
                continue
            further.append((names.setdefault(name, len(names)), *size_of, place))
            further_of.append(len(keys))
        keys.append(key)
        members.append(row)
        sizes.append(size)
        json_captions.append(bool(captions_in(tree)))
        room = len(index.fields) < MAX_FIELDS
        index.fields.update(name for name in tree if name in index.fields or (room and len(name) < 100))
    index.keys = Strings.of(keys)
    index.digests = np.array([_digest(key) for key in keys], dtype=np.uint64)
    index.members = np.array(members, dtype=MEMBER).reshape(-1, len(FIELDS))
    index.sizes = np.array(sizes, dtype=np.int32).reshape(-1, 2)
    index.json_captions = np.array(json_captions, dtype=np.bool_)
    index.named = np.array([bool(words_of(key)) for key in keys], dtype=np.bool_)
    index.further, index.further_names = np.array(further, dtype=FURTHER), list(names)
    index.further_of = np.array(further_of, dtype=np.int32)


def _digest(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _describe_further(
    name: str, offset: int, count: int, read: Callable[[int, int], bytes]
) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Width and height, and where it lies. Raises BadSample for what its name or its header refuses."""
    if not is_member(name):
        raise BadSample("name", "a name that data.columns cannot hold")
    if count > MAX_BYTES:
        raise BadSample("size_policy", f"{count} bytes, limit {MAX_BYTES}")
    data = read(offset, count)
    size = (0, 0)
    if name.endswith(f".{ARRAY}"):
        read_array_header(data)
    else:
        size, _ = read_header(data)
    return size, (offset, len(data), zlib.crc32(data))


def _describe_sample(
    group: _Group, read: Callable[[int, int], bytes]
) -> tuple[list[tuple[int, int, int]], tuple[int, int], dict[str, Any], dict[str, str]]:
    if group.refused:
        raise group.refused
    suffix = _picture(group)
    if suffix is None:
        raise BadSample("image_missing", "no picture under this key")
    row, size = [], (0, 0)
    tree: dict[str, Any] = {}
    remarks: dict[str, str] = {}
    for name in (suffix, "txt", "json"):
        if name not in group.parts:
            row.append((-1, 0, 0))
            continue
        offset, count = group.parts[name]
        if count > MAX_BYTES:
            raise BadSample("size_policy", f"{name} of {count} bytes, limit {MAX_BYTES}")
        data = read(offset, count)
        if name == suffix:
            size, remarks = read_header(data)
        if name == "json":
            try:
                tree = read_fields(data)
            except ValueError as error:
                remarks["metadata"] = f"the .json cannot be read: {error}"[:200]
        text = decode_caption(data) if name == "txt" else None
        if text and len(text) == MAX_CAPTION:
            remarks["long_caption"] = f"the first {MAX_CAPTION} characters are used"
        row.append((-1, 0, 0) if text == "" else (offset, len(data), zlib.crc32(data)))
    return row, size, tree, remarks


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


_COLUMNS = ("digests", "members", "sizes", "json_captions", "named", "further", "further_of", "records")


def save(index: Index, shard: Path, index_dir: Path | None) -> None:
    """Keep what was found, unless it is nothing, or some may be mended without the shard's dates changing."""
    nothing = not len(index.keys) and not index.problems
    if nothing or index.unusable or index.unread:
        return
    header = {
        "version": _VERSION,
        "signature": index.signature,
        "sha256": index.sha256,
        "further_names": index.further_names,
        "problems": index.problems,
        "examples": index.examples,
        "damage": index.damage,
        "fields": index.fields,
        "texts": list(index.texts),
    }
    files = Strings.of(index.files)
    arrays = {
        "header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
        "keys": index.keys.text,
        "key_ends": index.keys.ends,
        "files": files.text,
        "file_ends": files.ends,
        **{name: getattr(index, name) for name in _COLUMNS},
        "texts": np.array(list(index.texts.values()), dtype=np.bool_).reshape(len(index.texts), len(index.keys)),
    }
    for path in _index_files(shard, index_dir):
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:  # with the rights that any new file has: others may use the index
                np.savez(file, allow_pickle=False, **arrays)
            os.replace(temporary, path)
            return
        except OSError:  # read-only or full: the next place; without any, the index is built again next time
            continue
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


_READING = threading.Lock()


def _load(shard: Path, index_dir: Path | None, signature: str) -> Index | None:
    for path in _index_files(shard, index_dir):
        try:
            # numpy reads headers with ast.literal_eval, which may fail in several threads at once (CPython gh-106905)
            with _READING, np.load(path, allow_pickle=False) as saved:
                header = json.loads(saved["header"].tobytes())
                index = Index(
                    keys=Strings(saved["keys"], saved["key_ends"]),
                    files=Strings(saved["files"], saved["file_ends"]),
                    further_names=header["further_names"],
                    **{name: saved[name] for name in _COLUMNS},
                    fields=Counter(header["fields"]),
                    texts=dict(zip(header["texts"], saved["texts"], strict=True)),
                    sha256=header["sha256"],
                    signature=header["signature"],
                    problems=Counter(header["problems"]),
                    examples=[Problem(*row) for row in header["examples"]],
                    damage=header["damage"],
                )
                version = header["version"]
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            continue
        if version == _VERSION and index.signature == signature and _fits(index):
            return index
    return None


def _fits(index: Index) -> bool:
    """Whether the columns of a file that anybody may have written are those of one index."""
    count, further, empty = len(index.keys), len(index.further), Index()
    lengths = {"further": further, "further_of": further, "records": len(index.records)}
    for name in _COLUMNS:
        like, found = getattr(empty, name), getattr(index, name)
        if found.dtype != like.dtype or found.shape != (lengths.get(name, count), *like.shape[1:]):
            return False
    places = (index.members, index.further["place"])
    files = len(index.files) or RECORDS
    return (
        bool((index.sizes > 0).all())
        and bool((index.members["offset"][:, FIELDS.index("image")] >= 0).all())
        and all(has.shape == (count,) for has in index.texts.values())
        and all(bool(((p["size"] >= 0) & (p["size"] <= MAX_BYTES)).all()) for p in places)
        and all(bool(((p["offset"] < files) | (p["offset"] >= RECORDS)).all()) for p in places)
        and bool((index.further["place"]["offset"] >= 0).all())
        and bool((np.diff(index.further_of, prepend=0, append=max(count - 1, 0)) >= 0).all())
        and bool(((index.further["name"] >= 0) & (index.further["name"] < len(index.further_names))).all())
    )
