"""Validation on the held-out set, from the averaged weights, at the same noise every time."""

from __future__ import annotations

from contextlib import nullcontext

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from ldm.training.stage_module import StageModule


class Validation(pl.Callback):
    """Every `every` steps and at the last one. Leaves `results` (means over the valid samples of all ranks)."""

    def __init__(self, every: int | None, batch_size: int = 64) -> None:
        self.every, self.batch_size = every, batch_size
        self.results: dict[str, float] | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, module: StageModule, *_: object) -> None:  # type: ignore[override]
        self.results = None
        if module.outcome is None or self.every is None or trainer.datamodule.num_val == 0:  # type: ignore[attr-defined]
            return
        step = module.step.train_step
        if step % self.every == 0 or step >= module.settings.max_steps:
            self.results = self.run(trainer, module)

    @torch.no_grad()
    def run(self, trainer: pl.Trainer, module: StageModule) -> dict[str, float]:
        sums: dict[str, torch.Tensor] = {}
        count = torch.zeros((), dtype=torch.float64)
        module.eval()
        averages = module.step.ema.applied() if module.step.ema else nullcontext()
        with averages, trainer.precision_plugin.forward_context():
            for batch in trainer.datamodule.val_dataloader(self.batch_size):  # type: ignore[attr-defined]
                batch = batch.to(module.device)
                count += batch.valid.sum().cpu()
                for name, values in module.validation_terms(batch).items():
                    total = values.double()[batch.valid].sum().cpu()
                    sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + total
        module.train()
        table = torch.stack([count, *sums.values()]).to(module.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(table)
        table = table.cpu()
        return {name: float(table[i + 1] / table[0]) for i, name in enumerate(sums)}
