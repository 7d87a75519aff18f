"""What the network's output means: how it becomes x0, and what it is trained towards.

All methods take alpha and sigma that broadcast with the latents. `x0_factor` is sigma^2 times the factor from the
squared error of x0 to the squared error of the target; the weighting divides by it (weighting.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm.types import Level


class Prediction(Protocol):
    needs_alpha: bool
    """True if `to_x0` divides by alpha: such a prediction is refused with a schedule that reaches alpha = 0."""
    needs_alpha_one: bool
    """True if the formulas hold for alpha = 1 only: such a prediction is refused with any other schedule."""

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...

    def to_x0(self, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...

    def x0_factor(self, alpha: Tensor, sigma: Tensor) -> Tensor: ...

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What x_t is multiplied by before the network sees it."""
        ...

    def time_input(self, level: Level) -> Tensor:
        """What the network is told of the level."""
        ...


class _Plain:
    """The network sees x_t as it is, and t."""

    needs_alpha = False
    needs_alpha_one = False

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def time_input(self, level: Level) -> Tensor:
        assert level.t is not None  # the denoiser fills it in
        return level.t


@dataclass(frozen=True)
class Epsilon(_Plain):
    """The noise. Ho et al. 2020, arXiv:2006.11239, equation 14."""

    needs_alpha = True

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return eps

    def to_x0(self, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * prediction) / alpha

    def x0_factor(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha**2


@dataclass(frozen=True)
class Velocity(_Plain):
    """v = alpha * eps - sigma * x0. Salimans and Ho 2022, arXiv:2202.00512, appendix D."""

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * eps - sigma * x0

    def to_x0(self, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * x_t - sigma * prediction) / (alpha**2 + sigma**2)

    def x0_factor(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha**2 + sigma**2) ** 2


@dataclass(frozen=True)
class Flow(_Plain):
    """The velocity of the straight path, eps - x0, time running from clean 0 to noise 1.

    Liu et al. 2022, arXiv:2209.03003; Lipman et al. 2022, arXiv:2210.02747.
    """

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return eps - x0

    def to_x0(self, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * prediction) / (alpha + sigma)

    def x0_factor(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha + sigma) ** 2


@dataclass(frozen=True)
class X0(_Plain):
    """The picture itself. Ramesh et al. 2022, arXiv:2204.06125, section 2.2; called "sample" in diffusers."""

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0

    def to_x0(self, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return prediction

    def x0_factor(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma**2


@dataclass(frozen=True)
class EDM:
    """x0 = c_skip x_t + c_out F(c_in x_t, c_noise), so that input and target have unit variance at every sigma.

    c_skip = sd^2 / (sigma^2 + sd^2), c_out = sigma sd / sqrt(sigma^2 + sd^2), c_in = 1 / sqrt(sigma^2 + sd^2),
    c_noise = log(sigma) / 4. For alpha = 1. Karras et al. 2022, arXiv:2206.00364, table 1.

    sigma_data: sd, the data's standard deviation: 0.5 for pixels in [-1, 1], 1 for standardised latents.
    """

    sigma_data: float = 0.5

    needs_alpha = False
    needs_alpha_one = True

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, not {self.sigma_data}")

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        # (x0 - c_skip x_t) / c_out with x_t = x0 + sigma eps put in: nothing cancels for small sigma
        return (sigma * x0 - self.sigma_data**2 * eps) / (self.sigma_data * torch.sqrt(self._variance(sigma)))

    def to_x0(self, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        variance = self._variance(sigma)
        c_skip, c_out = self.sigma_data**2 / variance, self.sigma_data * sigma / torch.sqrt(variance)
        return c_skip * x_t + c_out * prediction

    def x0_factor(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self._variance(sigma) / self.sigma_data**2

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.rsqrt(self._variance(sigma))

    def time_input(self, level: Level) -> Tensor:
        return torch.log(level.sigma) / 4

    def _variance(self, sigma: Tensor) -> Tensor:
        return sigma**2 + self.sigma_data**2
