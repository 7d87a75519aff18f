"""The autoencoder's objective: pixel distance and KL, per sample (twin of diffusion/objective.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PIXEL_DISTANCES = ("l1", "l2")


@dataclass(frozen=True)
class ReconstructionObjective:
    """loss = pixel distance + kl_weight * KL.

    pixel: "l1" or "l2", mean over pixels and channels of pictures in [-1, 1].
    kl_weight: weight of the KL in nats per latent value.
    """

    pixel: str = "l1"
    kl_weight: float = 1e-3

    def __post_init__(self) -> None:
        if self.pixel not in PIXEL_DISTANCES:
            raise ValueError(f"pixel must be one of {', '.join(PIXEL_DISTANCES)}, not {self.pixel!r}")
        if not self.kl_weight >= 0:
            raise ValueError(f"kl_weight must not be negative, not {self.kl_weight}")

    def terms(self, reconstruction: Tensor, images: Tensor, moments: Tensor) -> dict[str, Tensor]:
        """[B] each: "pixel", "kl" and their weighted sum "loss"."""
        difference = (reconstruction.float() - images.float()).flatten(1)
        pixel = difference.abs().mean(1) if self.pixel == "l1" else difference.square().mean(1)
        kl = kl_divergence(moments)
        return {"loss": pixel + self.kl_weight * kl, "pixel": pixel, "kl": kl}


def kl_divergence(moments: Tensor) -> Tensor:
    """[B] KL from the posterior to a standard normal, in nats per latent value."""
    mean, logvar = moments.float().chunk(2, dim=1)
    return 0.5 * (mean**2 + torch.exp(logvar) - 1.0 - logvar).flatten(1).mean(1)


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """[B] peak signal-to-noise ratio in dB of pictures in [-1, 1], the reconstruction clamped to that range."""
    error = (reconstruction.float().clamp(-1, 1) - images.float()).flatten(1).square().mean(1)
    return 10.0 * (4.0 / error.clamp(min=1e-12)).log10()
