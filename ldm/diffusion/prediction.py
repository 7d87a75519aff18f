"""What the network's output means: how it becomes x0, and what it is trained towards.

All methods take alpha and sigma that broadcast with the latents. `x0_factor` is sigma^2 times the factor from the
squared error of x0 to the squared error of the target; the weighting divides by it (weighting.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Prediction(Protocol):
    needs_alpha: bool
    """True if `to_x0` divides by alpha: such a prediction is refused with a schedule that reaches alpha = 0."""

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...

    def to_x0(self, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...

    def x0_factor(self, alpha: Tensor, sigma: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Epsilon:
    """The noise. Ho et al. 2020, arXiv:2006.11239, equation 14."""

    needs_alpha = True

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return eps

    def to_x0(self, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * prediction) / alpha

    def x0_factor(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha**2


@dataclass(frozen=True)
class Velocity:
    """v = alpha * eps - sigma * x0. Salimans and Ho 2022, arXiv:2202.00512, appendix D."""

    needs_alpha = False

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * eps - sigma * x0

    def to_x0(self, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * x_t - sigma * prediction) / (alpha**2 + sigma**2)

    def x0_factor(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha**2 + sigma**2) ** 2


@dataclass(frozen=True)
class Flow:
    """The velocity of the straight path, eps - x0, time running from clean 0 to noise 1.

    Liu et al. 2022, arXiv:2209.03003; Lipman et al. 2022, arXiv:2210.02747.
    """

    needs_alpha = False

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return eps - x0

    def to_x0(self, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * prediction) / (alpha + sigma)

    def x0_factor(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha + sigma) ** 2
