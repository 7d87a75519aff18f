"""The distance between the network's output and its target, for each latent value: [B, C, h, w] -> [B, C, h, w].

Huber and smooth L1 are the smooth ("pseudo") forms, quadratic for errors below a threshold c and linear beyond it. The
threshold may follow the noise, because errors at noisy levels are large and carry the outliers of the data (Khrapov
et al. 2024, arXiv:2403.16728). Names and meaning are those of kohya's sd-scripts: `loss_type`, `huber_c`,
`huber_schedule`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.denoiser import per_sample
from ldm.diffusion.schedule import Schedule
from ldm.types import Level


class Loss(Protocol):
    def __call__(self, output: Tensor, target: Tensor, level: Level, schedule: Schedule) -> Tensor: ...


@dataclass(frozen=True)
class MSE:
    """The squared error."""

    def __call__(self, output: Tensor, target: Tensor, level: Level, schedule: Schedule) -> Tensor:
        return (output - target).square()


@dataclass(frozen=True)
class Huber:
    """2 c (sqrt(e^2 + c^2) - c), which is e^2 for small errors and 2 c |e| for large ones.

    c: the threshold at pure noise.
    schedule: of the threshold. "constant": c everywhere; "exponential": from 1 when clean to c, evenly in log over
        time; "snr": (1 - c) / (1 + sigma / alpha)^2 + c, again from 1 to c.
    """

    c: float = 0.1
    schedule: str = "snr"

    def __post_init__(self) -> None:
        if not 0 < self.c <= 1:
            raise ValueError(f"c must be above 0 and at most 1, not {self.c}")
        if self.schedule not in ("constant", "exponential", "snr"):
            raise ValueError(f"schedule must be 'constant', 'exponential' or 'snr', not {self.schedule!r}")

    def __call__(self, output: Tensor, target: Tensor, level: Level, schedule: Schedule) -> Tensor:
        c = per_sample(self.threshold(level, schedule), output)
        return 2 * c * _soft_absolute(output - target, c)

    def threshold(self, level: Level, schedule: Schedule) -> Tensor:
        """In the shape of level.t."""
        if self.schedule == "constant":
            return torch.full_like(level.sigma, self.c)
        if self.schedule == "exponential":
            assert level.t is not None  # a level of training has its time
            return torch.exp(math.log(self.c) / (schedule.num_timesteps or schedule.t_max) * level.t)
        return (1 - self.c) * (level.alpha / (level.alpha + level.sigma)) ** 2 + self.c


@dataclass(frozen=True)
class SmoothL1(Huber):
    """2 (sqrt(e^2 + c^2) - c), which is e^2 / c for small errors and 2 |e| for large ones. Arguments as of `Huber`."""

    def __call__(self, output: Tensor, target: Tensor, level: Level, schedule: Schedule) -> Tensor:
        return 2 * _soft_absolute(output - target, per_sample(self.threshold(level, schedule), output))


def _soft_absolute(error: Tensor, c: Tensor) -> Tensor:
    """sqrt(e^2 + c^2) - c, without the difference that would lose small errors."""
    squared = error.square()
    return squared / (torch.sqrt(squared + c**2) + c)
