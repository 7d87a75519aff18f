"""metrics.jsonl, one line a step: the truth about a run, whatever the monitor saw."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from ldm.checkpoints.files import append_jsonl
from ldm.checkpoints.run import StagePaths, point_latest, write_config
from ldm.training.callbacks.monitor import Monitor
from ldm.training.callbacks.samples import Samples
from ldm.training.callbacks.validation import Validation
from ldm.training.nonfinite import in_words
from ldm.training.stage_module import StageModule

log = logging.getLogger(__name__)


class Begin(pl.Callback):
    """What a command leaves in the run folder once nothing can refuse it any more. config: the composed one."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.config = folder, config

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            write_config(self.folder, json.dumps(self.config))
            point_latest(self.folder)


class Recorder(pl.Callback):
    """Collects a step's numbers in `record`, writes them to the stage's logs on rank 0 and hands them to the monitor.

    images_per_second counts the time between the ends of two steps, validation and pictures excluded; data_wait is the
    share of it spent waiting for the loader. bad_samples are those since the stage began, captions_cut those of the
    step that were longer than the text encoder reads, both of all ranks.
    """

    def __init__(
        self, paths: StagePaths, validation: Validation, samples: Samples, monitor: Monitor | None = None
    ) -> None:
        self.paths, self.validation, self.samples, self.monitor = paths, validation, samples, monitor
        self.record: dict[str, float] = {}
        self.bad_samples = self.captions_cut = 0  # since the stage began, and since this process did
        self._waited = self._worked = 0.0
        self._mark = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, module: StageModule) -> None:  # type: ignore[override]
        self.bad_samples = sum(trainer.datamodule.ledger.before.values())  # type: ignore[attr-defined]
        self._mark = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, module: StageModule, *_: object) -> None:  # type: ignore[override]
        now = time.monotonic()
        self._waited += now - self._mark
        self._mark = now

    def step_ended(self, module: StageModule) -> None:
        """Stops the clock of a micro-batch; called before validation and pictures are made."""
        now = time.monotonic()
        self._worked += now - self._mark
        self._mark = now

    def on_train_batch_end(self, trainer: pl.Trainer, module: StageModule, *_: object) -> None:  # type: ignore[override]
        outcome = module.outcome
        if outcome is not None:
            total = self._waited + self._worked
            bad, cut = (int(n) for n in outcome.tallies)
            self.bad_samples, self.captions_cut = self.bad_samples + bad, self.captions_cut + cut
            self.record = {
                "train/step": module.step.train_step,
                "train/samples": module.step.samples_seen,
                **{f"train/{k}": v for k, v in module.logs.items()},
                "train/grad_norm": outcome.grad_norm,
                "train/lr": outcome.lr,
                "train/applied": int(outcome.applied),
                "data/bad_samples": self.bad_samples,
                "data/captions_cut": cut,
                "perf/images_per_second": module.settings.batch_size / max(total, 1e-9),
                "perf/data_wait": self._waited / max(total, 1e-9),
                "perf/memory_gb": memory_gb(module.device),
            }
            if module.step.scaler is not None:
                self.record["train/loss_scale"] = module.step.scaler.scale
            self.record |= {f"val/{k}": v for k, v in (self.validation.results or {}).items()}
            self._waited = self._worked = 0.0
            if trainer.is_global_zero:
                append_jsonl(self.paths.metrics, self.record)
                if module.not_finite:
                    append_jsonl(self.paths.nonfinite, {"train/step": module.step.train_step, **module.not_finite})
                    step, words = module.step.train_step, in_words(module.not_finite)
                    log.warning("step %d was skipped, for it is not finite; %s", step, words)
                if self.monitor is not None:
                    self.monitor.log(self.record, self.samples.latest)
            if outcome.failure is not None:
                raise outcome.failure
        self._mark = time.monotonic()


class StopClock(pl.Callback):
    """Stands first in the list of callbacks, so that their work is not counted as training."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_batch_end(self, trainer: pl.Trainer, module: StageModule, *_: object) -> None:  # type: ignore[override]
        self.recorder.step_ended(module)


def memory_gb(device: torch.device) -> float:
    """Peak memory: allocated on the device, or resident in the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
