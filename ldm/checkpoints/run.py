"""The folder of a run: who may write it, where its parts are, and how a run is found again.

    runs/<name>/   run.json  config.yaml  lock  errors/  autoencoder/  diffusion/  features/
    runs/LATEST    pointer to the run last trained

One process writes: the parent, or rank 0 under an outer launcher. Other ranks call `write_error` and nothing else.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.checkpoints import files
from ldm.checkpoints.manifest import Verify
from ldm.checkpoints.store import Checkpoint, Store
from ldm.errors import REFUSED, LdmError, nearest

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_NAME = re.compile(r"[a-z0-9_-]{1,64}")
_SECRET = re.compile(r"(^|[^a-z])(token|secret|password|passwd|api_?key)($|[^a-z])", re.IGNORECASE)
_REDACTED = "<redacted>"


@dataclass(frozen=True)
class StagePaths:
    """Where a stage keeps its things; complete on its own."""

    folder: Path

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def bad_samples(self) -> Path:
        return self.folder / "bad_samples.jsonl"

    @property
    def nonfinite(self) -> Path:
        return self.folder / "nonfinite.jsonl"

    @property
    def alarms(self) -> Path:
        return self.folder / "alarms.jsonl"

    @property
    def samples(self) -> Path:
        return self.folder / "samples"

    @property
    def ckpt(self) -> Path:
        return self.folder / "ckpt"

    @property
    def ema(self) -> Path:
        return self.folder / "ema"


class Run:
    """A run opened for writing; holds its lock until `close`. Made by `open_run`.

    record: the content of run.json: {name, created, schema_version, stages: {stage: {wandb_id, exact}}}.
    adopted: stages that this command copied from another run.
    """

    def __init__(self, folder: Path, lock: Lock, record: dict[str, Any], *, is_new: bool = False) -> None:
        self.folder, self.record, self.is_new, self._lock = folder, record, is_new, lock
        self.adopted: set[str] = set()

    def stage(self, name: str) -> StagePaths:
        """The folders of a stage, made if absent."""
        _check_name(name, "a stage")
        paths = StagePaths(self.folder / name)
        paths.samples.mkdir(parents=True, exist_ok=True)
        paths.ckpt.mkdir(exist_ok=True)
        return paths

    def stage_record(self, name: str) -> dict[str, Any]:
        """What run.json says about a stage; `exact` stays true until something happens that a rerun cannot repeat."""
        return {"wandb_id": None, "exact": True, **self.record["stages"].get(name, {})}

    def update_stage(self, name: str, **values: Any) -> None:
        """Change what run.json says about a stage, on disk and here."""
        stages = self.record["stages"] | {name: self.stage_record(name) | values}
        record = self.record | {"stages": stages}
        files.replace_file(self.folder / "run.json", files.json_bytes(record))
        self.record = record

    def write_error(self, rank: int, text: str) -> None:
        write_error(self.folder, rank, text)

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        """Closes it. A new run whose command was refused leaves nothing behind."""
        refused = isinstance(error, LdmError) and error.exit_code == REFUSED
        trained = {step.parents[1].name for step in self.folder.glob("*/ckpt/step-*")} - self.adopted
        if refused and self.is_new and not trained:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.close()


def write_config(folder: Path, text: str) -> None:
    """Keep the composed config (YAML) of a run as a record, without secrets. It is never read back."""
    import yaml

    clean = yaml.safe_dump(redact(yaml.safe_load(text)), sort_keys=False, allow_unicode=True)
    files.replace_file(folder / "config.yaml", clean.encode())


def point_latest(folder: Path) -> None:
    """Make this run the default of `run=`."""
    files.replace_file(folder.parent / "LATEST", files.json_bytes({"run": folder.name}))


def open_run(output_dir: Path | str, name: str, *, steal_lock: bool = False, trust_dir: bool = False) -> Run:
    """Make or reopen `output_dir/name` and lock it.

    Raises LdmError (exit code 2): bad name, a folder that cannot be written or belongs to another user (unless
    `trust_dir`), another writer, a dead writer on another host (unless `steal_lock`), an unreadable run.json.
    """
    _check_name(name, "a run")
    folder = Path(output_dir) / name
    _check_owner(folder, trust_dir)
    is_new = not folder.exists()
    _probe(folder)
    lock = Lock(folder / "lock", steal=steal_lock)
    try:
        files.remove_leftovers(folder)
        (folder / "errors").mkdir(exist_ok=True)
        (folder / "errors" / "first.txt").unlink(missing_ok=True)
        return Run(folder, lock, _record(folder), is_new=is_new)
    except BaseException:
        lock.release()
        raise


def find_run(path: Path | str | None = None, output_dir: Path | str = "runs", *, where: str = "run") -> Path:
    """What `run=` means: a path, the name of a run in `output_dir`, or, when absent, the run last trained.

    A path may also be an exported folder or a file; the caller looks inside.   where: the key that names it.
    Raises LdmError (exit code 2).
    """
    output_dir = Path(output_dir)
    runs = _runs_in(output_dir)
    if path is not None:
        for found in (Path(path), output_dir / path):
            if found.is_file() and found.name == "LATEST":
                return find_run(None, found.parent, where=where)
            if found.exists():
                if inside := [] if (found / "run.json").exists() else _runs_in(found):
                    shown = [f"{where}={found / name}" for name in inside[:12]] + ["..."] * (len(inside) > 12)
                    hint = "choose one: " + ", ".join(shown)
                    raise LdmError("RUN", "this folder holds runs and is none", where=f"{where}={path}", next=hint)
                return found
        known = [*runs, *_runs_in(Path(path).parent)]
        hint = nearest(Path(path).name, known) if known else f"name a run's folder; {output_dir}/ holds none"
        raise LdmError("RUN", "there is no such run", where=f"{where}={path}", next=hint)
    if not runs:
        raise LdmError("RUN", "nothing has been trained yet", where=str(output_dir), next="run: python train.py")
    try:
        name = files.read_json(output_dir / "LATEST")["run"]
    except (OSError, ValueError, KeyError, TypeError):
        name = None
    if name not in runs:
        what = "LATEST names no run" if name is None else f"LATEST names {str(name)[:64]!r}, which is gone"
        raise LdmError("RUN", what, where=str(output_dir), next=f"choose with {where}=PATH; {nearest('', runs)}")
    return output_dir / name


def _runs_in(folder: Path) -> list[str]:
    return sorted(entry.parent.name for entry in folder.glob("*/run.json"))


def open_stage(run: Path, stage: str, *, verify: Verify = "hash") -> Checkpoint:
    """The newest checkpoint of a stage, for reading. Raises LdmError when there is none, or when it is damaged."""
    advice = "the training command of this run with resume.fallback=true sets it aside and goes on from there"
    checkpoint = Store(run / stage / "ckpt", verify=verify).newest(advice=advice)
    if checkpoint is None:
        is_run = (run / "run.json").exists()
        raise LdmError(
            "NO-CHECKPOINT",
            f"the stage {stage!r} of this run has no checkpoint" if is_run else f"no run with a stage {stage!r}",
            where=str(run / stage if is_run else run),
            next=f"train it: python train.py name={run.name} stages=[{stage}]" if is_run else "name a run's folder",
        )
    return checkpoint


def has_stage(run: Path, stage: str) -> bool:
    """Whether the run has a checkpoint of it."""
    return bool(Store(run / stage / "ckpt").steps())


def open_autoencoder(run: Path, *, verify: Verify = "hash") -> Checkpoint:
    """The finished autoencoder of a run, as `open_stage`; one whose latents were not measured yet is refused."""
    checkpoint = open_stage(run, "autoencoder", verify=verify)
    if not checkpoint.document("state")["finished"]:
        raise LdmError(
            "LATENTS",
            "the training of the autoencoder did not finish: it has no latent statistics yet",
            where=str(run / "autoencoder"),
            next=f"finish it: python train.py name={run.name} stages=[autoencoder]",
        )
    return checkpoint


def write_error(folder: Path, rank: int, text: str) -> None:
    """Keep the traceback of a rank in `errors/rank<k>.txt`, and the job's first one in `errors/first.txt`.

    Safe on any rank and in any state of the job: no lock, no collective.
    """
    errors = folder / "errors"
    errors.mkdir(parents=True, exist_ok=True)
    content = f"rank {rank}, {_now()}\n{redact(text)}\n".encode()
    files.replace_file(errors / f"rank{rank}.txt", content)
    try:
        with files.new_file(errors / "first.txt") as file:
            file.write(content)
    except FileExistsError:
        pass


def redact(value: Any) -> Any:
    """A copy of a config or a text without secrets.

    Hidden are values under keys with the word token, secret, password or api_key, and the values of environment
    variables of such names wherever they occur. Interpolations (`${...}`) stay: they name a secret, they hold none.
    """
    secrets = sorted((v for k, v in os.environ.items() if _SECRET.search(k) and len(v) >= 8), key=len, reverse=True)
    return _redact(value, secrets)


def _redact(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {k: _REDACTED if _is_secret(k, v) else _redact(v, secrets) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(child, secrets) for child in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, _REDACTED)
    return value


def _is_secret(key: Any, value: Any) -> bool:
    """pad_token: 49407 and token: null hide nothing; hf_token: ${oc.env:HF_TOKEN} names its source."""
    named = isinstance(value, str) and re.fullmatch(r"\$\{[^,{}]*\}", value)
    plain = value is None or isinstance(value, bool | int | float) or value == ""
    return isinstance(key, str) and _SECRET.search(key) is not None and not named and not plain


class Lock:
    """The right to write a run: flock for this machine, and host and pid for the others and for the message.

    The kernel drops the flock of a killed process, so what it leaves behind is recovered without asking. On another
    host nobody can tell whether the holder lives; `steal` is the user's word for it.
    """

    def __init__(self, path: Path, *, steal: bool = False) -> None:
        self.path = path
        self._handle: int | None = self._open()
        try:
            self._acquire(steal)
        except BaseException:
            self._close()
            raise
        # a forked data worker that outlives us must not keep the lock
        os.register_at_fork(after_in_child=self._close)

    def release(self) -> None:
        if self._handle is not None:
            os.ftruncate(self._handle, 0)
            self._close()

    def _acquire(self, steal: bool) -> None:
        assert self._handle is not None
        host = os.uname().nodename
        holder = self._holder()
        elsewhere = bool(holder) and holder.get("host") != host
        if not self._try():
            if not (elsewhere and steal):
                raise _locked(self.path, holder, "wait for it, or stop it" if not elsewhere else _STEAL)
            self._close()  # its flock is out of reach: leave it the old file and lock a new one
            self.path.unlink()
            self._handle = self._open()
            if not self._try():
                raise _locked(self.path, self._holder(), "wait for it, or stop it")
        elif elsewhere and not steal:
            raise _locked(self.path, holder, _STEAL)
        if holder:
            log.warning("%s: recovered the lock of pid %s on %s", self.path, holder.get("pid"), holder.get("host"))
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, json.dumps({"host": host, "pid": os.getpid()}).encode(), 0)
        os.fsync(self._handle)

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)

    def _try(self) -> bool:
        assert self._handle is not None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _holder(self) -> dict[str, Any]:
        assert self._handle is not None
        try:
            found = json.loads(os.pread(self._handle, 4096, 0))
        except ValueError:  # empty: released; torn: killed while writing, before it did anything
            return {}
        return found if isinstance(found, dict) else {}

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


_STEAL = "if that process is gone for sure: add resume.steal_lock=true"


def _locked(path: Path, holder: Mapping[str, Any], advice: str) -> LdmError:
    who = f"held by pid {holder.get('pid', '?')} on {holder.get('host', '?')}"
    return LdmError("LOCKED", "another process writes this run", where=str(path.parent), limit=who, next=advice)


def _check_name(name: str, kind: str) -> None:
    if not _NAME.fullmatch(name):
        raise LdmError(
            "NAME",
            f"{name!r} cannot name {kind}",
            where="name",
            limit="1 to 64 of a-z, 0-9, _ and -",
            next="choose another name=",
        )


def _check_owner(folder: Path, trusted: bool) -> None:
    """A folder that another user prepared may hold anything."""
    if folder.exists() and folder.stat().st_uid != os.geteuid() and not trusted:
        raise LdmError(
            "RUN-FOLDER",
            "the run belongs to another user",
            where=str(folder),
            limit=f"owner uid {folder.stat().st_uid}, yours {os.geteuid()}",
            next="choose another name=, or add resume.trust_dir=true if you trust its content",
        )


def _probe(folder: Path) -> None:
    """Try at once what a save will need in an hour: write, sync, rename."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / "probe"
        files.replace_file(probe, b"")
        probe.unlink()
    except OSError as error:
        raise LdmError(
            "RUN-FOLDER",
            f"the run folder cannot be written: {error.strerror}",
            where=str(folder.absolute()),
            limit=f"uid {os.geteuid()}",
            next="choose another output_dir= or make the folder writable",
        ) from error


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.exists():
        record = {"name": folder.name, "created": _now(), "schema_version": SCHEMA_VERSION, "stages": {}}
        files.replace_file(path, files.json_bytes(record))
        return record
    try:
        record = files.read_json(path)
        version, _ = record["schema_version"], record["stages"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        advice = "restore it from a copy or start a new run with name=..."
        raise LdmError("RUN-FOLDER", "run.json cannot be read", where=str(path), next=advice) from error
    if version > SCHEMA_VERSION:
        limit = f"schema_version {version}, this ldm reads up to {SCHEMA_VERSION}"
        raise LdmError("RUN-FOLDER", "written by a newer ldm", where=str(path), limit=limit, next="update ldm")
    return record


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
