"""Validation on the held-out set, from the averaged weights, at the same noise every time."""

from __future__ import annotations

import math

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from ldm.training.ranks import several
from ldm.training.stage_module import StageModule


class Validation(pl.Callback):
    """Every `every` steps and at the last one.

    Leaves `results`: means over the valid samples of all ranks, and what the module says of the set as a whole. None
    too where a stop signal on any rank has cut it short: nobody waits for a whole set to be gone through.
    """

    def __init__(self, every: int | None) -> None:
        self.every = every
        self.results: dict[str, float] | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, module: StageModule, *_: object) -> None:  # type: ignore[override]
        self.results = None
        if module.due(self.every) and trainer.datamodule.num_val:  # type: ignore[attr-defined]
            self.results = self.run(trainer, module)

    def run(self, trainer: pl.Trainer, module: StageModule) -> dict[str, float] | None:
        sums: dict[str, torch.Tensor] = {}  # by name: total and number of samples that have it, in float64
        with module.averaged(), trainer.precision_plugin.forward_context():
            for batch in trainer.datamodule.val_dataloader(module.evaluation_batch):  # type: ignore[attr-defined]
                batch = batch.to(module.device)
                for name, values in module.validation_terms(batch).items():
                    own = torch.stack([torch.where(batch.valid, values.double(), 0).sum(), batch.valid.sum()])
                    sums[name] = sums[name] + own if name in sums else own
                if _any_rank(module.stop_due, module.device):
                    return None
            summary = module.validation_summary()
        table = torch.stack([*sums.values()])
        if several():
            dist.all_reduce(table)
        means = (total / count if count else math.nan for total, count in table.tolist())
        return dict(zip(sums, means, strict=True)) | summary


def _any_rank(flag: bool, device: torch.device) -> bool:
    """Every rank takes part: all have equally many batches."""
    if not several():
        return flag
    control = torch.tensor(float(flag), device=device)
    dist.all_reduce(control, op=dist.ReduceOp.MAX)
    return bool(control)
