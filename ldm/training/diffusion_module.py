"""Trains the denoiser and its conditioner on the latents of a frozen autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.objective import Objective, denoising_error
from ldm.diffusion.schedule import for_size
from ldm.model import LatentDiffusion
from ldm.models.conditioner.compose import parts_of
from ldm.precompute.moments import encode_dataset
from ldm.random import Draws, Purpose
from ldm.training.stage_module import StageModule, StageSettings
from ldm.types import Batch

VALIDATION_LEVELS = 8


class DiffusionModule(StageModule):
    """model: the whole of it; the autoencoder is frozen and not saved again.

    cache_latents_mb: encode the set once and keep the moments in memory if they are no larger than this.
    saved_config: config.json of the checkpoints.
    """

    stage = "diffusion"

    def __init__(
        self,
        settings: StageSettings,
        model: LatentDiffusion,
        objective: Objective,
        *,
        cache_latents_mb: float,
        saved_config: dict[str, Any],
    ) -> None:
        super().__init__(settings)
        model.autoencoder.eval().requires_grad_(False)
        self.trained_parts = nn.ModuleDict({"conditioner": model.conditioner, "denoiser": model.denoiser})
        self._model = (model,)  # in a tuple: the frozen autoencoder is no submodule, so never saved or set to train()
        self.objective = objective
        self.cache_latents_mb, self.saved_config = cache_latents_mb, saved_config
        self.latent_id = model.autoencoder.latent_id()

    @property
    def model(self) -> LatentDiffusion:
        return self._model[0]

    def trained(self) -> nn.Module:
        return self.trained_parts

    def on_fit_start(self) -> None:
        """Moves the autoencoder along, tells the data what the conditioner can read and, for a small set, encodes every
        picture once.
        """
        self.model.to(self.device)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        data.check_columns(self.model.conditioner.checks)
        _, height, width = self.model.latent_shape(self.model.image_size, self.model.image_size)
        pixels = (data.num_train + data.num_val) * height * width
        megabytes = pixels * self.model.autoencoder.moment_channels * 4 / 2**20
        if megabytes > self.cache_latents_mb or data.transform != data.transform.without_chance():
            return
        tables = []
        for split, count in (("train", data.num_train), ("val", data.num_val)):
            if count:
                loader = data.encode_dataloader(split, batch_size=64, sharded=True)
                tables.append(encode_dataset(self.model.autoencoder, loader, count, (height, width)))
        data.use_moments(*tables)

    def loss(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        x0 = self.latents(batch, draws, Purpose.POSTERIOR)
        cond = self.model.condition(batch.captions, batch.columns, draws)
        return {"loss": self.objective.loss(self.model.denoiser, x0, cond, draws, batch.columns.get("mask"))}

    @torch.no_grad()
    def latents(self, batch: Batch, draws: Draws, purpose: Purpose) -> Tensor:
        """Standardised latents drawn from the posterior, where there is one, [B, C, h, w]."""
        autoencoder, moments = self.model.autoencoder, batch.moments
        if moments is None:
            with torch.autocast(self.device.type, enabled=False):  # as when the set is encoded once: in float32
                moments = autoencoder.moments(batch.images)  # type: ignore[arg-type]
        shape = (autoencoder.latent_channels, *moments.shape[2:])
        noise = draws.normal(purpose, shape) if autoencoder.moment_channels > autoencoder.latent_channels else None
        return autoencoder.latents(moments, noise)

    @torch.no_grad()
    def validation_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Error at eight equidistant times with fixed noise: comparable from step to step and from run to run."""
        draws = Draws(0, batch.slots.to(self.device), host=batch.slots)
        x0 = self.latents(batch, draws, Purpose.VALIDATION_POSTERIOR)
        noise = draws.normal(Purpose.VALIDATION_NOISE, x0.shape[1:]).to(x0)
        cond = self.model.condition(batch.captions, batch.columns)
        schedule = for_size(self.model.denoiser.schedule, x0.shape)
        terms = {}
        for i in range(VALIDATION_LEVELS):
            u = torch.full((len(x0),), (i + 0.5) / VALIDATION_LEVELS, device=x0.device)
            level = schedule.at(schedule.from_unit(u))
            terms[f"loss_at_{i + 0.5:g}_of_{VALIDATION_LEVELS}"] = denoising_error(
                self.model.denoiser, x0, noise, level, cond
            )
        return {"loss": torch.stack(list(terms.values())).mean(0), **terms}

    def captions_cut(self) -> int:
        parts = parts_of(self.model.conditioner)
        return max((part.tokenizer.truncated for part in parts if hasattr(part, "tokenizer")), default=0)

    def document(self) -> dict[str, Any]:
        return self.saved_config

    def describe(self) -> dict[str, Any]:
        shape = self.model.latent_shape(self.model.image_size, self.model.image_size)
        return {"latent_id": self.latent_id, "latent_shape": list(shape)}
