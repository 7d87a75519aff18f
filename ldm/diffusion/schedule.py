"""Time -> how much of the picture and how much noise: x_t = alpha * x0 + sigma * eps.

`t` is the number that the network is told, from 0 (clean) to about 1000 (noise) in every schedule here.
Training draws u uniformly in [0, 1) and asks `from_unit(u)`; a sampler asks `levels(...)` (levels.py).

Variance-preserving (VP, alpha^2 + sigma^2 = 1): `DiscreteVP` and `DiscretizedVP` in steps, `LinearVP`, `CosineVP` and
`SigmoidVP` in continuous time, `ZeroTerminalSNR` of any of them. `VarianceExploding`: alpha = 1. `RectifiedFlow`:
alpha + sigma = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from ldm.types import Level

T_END = 1000.0
"""Where continuous time ends, so that a network's time embedding sees the same range as with 1000 steps."""


class Schedule(Protocol):
    """A value that turns time into a `Level` and back; `at` has the dtype, device and shape of `t`."""

    def __hash__(self) -> int: ...

    @property
    def t_max(self) -> float: ...

    @property
    def num_timesteps(self) -> int | None:
        """Number of discrete steps, or None for continuous time."""
        ...

    def from_unit(self, u: Tensor) -> Tensor: ...

    def at(self, t: Tensor) -> Level: ...

    def t_at(self, ratio: Tensor) -> Tensor:
        """The time at which sigma / alpha = ratio, float64: the inverse of `at`, clamped to [0, t_max].

        ratio: 0 (clean) to infinity (pure noise).
        """
        ...


# ---- variance-preserving, in steps ----------------------------------------------------------------------------------


class _Steps:
    """N levels from a table of log(alpha^2), which is interpolated linearly so that samplers may stop anywhere."""

    num_timesteps: int

    def log_alphas_cumprod(self) -> Tensor:
        """[N] float64, decreasing."""
        raise NotImplementedError

    @property
    def t_max(self) -> float:
        return self.num_timesteps - 1.0

    def from_unit(self, u: Tensor) -> Tensor:
        """The discrete step that u falls into."""
        return (u * self.num_timesteps).floor().clamp(0, self.num_timesteps - 1)

    def at(self, t: Tensor) -> Level:
        table = _table(self, t.device)
        t64 = t.double().clamp(0, self.t_max)
        below = t64.floor().long().clamp(max=self.num_timesteps - 2)
        return _vp_level(t, torch.lerp(table[below], table[below + 1], t64 - below))

    def t_at(self, ratio: Tensor) -> Tensor:
        table = _table(self, ratio.device)
        log_alpha2 = torch.maximum(-torch.log1p(ratio.double() ** 2), table[-1])
        above = torch.searchsorted(-table, -log_alpha2).clamp(1, self.num_timesteps - 1)
        step = (table[above - 1] - log_alpha2) / (table[above - 1] - table[above])
        return above - 1 + step.clamp(0, 1)


@lru_cache(maxsize=32)
def _table(schedule: _Steps, device: torch.device) -> Tensor:
    # float64: the cumulative product of 1000 factors is compared with references to 1e-4 over whole trajectories
    return schedule.log_alphas_cumprod().to(device)


def _vp_level(t: Tensor, log_alpha2: Tensor) -> Level:
    alpha = torch.exp(0.5 * log_alpha2)
    sigma = torch.sqrt(-torch.expm1(log_alpha2))
    return Level(t, alpha.to(t.dtype), sigma.to(t.dtype))


@dataclass(frozen=True)
class DiscreteVP(_Steps):
    """Variance-preserving schedule of N discrete steps, alpha^2 = prod(1 - beta), sigma^2 = 1 - alpha^2.

    betas: "linear" (Ho et al. 2020, arXiv:2006.11239, beta 1e-4 to 0.02); "scaled_linear", linear in sqrt(beta), as
    Stable Diffusion was trained (Rombach et al. 2022, beta 0.00085 to 0.012); "sigmoid", beta along a sigmoid from -6
    to 6 (Xu et al. 2022, arXiv:2203.02923). The names are those of diffusers; its "squaredcos_cap_v2" is
    `DiscretizedVP(CosineVP())`.
    """

    betas: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.betas not in ("linear", "scaled_linear", "sigmoid"):
            raise ValueError(f"betas must be 'linear', 'scaled_linear' or 'sigmoid', not {self.betas!r}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError("need 0 < beta_start <= beta_end < 1")
        _check_whole("num_timesteps", self.num_timesteps, 2)

    def log_alphas_cumprod(self) -> Tensor:
        start, end, n = self.beta_start, self.beta_end, self.num_timesteps
        if self.betas == "linear":
            betas = torch.linspace(start, end, n, dtype=torch.float64)
        elif self.betas == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2
        else:
            betas = start + (end - start) * torch.sigmoid(torch.linspace(-6, 6, n, dtype=torch.float64))
        return torch.log1p(-betas).cumsum(0)


# ---- variance-preserving, in continuous time ------------------------------------------------------------------------


class _Continuous:
    """Time from 0 to 1000, s = t / 1000."""

    num_timesteps = None

    @property
    def t_max(self) -> float:
        return T_END

    def from_unit(self, u: Tensor) -> Tensor:
        return T_END * u


@dataclass(frozen=True)
class LinearVP(_Continuous):
    """beta(s) linear in time, log(alpha^2) = -(beta_min s + (beta_max - beta_min) s^2 / 2).

    The limit of Ho's 1000 linear steps, with beta counted per unit of s. Song et al. 2021, arXiv:2011.13456, eq. 33.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError("need 0 < beta_min <= beta_max")

    def at(self, t: Tensor) -> Level:
        s = t.double() / T_END
        return _vp_level(t, -(self.beta_min * s + (self.beta_max - self.beta_min) * s**2 / 2))

    def t_at(self, ratio: Tensor) -> Tensor:
        rise = self.beta_max - self.beta_min
        integral = torch.log1p(ratio.double() ** 2).clamp(max=self.beta_min + rise / 2)
        return T_END * 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * rise * integral))


@dataclass(frozen=True)
class CosineVP(_Continuous):
    """alpha = cos(b) / cos(b0), b from b0 = pi/2 offset / (1 + offset) at s = 0 to pi/2 at s = 1, where alpha = 0.

    Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17; their 1000 steps with clipped beta are
    `DiscretizedVP(CosineVP())`.
    """

    offset: float = 0.008

    def __post_init__(self) -> None:
        if not self.offset >= 0:
            raise ValueError(f"offset must be at least 0, not {self.offset}")

    @property
    def _scale(self) -> float:
        return math.pi / 2 / (1 + self.offset)

    def at(self, t: Tensor) -> Level:
        s, b0 = t.double() / T_END, self._scale * self.offset
        # cos(b) and 1 - alpha^2 = (cos(b0)^2 - cos(b)^2) / cos(b0)^2 as products of sines: exactly 0 at the two ends
        alpha = torch.sin(self._scale * (1 - s)) / math.cos(b0)
        sigma = torch.sqrt(torch.sin(self._scale * s) * torch.sin(self._scale * (s + 2 * self.offset))) / math.cos(b0)
        return Level(t, alpha.to(t.dtype), sigma.to(t.dtype))

    def t_at(self, ratio: Tensor) -> Tensor:
        angle, b0 = torch.atan(ratio.double()), self._scale * self.offset
        sin_b = torch.sqrt(torch.sin(angle) ** 2 + (torch.cos(angle) * math.sin(b0)) ** 2)
        b = torch.atan2(sin_b, torch.cos(angle) * math.cos(b0))
        return T_END * (b / self._scale - self.offset).clamp(0, 1)


@dataclass(frozen=True)
class SigmoidVP(_Continuous):
    """alpha^2 falls from 1 to 0 along the piece of a sigmoid between start / tau and end / tau.

    Larger tau is nearer to a straight line. Jabri et al. 2022, arXiv:2212.11972, algorithm 3 (there with -3, 3 and
    tau 0.9 to 1.1; Chen 2023, arXiv:2301.10972).
    """

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0

    def __post_init__(self) -> None:
        if not self.start < self.end or not self.tau > 0:
            raise ValueError("need start < end and tau > 0")

    def at(self, t: Tensor) -> Level:
        # sigmoid(p) - sigmoid(q) = sinh((p - q) / 2) / (2 cosh(p / 2) cosh(q / 2)): exactly 0 at the two ends
        s, (a, b) = t.double() / T_END, self._halves
        x = a + (b - a) * s
        alpha2 = torch.sinh((b - a) * (1 - s)) * math.cosh(a) / (math.sinh(b - a) * torch.cosh(x))
        sigma2 = torch.sinh((b - a) * s) * math.cosh(b) / (math.sinh(b - a) * torch.cosh(x))
        return Level(t, torch.sqrt(alpha2).to(t.dtype), torch.sqrt(sigma2).to(t.dtype))

    def t_at(self, ratio: Tensor) -> Tensor:
        angle, (a, b) = torch.atan(ratio.double()), self._halves
        clean, noise = torch.cos(angle) ** 2 * math.cosh(b), torch.sin(angle) ** 2 * math.cosh(a)
        up, down = noise * math.exp(b) + clean * math.exp(a), clean * math.exp(-a) + noise * math.exp(-b)
        return T_END * ((torch.log(up / down) / 2 - a) / (b - a)).clamp(0, 1)

    @property
    def _halves(self) -> tuple[float, float]:
        return self.start / self.tau / 2, self.end / self.tau / 2


@dataclass(frozen=True)
class DiscretizedVP(_Steps):
    """A continuous VP curve as N steps, as trained checkpoints of it need: step k stands at s = (k + 1) / N.

    max_beta: bound of a single step's beta, which keeps alpha above 0 at the last step
    (Nichol and Dhariwal 2021, arXiv:2102.09672, section 3.2; with `CosineVP` diffusers' "squaredcos_cap_v2").
    """

    curve: LinearVP | CosineVP | SigmoidVP = field(default_factory=CosineVP)
    num_timesteps: int = 1000
    max_beta: float = 0.999

    def __post_init__(self) -> None:
        if not isinstance(self.curve, LinearVP | CosineVP | SigmoidVP):
            raise ValueError(f"DiscretizedVP takes LinearVP, CosineVP or SigmoidVP as its curve, not {self.curve}")
        if not 0 < self.max_beta < 1:
            raise ValueError("need 0 < max_beta < 1")
        _check_whole("num_timesteps", self.num_timesteps, 2)

    def log_alphas_cumprod(self) -> Tensor:
        s = torch.arange(self.num_timesteps + 1, dtype=torch.float64) / self.num_timesteps
        log_alpha2 = 2 * torch.log(self.curve.at(T_END * s).alpha)
        return log_alpha2.diff().clamp(min=math.log1p(-self.max_beta)).cumsum(0)


@dataclass(frozen=True)
class ZeroTerminalSNR:
    """Any VP schedule, shifted and stretched in alpha so that its last level is pure noise and its first is kept.

    Lin et al. 2023, arXiv:2305.08891, algorithm 1. Needs a prediction that does not divide by alpha, and levels that
    begin at the last step ("trailing").
    """

    schedule: Schedule = field(default_factory=DiscreteVP)

    def __post_init__(self) -> None:
        ends = self.schedule.at(torch.tensor([0.0, self.t_max / 2, self.t_max], dtype=torch.float64))
        if not torch.allclose(ends.alpha**2 + ends.sigma**2, torch.ones_like(ends.alpha)):
            raise ValueError(f"ZeroTerminalSNR rescales variance-preserving schedules, which {self.schedule} is not")

    @property
    def t_max(self) -> float:
        return self.schedule.t_max

    @property
    def num_timesteps(self) -> int | None:
        return self.schedule.num_timesteps

    def from_unit(self, u: Tensor) -> Tensor:
        return self.schedule.from_unit(u)

    def at(self, t: Tensor) -> Level:
        stretch, last = _stretch(self.schedule)
        t64 = t.double()
        alpha = stretch * (self.schedule.at(t64).alpha - last).clamp(min=0)
        alpha = alpha.masked_fill(t64 >= self.t_max, 0.0)  # exactly, whatever the rounding of this device's exp
        sigma = torch.sqrt((1 - alpha) * (1 + alpha))
        return Level(t, alpha.to(t.dtype), sigma.to(t.dtype))

    def t_at(self, ratio: Tensor) -> Tensor:
        stretch, last = _stretch(self.schedule)
        alpha = (torch.cos(torch.atan(ratio.double())) / stretch + last).clamp(max=1)
        t = self.schedule.t_at(torch.sqrt((1 - alpha) * (1 + alpha)) / alpha)
        return t.masked_fill(torch.isinf(ratio), self.t_max)


@lru_cache(maxsize=32)
def _stretch(schedule: Schedule) -> tuple[float, float]:
    """first / (first - last) and last, of alpha."""
    first, last = schedule.at(torch.tensor([0.0, schedule.t_max], dtype=torch.float64)).alpha.tolist()
    return first / (first - last), last


# ---- others ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VarianceExploding(_Continuous):
    """alpha = 1, sigma from sigma_min to sigma_max, evenly in log(sigma).

    sigma_min, sigma_max: in units of the latents. Song et al. 2021, arXiv:2011.13456; the default range is that of
    Karras et al. 2022, arXiv:2206.00364, whose distribution of training noise is `timesteps.LogNormalSigma`.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError("need 0 < sigma_min < sigma_max")

    def at(self, t: Tensor) -> Level:
        span = math.log(self.sigma_max / self.sigma_min)
        sigma = self.sigma_min * torch.exp(span * t.double() / T_END)
        return Level(t, torch.ones_like(t), sigma.to(t.dtype))

    def t_at(self, ratio: Tensor) -> Tensor:
        span = math.log(self.sigma_max / self.sigma_min)
        return T_END * (torch.log(ratio.double() / self.sigma_min) / span).clamp(0, 1)


@dataclass(frozen=True)
class RectifiedFlow(_Continuous):
    """Straight lines from picture to noise: alpha = 1 - s, sigma = s, t = 1000 s.

    shift: s' = shift * s / (1 + (shift - 1) * s) moves times towards the noise, for large latents
    (Esser et al. 2024, arXiv:2403.03206, equation 23). Source: Liu et al. 2022, arXiv:2209.03003.
    base_positions: the number h * w of latent positions for which `shift` is right; for another size `for_size`
    multiplies it by sqrt(h * w / base_positions), by the same equation. None: one shift for every size.
    """

    shift: float = 1.0
    base_positions: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be a positive number, not {self.shift}")
        if self.base_positions is not None:
            _check_whole("base_positions", self.base_positions, 1)

    def from_unit(self, u: Tensor) -> Tensor:
        noise = self.shift * u
        return T_END * (noise / (noise + (1.0 - u)))  # in this order exactly 1000 at u = 1: pure noise has alpha = 0

    def at(self, t: Tensor) -> Level:
        sigma = t / T_END
        return Level(t, 1.0 - sigma, sigma)

    def t_at(self, ratio: Tensor) -> Tensor:
        return T_END / (1.0 + 1.0 / ratio.double())


def _check_whole(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value}")


def for_size(schedule: Schedule, shape: Sequence[int]) -> Schedule:
    """The schedule for latents [..., h, w]: itself, but for a flow whose shift depends on the resolution."""
    if not isinstance(schedule, RectifiedFlow) or schedule.base_positions is None:
        return schedule
    positions = shape[-2] * shape[-1]
    shift = schedule.shift * math.sqrt(positions / schedule.base_positions)
    return replace(schedule, shift=shift, base_positions=positions)
