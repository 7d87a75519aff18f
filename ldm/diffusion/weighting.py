"""How much each noise level counts, as a weight on the squared error of the prediction's own target.

A weighting is a function w(SNR) on the x0 error, SNR = alpha^2 / sigma^2. The prediction knows the factor between
the two errors; both are multiplied by sigma^2 here, so that the product is formed as one ratio, finite at both ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule

SIGMA_FLOOR = 1e-8
"""Stands for sigma = 0: the ratio then has its limit where it would be 0 / 0."""


class Weighting(Protocol):
    def __call__(self, prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
        """[B] weights of the target's squared error."""
        ...


@dataclass(frozen=True)
class Unit:
    """Every target counts the same: the plain loss of whatever is predicted."""

    def __call__(self, prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


class _OfSNR:
    """A weighting by its w(SNR), written as `times_variance` = sigma^2 w."""

    def times_variance(self, alpha2: Tensor, sigma2: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.clamp(min=SIGMA_FLOOR)
        return self.times_variance(alpha**2, sigma**2) / prediction.x0_factor(alpha, sigma)


@dataclass(frozen=True)
class SNR(_OfSNR):
    """w = SNR: every level counts by its error in the noise, whatever is predicted (1 on epsilon)."""

    def times_variance(self, alpha2: Tensor, sigma2: Tensor) -> Tensor:
        return alpha2


@dataclass(frozen=True)
class MinSNR(_OfSNR):
    """w = min(SNR, gamma). Hang et al. 2023, arXiv:2303.09556, section 3.4."""

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _check_positive("gamma", self.gamma)

    def times_variance(self, alpha2: Tensor, sigma2: Tensor) -> Tensor:
        return torch.minimum(alpha2, self.gamma * sigma2)


@dataclass(frozen=True)
class SoftMinSNR(_OfSNR):
    """w = SNR gamma / (SNR + gamma), a smooth minimum of the two. Crowson et al. 2024, arXiv:2401.11605, section 4.4.

    There gamma = 4 and noise in units of the data.
    """

    gamma: float = 4.0

    def __post_init__(self) -> None:
        _check_positive("gamma", self.gamma)

    def times_variance(self, alpha2: Tensor, sigma2: Tensor) -> Tensor:
        return self.gamma * alpha2 * sigma2 / (alpha2 + self.gamma * sigma2)


@dataclass(frozen=True)
class P2(_OfSNR):
    """w = SNR / (k + SNR)^gamma: 1 / (k + SNR)^gamma on epsilon. Choi et al. 2022, arXiv:2204.00227, equation 8."""

    k: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("k", self.k)
        if not self.gamma >= 0:
            raise ValueError(f"gamma must be at least 0, not {self.gamma}")

    def times_variance(self, alpha2: Tensor, sigma2: Tensor) -> Tensor:
        return alpha2 * (sigma2 / (self.k * sigma2 + alpha2)) ** self.gamma


@dataclass(frozen=True)
class EDM(_OfSNR):
    """w = SNR + 1 / sigma_data^2, which is 1 on the target of the EDM prediction.

    Karras et al. 2022, arXiv:2206.00364, table 1 (lambda). sigma_data: as in the prediction.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _check_positive("sigma_data", self.sigma_data)

    def times_variance(self, alpha2: Tensor, sigma2: Tensor) -> Tensor:
        return alpha2 + sigma2 / self.sigma_data**2


def check_finite(weighting: Weighting, schedule: Schedule, prediction: Prediction) -> None:
    """Raises ValueError, naming all sides, if the weight has no limit where the schedule reaches sigma = 0."""
    clean = schedule.at(torch.zeros(2, dtype=torch.float64))
    near_zero = torch.tensor([1e-6, SIGMA_FLOOR], dtype=torch.float64)
    weights = weighting(prediction, clean.alpha, near_zero)
    if float(clean.sigma[0]) == 0 and float(weights[1]) > 2 * float(weights[0]):
        raise ValueError(
            f"the weighting {weighting} on the prediction {type(prediction).__name__} is infinite at the clean end of "
            f"{schedule}: choose MinSNR, SoftMinSNR or Unit as the weighting, or Velocity as the prediction"
        )


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, not {value}")
