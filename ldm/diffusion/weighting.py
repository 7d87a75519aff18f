"""How much each noise level counts, as a weight on the squared error of the prediction's own target.

A weighting is a function w(SNR) on the x0 error, SNR = alpha^2 / sigma^2. The prediction knows the factor between
the two errors; both are multiplied by sigma^2 here, so that the ratio is finite at both ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.prediction import Prediction


class Weighting(Protocol):
    def __call__(self, prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
        """[B] weights of the target's squared error."""
        ...


@dataclass(frozen=True)
class Unit:
    """Every target counts the same: the plain loss of whatever is predicted."""

    def __call__(self, prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


@dataclass(frozen=True)
class MinSNR:
    """w = min(SNR, gamma) on the x0 error. Hang et al. 2023, arXiv:2303.09556, section 3.4."""

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma must be positive, not {self.gamma}")

    def __call__(self, prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.minimum(alpha**2, self.gamma * sigma**2) / prediction.x0_factor(alpha, sigma)
