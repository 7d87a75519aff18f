"""The manifest of a checkpoint: what belongs to it, and whether it is whole. Standard library only.

`manifest.json` is written last; a folder without it is no checkpoint. It lists every file with size and sha256, and
ends with the digest of itself.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ldm.checkpoints.files import json_bytes, sha256_of
from ldm.errors import LdmError

Verify = Literal["hash", "size"]
Manifest = Mapping[str, Any]

FILE = "manifest.json"
SCHEMA_VERSION = 1
INVALID = "CKPT-INVALID"
_MAX_BYTES = 64 * 2**20
_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*\.(safetensors|json)")


def seal(content: Manifest) -> dict[str, Any]:
    """`content` with the schema version and its digest."""
    body = {"schema_version": SCHEMA_VERSION, **content}
    return {**body, "digest": _digest(body)}


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder. Raises LdmError when it is missing, damaged, or of a newer version."""
    path = folder / FILE
    try:
        if not 0 < _size(path, FILE) <= _MAX_BYTES:
            raise invalid(folder, f"{FILE} is {path.stat().st_size} bytes long")
        data = path.read_bytes()
        manifest = json.loads(data)
        version = manifest["schema_version"]
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise _newer(folder, version)
        body = {key: value for key, value in manifest.items() if key != "digest"}
        if manifest["digest"] != _digest(body) or data != json_bytes(manifest):
            raise invalid(folder, f"{FILE} does not match its digest")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise invalid(folder, f"{FILE} is not a manifest") from error
    return manifest


def check(folder: Path, mode: Verify = "hash") -> Manifest:
    """Read the manifest and compare every file with it. mode: "size" trusts the content, "hash" reads all of it."""
    manifest = read(folder)
    for name in manifest["files"]:
        check_file(folder, manifest, name, mode)
    return manifest


def check_file(folder: Path, manifest: Manifest, name: str, mode: Verify = "size") -> Path:
    """Path of one file of the checkpoint, once it is what the manifest says."""
    entry = manifest["files"][name]
    if not is_file_name(name):
        raise invalid(folder, f"{name!r} is not the name of a checkpoint's file")
    size = _size(folder / name, name)
    if size != entry["size"]:
        raise invalid(folder, f"{name} has {size} bytes instead of {entry['size']}")
    if mode == "hash" and sha256_of(folder / name) != entry["sha256"]:
        raise invalid(folder, f"{name} does not match its sha256")
    return folder / name


def is_file_name(name: str) -> bool:
    return name != FILE and _FILE_NAME.fullmatch(name) is not None


def invalid(folder: Path, what: str) -> LdmError:
    return LdmError(INVALID, what, where=str(folder))


def _size(path: Path, name: str) -> int:
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        raise invalid(path.parent, f"{name} is missing") from None
    if not stat.S_ISREG(found.st_mode):
        raise invalid(path.parent, f"{name} is not a regular file")
    return found.st_size


def _newer(folder: Path, version: int) -> LdmError:
    return LdmError(
        "CKPT-SCHEMA",
        "written by a newer ldm",
        where=str(folder),
        limit=f"schema_version {version}, this ldm reads up to {SCHEMA_VERSION}",
        next="update ldm",
    )


def _digest(body: Manifest) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
