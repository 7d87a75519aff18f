"""Several devices on one machine: one process each, started, watched and ended by the command itself.

Why not torch's elastic launcher: see docs/scaling.md.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ldm.checkpoints.run import write_error
from ldm.errors import INTERRUPTED, REFUSED, TEMPORARY, TERMINATED, LdmError, classified
from ldm.training.group import losses_named
from ldm.training.place import Place
from ldm.training.signals import REPEAT_S, Stopped, handling, leave_now, left_at_once, not_saved

PATIENCE_S = 7.0
"""How long the others may take to end by themselves, once a process has failed; then they are ended."""
PARTING_S = 60.0
"""How long they may take once one has ended well."""
_STACK_S = 0.5  # for a process to write where it is
_SHOW_STACK = signal.SIGUSR2


def local_devices(node: Mapping[str, Any]) -> int:
    """How many devices of this machine the trainer config asks for."""
    devices = node["devices"]
    if devices == "auto":
        return max(1, torch.cuda.device_count()) if node["accelerator"] in ("gpu", "cuda") else 1
    if node["accelerator"] in ("gpu", "cuda") and int(devices) > torch.cuda.device_count():
        raise LdmError(
            "DEVICE",
            "there are fewer GPUs than asked for",
            where="trainer.devices",
            limit=f"{torch.cuda.device_count()} found, {devices} asked for",
            next="trainer=cpu, or fewer trainer.devices",
        )
    return int(devices)


def launch(cfg: Mapping[str, Any], trusted: tuple[str, ...], stage: str, folder: Path) -> None:
    """Trains `stage` in one process a device, each with this configuration, and waits.

    A stop signal to this process is passed on; the workers finish their step, save, and report how they ended. A
    worker that fails takes the others with it within 10 seconds, and the first error of any is raised here.
    """
    count = local_devices(cfg["trainer"])
    if int(cfg["trainer"]["nodes"]) != 1:
        raise LdmError(
            "LAUNCH", "several nodes need torchrun or SLURM", where="trainer.nodes", next="see docs/scaling.md"
        )
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    context = multiprocessing.get_context("spawn")
    workers = []
    for rank in range(count):
        place = Place(rank, rank, count, nodes=1)
        (said, sender), (stack, stack_sender) = (context.Pipe(duplex=False) for _ in range(2))
        arguments = (dict(cfg), trusted, stage, str(folder), place, environment, os.getpid(), sender, stack_sender)
        workers.append(_Worker(rank, context.Process(target=_work, args=arguments), said, stack, sender))
    watch = _Watch(workers, folder, grace_s=float(cfg["checkpoint"]["grace_s"]))
    with handling(watch.on_signal):
        error = watch.run()
    if error is None and watch.signals:  # it came when all had finished
        error = Stopped(watch.signals[0][0], int(cfg["stage"][stage]["max_steps"]))
    if error is not None:
        raise error


# ---- in the parent


@dataclass
class _Worker:
    """One process, and what is known of it.

    report: the error it ended with, "done", or None while it says nothing.   at: when it said so, or was found dead.
    """

    rank: int
    process: Any
    said: connection.Connection
    stack: connection.Connection
    sender: connection.Connection
    report: LdmError | str | None = None
    at: float = 0.0

    def start(self) -> None:
        self.process.start()
        self.sender.close()  # this end's copy: so that the pipe ends with the worker

    def look(self) -> None:
        """Take in what it has said, or that it ended without a word."""
        alive = self.process.is_alive()  # asked first: what it said before it ended is then there to read
        if self.report is not None:
            return
        with suppress(EOFError, OSError):
            if self.said.poll():
                self.report, text, self.at = self.said.recv()
                if isinstance(self.report, LdmError):
                    self.report.recorded = True
                    self.report.__cause__ = _InWorker(f"rank {self.rank}\n{text}")
        if not alive and self.report is None:
            self.report, self.at = self._death(), time.monotonic()

    def _death(self) -> LdmError:
        code = self.process.exitcode
        return LdmError(
            "WORKER",
            f"worker {self.rank} died: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}",
            next="often memory ran out; run the same command again to continue from the last checkpoint",
            exit_code=TEMPORARY,
        )

    def show_stack(self) -> str:
        """Where it is now, in every thread."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, _SHOW_STACK)
        text = b""
        while self.stack.poll(_STACK_S):
            text += os.read(self.stack.fileno(), 65536)
        return text.decode(errors="replace")

    @property
    def failed(self) -> bool:
        return isinstance(self.report, LdmError) and not isinstance(self.report, Stopped)


@dataclass
class _Watch:
    """Waits for the workers, and sees to it that all of them end."""

    workers: list[_Worker]
    folder: Path
    grace_s: float
    signals: list[tuple[int, float]] = field(default_factory=list)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals.append((number, time.monotonic()))

    def run(self) -> LdmError | None:
        """How it ended: None if all is well."""
        told, verdict = False, None
        try:
            for worker in self.workers:
                worker.start()
            while verdict is None and (alive := [w for w in self.workers if w.process.is_alive()]):
                connection.wait([w.process.sentinel for w in alive] + [w.said for w in alive if not w.report], 0.1)
                for worker in self.workers:
                    worker.look()
                if self.signals and not told:
                    told = True
                    for worker in alive:
                        with suppress(ProcessLookupError):
                            os.kill(worker.process.pid, self.signals[0][0])
                verdict = self._overdue()
            if verdict is None:
                for worker in self.workers:
                    worker.look()
                verdict = self._first_error()
        finally:
            for worker in self.workers:
                if worker.process.pid is not None:
                    worker.process.kill()
                    worker.process.join()
        if verdict is not None:
            verdict.recorded = True  # errors/ has what the ranks said, which is more
        return verdict

    def _overdue(self) -> LdmError | None:
        """Why those that still run are to be ended now, if they are."""
        now = time.monotonic()
        if self.signals:
            first = self.signals[0][1]
            if any(again != signal.SIGUSR1 and at - first > REPEAT_S for again, at in self.signals):
                return left_at_once()
            if now - first > self.grace_s:
                return LdmError(
                    "GRACE",
                    "the workers did not save in time and were ended",
                    where="checkpoint.grace_s",
                    limit=f"{self.grace_s:g} s",
                    next="run the same command again: it continues from the last checkpoint",
                    exit_code=TEMPORARY,
                )
        ended = (worker for worker in self.workers if worker.report is not None)
        if any(now - worker.at > (PATIENCE_S if worker.failed else PARTING_S) for worker in ended):
            return self._first_error(self._silent())
        return None

    def _silent(self) -> LdmError | None:
        """Of those that say nothing, where they are: kept in errors/, and the first of them in words."""
        found = None
        for worker in (w for w in self.workers if w.report is None):
            stack = worker.show_stack()
            _keep(self.folder, worker.rank, f"did not answer, and was here:\n{stack}")
            calls = re.findall(r'File "[^"]*?([^/"]+/[^/"]+)", line (\d+) in (\w+)', stack)
            file, line, function = calls[0] if calls else ("?", "?", "?")
            found = found or LdmError(
                "PEER",
                f"rank {worker.rank} did not answer",
                where=f"in {function}, {file}:{line}",
                next=f"read {self.folder / 'errors' / f'rank{worker.rank}.txt'}; rerun the same command to resume",
                exit_code=TEMPORARY,
            )
        return found

    def _first_error(self, silent: LdmError | None = None) -> LdmError | None:
        """The first cause: a rank that lost another one is none, unless nobody else failed.

        silent: in words, a rank that had to be ended because it said nothing.
        """
        errors = sorted((w for w in self.workers if isinstance(w.report, LdmError)), key=lambda worker: worker.at)
        if self.signals and any(worker.process.exitcode == -self.signals[0][0] for worker in errors):
            return not_saved(self.signals[0][0])  # it came before they had a handler
        reports: list[Any] = [w.report for w in errors if w.failed] + [w.report for w in errors]
        causes = [report for report in reports if report.code != "PEER" and not isinstance(report, Stopped)]
        return next(iter([*causes, *([silent] if silent else []), *reports]), None)


# ---- in the workers


def _work(
    cfg: dict[str, Any],
    trusted: tuple[str, ...],
    stage: str,
    folder: str,
    place: Place,
    environment: dict[str, str],
    parent: int,
    sender: connection.Connection,
    stack: connection.Connection,
) -> None:
    """One rank. Leaves with the exit code that says how it ended."""
    die_with_parent(parent)
    os.setpgid(0, 0)  # a Ctrl-C in the terminal reaches the parent alone, which passes it on once
    faulthandler.register(_SHOW_STACK, file=stack.fileno())  # answers even where the interpreter waits in C
    os.environ.update(place.environment())
    os.environ.update(environment)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.world_size))
    with handling(leave_now), _Report(sender, Path(folder), place.rank), losses_named():
        from ldm.training.run_stage import run_stage

        run_stage(cfg, trusted, stage, Path(folder), place)


class _Report:
    """Tells the parent how this rank ended, keeps the traceback of an error in errors/, and leaves with the exit code.

    That is the last thing that happens here: after a failure no word may go to the group and no destructor may wait
    for it, and an interpreter that ends in good order takes a second.
    """

    def __init__(self, sender: connection.Connection, folder: Path, rank: int) -> None:
        self.sender, self.folder, self.rank = sender, folder, rank

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, frames: object) -> None:
        failure = error if isinstance(error, LdmError) else classified(error) if error is not None else None
        text = "".join(traceback.format_exception(error)) if error is not None else ""
        if failure is not None and failure.exit_code not in (REFUSED, INTERRUPTED, TERMINATED):
            _keep(self.folder, self.rank, text)
            if failure.code == "UNCLASSIFIED":
                failure.next = f"read {self.folder / 'errors' / f'rank{self.rank}.txt'}, or " + failure.next
        self.sender.send((failure or "done", text, time.monotonic()))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0 if failure is None else failure.exit_code)


def _keep(folder: Path, rank: int, text: str) -> None:
    """In errors/, unless the disk is full, or the run folder is gone: then a new one would only hide the old."""
    if folder.is_dir():
        with suppress(OSError):
            write_error(folder, rank, text)


class _InWorker(Exception):
    """The traceback of a worker, as the cause of what the parent raises."""


def die_with_parent(parent: int | None = None) -> None:
    """On Linux the kernel ends this process when its parent is killed. parent: who that must be, if known."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:  # it died before that
        os._exit(TEMPORARY)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
