"""Trains the denoiser and its conditioner on the latents of a frozen autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.cache import Cache
from ldm.data.datamodule import DataModule
from ldm.diffusion.objective import Objective, denoising_error
from ldm.diffusion.schedule import for_size
from ldm.model import LatentDiffusion
from ldm.models.conditioner.compose import parts_of
from ldm.precompute.moments import encode_dataset
from ldm.precompute.text import encoder_ids, remembered, text_encoders
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
        self.reads_cache = False

    @property
    def model(self) -> LatentDiffusion:
        return self._model[0]

    def trained(self) -> nn.Module:
        return self.trained_parts

    def networks(self) -> list[nn.Module]:
        return [self.model.denoiser.network]

    def observed(self) -> nn.Module:
        return self.model

    def use_cache(self, cache: Cache, data: DataModule, trusted: tuple[str, ...] = ()) -> None:
        """Read latents, and text embeddings where there are some, instead of computing them.

        Raises LdmError, `CACHE`, with a line for each difference, if the cache was made by something else.
        """
        cache.check(self.latent_id, data.transform, data.buckets)
        if (text := cache.text()) is not None:
            conditioner = self.model.conditioner
            cache.check_text(encoder_ids(conditioner, self.saved_config["conditioner"], trusted), data.captions)
            self.model.instead = remembered(text_encoders(conditioner), text)
        splits = ["train"] + ["val"] * bool(data.num_val)
        data.use_moments(*(cache.moments(data.dataset(split)) for split in splits))
        self.reads_cache = True

    def on_fit_start(self) -> None:
        """Moves the autoencoder along, tells the data what the conditioner can read and, for a small set without a
        cache, encodes every picture once.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        data.check_columns(self.model.conditioner.checks)
        if self.reads_cache:
            self.trained_parts.to(self.device)
            for name, part in self.model.autoencoder.named_children():
                if name not in ("encoder", "quant_conv"):
                    part.to(self.device)
            return
        self.model.to(self.device)
        splits = ["train"] + ["val"] * bool(data.num_val)
        sizes = [data.target_sizes(split)[:, ::-1] // self.model.autoencoder.downsampling for split in splits]
        pixels = sum(int(heights_and_widths.prod(axis=1).sum()) for heights_and_widths in sizes)
        megabytes = pixels * self.model.autoencoder.moment_channels * 4 / 2**20
        if megabytes > self.cache_latents_mb or data.transform != data.transform.without_chance():
            return
        loaders = [data.encode_dataloader(split, batch_size=64, sharded=True) for split in splits]
        data.use_moments(*(encode_dataset(self.model.autoencoder, *each) for each in zip(loaders, sizes, strict=True)))

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
        if moments.dtype.itemsize < 4:  # of a cache in half precision
            moments = moments.float()
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
        counts = self.objective.counts(batch.columns.get("mask"), x0)
        terms = {}
        for i in range(VALIDATION_LEVELS):
            u = torch.full((len(x0),), (i + 0.5) / VALIDATION_LEVELS, device=x0.device)
            level = schedule.at(schedule.from_unit(u))
            terms[f"loss_at_{i + 0.5:g}_of_{VALIDATION_LEVELS}"] = denoising_error(
                self.model.denoiser, x0, noise, level, cond, counts
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
