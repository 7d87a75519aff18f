"""`data.path` to a list of shards: folders, globs, brace expansions and lists of local paths. Standard library only."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ldm.errors import LdmError, nearest

_BRACES = re.compile(r"\{([^{}]*)\}")
_MAX_SHARDS = 1_000_000
SPLITS = ("train", "val")


def expand(path: str | Sequence[str], *, split: str | None = None, where: str = "data.path") -> list[Path]:
    """Shards, each a tar file or a folder of pictures, in a fixed order and each once.

    A name that exists is taken literally, whatever characters it has; only then `{000..004}`, `{a,b}`, `*`, `?` and
    `[...]` are expanded. Names that a brace expansion lists stay in the list when they are missing, to be reported.
    """
    return list(sets_of(path, split=split, where=where))


def sets_of(path: str | Sequence[str], *, split: str | None = None, where: str = "data.path") -> dict[Path, int]:
    """The shards of `expand`, each with the number of the item of `path` that names it first."""
    items = items_of(path)
    if not items or not all(item.strip() for item in items):
        raise LdmError("DATA", "the path is empty", where=where, next=f"set {where} to a folder of shards or pictures")
    found: dict[Path, int] = {}
    for number, item in enumerate(items):
        for shard in _expand_one(item, split, where):
            found.setdefault(shard, number)
    return found


def items_of(path: str | Sequence[str]) -> list[str]:
    return [str(path)] if isinstance(path, str | os.PathLike) else [str(item) for item in path]


def files_below(folder: Path) -> Iterator[str]:
    """Names relative to the folder, sorted, hidden files and folders left out."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(root, name)
            if not name.startswith(".") and path.is_file():
                yield path.relative_to(folder).as_posix()


def _expand_one(item: str, split: str | None, where: str) -> list[Path]:
    path = Path(item).expanduser()
    if path.is_dir():
        return _expand_folder(path, split)
    if path.exists():
        if split == "val":  # a set without a split of its own
            return []
        if path.suffix.lower() != ".tar":
            raise LdmError("DATA", f"{item} is not a folder and not a .tar file", where=where)
        return [path]
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", item) or "::" in item:
        raise LdmError("DATA", f"{item!r} is not a local path", where=where, next="copy the shards to a local folder")
    if split == "val":
        return []
    names = _expand_braces(str(path), where)
    found = [Path(match) for name in names for match in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    if not found or (len(names) == 1 and not found[0].exists()):
        raise _missing(path, where)
    return found


def _expand_folder(folder: Path, split: str | None) -> list[Path]:
    shards = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".tar" and not p.name.startswith("."))
    if not shards:
        return [folder] if split != "val" else []
    of_val = [p for p in shards if p.name.startswith("val-")]
    if split is None:
        return shards
    return of_val if split == "val" else [p for p in shards if p not in of_val]


def _expand_braces(pattern: str, where: str) -> list[str]:
    """`a-{00..02}` to a-00, a-01, a-02, and `{a,b}` to a, b; several braces multiply."""
    parts = _BRACES.split(pattern)  # text, body, text, body, ..., text
    choices = [[text] if i % 2 == 0 else _choices(text, where) for i, text in enumerate(parts)]
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(body: str, where: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", body)
    if not numbers:
        return body.split(",")
    first, last = numbers.groups()
    if not 0 <= int(last) - int(first) < _MAX_SHARDS:
        raise LdmError("DATA", f"cannot expand {{{body}}}", where=where, limit=f"rising, at most {_MAX_SHARDS} names")
    return [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]


def _missing(path: Path, where: str) -> LdmError:
    parent = path.parent
    if not parent.is_dir():
        return LdmError("DATA", f"there is no {path}", where=where, next=f"the folder {parent} does not exist either")
    return LdmError("DATA", f"there is no {path}", where=where, next=nearest(path.name, os.listdir(parent)))


def has_val_shards(path: str | Sequence[str]) -> bool:
    """Whether a folder of `path` holds shards named `val-*.tar`."""
    folders = (Path(item).expanduser() for item in items_of(path))
    return any(p.name.startswith("val-") for folder in folders if folder.is_dir() for p in folder.glob("*.tar"))
