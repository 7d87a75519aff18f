"""Latent statistics: the one object that standardises latents and undoes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LatentStatistics(nn.Module):
    """Per-channel mean and standard deviation of the latents, measured over `count` images.

    Denoisers see `(z - mean) / std`. Until measured they are 0 and 1 and `count` is 0. The values are buffers: they
    move, are saved with the autoencoder, and belong to `latent_id`.
    """

    mean: Tensor
    std: Tensor
    count: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def standardise(self, z: Tensor) -> Tensor:
        """z: [B, C, h, w] raw latents."""
        return (z - self._shape(self.mean, z)) / self._shape(self.std, z)

    def restore(self, latents: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        return latents * self._shape(self.std, latents) + self._shape(self.mean, latents)

    @staticmethod
    def _shape(value: Tensor, z: Tensor) -> Tensor:
        return value.to(z.dtype).view(1, -1, 1, 1)

    @property
    def known(self) -> bool:
        """Whether they were measured, or set to anything but 0 and 1."""
        return int(self.count) > 0 or bool((self.mean != 0).any()) or bool((self.std != 1).any())

    @torch.no_grad()
    def set(self, mean: Tensor, variance: Tensor, images: int) -> None:
        """mean, variance: [C] float64, over the latents of `images` pictures.

        Raises ValueError when a channel has no spread: such a latent carries nothing and cannot be divided by.
        """
        if not bool((variance > 0).all()) or not bool(torch.isfinite(variance).all()):
            raise ValueError(f"latent channels without spread: variances {variance.tolist()}")
        self.mean.copy_(mean)
        self.std.copy_(variance.sqrt())
        self.count.fill_(images)
