"""Stop signals: a handler sets a flag and returns; the step that is running is finished, saved, and then we leave."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import pytorch_lightning as pl

from ldm.errors import INTERRUPTED, TEMPORARY, TERMINATED, LdmError
from ldm.training.stage_module import StageModule

STOPS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED, signal.SIGUSR1: TERMINATED}


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


class StopOnSignal(pl.Callback):
    """Installs the handlers now, and again after Lightning has registered its own; `restore` puts the old ones back.

    A second signal leaves at once with code 75; the previous checkpoint is intact.
    """

    def __init__(self, module: StageModule) -> None:
        self.received: int | None = None
        self._old: dict[int, Any] = {}
        self._module = module
        self.install()

    def install(self) -> None:
        for number in STOPS:
            old = signal.signal(number, self._handle)
            self._old.setdefault(number, old)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.install()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number != signal.SIGUSR1:
            os._exit(TEMPORARY)
        self.received = number
        self._module.stop_due = True

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}
