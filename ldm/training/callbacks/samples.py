"""Pictures of fixed seeds while training: what the model can do now, beside what it could before."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from ldm.sampling.outputs import captioned_grid, save_png, to_uint8
from ldm.sampling.tasks import Sampling, one_for_each, subtitles, text_to_image
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.diffusion_module import DiffusionModule
from ldm.training.stage_module import StageModule

log = logging.getLogger(__name__)

DIFFERENCE_GAIN = 4


class _Stopping(Exception):
    """A stop signal came while pictures were drawn."""


class Samples(pl.Callback):
    """Writes `samples/step-<step>.png` every `every` steps and at the last one; leaves its path in `latest`.

    From the averaged weights: the autoencoder shows the first held-out pictures, their reconstructions and the
    differences; the denoiser draws `prompts` and `columns` (see `one_for_each`) with the seeds 0, 1, 2, ... A model
    without text has empty prompts. A stop signal ends the drawing; that picture is left out.
    """

    def __init__(
        self,
        every: int | None,
        folder: Path,
        *,
        prompts: list[str] | None = None,
        columns: Mapping[str, Any] | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.every, self.folder = every, folder
        given = prompts or ([""] if columns else [])
        self.prompts, self.columns = one_for_each(given, columns or {}) if given else ([], {})
        self.sampling = sampling
        self.latest: Path | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, module: StageModule, *_: object) -> None:  # type: ignore[override]
        self.latest = None
        if module.due(self.every) and trainer.is_global_zero:
            self.latest = self.draw(trainer, module, module.step.train_step)

    def draw(self, trainer: pl.Trainer, module: StageModule, step: int) -> Path | None:
        with module.averaged():
            if isinstance(module, AutoencoderModule):
                grid = _reconstructions(trainer, module)
            else:
                assert isinstance(module, DiffusionModule)
                grid = self._from_prompts(module)
        if grid is None:
            return None
        path = self.folder / f"step-{step:09d}.png"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_png(grid, path, {"step": step, "stage": module.stage})
        except OSError as error:  # a full disk is the checkpoint's concern, not the pictures'
            log.warning("pictures of step %d not written: %s", step, error)
            return None
        return path

    def _from_prompts(self, module: DiffusionModule):
        if not self.prompts or self.sampling is None:
            return None
        seeds = list(range(len(self.prompts)))

        def look(step: int, x: torch.Tensor, x0: torch.Tensor) -> None:
            if module.stop_due:
                raise _Stopping

        try:
            pictures = text_to_image(
                module.model, self.prompts, seeds, self.sampling, columns=self.columns, on_step=look
            )
        except _Stopping:
            return None
        return captioned_grid(to_uint8(pictures), subtitles(self.prompts, self.columns))


def _reconstructions(trainer: pl.Trainer, module: AutoencoderModule, count: int = 8):
    data = trainer.datamodule  # type: ignore[attr-defined]
    loader = data.encode_dataloader("val" if data.num_val else "train", batch_size=count)
    batch = next(iter(loader))
    images = batch.images[batch.valid].to(module.device)
    if not len(images):
        return None
    reconstructions = module.autoencoder(images)[0].clamp(-1, 1)
    # grey where they agree; an error of 32 of the 255 levels, or more, is black or white
    differences = (DIFFERENCE_GAIN * (reconstructions - images)).clamp(-1, 1)
    titles = ["picture", "reconstruction", f"difference x{DIFFERENCE_GAIN}"]
    pictures = to_uint8(torch.cat([images, reconstructions, differences]))
    return captioned_grid(pictures, [title for title in titles for _ in images], len(images))
