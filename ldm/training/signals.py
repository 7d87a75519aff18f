"""Stop signals: a handler sets a flag and returns; the step that is running is finished, saved, and then we leave."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytorch_lightning as pl

from ldm.errors import INTERRUPTED, TEMPORARY, TERMINATED, LdmError
from ldm.training.stage_module import StageModule

STOPS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED, signal.SIGUSR1: TERMINATED}

REPEAT_S = 1.0
"""A signal so soon after the first is the same one: `timeout`, SLURM and systemd send to a group and to its leader."""


class Stopped(LdmError):
    """Training was stopped by a signal, after a checkpoint."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step
        super().__init__(
            "STOPPED",
            f"stopped by {signal.Signals(number).name} at step {step}, saved",
            next="run the same command again to continue",
            exit_code=STOPS[signal.Signals(number)],
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Stopped, (self.number, self.step)


def not_saved(number: int) -> LdmError:
    """Stopped before a step could be finished: nothing was saved, nothing was lost."""
    return LdmError(
        "STOPPED",
        f"stopped by {signal.Signals(number).name} before a step was finished, nothing to save",
        next="run the same command again to continue",
        exit_code=STOPS[signal.Signals(number)],
    )


def left_at_once() -> LdmError:
    """The answer to a second signal."""
    return LdmError(
        "STOPPED",
        "stopped at once by a second signal, without saving",
        next="run the same command again to continue from the checkpoint before",
        exit_code=TEMPORARY,
    )


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """`handler` for the three stop signals, the old ones afterwards; but what came to be ignored remains so."""
    old = {number: signal.signal(number, handler) for number in STOPS}
    try:
        yield
    finally:
        _put_back(old)


def _put_back(old: Mapping[Any, Any]) -> None:
    for number, before in old.items():
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, before)


def leave_now(number: int, frame: FrameType | None) -> None:
    """A handler for the time in which there is nothing to save."""
    raise not_saved(number)


class StopOnSignal(pl.Callback):
    """Installs its handlers now, and again after Lightning has registered its own; `restore` puts the old ones back.

    Before training has begun a signal ends it there. Afterwards it sets `module.stop_due`, which the next step tells
    to all ranks.
    only_process: the job has no other, and a second signal, a second or more after the first, leaves at once with code
    75; the previous checkpoint is intact. Of several processes the launcher decides that.
    """

    def __init__(self, module: StageModule, *, only_process: bool) -> None:
        self.received: int | None = None
        self._module, self._only_process = module, only_process
        self._began = False
        self._since = 0.0
        self._old: dict[int, Any] = {}
        self.install()

    def install(self) -> None:
        for number in STOPS:
            old = signal.signal(number, self._handle)
            self._old.setdefault(number, old)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._began = True
        self.install()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
            self._module.stop_due = True
            if not self._began:
                leave_now(number, frame)
        elif self._only_process and number != signal.SIGUSR1 and time.monotonic() - self._since > REPEAT_S:
            os.write(2, (left_at_once().line() + "\n").encode())  # of print's buffers nobody knows the state here
            os._exit(TEMPORARY)

    def restore(self) -> None:
        _put_back(self._old)
        self._old = {}
