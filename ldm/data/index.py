"""One pass over each shard: where every sample's bytes lie, what they hash to, and what is wrong with the rest.

The result is kept as one npz file per shard and compared by size and time at the next start. Needs the standard
library, numpy and Pillow.
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
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.data import metadata, paths, tar
from ldm.data.captions import captions_in, fields_of
from ldm.data.decode import MAX_BYTES, MAX_CAPTION, BadSample, decode_caption, read_header

PICTURES = ("jpg", "png", "webp")  # of two pictures under one key the first in this order is taken
FIELDS = ("image", "txt", "json")
_SUFFIXES = {**{s: s for s in PICTURES}, "jpeg": "jpg", "txt": "txt", "caption": "txt", "json": "json"}
_VERSION = 2
_SHOWN = 10  # examples kept per kind of problem
_MAX_FIELDS = 1000  # names of JSON fields that are counted
RECORDS = 1 << 60  # an offset from here on counts bytes of `Index.records`

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

    members: [N, 3, 3] int64, for image, txt and json: offset (in a folder: number in `files`; or see RECORDS), size,
        crc32; -1 = none.   records: JSON that a folder's metadata tables and folder names gave.
    sizes: [N, 2], upright width and height.   json_captions: [N] bool, whether the JSON has a caption.
    fields: how many samples have each name at the top of their JSON.
    damage: how a truncated tar ends.   unusable: why nothing was read.
    """

    keys: list[str] = field(default_factory=list)
    members: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 3, 3), np.int64))
    sizes: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))
    json_captions: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    records: bytes = b""
    fields: Counter[str] = field(default_factory=Counter)
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

    def take(self, rows: NDArray[np.intp]) -> Index:
        """The samples `rows` of the same shard, without the problems."""
        keys = [self.keys[i] for i in rows]
        return replace(
            self, keys=keys, members=self.members[rows], sizes=self.sizes[rows], json_captions=self.json_captions[rows]
        )


def index_all(shards: list[Path], index_dir: Path | None) -> list[Index]:
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
    tables = metadata.rows_below(
        folder, index.files, lambda table, reason: index.report("metadata", folder.name, table, reason)
    )
    records = bytearray()
    for number, name in enumerate(index.files):
        if name.rpartition("/")[2] in metadata.TABLES:
            continue
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
    contents = hashlib.sha256(json.dumps(tables, sort_keys=True).encode() if tables else b"")

    def read(number: int, size: int) -> bytes:
        if number >= RECORDS:
            return bytes(records[number - RECORDS :][:size])
        data = (folder / index.files[number]).read_bytes()
        contents.update(f"{index.files[number]}\0{len(data)}\0".encode("utf-8", "surrogateescape") + data)
        return data

    for key, group in groups.items():
        picture = group.parts[_picture(group) or ""][0]
        record = _record(key, group, tables.get(index.files[picture], {}), read)
        if record:
            group.parts["json"] = (RECORDS + len(records), len(record))
            records += record
    ordered = sorted(groups.items(), key=lambda item: hashlib.sha256(item[0].encode("utf-8", "replace")).digest())
    _describe_samples(index, dict(ordered), read, folder.name)
    index.sha256, index.records = contents.hexdigest(), bytes(records)
    return index


def _record(key: str, group: _Group, row: metadata.Row, read: Callable[[int, int], bytes]) -> bytes:
    """What a sample's JSON holds: its own .json, the row of the table and its class, the first of these first.

    A picture without any text in one of kohya's folders, `10_fox`, has the folder's name for its caption, as there.
    Empty where there is nothing but a .json, or one that cannot be read: it then stays the sample's JSON as it is.
    """
    name, repeats = metadata.class_of(key), metadata.repeated(key.rpartition("/")[0].rpartition("/")[2])
    added = ({"class": name} if name else {}) | row
    number, size = group.parts.get("json", (-1, 0))
    if not added or size > MAX_BYTES:
        return b""
    own = fields_of(read(number, size)) if size else {}
    if size and not own:
        return b""
    tree = added | own
    if repeats and "txt" not in group.parts and not captions_in(tree):
        tree["caption"] = name
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


def _describe_samples(index: Index, groups: dict[str, _Group], read: Callable[[int, int], bytes], shard: str) -> None:
    """Read every member of every key once; keep what makes a sample, report what does not."""
    members, sizes, json_captions = [], [], []
    for key, group in groups.items():
        try:
            row, size, tree, remarks = _describe_sample(key, group, groups, read)
        except BadSample as bad:
            index.report(bad.kind, shard, key, bad.reason)
            continue
        if sum(suffix in group.parts for suffix in PICTURES) > 1:
            index.report("second_image", shard, key, "several pictures; taken in the order " + ", ".join(PICTURES))
        for kind, reason in remarks.items():
            index.report(kind, shard, key, reason)
        index.keys.append(key)
        members.append(row)
        sizes.append(size)
        json_captions.append(bool(captions_in(tree)))
        room = len(index.fields) < _MAX_FIELDS
        index.fields.update(name for name in tree if name in index.fields or (room and len(name) < 100))
    index.members = np.array(members, dtype=np.int64).reshape(-1, 3, 3)
    index.sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)
    index.json_captions = np.array(json_captions, dtype=np.bool_)


def _describe_sample(
    key: str, group: _Group, groups: dict[str, _Group], read: Callable[[int, int], bytes]
) -> tuple[list[tuple[int, int, int]], tuple[int, int], dict[str, Any], dict[str, str]]:
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
            tree = fields_of(data)
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
        "fields": index.fields,
    }
    arrays = {
        "header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
        "records": np.frombuffer(index.records, dtype=np.uint8),
        "members": index.members,
        "sizes": index.sizes,
        "json_captions": index.json_captions,
    }
    for path in _index_files(shard, index_dir):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
                np.savez(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]
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
                    json_captions=saved["json_captions"],
                    records=saved["records"].tobytes(),
                    fields=Counter(header["fields"]),
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
        count = len(index.keys)
        fits = index.members.shape == (count, 3, 3) and index.sizes.shape == (count, 2)
        fits = fits and index.json_captions.shape == (count,)
        bounded = bool((index.members[:, :, 1] <= MAX_BYTES).all())
        if version == _VERSION and index.signature == signature and fits and bounded:
            return index
    return None
