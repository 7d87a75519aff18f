"""Which noise levels training visits: a sample's time on the schedule, from its own key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.random import Draws, Purpose


class Timesteps(Protocol):
    def __call__(self, draws: Draws, schedule: Schedule) -> Tensor:
        """[B] float32 times in [0, t_max], whole numbers on a schedule of discrete steps."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Uniform on the schedule's own unit interval, `schedule.from_unit`.

    low_discrepancy: spread evenly over the global batch, which lowers the variance of the loss at no cost
    (Kingma et al. 2021, arXiv:2107.00630, appendix I.1, there with one shared offset per batch).
    """

    low_discrepancy: bool = True

    def __call__(self, draws: Draws, schedule: Schedule) -> Tensor:
        if self.low_discrepancy:
            return schedule.from_unit(draws.low_discrepancy(Purpose.TIMESTEP))
        return schedule.from_unit(draws.uniform(Purpose.TIMESTEP))


@dataclass(frozen=True)
class LogitNormal:
    """u = sigmoid(mean + std * z): more steps in the middle. Esser et al. 2024, arXiv:2403.03206, section 3.1.

    low_discrepancy: as in `Uniform`, through the normal quantile function.
    """

    mean: float = 0.0
    std: float = 1.0
    low_discrepancy: bool = True

    def __post_init__(self) -> None:
        _check_std(self.std)

    def __call__(self, draws: Draws, schedule: Schedule) -> Tensor:
        return schedule.from_unit(torch.sigmoid(self.mean + self.std * _normal(draws, self.low_discrepancy)))


@dataclass(frozen=True)
class LogNormalSigma:
    """log(sigma / alpha) = mean + std * z, cut at the ends of the schedule.

    Karras et al. 2022, arXiv:2206.00364, table 1 (P_mean, P_std), for data of standard deviation 0.5; for data of
    deviation d the same levels have the mean -1.2 + log(d / 0.5).
    low_discrepancy: as in `Uniform`, through the normal quantile function.
    """

    mean: float = -1.2
    std: float = 1.2
    low_discrepancy: bool = True

    def __post_init__(self) -> None:
        _check_std(self.std)

    def __call__(self, draws: Draws, schedule: Schedule) -> Tensor:
        t = schedule.t_at(torch.exp(self.mean + self.std * _normal(draws, self.low_discrepancy).double()))
        return (t if schedule.num_timesteps is None else t.round()).float()


def _normal(draws: Draws, low_discrepancy: bool) -> Tensor:
    """[B] standard normal, float32."""
    if not low_discrepancy:
        return draws.normal(Purpose.TIMESTEP)
    u = draws.low_discrepancy(Purpose.TIMESTEP).double()
    return torch.special.ndtri(u.clamp(2.0**-25, 1 - 2.0**-25)).float()


def _check_std(std: float) -> None:
    if not std > 0:
        raise ValueError(f"std must be positive, not {std}")
