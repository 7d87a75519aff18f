"""Writes the averages that post-hoc reconstruction needs, on our own clock."""

from __future__ import annotations

import logging

import pytorch_lightning as pl
import torch

from ldm.checkpoints.snapshots import Snapshot, Snapshots
from ldm.errors import LdmError
from ldm.training.ema import EMA, PowerFunction
from ldm.training.stage_module import StageModule

log = logging.getLogger(__name__)


class AverageSnapshots(pl.Callback):
    """The power-function averages, every `every` steps and after the last, before the checkpoint of that step.

    dtype: of the files.   A snapshot that the disk refuses is missing, which is said: training does not need it.
    """

    def __init__(self, snapshots: Snapshots, every: int, dtype: torch.dtype) -> None:
        self.snapshots, self.every, self.dtype = snapshots, every, dtype

    def on_train_start(self, trainer: pl.Trainer, module: StageModule) -> None:  # type: ignore[override]
        lengths = _lengths(module.step.ema)
        if not lengths or not trainer.is_global_zero:
            return
        assert module.step.ema is not None
        numbers = len(lengths) * sum(value.numel() for value in module.step.ema.averages.values())
        size, count = numbers * self.dtype.itemsize / 1e6, -(-module.settings.max_steps // self.every)
        print(
            f"{module.stage}: averages of length {', '.join(f'{v:g}' for v in lengths.values())}, a snapshot of "
            f"{size:.3g} MB every {self.every} steps: {count * size:.3g} MB in all, in {self.snapshots.store.folder}",
            flush=True,
        )

    def on_train_batch_end(self, trainer: pl.Trainer, module: StageModule, *_: object) -> None:  # type: ignore[override]
        ema = module.step.ema
        if ema is None or not trainer.is_global_zero or not module.due(self.every):
            return
        if lengths := _lengths(ema):
            snapshot = Snapshot(module.step.train_step, module.step.counters.updates, lengths)
            tensors = {name: {k: v.to(self.dtype) for k, v in ema.further[name].items()} for name in lengths}
            try:
                self.snapshots.save(snapshot, tensors)
            except LdmError as error:  # a full disk, or numbers beyond float16
                log.warning("%s; this snapshot of the averages is missing", error.line())


def _lengths(ema: EMA | None) -> dict[str, float]:
    """Of the power-function averages, by the names of their files."""
    profiles = ema.profiles if ema is not None else {}
    return {name: p.length for name, p in profiles.items() if isinstance(p, PowerFunction)}
