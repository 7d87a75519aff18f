"""The checkpoints of one stage: committed whole or not at all, verified before use, rotated after success.

A save writes `.tmp-step-N@<host>-<pid>/`, syncs every file, writes the manifest last, and renames the folder to
`step-N`; a kill at any moment leaves the previous checkpoints as they were. The highest valid step counts: neither
modification times nor LATEST, which is a hint for people, decide. One writer per run is assumed (see run.py).

Importing, choosing and verifying need no torch, so that a damaged checkpoint is reported at once.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoints import files, manifest
from ldm.checkpoints.manifest import INVALID, Manifest, Verify
from ldm.errors import NON_FINITE, TEMPORARY, LdmError, nearest

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d{9,})")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PROBE = 2**25
_HEADROOM = 1.2  # free space asked for, in units of the expected size


class SaveFailed(LdmError):
    """Nothing was committed, earlier checkpoints are intact; the trainer goes on and counts it."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint. Every read checks the file's size against the manifest first."""

    path: Path
    step: int
    manifest: Manifest

    def tensors(self, name: str, device: Any = "cpu") -> dict[str, Tensor]:
        """The tensors saved as `tensors={name: ...}`; tied ones are one tensor again."""
        from ldm.checkpoints.tensorfile import read_tensors

        tensors = read_tensors(self._file(f"{name}.safetensors"), device)
        return tensors | {
            alias: tensors[original] for alias, original in self.manifest["aliases"].get(name, {}).items()
        }

    def tree(self, name: str, device: Any = "cpu") -> Any:
        """The tree saved as `trees={name: ...}`, equal type by type."""
        from ldm.checkpoints.codec import join

        return join(self.tensors(name, device), self.document(name))

    def document(self, name: str) -> Any:
        """The JSON value saved as `documents={name: ...}`."""
        path = self._file(f"{name}.json")
        try:
            return files.read_json(path)
        except ValueError as error:
            raise manifest.invalid(self.path, f"{path.name} is not JSON") from error

    def _file(self, name: str) -> Path:
        if name not in self.manifest["files"]:
            hint = nearest(name, self.manifest["files"])
            raise LdmError("CKPT-CONTENT", f"the checkpoint holds no {name}", where=str(self.path), next=hint)
        return manifest.check_file(self.path, self.manifest, name)


class Store:
    """The `ckpt/` folder of one stage.

    keep_last: newest checkpoints to keep, at least 2.   keep_every: keep the multiples of this step for good.
    keep_best: how many with the lowest score to keep besides.   verify: "hash" reads all bytes, "size" none.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        keep_best: int = 1,
        verify: Verify = "hash",
    ) -> None:
        for key, value, least in (
            ("keep_last", keep_last, 2),
            ("keep_every", keep_every, 1),
            ("keep_best", keep_best, 0),
        ):
            if value is not None and value < least:
                raise LdmError("CONFIG", f"{value} is too small", where=f"checkpoint.{key}", limit=f"at least {least}")
        if verify not in ("hash", "size"):
            raise LdmError("CONFIG", f"unknown value {verify!r}", where="checkpoint.verify", next="use hash or size")
        self.folder = Path(folder)
        self.keep_last, self.keep_every, self.keep_best, self.mode = keep_last, keep_every, keep_best, verify

    # ---- reading

    def steps(self) -> list[int]:
        """Steps with a folder, ascending, valid or not. A symlink is not a checkpoint."""
        if not self.folder.is_dir():
            return []
        found = ((_STEP.fullmatch(entry.name), entry) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match, entry in found if match and not entry.is_symlink() and entry.is_dir())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"

    def load(self, step: int) -> Checkpoint:
        """The verified checkpoint of exactly this step. Raises LdmError when it is missing or invalid."""
        if step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise LdmError(
                "CKPT-MISSING", f"no checkpoint of step {step}", where=str(self.folder), limit=f"have: {have}"
            )
        return Checkpoint(self.path(step), step, self._checked(step))

    def verify(self, step: int) -> None:
        """Raise LdmError, naming file and reason, unless the checkpoint of this step is whole."""
        self.load(step)

    def newest(self, *, fallback: bool = False, advice: str = "rerun with resume.fallback=true") -> Checkpoint | None:
        """The checkpoint of the highest step, or None when there is none.

        An invalid one is refused with the valid alternative; with `fallback` it is set aside as `bad-step-...` and
        the alternative taken. Nothing is renamed when no valid one exists.   advice: what the user of this command can
        do about an invalid one.
        """
        broken: dict[int, LdmError] = {}
        found = self._newest_valid(broken)
        if not broken:
            return found
        first = broken[max(broken)]
        if found is None:
            raise LdmError(
                first.code,
                first.what,
                where=first.where,
                limit="no other checkpoint is valid",
                next="restore it from a copy or start a new run with name=...",
            )
        if not fallback:
            raise LdmError(
                first.code,
                first.what,
                where=first.where,
                limit=f"newest valid is {found.step}",
                next=advice,
            )
        for step, error in broken.items():
            log.warning("%s; set aside as %s", error.line(), self._set_aside(step, "bad").name)
        log.warning("continuing from the older step %d: later progress is lost", found.step)
        return found

    # ---- writing

    def claim(self) -> None:
        """Make the folder and remove what killed writers left. Call it once, under the run's lock, before saving."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(self.folder)

    def save(
        self,
        step: int,
        *,
        tensors: Mapping[str, Mapping[str, Tensor]],
        trees: Mapping[str, Any],
        documents: Mapping[str, Any],
        score: float | None = None,
    ) -> Path:
        """Commit one checkpoint, then prune. Returns its folder.

        tensors: {"model": {...}} becomes model.safetensors.   trees: {"optim": tree} becomes optim.safetensors and
        optim.json.   documents: {"state": json} becomes state.json.   score: lower is better, for `keep_best`.
        Raises SaveFailed when the disk refuses, LdmError for non-finite tensors (exit 4), for values that the format
        does not have, and for a step that is already committed.
        """
        if os.path.lexists(self.path(step)):
            raise LdmError("CKPT-EXISTS", f"step {step} is already committed", where=str(self.path(step)))
        contents, aliases = _contents(tensors, trees, documents)
        size = sum(_size(content) for content in contents.values())
        _refuse_non_finite(contents, self.path(step))
        score = score if score is not None and math.isfinite(score) else None
        about = {"step": step, "score": score, "finite": True, "aliases": aliases}
        try:
            try:
                self._commit(step, contents, about, size)
            except OSError as error:
                if error.errno not in _FULL or not self._prune(keep_last=1):
                    raise
                log.warning("%s: disk full, pruned older checkpoints, saving again", self.folder)
                self._commit(step, contents, about, size)
        except OSError as error:
            raise self._failed(error, size) from error
        self._point_and_prune(step)
        return self.path(step)

    def expect(self, size: int) -> float:
        """How many seconds a commit of `size` bytes takes, as far as writing a part of it tells.

        Raises SaveFailed unless it fits, with room to spare.
        """
        part = min(size, _PROBE)
        try:
            self._require_space(size)
            latency, whole = self._probe(1), self._probe(part)
        except OSError as error:
            raise self._failed(error, size) from error
        return latency + max(0.0, whole - latency) * size / max(1, part)

    def truncate(self, step: int) -> list[int]:
        """Rename the checkpoints newer than `step` to `abandoned-...`, once `step` is known to be valid."""
        self.verify(step)
        newer = [s for s in self.steps() if s > step]
        for s in newer:
            self._set_aside(s, "abandoned")
        self._point(step)
        return newer

    # ---- inside

    def _checked(self, step: int) -> Manifest:
        found = manifest.check(self.path(step), self.mode)
        if found["step"] != step:  # a renamed folder would continue at the wrong position
            raise manifest.invalid(self.path(step), f"{manifest.FILE} is of step {found['step']}")
        return found

    def _newest_valid(self, broken: dict[int, LdmError]) -> Checkpoint | None:
        """The highest valid step; what is broken above it goes into `broken`."""
        for step in reversed(self.steps()):
            try:
                return Checkpoint(self.path(step), step, self._checked(step))
            except LdmError as error:
                if error.code != INVALID:  # of a newer version: whole, and not ours to judge
                    raise
                broken[step] = error
        return None

    def _set_aside(self, step: int, prefix: str) -> Path:
        target = self.folder / f"{prefix}-{self.path(step).name}"
        count = 1
        while os.path.lexists(target):
            count += 1
            target = self.folder / f"{prefix}-{self.path(step).name}-{count}"
        os.rename(self.path(step), target)
        files.sync_folder(self.folder)
        return target

    def _commit(self, step: int, contents: Mapping[str, Any], about: Mapping[str, Any], size: int) -> None:
        self._require_space(size)
        temp = files.temporary(self.path(step))
        try:
            temp.mkdir()
            listed = {name: _write(temp / name, content) for name, content in contents.items()}
            _write(temp / manifest.FILE, files.json_bytes(manifest.seal({**about, "files": listed})))
            files.sync_folder(temp)
            os.rename(temp, self.path(step))
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
        files.sync_folder(self.folder)

    def _point_and_prune(self, step: int) -> None:
        """Housekeeping after the commit, which stands whether or not this works."""
        try:
            self._point(step)
            self._prune(self.keep_last)
        except OSError as error:
            log.warning("step %d is saved, but tidying %s failed: %s", step, self.folder, error.strerror)

    def _point(self, step: int) -> None:
        files.replace_file(self.folder / "LATEST", files.json_bytes({"step": step, "path": self.path(step).name}))

    def _prune(self, keep_last: int) -> list[int]:
        """Delete what the rotation does not keep; the newest valid one always stays. Returns the deleted steps."""
        steps = self.steps()
        scores = {step: score for step in steps if (score := self._score(step)) is not None}
        best = sorted(scores, key=lambda step: (scores[step], -step))[: self.keep_best]
        keep = {*steps[-keep_last:], *best, *(s for s in steps if self.keep_every and s % self.keep_every == 0)}
        doomed = [step for step in steps if step not in keep]
        if not doomed or (valid := self._newest_valid({})) is None:
            return []
        doomed = [step for step in doomed if step != valid.step]
        for step in doomed:
            # renamed first: a kill in the middle of the deletion leaves no half checkpoint under a valid name
            grave = files.temporary(self.path(step))
            os.rename(self.path(step), grave)
            files.remove_tree(grave)
        return doomed

    def _score(self, step: int) -> float | None:
        try:
            return manifest.read(self.path(step))["score"]
        except LdmError:
            return None

    def _probe(self, size: int) -> float:
        """Seconds for a file of that size, of bytes that no filesystem makes smaller."""
        temp, content = files.temporary(self.folder / "probe"), os.urandom(size)
        began = time.perf_counter()
        try:
            with files.new_file(temp) as file:
                file.write(content)
            return time.perf_counter() - began
        finally:
            temp.unlink(missing_ok=True)

    def _require_space(self, size: int) -> None:
        if self._free() < _HEADROOM * size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _free(self) -> int:
        place = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        found = os.statvfs(place)
        return found.f_bavail * found.f_frsize

    def _failed(self, error: OSError, size: int) -> SaveFailed:
        if error.errno in _FULL:
            limit = f"need {_human(_HEADROOM * size)}, have {_human(self._free())}"
            advice = "free space and rerun the same command"
        else:
            limit = f"{error.strerror}: {error.filename or 'while writing'}"
            advice = "repair the disk or the folder and rerun the same command"
        return SaveFailed(
            "DISK", "checkpoint not saved", where=str(self.folder), limit=limit, next=advice, exit_code=TEMPORARY
        )


def _contents(
    tensors: Mapping[str, Mapping[str, Tensor]], trees: Mapping[str, Any], documents: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """What goes into each file, tensors or bytes, and the aliases of each tensor file."""
    from ldm.checkpoints.codec import split, unalias

    contents: dict[str, Any] = {}
    aliases = {}
    for name, content in _pairs(tensors, trees, documents):
        if name in tensors:
            contents[f"{name}.safetensors"], tied = unalias(content)
            if tied:
                aliases[name] = tied
        elif name in trees:
            contents[f"{name}.safetensors"], skeleton = split(content)
            contents[f"{name}.json"] = files.json_bytes(skeleton)
        else:
            if split(content)[1] != content:
                raise LdmError("CKPT-CODEC", "not plain JSON", where=f"{name}.json", next="save it as a tree")
            contents[f"{name}.json"] = files.json_bytes(content)
    return contents, aliases


def _pairs(*groups: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    names = [name for group in groups for name in group]
    for name in names:
        if names.count(name) > 1 or not manifest.is_file_name(f"{name}.json"):
            raise ValueError(f"{name!r} is given twice, or is no name for a checkpoint's file")
    for group in groups:
        yield from group.items()


def _refuse_non_finite(contents: Mapping[str, Any], path: Path) -> None:
    from ldm.checkpoints.tensorfile import first_non_finite

    for name, content in contents.items():
        if not isinstance(content, bytes) and (culprit := first_non_finite(content)):
            raise LdmError(
                "NON-FINITE",
                f"{culprit} holds NaN or infinity, so the state was not saved",
                where=f"{name} of {path}",
                next="the previous checkpoint is intact: rerun with a lower learning rate or float32",
                exit_code=NON_FINITE,
            )


def _size(content: Any) -> int:
    from ldm.checkpoints.tensorfile import size_of

    return len(content) if isinstance(content, bytes) else size_of(content)


def _write(path: Path, content: Any) -> dict[str, Any]:
    """Write one file; returns its entry in the manifest."""
    from ldm.checkpoints.tensorfile import write_tensors

    with files.new_file(path) as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            write_tensors(file, content)
    count = {} if isinstance(content, bytes) else {"tensors": len(content)}
    return {"size": file.size, "sha256": file.sha256, **count}


def _human(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
