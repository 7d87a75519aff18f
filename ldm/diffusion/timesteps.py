"""Which noise levels training visits: a sample's place u in [0, 1), from its own key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm.random import Draws, Purpose


class Timesteps(Protocol):
    def __call__(self, draws: Draws) -> Tensor:
        """[B] float32 in [0, 1)."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Uniform in [0, 1).

    low_discrepancy: spread evenly over the global batch, which lowers the variance of the loss at no cost
    (Kingma et al. 2021, arXiv:2107.00630, appendix I.1, there with one shared offset per batch).
    """

    low_discrepancy: bool = True

    def __call__(self, draws: Draws) -> Tensor:
        if self.low_discrepancy:
            return draws.low_discrepancy(Purpose.TIMESTEP)
        return draws.uniform(Purpose.TIMESTEP)


@dataclass(frozen=True)
class LogitNormal:
    """u = sigmoid(mean + std * z): more steps in the middle. Esser et al. 2024, arXiv:2403.03206, section 3.1.

    low_discrepancy: as in `Uniform`, through the normal quantile function.
    """

    mean: float = 0.0
    std: float = 1.0
    low_discrepancy: bool = True

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std must be positive, not {self.std}")

    def __call__(self, draws: Draws) -> Tensor:
        if self.low_discrepancy:
            u = draws.low_discrepancy(Purpose.TIMESTEP).double()
            z = torch.special.ndtri(u.clamp(2.0**-25, 1 - 2.0**-25)).float()
        else:
            z = draws.normal(Purpose.TIMESTEP)
        return torch.sigmoid(self.mean + self.std * z)
