"""The bar: where training is, how fast, how well. Plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ldm.training.callbacks.recorder import Recorder
from ldm.training.stage_module import StageModule

PLAIN_INTERVAL_S = 15.0


class ProgressBar(pl.Callback):
    """One line that is redrawn on a terminal, or a line now and then in a file or a pipe."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._bar: Progress | None = None
        self._said = 0.0
        self._smooth: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, module: StageModule) -> None:  # type: ignore[override]
        if not trainer.is_global_zero:
            return
        self._said = time.monotonic()
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}"),
                console=Console(),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                module.stage, total=module.settings.max_steps, completed=module.step.train_step, facts=""
            )

    def on_train_batch_end(self, trainer: pl.Trainer, module: StageModule, *_: object) -> None:  # type: ignore[override]
        if module.outcome is None or not trainer.is_global_zero:
            return
        facts = self._facts()
        if self._bar is not None:
            self._bar.update(self._task, completed=module.step.train_step, facts=facts)
        step, now = module.step.train_step, time.monotonic()
        validated = self.recorder.validation.results
        if validated is not None:
            words = "  ".join(f"{k} {v:.4g}" for k, v in validated.items() if "_at_" not in k)
            self._say(f"{module.stage}  step {step}  validation  {words}")
        if self._bar is None and (now - self._said > PLAIN_INTERVAL_S or step == module.settings.max_steps):
            self._said = now
            self._say(f"{module.stage}  {step}/{module.settings.max_steps}  {facts}")

    def on_train_end(self, trainer: pl.Trainer, module: StageModule) -> None:  # type: ignore[override]
        self._stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, flush=True)

    def _facts(self) -> str:
        record, counted = self.recorder.record, self.recorder
        for key in ("train/loss", "perf/images_per_second", "perf/data_wait"):
            old = self._smooth.get(key, record[key])
            self._smooth[key] = record[key] if old != old else 0.95 * old + 0.05 * record[key]
        s = self._smooth
        return (
            f"loss {s['train/loss']:.4f}  {s['perf/images_per_second']:.0f} images/s  "
            f"data wait {s['perf/data_wait']:.0%}  memory {record['perf/memory_gb']:.1f} GB"
            + (f"  bad samples {counted.bad_samples}" if counted.bad_samples else "")
            + (f"  captions cut {counted.captions_cut}" if counted.captions_cut else "")
        )
