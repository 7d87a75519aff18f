"""`data.path` to a list of shards: folders, globs, brace expansions, lists of these and URLs. Standard library only."""

from __future__ import annotations

import glob
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from ldm.data.remote import Remote
from ldm.data.web import is_url
from ldm.errors import LdmError, nearest

_BRACES = re.compile(r"\{([^{}]*)\}")
_MAX_SHARDS = 1_000_000
SPLITS = ("train", "val")


def expand(path: str | Sequence[str], *, split: str | None = None, where: str = "data.path") -> list[Path]:
    """Shards, each a tar file or a folder of pictures, in a fixed order and each once.

    A name that exists is taken literally, whatever characters it has; only then `{000..004}`, `{a,b}`, `*`, `?` and
    `[...]` are expanded. Names that a brace expansion lists stay in the list when they are missing, to be reported.

    split: of what a folder or a pattern with `*`, `?` or `[...]` finds, "val" takes the `val-*` and "train" all others;
    None takes everything. What is spelled out, a file, a list in braces or a pattern `val-*`, has no such parts.
    """
    return list(sets_of(path, split=split, where=where))


def sets_of(
    path: str | Sequence[str],
    *,
    split: str | None = None,
    where: str = "data.path",
    apart: bool = False,
    remote: Remote | None = None,
) -> dict[Path, int]:
    """The shards of `expand`, each with the number of the item of `path` that names it first.

    apart: two items that name the same shard are refused, because each has a number of its own.
    remote: fetches shards at URLs; their paths are those of its cache. None = URLs are refused.
    Raises LdmError, also for a folder of pictures within another, whose pictures would count twice.
    """
    items = items_of(path)
    if not items or not all(item.strip() for item in items):
        raise LdmError("DATA", "the path is empty", where=where, next=f"set {where} to a folder of shards or pictures")
    real = cache(os.path.realpath)  # `a`, `./a` and a link to it are one; of many tars each folder is looked up once

    def place_of(shard: Path) -> Path:
        return Path(real(shard.parent), shard.name) if shard.suffix.lower() == ".tar" else Path(real(shard))

    found: dict[Path, int] = {}
    known: dict[Path, int] = {}
    fetched = {} if split == "val" else _at_urls(items, remote, where)
    for number, item in enumerate(items):
        for shard in fetched[item] if item in fetched else _expand_one(item, split, where):
            place = place_of(shard)
            if place not in known:
                found[shard] = known[place] = number
            elif apart and known[place] != number:
                what = f"{items[known[place]]!r} and {item!r} name the same data, {shard.name}"
                hint = "name each set once; its number counts all its uses"
                raise LdmError("CONFIG", what, where=where, next=hint)
    folders = {place: number for place, number in known.items() if place.suffix.lower() != ".tar"}
    for place, number in folders.items():
        if (outer := next((p for p in place.parents if p in folders), None)) is not None:
            what = f"{items[number]!r} lies within {items[folders[outer]]!r}, which its pictures belong to already"
            raise LdmError("CONFIG", what, where=where, next="name the folders inside, or the one around them")
    return found


def items_of(path: str | Sequence[str]) -> list[str]:
    return [str(path)] if isinstance(path, str | os.PathLike) else [str(item) for item in path]


def files_below(folder: Path, unreadable: Callable[[str, str], None] = lambda name, reason: None) -> Iterator[str]:
    """Names relative to the folder, sorted, hidden files and folders left out.

    Names that lead nowhere or may not be looked at are among them: who reads them learns why not. A folder whose names
    cannot be read goes to `unreadable`, with the reason.
    """

    def failed(error: OSError) -> None:
        unreadable(Path(error.filename).relative_to(folder).as_posix(), str(error.strerror))

    for root, folders, files in os.walk(folder, onerror=failed):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        place = Path(root).relative_to(folder).as_posix()
        for name in sorted(files):
            if not name.startswith(".") and _may_be_file(os.path.join(root, name)):
                yield name if place == "." else f"{place}/{name}"


def _may_be_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True


def _at_urls(items: list[str], remote: Remote | None, where: str) -> dict[str, list[Path]]:
    """The paths of the shards that those items which are URLs name; all are asked about together."""
    urls = {item: _expand_braces(item, where) for item in items if is_url(item)}
    if urls and remote is None:
        raise LdmError("DATA", "a URL is not a local path", where=where, next="copy the shards to a local folder")
    paths = iter(remote.paths([url for some in urls.values() for url in some], where) if urls and remote else ())
    return {item: [next(paths) for _ in some] for item, some in urls.items()}


def _expand_one(item: str, split: str | None, where: str) -> list[Path]:
    if is_url(item):  # spelled out: it has no part of its own for validation
        return []
    path = Path(item).expanduser()
    if _exists(path, where):
        if not path.is_dir() and path.suffix.lower() != ".tar":
            raise LdmError("DATA", f"{item} is not a folder and not a .tar file", where=where)
        return _of_split(path, split, where)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", item) or "::" in item:
        raise LdmError("DATA", f"{item!r} is not a local path", where=where, next="copy the shards to a local folder")
    names = _expand_braces(str(path), where)
    found = [(name, Path(match)) for name in names for match in _matches(name)]
    if not found or (len(names) == 1 and not found[0][1].exists()):
        raise _missing(path, where)
    return [shard for name, match in found for shard in _of_split(match, split, where, by_pattern=_is_open(name))]


def _exists(path: Path, where: str) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a folder above it may not be entered, or the name is too long
        raise LdmError("DATA", f"{path} cannot be looked at: {error.strerror}", where=where) from error


def _matches(name: str) -> list[str]:
    return sorted(glob.glob(name)) if glob.has_magic(name) else [name]


def _is_open(name: str) -> bool:
    """Whether a pattern finds `val-*` among others; one that begins so asks for them."""
    return glob.has_magic(name) and not Path(name).name.startswith("val-")


def _of_split(path: Path, split: str | None, where: str, *, by_pattern: bool = False) -> list[Path]:
    """What belongs to the split: of a folder, of a file that a pattern found, or of a file that was named."""
    if _exists(path, where) and path.is_dir():
        return _expand_folder(path, split, where)
    if by_pattern and split is not None:
        return [path] if path.name.startswith("val-") == (split == "val") else []
    return [] if split == "val" else [path]  # a set without a split of its own


def _expand_folder(folder: Path, split: str | None, where: str) -> list[Path]:
    try:
        shards = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".tar" and not p.name.startswith("."))
    except OSError as error:
        raise LdmError("DATA", f"{folder} cannot be read: {error.strerror}", where=where) from error
    if not shards:
        return [folder] if split != "val" else []
    return [found for shard in shards for found in _of_split(shard, split, where, by_pattern=True)]


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
    set_it = f"set {where} to a folder of pictures or of tar shards"
    try:
        close = nearest(path.name, os.listdir(path.parent))
        hint = close if close.startswith("did you mean") else set_it  # a list of all that lies there helps nobody
    except FileNotFoundError:
        hint = f"the folder {path.parent} does not exist either"
    except OSError as error:
        hint = f"{path.parent}: {error.strerror}"
    return LdmError("DATA", f"there is no {path}", where=where, next=hint)


def has_val_shards(path: str | Sequence[str], *, where: str = "data.path") -> bool:
    """Whether a folder or a pattern of `path` finds shards named `val-*.tar` among others."""
    return any(_expand_one(item, "val", where) for item in items_of(path))
