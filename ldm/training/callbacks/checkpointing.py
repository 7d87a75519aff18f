"""When to save, on our own clock; what a checkpoint says of the run."""

from __future__ import annotations

import logging
import platform
import time
from typing import Any

import pytorch_lightning as pl
import torch

from ldm import __version__
from ldm.checkpoints.store import SaveFailed, Store
from ldm.training.callbacks.validation import Validation
from ldm.training.stage_module import StageModule, gathered

log = logging.getLogger(__name__)
VERSIONS = {"ldm": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


class Checkpointing(pl.Callback):
    """Saves every `save_every` steps, every `every_minutes`, at a stop, and finished at the end.

    fingerprint: the settings that a resume must find unchanged.   environment: those that may differ, but are said.
    max_failed_saves: consecutive failures of the disk that training survives.

    Leaves `bad_samples`, the ledgers of all ranks as one, as of the last save.
    """

    def __init__(
        self,
        store: Store,
        validation: Validation,
        *,
        save_every: int,
        fingerprint: dict[str, Any],
        environment: dict[str, Any],
        every_minutes: float | None = None,
        max_failed_saves: int = 3,
    ) -> None:
        self.store, self.validation = store, validation
        self.save_every, self.every_minutes, self.max_failed_saves = save_every, every_minutes, max_failed_saves
        self.fingerprint, self.environment = fingerprint, environment
        self.bad_samples: dict[str, Any] = {"counts": {}, "recent": []}
        self._failed = 0
        self._last = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, module: StageModule, *_: object) -> None:  # type: ignore[override]
        elapsed = time.monotonic() - self._last
        due = self.every_minutes is not None and elapsed > 60 * self.every_minutes
        module.save_due = bool(due and trainer.is_global_zero)

    def on_train_batch_end(self, trainer: pl.Trainer, module: StageModule, *_: object) -> None:  # type: ignore[override]
        outcome = module.outcome
        if outcome is None or module.step.train_step >= module.settings.max_steps:
            return
        if outcome.stop or outcome.save_due or module.step.train_step % self.save_every == 0:
            self.save(trainer, module, finished=False)

    def on_train_end(self, trainer: pl.Trainer, module: StageModule) -> None:  # type: ignore[override]
        if module.step.train_step >= module.settings.max_steps:
            module.finish()
            self.save(trainer, module, finished=True)

    def save(self, trainer: pl.Trainer, module: StageModule, *, finished: bool) -> None:
        failure: SaveFailed | None = None
        ledger = trainer.datamodule.ledger  # type: ignore[attr-defined]
        self.bad_samples = ledger.merged(gathered(ledger.state_dict(module.step.samples_seen)))
        if trainer.is_global_zero:
            try:
                self._commit(module, finished)
            except SaveFailed as error:
                failure = error
        failure = trainer.strategy.broadcast(failure)  # also the barrier: nobody leaves before the commit
        self._last = time.monotonic()
        self._failed = self._failed + 1 if failure else 0
        if failure:
            log.warning("%s (%d of %d)", failure.line(), self._failed, self.max_failed_saves)
            stopping = module.outcome is not None and module.outcome.stop
            if finished or stopping or self._failed > self.max_failed_saves:
                raise failure

    def _commit(self, module: StageModule, finished: bool) -> None:
        results = self.validation.results
        self.store.save(
            module.step.train_step,
            tensors=module.tensors(),
            trees=module.trees(),
            documents={
                "state": {
                    **module.step.state(),
                    **module.describe(),
                    "bad_samples": self.bad_samples,
                    "finished": finished,
                    "fingerprint": self.fingerprint,
                    "environment": self.environment,
                    "versions": VERSIONS,
                },
                "config": module.document(),
            },
            score=results["loss"] if results else None,
        )
