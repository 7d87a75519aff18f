"""When to save, on our own clock; what a checkpoint says of the run."""

from __future__ import annotations

import contextlib
import logging
import math
import platform
import time
from typing import Any

import pytorch_lightning as pl
import torch

from ldm import __version__
from ldm.checkpoints.background import DEADLINE_S, Result, Writer
from ldm.checkpoints.codec import split
from ldm.checkpoints.store import SaveFailed, Store
from ldm.errors import LdmError
from ldm.training.agreement import check_ranks
from ldm.training.callbacks.validation import Validation
from ldm.training.ranks import gathered
from ldm.training.stage_module import StageModule

log = logging.getLogger(__name__)
VERSIONS = {"ldm": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


class Checkpointing(pl.Callback):
    """Saves every `save_every` steps, every `every_minutes`, at a stop, and finished at the end.

    fingerprint: the settings that a resume must find unchanged.   environment: those that may differ, but are said.
    max_failed_saves: consecutive failures of the disk that training survives.
    async_save: training goes on while a copy of the state is written. What rank 0 finds when that ends, every rank
        knows after the next step. At a stop and at the end all wait for the commit.
    grace_s: how long a stop, or an error, waits for a commit that was begun before.

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
        async_save: bool = False,
        grace_s: float = 30.0,
    ) -> None:
        self.writer, self.validation = Writer(store, background=async_save), validation
        self.save_every, self.every_minutes, self.max_failed_saves = save_every, every_minutes, max_failed_saves
        self.fingerprint, self.environment = fingerprint, environment
        self.bad_samples: dict[str, Any] = {"counts": {}, "recent": []}
        self.grace_s = grace_s
        self._result, self._failed = Result(), 0.0
        self._last = time.monotonic()
        self._estimated = False

    def on_train_batch_start(self, trainer: pl.Trainer, module: StageModule, *_: object) -> None:  # type: ignore[override]
        elapsed = time.monotonic() - self._last
        due = self.every_minutes is not None and elapsed > 60 * self.every_minutes
        module.save_due = bool(due and trainer.is_global_zero)
        self._result = self.writer.result
        module.failed_saves = self._result.failed

    def on_train_batch_end(self, trainer: pl.Trainer, module: StageModule, *_: object) -> None:  # type: ignore[override]
        outcome = module.outcome
        if outcome is None:
            return
        if trainer.is_global_zero and not self._estimated:
            self._estimate(module, several=trainer.world_size > 1)
        self._report(trainer, outcome.failed_saves)
        if module.step.train_step >= module.settings.max_steps:
            return
        if outcome.stop or outcome.save_due or module.step.train_step % self.save_every == 0:
            self.save(trainer, module, wait=outcome.stop)

    def on_train_end(self, trainer: pl.Trainer, module: StageModule) -> None:  # type: ignore[override]
        if module.step.train_step >= module.settings.max_steps:
            module.finish()
            self.save(trainer, module, wait=True, finished=True)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """What was good when it was copied is committed, as far as there is time: of several ranks the launcher ends
        those that do not follow the first that failed within seven seconds.
        """
        with contextlib.suppress(LdmError):
            self.writer.join(self.grace_s if trainer.world_size == 1 else min(5.0, self.grace_s))

    def _estimate(self, module: StageModule, *, several: bool) -> None:
        """After the first step, when the whole state exists: does it fit the disk, and the time that a stop leaves?

        Several ranks are ended by their launcher when `grace_s` is over, and a commit beside training is not waited for
        any longer; of those a stop may find one under way.
        """
        self._estimated = True
        tensors, _ = split([*map(dict, module.tensors().values()), module.trees()])
        size = sum(tensor.nbytes for tensor in tensors.values())
        try:
            seconds = self.writer.store.expect(size)
        except SaveFailed as error:
            log.warning("%s; training goes on, and %d failed saves end it", error.line(), self.max_failed_saves + 1)
            return
        if (several or self.writer.background) and seconds * (1 + self.writer.background) > self.grace_s:
            log.warning(
                "a checkpoint of %.3g GB takes about %.0f s here%s, and a stop leaves checkpoint.grace_s=%g: raise "
                "that, and what your launcher leaves after a signal",
                *(size / 1e9, seconds, ", a stop may need two" if self.writer.background else "", self.grace_s),
            )

    def save(self, trainer: pl.Trainer, module: StageModule, *, wait: bool, finished: bool = False) -> None:
        """wait: nobody goes on before the commit, and if it fails, nobody goes on."""
        check_ranks(module)
        ledger = trainer.datamodule.ledger  # type: ignore[attr-defined]
        self.bad_samples = ledger.merged(gathered(ledger.state_dict(module.step.samples_seen)))
        if trainer.is_global_zero:
            self._write(module, finished, wait)
        self._last = time.monotonic()
        if wait or not self.writer.background:
            self._result = self.writer.result
            failed = trainer.strategy.broadcast(self._result.failed)  # also the barrier
            self._report(trainer, math.inf if wait and failed else failed)

    def _report(self, trainer: pl.Trainer, failed: float) -> None:
        """failed: what rank 0 found, which every rank knows now."""
        if failed > self.max_failed_saves:
            error = trainer.strategy.broadcast(self._result.error)
            assert error is not None
            raise error
        if failed != self._failed and self._result.error is not None:
            log.warning("%s (%d of %d)", self._result.error.line(), failed, self.max_failed_saves)
        self._failed = failed

    def _write(self, module: StageModule, finished: bool, wait: bool) -> None:
        results = self.validation.results
        self.writer.save(
            module.step.train_step,
            wait=wait,
            deadline_s=self.grace_s if module.outcome is not None and module.outcome.stop else DEADLINE_S,
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
