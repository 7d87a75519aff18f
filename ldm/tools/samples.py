"""What `prepare` and `inspect` read: the samples of a folder, of shards or of a table, and what each picture is.

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ldm.data import metadata, paths
from ldm.data.captions import Captions
from ldm.data.decode import BadSample, decode_image, open_image
from ldm.data.duplicates import fingerprint
from ldm.data.index import ARRAY, BAD_KINDS, FIELDS, PICTURES
from ldm.data.shards import Dataset, open_dataset
from ldm.errors import LdmError, nearest
from ldm.tools.pool import each, progress

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
FORMS = tuple(SUFFIXES)
PATH_COLUMNS = ("file_name", "path", "image", "image_path", "filename", "file")
_CHUNK = 256

FACTS = np.dtype(
    [
        ("number", "i8"),
        ("bytes", "i8"),
        ("further", "i8"),
        ("width", "i4"),
        ("height", "i4"),
        ("form", "u1"),
        ("transparent", "?"),
        ("sha256", "u1", 32),
        ("pixels", "u1", 16),
        ("phash", "u8"),
        ("small", "u1", 768),
        ("encoded", "i8"),
    ]
)
"""A row per picture. number: in its source.   form: in FORMS.   sha256: of its bytes.   width, height: upright.

further: bytes of its other pictures and arrays.

pixels, phash, small: see `ldm.data.duplicates`.   encoded: bytes after re-encoding, where that was tried; else 0.
"""


class Sample(NamedTuple):
    """txt, json: as they stand, or None.   captions: all that it has, each one line.

    further: its other pictures and arrays, by what follows the key in their names, `.mask.png`.
    """

    image: bytes
    txt: bytes | None
    json: bytes | None
    captions: list[str]
    further: Mapping[str, bytes] = {}

    @property
    def caption(self) -> str:
        """The first, "" for none."""
        return self.captions[0] if self.captions else ""


class Bad(NamedTuple):
    """One that is left out."""

    path: str
    kind: str
    reason: str


class Source(Protocol):
    """names: [N], what a person calls each: a path below the folder, SHARD/KEY, or a row's path.

    identity: stands for all contents.   problems, examples: what was found wrong already, and so is in no number.
    remarks: sentences for a person.
    """

    names: list[str]
    identity: str
    problems: Counter[str]
    examples: list[Bad]
    remarks: list[str]

    def read(self, number: int) -> Sample:
        """Raises BadSample."""
        ...


class Opened:
    """A folder of pictures or shards, as training reads them; and the pictures of a folder that training leaves out,
    so that each can be named with its reason.
    """

    def __init__(self, dataset: Dataset, captions: Captions) -> None:
        self.dataset, self.captions = dataset, captions
        self.remarks = dataset.remarks
        self.folder = dataset.shards[0] if len(dataset.shards) == 1 and dataset.shards[0].is_dir() else None
        if self.folder is None:
            self.names = [f"{dataset.shard_name(i)}/{key}" for i, key in enumerate(dataset.keys)]
            self.left_out: list[str] = []
            self.problems = Counter({k: n for k, n in dataset.problems.items() if k in BAD_KINDS})
            self.examples = [
                Bad(f"{p.shard}/{p.key}", p.kind, p.reason) for p in dataset.examples if p.kind in BAD_KINDS
            ]
        else:
            self.problems, self.examples = Counter(), []
            index = dataset.indexes[0]
            further = {
                index.files[int(other["place"]["offset"])]
                for other in index.further
                if _stands_beside(index.further_names[other["name"]])
            }
            pictures: dict[str, list[str]] = {}
            for name in paths.files_below(self.folder, self._unreadable):
                key, _, suffix = name.rpartition(".")
                if _suffix(suffix) in PICTURES and name not in further:
                    pictures.setdefault(key, []).append(name)
            for found in pictures.values():
                found.sort(key=lambda name: PICTURES.index(_suffix(name.rpartition(".")[2])))  # stable, as the index
            used = [pictures.get(key, [key]).pop(0) for key in dataset.keys]
            self.left_out = sorted(name for found in pictures.values() for name in found)
            self.names = used + self.left_out
        self._keys = frozenset(dataset.keys) if self.left_out else frozenset()
        self.identity = hashlib.sha256(json_bytes([dataset.manifest_hash, self.names])).hexdigest()

    def _unreadable(self, name: str, reason: str) -> None:
        self.problems["fetch"] += 1
        self.examples.append(Bad(name, "fetch", reason))

    def read(self, number: int) -> Sample:
        if number >= self.dataset.num_samples:
            raise self._why(self.names[number])
        index, row = self.dataset.indexes[self.dataset.shard_of[number]], int(self.dataset.row_of[number])
        others = [index.further_names[other["name"]] for other in index.further_rows(row)]
        raw = self.dataset.read(number, (*FIELDS, *filter(_stands_beside, others)))
        txt, data = raw.get("txt"), raw.get("json")
        found = self.captions.all_of(self.dataset.keys[number], txt, data)
        further = {name: raw[name] for name in sorted(raw) if name not in FIELDS}
        return Sample(raw["image"], txt if "txt" in self.captions.members else None, data, found, further)

    def _why(self, name: str) -> BadSample:
        """Why training leaves a picture of the folder out."""
        assert self.folder is not None
        key = name.rpartition(".")[0]
        if key in self._keys:
            return BadSample("second_image", "another picture of this name is taken")
        owner, dot, last = key.rpartition(".")
        while dot and "/" not in last:
            if owner in self._keys:
                return BadSample("second_image", f"a further picture of {owner}")
            owner, dot, last = owner.rpartition(".")
        try:
            open_image((self.folder / name).read_bytes())
            txt = next((p for s in ("txt", "caption") if (p := self.folder / f"{key}.{s}").is_file()), None)
            self.captions(key, txt.read_bytes() if txt else None, None)
        except OSError as error:
            return BadSample("fetch", f"{error.strerror}")
        except BadSample as bad:
            return bad
        return BadSample("caption_missing", "no text for it")


class Table:
    """The pictures that a CSV or JSON-lines file names, with its columns as their JSON.

    root: where relative paths begin; what leads out of it is not read.
    """

    def __init__(
        self,
        table: Path,
        captions: Captions,
        *,
        root: Path,
        image_column: str | None,
        caption_column: str | None,
        skip: bool,
    ) -> None:
        self.captions, self.root, self.skip = captions, root.resolve(), skip
        self.problems: Counter[str] = Counter()
        self.examples: list[Bad] = []
        self.remarks: list[str] = []
        try:
            digest = hashlib.sha256(table.read_bytes())
        except OSError as error:
            raise LdmError("DATA", f"{table} cannot be read: {error.strerror}") from error
        rows = list(metadata.read_table(table, self._remark))
        known = list(dict.fromkeys(name for _, row in rows for name in row))
        column = image_column or next((name for name in PATH_COLUMNS if name in known), None)
        for name, where in ((column, "image_column"), (caption_column or column, "caption_column")):
            if name not in known:
                looked = f"looked for {name or ', '.join(PATH_COLUMNS)}"
                hint = f"{where}=NAME; {nearest(name or '', known) if name else 'known: ' + ', '.join(known[:12])}"
                raise LdmError("DATA", f"no such column in {table}", where=where, limit=looked, next=hint)
        self.names, self.rows = [], []
        for number, row in rows:
            name = row.pop(str(column), None)
            if not isinstance(name, str) or not name.strip():
                self.problems["image_missing"] += 1
                self.examples.append(Bad(f"{table.name}, line {number}", "image_missing", f"{column} is empty"))
                continue
            if caption_column and caption_column in row:
                value = row.pop(caption_column)
                row["text"] = value if isinstance(value, list) else str(value)  # looked at before any other column
            self.names.append(name)
            self.rows.append(row)
        for name in self.names:
            with contextlib.suppress(OSError, ValueError):
                stat = os.stat(self.root / name)
                digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
        self.identity = digest.hexdigest()

    def _remark(self, reason: str) -> None:
        self.problems["row"] += 1
        self.examples.append(Bad("", "row", reason))

    def read(self, number: int) -> Sample:
        name = self.names[number]
        try:
            path = (self.root / name).resolve()
            if not path.is_relative_to(self.root):
                raise BadSample("outside", f"outside of {self.root}; root=FOLDER sets where pictures may lie")
            if not path.is_file():
                raise BadSample("image_missing", "there is no such file")
            image = path.read_bytes()
        except (OSError, ValueError) as error:
            raise BadSample("fetch", f"{error}"[:200]) from error
        data = json_bytes(self.rows[number])
        found = self.captions.all_of(name.rpartition(".")[0], None, data)
        if self.skip and not any(found):
            raise BadSample("caption_missing", "the row has no text")
        return Sample(image, None, data, found)


def json_bytes(value: Any) -> bytes:
    """Compact JSON; numbers that are not finite become null, because JSON has none."""

    def finite(node: Any) -> Any:
        if isinstance(node, dict):
            return {str(key): finite(child) for key, child in node.items()}
        if isinstance(node, list):
            return [finite(child) for child in node]
        return None if isinstance(node, float) and not np.isfinite(node) else node

    # Half of a surrogate pair, which JSON can spell and UTF-8 cannot, becomes a question mark.
    return json.dumps(finite(value), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def plain(text: str) -> str:
    """Control and direction characters as spaces: names and captions are shown, never obeyed."""
    return "".join(c if c.isprintable() else " " for c in text)


def is_table(path: str) -> bool:
    return Path(path).suffix.lower() in (".csv", ".jsonl") and not Path(path).is_dir()


def open_source(
    path: str | list[str],
    *,
    caption: str = "auto",
    on_missing_caption: str = "skip",
    on_truncated: str = "refuse",
    root: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    index_dir: str | None = None,
) -> Source:
    """What `path` names. Raises LdmError in the words of the verbs' options."""
    with own_words():
        captions = Captions(caption, on_missing_caption=on_missing_caption)
        if isinstance(path, str) and is_table(path):
            table = Path(path).expanduser()
            return Table(
                table,
                captions,
                root=Path(root).expanduser() if root else table.parent,
                image_column=image_column,
                caption_column=caption_column,
                skip=on_missing_caption != "empty",
            )
        for key, value in (("root", root), ("image_column", image_column), ("caption_column", caption_column)):
            if value is not None:
                hint = f"{key} is for a table, .csv or .jsonl"
                raise LdmError("CONFIG", f"{key}={value}", where=str(path), next=hint)
        dataset = open_dataset(
            path,
            caption=caption,
            on_missing_caption=on_missing_caption,
            on_truncated=on_truncated,
            index_dir=index_dir,
            where="the path",
        )
        return Opened(dataset, captions)


@contextlib.contextmanager
def own_words() -> Iterator[None]:
    """The data's errors name the keys of training; the verbs' options have the same names without `data.`"""
    try:
        yield
    except LdmError as error:
        words = {name: getattr(error, name).replace("data.", "") for name in ("where", "limit", "next")}
        raise LdmError(error.code, error.what, **words, exit_code=error.exit_code) from error


# ---- what each picture is


@dataclass(frozen=True)
class Scan:
    """The state of a worker. reencode: bytes of a picture to bytes of the new one, to learn how large they become."""

    source: Source
    reencode: Callable[[bytes], bytes] | None = None
    every: int = 32


class Chunk(NamedTuple):
    """facts: [n] of FACTS.   captions: [n].   bad: number, kind, reason of the others."""

    facts: NDArray[np.void]
    captions: list[str]
    bad: list[tuple[int, str, str]]


def scan_chunk(scan: Scan, numbers: range) -> Chunk:
    """Read and decode the pictures of a source: what training would meet, met now."""
    rows, captions, bad = [], [], []
    for number in numbers:
        try:
            sample = scan.source.read(number)
            rows.append(_facts(scan, number, sample))
            captions.append(sample.caption)
        except BadSample as problem:
            bad.append((number, problem.kind, problem.reason))
    return Chunk(np.array(rows, dtype=FACTS), captions, bad)


def _facts(scan: Scan, number: int, sample: Sample) -> tuple[Any, ...]:
    data = sample.image
    header = open_image(data)
    image = decode_image(data)
    print_ = fingerprint(image)
    encoded = len(scan.reencode(data)) if scan.reencode and number % scan.every == 0 else 0
    return (
        number,
        len(data),
        sum(map(len, sample.further.values())),
        *image.size,
        FORMS.index(str(header.format)),
        header.has_transparency_data,
        np.frombuffer(hashlib.sha256(data).digest(), np.uint8),
        np.frombuffer(print_.pixels, np.uint8),
        print_.phash,
        np.frombuffer(print_.small, np.uint8),
        encoded,
    )


def chunks_of(count: int) -> list[range]:
    return [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]


def scan_all(scan: Scan, tasks: Sequence[range], workers: int) -> Iterator[Chunk]:
    with progress("reading", sum(map(len, tasks))) as advance:
        yield from each(scan_chunk, scan, tasks, workers, lambda task: advance(len(task)))


def _stands_beside(name: str) -> bool:
    """Whether a further member is another thing than a second form of the picture: `.mask.png`, not `.png`."""
    return name.count(".") > 1 or name.endswith(f".{ARRAY}")


def _suffix(suffix: str) -> str:
    return {"jpeg": "jpg"}.get(suffix.lower(), suffix.lower())
