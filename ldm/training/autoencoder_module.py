"""Trains the autoencoder: pictures -> latents -> pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.autoencoder.kl import AutoencoderKL
from ldm.precompute.moments import measure_statistics
from ldm.random import Draws, Purpose
from ldm.reconstruction.objective import ReconstructionObjective, psnr
from ldm.training.stage_module import StageModule, StageSettings
from ldm.types import Batch


class AutoencoderModule(StageModule):
    """autoencoder: as built from the config.   saved_config: the same as a `{"class", "args"}` node."""

    stage = "autoencoder"

    def __init__(
        self,
        settings: StageSettings,
        autoencoder: AutoencoderKL,
        objective: ReconstructionObjective,
        saved_config: dict[str, Any],
    ) -> None:
        super().__init__(settings)
        self.autoencoder, self.objective, self.saved_config = autoencoder, objective, saved_config

    def trained(self) -> nn.Module:
        return self.autoencoder

    def loss(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        height, width = batch.images.shape[-2:]  # type: ignore[union-attr]
        f = self.autoencoder.downsampling
        noise = draws.normal(Purpose.POSTERIOR, (self.autoencoder.latent_channels, height // f, width // f))
        reconstruction, moments = self.autoencoder(batch.images, noise)
        return self.objective.terms(reconstruction, batch.images, moments)  # type: ignore[arg-type]

    @torch.no_grad()
    def validation_terms(self, batch: Batch) -> dict[str, Tensor]:
        reconstruction, moments = self.autoencoder(batch.images)
        terms = self.objective.terms(reconstruction, batch.images, moments)  # type: ignore[arg-type]
        return {**terms, "psnr": psnr(reconstruction, batch.images)}  # type: ignore[arg-type]

    def document(self) -> dict[str, Any]:
        return {"autoencoder": self.saved_config}

    def describe(self) -> dict[str, Any]:
        statistics = self.autoencoder.statistics
        latent_id = None
        if int(statistics.count) > 0:  # measured
            with self.averaged():
                latent_id = self.autoencoder.latent_id()
        return {
            "latent_id": latent_id,
            "latent_mean": statistics.mean.tolist(),
            "latent_std": statistics.std.tolist(),
            "latent_images": int(statistics.count),
        }

    def finish(self) -> None:
        """Latent statistics of the averaged weights over the training set."""
        loader = self.trainer.datamodule.encode_dataloader("train", batch_size=64, sharded=True)  # type: ignore[attr-defined]
        with self.averaged():
            measure_statistics(self.autoencoder, loader)
