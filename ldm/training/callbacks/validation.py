"""Validation on the held-out set, from the averaged weights, at the same noise every time."""

from __future__ import annotations

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
        if module.due(self.every) and trainer.datamodule.num_val:  # type: ignore[attr-defined]
            self.results = self.run(trainer, module)

    def run(self, trainer: pl.Trainer, module: StageModule) -> dict[str, float]:
        sums: dict[str, torch.Tensor] = {}
        count = torch.zeros((), dtype=torch.float64)
        with module.averaged(), trainer.precision_plugin.forward_context():
            for batch in trainer.datamodule.val_dataloader(self.batch_size):  # type: ignore[attr-defined]
                batch = batch.to(module.device)
                count += batch.valid.sum().cpu()
                for name, values in module.validation_terms(batch).items():
                    total = values.double()[batch.valid].sum().cpu()
                    sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + total
        table = torch.stack([count, *sums.values()]).to(module.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(table)
        table = table.cpu()
        return {name: float(table[i + 1] / table[0]) for i, name in enumerate(sums)}
