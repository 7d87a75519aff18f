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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.data import paths
from ldm.data.captions import FILENAME, SOURCES, TEXT_FIELDS, Captions, fields_of, has_text, words_of
from ldm.data.columns import checked, kind_of
from ldm.data.decode import BadSample
from ldm.data.index import (
    ARRAY,
    FIELDS,
    MAX_FIELDS,
    PICTURES,
    RECORDS,
    SHOWN,
    Index,
    Problem,
    classes_of,
    index_all,
    save,
)
from ldm.data.metadata import TABLES
from ldm.data.mixture import check_weights, mixed, per_item, repeats_of
from ldm.data.packed import Picked
from ldm.data.remote import Remote
from ldm.data.web import Unreachable
from ldm.errors import LdmError, nearest


class Dataset:
    """Valid samples in a fixed order, read by number.

    keys: [N].   shard_of, row_of: [N] int32, the number in `shards`, and the row in that one of `indexes`.
    image_sizes: [N, 2] int32, upright width and height.
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
        repeats: NDArray[np.float64] | None = None,
        remarks: Sequence[str] = (),
        rows: Sequence[NDArray[np.int64] | None] | None = None,
        remote: Remote | None = None,
    ) -> None:
        """rows: for each shard those of its index that are taken, rising, or None for all."""
        self.shards, self.indexes = shards, indexes
        self.manifest = [(shard.name, index.sha256) for shard, index in zip(shards, indexes, strict=True)]
        chosen = rows or [None] * len(indexes)
        taken = [_taken(index, some).astype(np.int32) for index, some in zip(indexes, chosen, strict=True)]
        self.row_of = np.concatenate([*taken, np.empty(0, np.int32)])
        self.shard_of = np.repeat(np.arange(len(shards), dtype=np.int32), [len(some) for some in taken])
        self.keys = Picked([index.keys for index in indexes], self.shard_of, self.row_of)
        self.image_sizes = self._column(lambda index: index.sizes)
        self.problems = problems or Counter()
        self.examples = examples or []
        self.repeats = np.broadcast_to(np.float64(1), len(self.keys)) if repeats is None else repeats
        self.remarks = list(remarks)
        self._handles = Handles(remote.open if remote else io.FileIO)

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """[N], bytes of each sample's image, txt and json."""
        return self._column(lambda index: index.members["size"].sum(axis=1, dtype=np.int64))

    @property
    def digests(self) -> NDArray[np.uint64]:
        """[N], a hash of each key, see `Index`."""
        return self._column(lambda index: index.digests)

    def _column(self, of: Callable[[Index], NDArray[Any]]) -> NDArray[Any]:
        """A value for each sample, from those for each row of the indexes."""
        parts = [of(index) for index in self.indexes]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if len(whole) == len(self.row_of):  # rows rise, so all are taken
            return whole
        starts = np.cumsum([0, *map(len, parts[:-1])])
        return whole[starts[self.shard_of] + self.row_of]

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

    def json_for(self, captions: Captions) -> bool:
        """Whether captions need the JSON: that of a sample with a .txt is not read for them."""
        return "json" in captions.members and ("txt" not in captions.members or self._lacks_text())

    def _lacks_text(self) -> bool:
        return bool(self._column(lambda index: index.members["offset"][:, FIELDS.index("txt")] < 0).any())

    def shard_name(self, sample_id: int) -> str:
        return self.shards[self.shard_of[sample_id]].name

    def read(self, sample_id: int, fields: Iterable[str] = FIELDS) -> dict[str, bytes]:
        """The bytes of those of `fields` that the sample has, compared with their checksums.

        fields: image, txt, json, or what follows the key in the name of a further member: `.mask.png`.

        Raises BadSample: `fetch` if the file cannot be read, `truncated_shard` if it became shorter, `decode` if its
        bytes changed since the index was made.
        """
        shard, row = int(self.shard_of[sample_id]), int(self.row_of[sample_id])
        found = {}
        for name in fields:
            place = self.indexes[shard].place(row, name)
            if place is None:
                continue
            offset, size, crc = place
            data = self._bytes(shard, offset, size)
            if len(data) != size:
                raise BadSample("truncated_shard", f"{name}: {len(data)} of {size} bytes are left")
            if zlib.crc32(data) != crc:
                raise BadSample("decode", f"{name}: the bytes differ from the index")
            found[name] = data
        return found

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        if offset >= RECORDS:
            return self.indexes[shard].records[offset - RECORDS : offset - RECORDS + size].tobytes()
        try:
            if files := self.indexes[shard].files:
                with open(self.shards[shard] / files[offset], "rb") as file:
                    return file.read(size + 1)
            return os.pread(self._handles.get(self.shards[shard]), size, offset)
        except OSError as error:
            raise BadSample("fetch", f"{type(error).__name__}: {error.strerror}") from error
        except Unreachable as error:
            raise BadSample("fetch", str(error)) from error

    def take(self, ids: Sequence[int] | NDArray[np.int64]) -> Dataset:
        """The same shards with the samples `ids` (increasing) only."""
        rows = np.asarray(ids, dtype=np.int64)
        part = Dataset.__new__(Dataset)
        part.__dict__.update(self.__dict__, _handles=self._handles.anew())
        part.row_of, part.shard_of = self.row_of[rows], self.shard_of[rows]
        part.keys = Picked(self.keys.parts, part.shard_of, part.row_of)
        part.image_sizes, part.repeats = self.image_sizes[rows], self.repeats[rows]
        return part


class Handles:
    """Open files, a bounded number per process. `pread` moves no shared position, so forks may share them."""

    def __init__(self, opener: Callable[[Path], io.FileIO] = io.FileIO, limit: int = 128) -> None:
        self._opener, self._limit = opener, limit
        self._open: OrderedDict[Path, io.FileIO] = OrderedDict()

    def anew(self) -> Handles:
        return Handles(self._opener, self._limit)

    def get(self, path: Path) -> int:
        if path not in self._open:
            self._open[path] = self._opener(path)
            if self._opener is not io.FileIO:  # a shard that its cache gave up keeps its room on the disk until closed
                for gone in [p for p, file in self._open.items() if not os.fstat(file.fileno()).st_nlink]:
                    if gone != path:  # another process may have given up this one just now
                        self._open.pop(gone).close()
            if len(self._open) > self._limit:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(path)
        return self._open[path].fileno()

    def __reduce__(self):  # another process opens its own
        return Handles, (self._opener, self._limit)


def open_dataset(
    path: str | Sequence[str],
    *,
    split: str | None = None,
    index_dir: str | None = None,
    caption: str = "auto",
    repeats: float | Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    on_missing_caption: str = "skip",
    on_truncated: str = "refuse",
    columns: Mapping[str, str] | None = None,
    remote: Remote | None = None,
    where: str = "data.path",
) -> Dataset:
    """Index everything under `path` and return its valid samples.

    path: a folder of tar shards, a folder of pictures, one tar, a glob, a brace expansion, or a list of these.
    split: "train" or "val" chooses among `train-*.tar` and `val-*.tar` of a folder; None takes everything.
    index_dir: default `.ldm-index` beside the shards, or the user's cache where that cannot be written.
    caption: where captions come from, see `ldm.data.captions.Captions`.
    repeats: how often an epoch uses each sample, one number or one for each item of `path`; None = as the folders'
        names say (`10_fox`), else once. With 0.5 half of the samples are used, each in its turn.
    weights: the share of an epoch that each item of `path` has, as numbers in proportion. Every sample is used at least
        once, those of sets that are small for their weight more often.
    on_missing_caption: "skip", "empty" or "error".   on_truncated: "refuse" or "use" what is complete.
    columns: see `ldm.data.datamodule.DataModule`; a field that no sample has is refused.
    remote: fetches shards at http(s) URLs; None = URLs are refused.
    Raises LdmError that names every shard that cannot be used, in one report.
    """
    _choose("data.on_missing_caption", on_missing_caption, ("skip", "empty", "error"))
    _choose("data.on_truncated", on_truncated, ("refuse", "use"))
    captions = Captions(caption)
    items = paths.items_of(path)
    numbers = per_item(repeats, len(items))
    check_weights(weights, repeats, len(items))
    apart = weights is not None or (numbers is not None and not isinstance(repeats, int | float))
    sets = paths.sets_of(path, split=split, where=where, apart=apart, remote=remote)
    shards = list(sets)
    indexes = index_all(shards, Path(index_dir) if index_dir else None, remote)
    _refuse_unusable(shards, indexes, on_truncated, where, remote)
    declared = checked(columns or {})
    _refuse_unknown_fields(captions, declared, indexes)
    if on_missing_caption != "empty":
        _look_for_texts(shards, indexes, captions, Path(index_dir) if index_dir else None, remote)
    problems, examples = Counter[str](), []
    rows: list[NDArray[np.int64] | None] = []
    for shard, index in zip(shards, indexes, strict=True):
        problems.update(index.problems)
        examples.extend(index.examples)
        if on_missing_caption != "empty":
            has = _captioned(index, captions)
            missing = np.flatnonzero(~has)
            problems["caption_missing"] += len(missing)
            shown = (index.keys[i] for i in missing[:SHOWN])
            examples += [Problem("caption_missing", shard.name, key, _looked_for(caption)) for key in shown]
            rows.append(np.flatnonzero(has) if len(missing) else None)
        else:
            rows.append(None)
    num_samples = sum(len(_taken(index, some)) for index, some in zip(indexes, rows, strict=True))
    remarks = _undeclared(indexes, declared.values())
    if problems["caption_missing"]:
        if on_missing_caption == "error" or not num_samples:
            raise _caption_error(shards, indexes, problems, examples, caption, where)
        remarks.append(
            f"without a caption and left out: {problems['caption_missing']} pictures ({_looked_for(caption)}); "
            "data.on_missing_caption=empty keeps them"
        )
    if not num_samples:
        raise _empty_error(shards, indexes, problems, where)
    uses = [
        repeats_of(index, _taken(index, some), numbers[sets[shard]] if numbers else None, remarks)
        for shard, index, some in zip(shards, indexes, rows, strict=True)
    ]
    uses = mixed(uses, list(sets.values()), items, weights, remarks)
    once = all((of_shard == 1).all() for of_shard in uses)
    data = Dataset(
        shards,
        indexes,
        repeats=None if once else np.concatenate(uses),
        problems=problems,
        examples=examples,
        remarks=remarks,
        rows=rows,
        remote=remote,
    )
    problems["duplicate_key"] += _num_duplicates(data)
    data.problems = +problems
    return data


def _taken(index: Index, rows: NDArray[np.int64] | None) -> NDArray[np.int64]:
    return np.arange(len(index.keys)) if rows is None else rows


def _undeclared(indexes: list[Index], declared: Collection[str]) -> list[str]:
    """A sentence about pictures that are no samples, being further members of others, and no column either."""
    count, name, key = 0, "", ""
    for index in indexes:
        others = index.further_names
        loose = [n.count(".") > 1 and not n.endswith(f".{ARRAY}") and n not in declared for n in others]
        if any(loose):
            found = np.flatnonzero(np.array(loose)[index.further["name"]])
            if len(found) and not count:
                key, name = index.keys[index.further_of[found[0]]], others[index.further[found[0]]["name"]]
            count += len(found)
    if not count:
        return []
    pictures = "1 picture is a further member" if count == 1 else f"{count} pictures are further members"
    return [
        f"{pictures} of others and no sample, for example {name} of {key}: data.columns.NAME={name} makes it a column; "
        f"a caption of its own ({key}{name.rpartition('.')[0]}.txt), or a name without that dot, makes it a sample"
    ]


def _num_duplicates(data: Dataset) -> int:
    """Samples of tars whose key another one has already. Every folder names its own pictures."""
    in_tar = np.array([not index.files for index in data.indexes])
    digests = np.sort(data.digests[in_tar[data.shard_of]])
    return int((digests[1:] == digests[:-1]).sum())


def _choose(where: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise LdmError("CONFIG", f"unknown value {value!r}", where=where, next="one of: " + ", ".join(allowed))


def _captioned(index: Index, captions: Captions) -> NDArray[np.bool_]:
    """[N], whether a sample has a caption."""
    if captions.caption not in SOURCES:
        has = [index.texts[path] for path in captions.fields]
        if captions.names_file:
            has.append(index.named | index.texts.get(FILENAME, False))
        return np.logical_and.reduce([np.ones(len(index.keys), dtype=np.bool_), *has])
    if captions.caption == "filename":
        return index.named
    found = {"txt": index.members["offset"][:, FIELDS.index("txt")] >= 0, "json": index.json_captions}
    return np.logical_or.reduce([found[member] for member in captions.members])


def _look_for_texts(
    shards: list[Path], indexes: list[Index], captions: Captions, index_dir: Path | None, remote: Remote | None
) -> None:
    """Learn which samples have a text at each dotted path of a template: from their JSON, once, kept in the index.

    One that cannot be read now counts as having it, for reading it will say why; then nothing is kept.
    """
    for shard, index in zip(shards, indexes, strict=True):
        own = captions.names_file and (FILENAME in index.fields or len(index.fields) >= MAX_FIELDS)
        names = [*captions.fields, *([FILENAME] if own else [])]
        if all(name in index.texts for name in names):
            continue
        data = Dataset([shard], [index], remote=remote)
        has = np.ones((len(names), data.num_samples), dtype=np.bool_)
        for row in range(data.num_samples):
            try:
                tree = fields_of(data.read(row, ("json",)).get("json"))
            except BadSample:
                index.unread = True
                continue
            has[:, row] = [has_text(tree, name) for name in names]
        index.texts = dict(zip(names, has, strict=True))
        save(index, shard, index_dir)


def _refuse_unknown_fields(captions: Captions, columns: Mapping[str, str], indexes: list[Index]) -> None:
    """A field or a further member that no sample has, in a template or as a column, is a typo."""
    known = sum((index.fields for index in indexes), Counter[str]())
    named = [(path, "data.caption", captions.caption, [FILENAME]) for path in captions.fields]
    kinds = {name: kind_of(name, path) for name, path in columns.items()}
    named += [(columns[n], "data.columns", f"{n}: {columns[n]}", []) for n, kind in kinds.items() if kind == "field"]
    members = list(dict.fromkeys(name for index in indexes for name in index.further_names))
    for name, path in columns.items():
        if kinds[name] not in ("field", "size") and path not in members:
            what, hint = f"no sample has a member or file KEY{path}", nearest(path, members) if members else ""
            raise LdmError("DATA", what, where="data.columns", limit=f"{name}: {path}", next=hint)
    for path, where, setting, others in named:
        others = [*others, f".{path}"] if f".{path}" in members else others
        if path.split(".")[0] not in known and len(known) < MAX_FIELDS:
            named_so = known or f".{path}" in others
            hint = nearest(path, [*known, *others]) if named_so else "no sample has a JSON with fields"
            raise LdmError("DATA", f"no sample has the field {path!r}", where=where, limit=setting, next=hint)


def _refuse_unusable(
    shards: list[Path], indexes: list[Index], on_truncated: str, where: str, remote: Remote | None
) -> None:
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
        place = remote.url(shards[0]) if remote and remote.holds(shards[0]) else shards[0].parent
        raise LdmError(
            "DATA",
            f"{len(unusable) + len(cut)} of {len(shards)} shards cannot be used",
            where=" | ".join(listed) + (f" | and {more} more" if more else ""),
            limit=f"{where}: {place}",
            next=advice + ("; data.on_truncated=use keeps what is complete" if cut and not unusable else ""),
        )


def _looked_for(caption: str) -> str:
    """Where a caption was looked for, in words."""
    sidecar = "KEY.txt or KEY.caption beside KEY.jpg"
    table = f"{', '.join(TEXT_FIELDS)} in KEY.json, {' or '.join(TABLES)}"
    words = {"auto": f"{sidecar}; {table}", "sidecar": sidecar, "metadata": table}
    words["filename"] = name = "words in the file's name"
    captions = Captions(caption)
    fields = f"a text or number at {', '.join(captions.fields)} in the sample's JSON" if captions.fields else ""
    return "looked for " + words.get(caption, " and ".join(filter(None, (fields, name if captions.names_file else ""))))


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
    classes = {folder: about.name for index in indexes for folder, about in classes_of(index).items()}
    if "class" in known and (name := next(filter(None, (classes.get(p.key.rpartition("/")[0]) for p in missing)), "")):
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
    found = [f"{count} {kind}" for kind, count in problems.most_common() if count]
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
