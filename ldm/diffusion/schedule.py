"""Time -> how much of the picture and how much noise: x_t = alpha * x0 + sigma * eps.

`t` is the number that the network is told, from 0 (clean) to about 1000 (noise) in every schedule here.
Training draws u uniformly in [0, 1) and asks `from_unit(u)`; a sampler asks `levels(...)` (levels.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from ldm.types import Level


class Schedule(Protocol):
    """A value that turns time into a `Level`; results have the dtype, device and shape of `t`."""

    @property
    def t_max(self) -> float: ...

    @property
    def num_timesteps(self) -> int | None:
        """Number of discrete steps, or None for continuous time."""
        ...

    def from_unit(self, u: Tensor) -> Tensor: ...

    def at(self, t: Tensor) -> Level: ...


@dataclass(frozen=True)
class DiscreteVP:
    """Variance-preserving schedule of N discrete steps, alpha^2 = prod(1 - beta), sigma^2 = 1 - alpha^2.

    betas: "linear" (Ho et al. 2020, arXiv:2006.11239, beta 1e-4 to 0.02) or "scaled_linear", linear in
    sqrt(beta), as Stable Diffusion was trained (Rombach et al. 2022, beta 0.00085 to 0.012).
    Between the integers log(alpha^2) is interpolated linearly, so that samplers may stop anywhere.
    """

    betas: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.betas not in ("linear", "scaled_linear"):
            raise ValueError(f"betas must be 'linear' or 'scaled_linear', not {self.betas!r}")
        if not 0 < self.beta_start <= self.beta_end < 1 or self.num_timesteps < 2:
            raise ValueError("need 0 < beta_start <= beta_end < 1 and at least 2 timesteps")

    @property
    def t_max(self) -> float:
        return self.num_timesteps - 1.0

    def from_unit(self, u: Tensor) -> Tensor:
        """The discrete step that u falls into."""
        return (u * self.num_timesteps).floor().clamp(0, self.num_timesteps - 1)

    def at(self, t: Tensor) -> Level:
        table = _log_alphas_cumprod(self, t.device)
        t64 = t.double().clamp(0, self.t_max)
        below = t64.floor().long().clamp(max=self.num_timesteps - 2)
        log_alpha2 = torch.lerp(table[below], table[below + 1], t64 - below)
        alpha = torch.exp(0.5 * log_alpha2)
        sigma = torch.sqrt(-torch.expm1(log_alpha2))
        return Level(t, alpha.to(t.dtype), sigma.to(t.dtype))


@lru_cache(maxsize=32)
def _log_alphas_cumprod(schedule: DiscreteVP, device: torch.device) -> Tensor:
    # float64: the cumulative product of 1000 factors is compared with references to 1e-4 over whole trajectories
    start, end, n = schedule.beta_start, schedule.beta_end, schedule.num_timesteps
    if schedule.betas == "linear":
        betas = torch.linspace(start, end, n, dtype=torch.float64)
    else:
        betas = torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2
    return torch.log1p(-betas).cumsum(0).to(device)


@dataclass(frozen=True)
class RectifiedFlow:
    """Straight lines from picture to noise: alpha = 1 - s, sigma = s, t = 1000 s.

    shift: s' = shift * s / (1 + (shift - 1) * s) moves times towards the noise, for large latents
    (Esser et al. 2024, arXiv:2403.03206, equation 23). Source: Liu et al. 2022, arXiv:2209.03003.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift must be positive, not {self.shift}")

    @property
    def t_max(self) -> float:
        return 1000.0

    @property
    def num_timesteps(self) -> int | None:
        return None

    def from_unit(self, u: Tensor) -> Tensor:
        return 1000.0 * self.shift * u / (1.0 + (self.shift - 1.0) * u)

    def at(self, t: Tensor) -> Level:
        sigma = t / 1000.0
        return Level(t, 1.0 - sigma, sigma)
