"""What a folder says about its pictures beside their sidecars: metadata tables, classes, repeats.

`metadata.jsonl` and `metadata.csv` are those of the imagefolder convention: a row per picture, named by `file_name`
relative to the table; `mask_file_name` and the like name further files of it.
"""

from __future__ import annotations

import csv
import json
import math
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ldm.data.captions import TEXT_FIELDS

TABLES = ("metadata.jsonl", "metadata.csv")  # of two in one folder the first is taken
FURTHER = "_file_name"  # of a column that names another file of the picture, relative to the table
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_MAX_LINE = 2**20
_WHOLE = re.compile(r"[+-]?(0|[1-9]\d{0,17})")
_DECIMAL = re.compile(r"[+-]?((0|[1-9]\d{0,17})(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")
_NUMBERED = re.compile(r"([0-9]{1,18})_(.+)", re.DOTALL)
_MAX_COUNT = 1000  # a larger number before a folder's name is a year or a code

Row = dict[str, Any]
Remark = Callable[[str, str], None]
"""Called with the table's name and what is wrong."""


class Class(NamedTuple):
    """What a folder of pictures stands for. name: "" at the top.   repeats: of kohya's `10_fox` the ten, else None.

    numbered: the name begins with a number that is no count of repeats.
    """

    name: str
    repeats: int | None = None
    numbered: bool = False


def classes_of(folders: Iterable[str]) -> dict[str, Class]:
    """What each of all the folders that hold pictures stands for, by their names relative to the set.

    Folders side by side are kohya's when every one is `N_name`, N from 1 to 1000 without leading zeros, and the
    numbers do not merely count the folders: three or more that follow one another, each once, are numbering.
    """
    beside: defaultdict[str, list[str]] = defaultdict(list)
    for folder in folders:
        beside[folder.rpartition("/")[0] if folder else "\0"].append(folder)  # the top lies beside none
    found: dict[str, Class] = {}
    for level in beside.values():
        parts = {folder: _NUMBERED.fullmatch(folder.rpartition("/")[2]) for folder in level}
        numbers = sorted(int(match[1]) for match in parts.values() if match)
        written = all(match and match[1][0] != "0" for match in parts.values())
        counting = len(numbers) > 2 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        kohyas = written and not counting and numbers[-1] <= _MAX_COUNT
        for folder, match in parts.items():
            name = folder.rpartition("/")[2]
            found[folder] = Class(match[2], int(match[1])) if kohyas and match else Class(name, numbered=bool(match))
    return found


def rows_below(folder: Path, files: Iterable[str], remark: Remark) -> dict[str, Row]:
    """Fields by picture, named as in `files`; so are the files in `mask_file_name` and the like.

    Several rows of one picture give its captions as a list.
    """
    known = set(files)
    found: dict[str, Row] = {}
    taken: set[str] = set()
    for table in sorted(
        (f for f in known if f.rpartition("/")[2] in TABLES), key=lambda f: (not f.endswith(".jsonl"), f)
    ):
        place = table.rpartition("/")[0]
        if place in taken:
            remark(table, "a metadata.jsonl lies beside it and is taken")
            continue
        taken.add(place)
        for number, row in read_table(folder / table, lambda reason, table=table: remark(table, reason)):  # type: ignore[misc]
            name = row.pop("file_name", None)
            if not isinstance(name, str) or not name:
                remark(table, f"line {number} has no file_name; it has: {', '.join(map(str, row))[:100]}")
                continue
            picture = posixpath.normpath(posixpath.join(place, name.replace("\\", "/")))
            if picture not in known:  # also all that leads out of the folder
                remark(table, f"line {number}: there is no {name[:100]!r} here")
                continue
            if not picture.lower().endswith(_PICTURES):
                remark(table, f"line {number}: {name[:100]!r} is no picture ({', '.join(_PICTURES)})")
                continue
            for column in [c for c, value in row.items() if c.endswith(FURTHER) and isinstance(value, str)]:
                other = posixpath.normpath(posixpath.join(place, row[column].replace("\\", "/")))
                if other not in known:
                    remark(table, f"line {number}: there is no {row.pop(column)[:100]!r} here")
                else:
                    row[column] = other
            if picture in found:
                _join_captions(found[picture], row)
            else:
                found[picture] = row
    return found


def read_table(path: Path, remark: Callable[[str], None]) -> Iterator[tuple[int, Row]]:
    """(line, fields) of each row of a .jsonl or .csv. What cannot be read is remarked and left out.

    Numbers of a .csv are numbers where every value of the column is one; its empty cells are absent.
    """
    return _jsonl_rows(path, remark) if path.suffix.lower() == ".jsonl" else _csv_rows(path, remark)


def _join_captions(row: Row, other: Row) -> None:
    for name in TEXT_FIELDS:
        if name in other:
            texts = (r.get(name, []) for r in (row, other))
            row[name] = [text for given in texts for text in (given if isinstance(given, list) else [given])]


def _jsonl_rows(path: Path, remark: Callable[[str], None]) -> Iterator[tuple[int, Row]]:
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE), b""), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                remark(f"line {number} cannot be read: {error}"[:200])
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                remark(f"line {number} is not an object")


def _csv_rows(path: Path, remark: Callable[[str], None]) -> Iterator[tuple[int, Row]]:
    rows: list[tuple[int, Row]] = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                rows.append((reader.line_num, {k: v for k, v in row.items() if k and isinstance(v, str) and v}))
        except (csv.Error, ValueError) as error:  # a cell above 128 KiB; bytes that are not UTF-8
            remark(f"nothing is read after line {reader.line_num}: {error}"[:200])
        names = [name for name in reader.fieldnames or () if name]
    for name in names:
        values = [row[name] for _, row in rows if name in row]
        kind = None if name in (*TEXT_FIELDS, "file_name") else _number_type(values)
        for _, row in rows:
            if kind and name in row:
                row[name] = kind(row[name])
    yield from rows


def _number_type(values: list[str]) -> type[int] | type[float] | None:
    """Numbers as people write them: what has leading zeros, underscores or more than 18 digits is a name."""
    if all(_WHOLE.fullmatch(value) for value in values):
        return int
    decimal = all(_DECIMAL.fullmatch(value) and math.isfinite(float(value)) for value in values)
    return float if decimal else None
