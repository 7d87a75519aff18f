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


class StopOnSignal(pl.Callback):
    """Installs the handlers after Lightning has registered its own, and puts the old ones back at the end.

    A second signal leaves at once with code 75; the previous checkpoint is intact.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._old: dict[int, Any] = {}
        self._module: StageModule | None = None

    def on_train_start(self, trainer: pl.Trainer, module: StageModule) -> None:  # type: ignore[override]
        self._module = module
        for number in STOPS:
            self._old[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number != signal.SIGUSR1:
            os._exit(TEMPORARY)
        self.received = number
        if self._module is not None:
            self._module.stop_due = True

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.restore()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.restore()

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}
