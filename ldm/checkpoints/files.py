"""Durable writes and JSON lines: what is acknowledged survives a kill, what is interrupted leaves the old file.

Standard library only. `os.fsync`, `os.rename` and `os.replace` are called by these names, so that a test can record
their order.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

log = logging.getLogger(__name__)

_TEMPORARY = re.compile(r"\.tmp-.+?(?:@([^@]+))?-(\d+)")


class Digesting:
    """A file opened for writing that knows the size and the sha256 of what went through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> None:
        """data: bytes, or any contiguous buffer of bytes."""
        self._file.write(data)
        self._sha256.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()


@contextmanager
def new_file(path: Path) -> Iterator[Digesting]:
    """A file that must not exist yet (a symlink in its place counts as existing), synced to disk on leaving."""
    with open(path, "xb") as file:
        yield Digesting(file)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary(path: Path) -> Path:
    """Where `path` is prepared: beside it, so on the same filesystem, and named after this process and its host."""
    return path.with_name(f".tmp-{path.name}@{os.uname().nodename}-{os.getpid()}")


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees either the old or the new content, even after a power loss."""
    temp = temporary(path)
    temp.unlink(missing_ok=True)
    try:
        with new_file(temp) as file:
            file.write(data)
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def json_bytes(value: Any) -> bytes:
    """Strict JSON with stable text: NaN is refused, keys keep their order."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_tree(path: Path) -> None:
    """Delete a folder that we made. A symlink in its place, or inside, is never followed."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def remove_leftovers(folder: Path, *, locked: bool = True) -> None:
    """Delete the `.tmp-*@<host>-<pid>` entries of dead processes. Ours count as dead: call it before the first write.

    locked: no process of another host writes here; otherwise what they left stays, for nothing tells whether they run.
    """
    for entry in folder.iterdir():
        match = _TEMPORARY.fullmatch(entry.name)
        if not match or not (locked or match[1] == os.uname().nodename):
            continue
        if int(match[2]) == os.getpid() or not is_alive(int(match[2])):
            if entry.is_dir() and not entry.is_symlink():
                remove_tree(entry)
            else:
                entry.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine has that id and runs; one that ended and waits for its parent does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):  # no Linux, or it ended just now
        return True
    return state != "Z"


def append_jsonl(path: Path, record: dict[str, Any]) -> bool:
    """Add one line. A log never stops training: if it cannot be written, says so once per call and returns False.

    Non-finite numbers become null, which every JSON reader and plotter takes as a gap.
    """
    line = (json.dumps(_finite(record), allow_nan=False) + "\n").encode()
    try:
        with open(path, "ab", buffering=0) as file:  # one write per line: lines of two writers never mix
            file.write(line)
    except OSError as error:
        log.warning("%s: line not written: %s", path, error.strerror)
        return False
    return True


def truncate_jsonl(path: Path, step_key: str, step: int) -> int:
    """Drop the records with `record[step_key] > step`, and lines that a kill has torn; returns how many went.

    Called on resume, so that each step occurs once. Records without the key stay.
    """
    if not path.exists():
        return 0
    temp, dropped = temporary(path), 0
    temp.unlink(missing_ok=True)
    with open(path, "rb") as old, new_file(temp) as new:
        for line in old:
            if _is_kept(line, step_key, step):
                new.write(line)
            else:
                dropped += 1
    if dropped:
        os.replace(temp, path)
        sync_folder(path.parent)
    else:
        temp.unlink()
    return dropped


def _is_kept(line: bytes, step_key: str, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n") and isinstance(record, dict) and not record.get(step_key, step) > step


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    return value
