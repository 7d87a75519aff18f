"""What the latents of a set of pictures look like, channel by channel, and how far they are from a normal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
KEPT = 2**17
"""Values of each channel that are kept to compare their distribution with a normal."""
STRIDE = 7919
"""Positions from one picture's kept values to the next one's: a prime, so that in time all positions are met."""
EDGES = np.linspace(-4.0, 4.0, 41)


@dataclass(frozen=True)
class LatentReport:
    """Of standardised latents, (z - stored mean) / stored std; arrays over the C channels.

    mean, std: on these pictures; 0 and 1 where the stored statistics fit.   skewness, kurtosis: the latter above a
    normal's.   wasserstein, kolmogorov: distances of each channel, shifted and scaled to mean 0 and deviation 1, from
    the unit normal: W1 in deviations, and the largest difference of the distribution functions.
    drift: KL of a normal with this mean and std from the unit normal, nats a value: 0 where the stored ones fit.
    correlation: [C, C].   signal: share of a channel's variance that is not the posterior's noise; None without one.
    histogram: [C, 40] share of the values between `EDGES`.
    raw_mean, raw_std: of the raw latents on these pictures.   raw_scale: std of all raw values together.
    stored_mean, stored_std, stored_count: the checkpoint's.
    NaN stands for what a channel without spread does not have.
    """

    mean: Array
    std: Array
    skewness: Array
    kurtosis: Array
    wasserstein: Array
    kolmogorov: Array
    drift: Array
    correlation: Array
    signal: Array | None
    histogram: Array
    raw_mean: Array
    raw_std: Array
    raw_scale: float
    stored_mean: Array
    stored_std: Array
    stored_count: int

    @property
    def one_factor(self) -> bool:
        """Whether the stored statistics are a known model's factor, one for all channels, and were not measured."""
        values = (self.stored_mean, self.stored_std)
        return self.stored_count == 0 and all(bool((v == v[0]).all()) for v in values)

    @property
    def overall(self) -> float:
        """Deviation of all standardised values together: raw_scale times a known model's factor."""
        return float(np.sqrt((self.std**2 + (self.mean - self.mean.mean()) ** 2).mean()))

    @property
    def effective_channels(self) -> float:
        """exp of the entropy of the correlation matrix's spectrum: C when channels are uncorrelated, 1 when equal."""
        alive = np.isfinite(np.diag(self.correlation))
        values = np.linalg.eigvalsh(self.correlation[alive][:, alive]).clip(min=0) if alive.any() else np.zeros(0)
        p = values / max(values.sum(), 1e-300)
        return float(np.exp(-(p * np.log(np.where(p > 0, p, 1))).sum())) if alive.any() else 0.0


class LatentTally:
    """Sums over batches of latents, in float64, and a share of the values. num_images: how many will come."""

    def __init__(self, channels: int, num_images: int) -> None:
        self.per_image = max(1, KEPT // max(1, num_images))
        self.images, self.count = 0, 0
        self.powers = torch.zeros(4, channels, dtype=torch.float64)
        self.outer = torch.zeros(channels, channels, dtype=torch.float64)
        self.noise = torch.zeros(channels, dtype=torch.float64)
        self.has_noise = False
        self.kept: list[Tensor] = []

    def add(self, latents: Tensor, noise: Tensor | None = None) -> None:
        """latents: [B, C, h, w], standardised.   noise: the posterior's variance in their units, of the same shape."""
        x = latents.detach().double().flatten(2).transpose(0, 1)  # [C, B, hw]
        places = self._places(*x.shape[1:]).to(x.device)
        self.kept.append(x.gather(2, places.expand(len(x), -1, -1)).flatten(1).float().cpu())
        x = x.flatten(1)
        self.count += x.shape[1]
        self.powers += torch.stack([(x**k).sum(1) for k in (1, 2, 3, 4)]).cpu()
        self.outer += (x @ x.T).cpu()
        if noise is not None:
            self.has_noise = True
            self.noise += noise.detach().double().transpose(0, 1).flatten(1).sum(1).cpu()

    def _places(self, images: int, size: int) -> Tensor:
        """[images, n]: of `size` positions those to keep, evenly spaced, and others for every picture: what a place of
        its own does to latents, as a border, must not pass for their distribution."""
        kept = min(size, self.per_image)
        numbers = torch.arange(self.images, self.images + images)
        self.images += images
        return (numbers[:, None] * STRIDE + torch.arange(kept) * size // kept) % size

    def report(self, mean: Tensor, std: Tensor, count: int) -> LatentReport:
        """mean, std [C], count: the statistics that standardised the latents."""
        m1, m2, m3, m4 = (self.powers / self.count).numpy()
        variance = (m2 - m1**2).clip(min=0)
        variance[variance <= 1e-12 * m2] = 0  # what rounding left
        spread = np.sqrt(variance)
        safe = np.where(variance > 0, variance, np.nan)
        third = m3 - 3 * m1 * m2 + 2 * m1**3
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        covariance = self.outer.numpy() / self.count - np.outer(m1, m1)
        values = torch.cat(self.kept, dim=1).double()
        near = torch.from_numpy(m1), torch.from_numpy(np.sqrt(safe))
        wasserstein, kolmogorov = distances_from_normal((values - near[0][:, None]) / near[1][:, None])
        noise = (self.noise / self.count).numpy()
        stored_mean, stored_std = mean.double().cpu().numpy(), std.double().cpu().numpy()
        raw_mean, raw_std = stored_mean + stored_std * m1, stored_std * spread
        total = raw_mean.mean()
        return LatentReport(
            mean=m1,
            std=spread,
            skewness=third / safe**1.5,
            kurtosis=fourth / safe**2 - 3,
            wasserstein=wasserstein,
            kolmogorov=kolmogorov,
            drift=0.5 * (m1**2 + safe - 1 - np.log(safe)),
            correlation=covariance / np.sqrt(np.outer(safe, safe)),
            signal=variance / np.maximum(variance + noise, 1e-300) if self.has_noise else None,
            histogram=np.stack([np.histogram(row, EDGES)[0] / len(row) for row in values.numpy()]),
            raw_mean=raw_mean,
            raw_std=raw_std,
            raw_scale=float(np.sqrt((raw_std**2 + (raw_mean - total) ** 2).mean())),
            stored_mean=stored_mean,
            stored_std=stored_std,
            stored_count=count,
        )


def distances_from_normal(values: Tensor) -> tuple[Array, Array]:
    """(W1, Kolmogorov-Smirnov) of each row of [C, n] from the unit normal, float64; NaN for a row with NaN.

    W1 is the area between the quantile functions, taken at the midpoints of n equal shares of probability.
    """
    rows = values.double().sort(dim=1).values
    n = rows.shape[1]
    steps = torch.arange(n, dtype=torch.float64)
    normal = torch.special.ndtri((steps + 0.5) / n)
    below = torch.special.ndtr(rows)
    kolmogorov = torch.maximum((below - steps / n).abs(), (below - (steps + 1) / n).abs()).amax(1)
    return (rows - normal).abs().mean(1).numpy(), kolmogorov.numpy()
