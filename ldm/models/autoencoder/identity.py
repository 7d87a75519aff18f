"""No autoencoder: the pixels are the latents, so that pixel models take the way of all others."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from ldm.models.autoencoder.statistics import LatentStatistics


class Identity(nn.Module):
    """Pictures [B, C, H, W] in [-1, 1] are latents of the same shape, standardised by a fixed mean and std.

    It has nothing to train and no stage: the denoiser's checkpoint holds these three numbers.
    latent_channels: of the pictures.
    mean, std: of the pixels, std > 0; 0 and 1 leave them as they are, as the DDPM does; EDM takes 0.5 for std.
    """

    def __init__(self, latent_channels: int = 3, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        if not std > 0:
            raise ValueError(f"std must be above 0, not {std}")
        self.in_channels = self.latent_channels = self.moment_channels = latent_channels
        self.downsampling = 1
        self.statistics = LatentStatistics(latent_channels)
        self.statistics.mean.fill_(mean)
        self.statistics.std.fill_(std)

    def moments(self, images: Tensor) -> Tensor:
        """The pixels, [B, C, H, W]: they are known exactly, so there is no variance beside them."""
        return images

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Standardised pixels; there is no posterior to draw from."""
        return self.statistics.standardise(images)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Standardised pixels from stored moments [B, C, H, W]."""
        return self.encode(moments)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (not clamped)."""
        return self.statistics.restore(latents)

    @torch.no_grad()
    def latent_id(self) -> str:
        """sha256 over the channels, the mean and the standard deviation."""
        digest = hashlib.sha256(f"pixels:{self.latent_channels}".encode())
        for value in (self.statistics.mean, self.statistics.std):
            digest.update(value.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
