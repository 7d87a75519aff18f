"""The noise of training. Each kind gives two: the noise that x_t is made with, and the one that the target names.

Both are [B, C, h, w] float32, functions of the sample's own draws, and the same tensor but for `Perturbed`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ldm.random import Draws, Purpose


class Noising(Protocol):
    def __call__(self, draws: Draws, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """shape: (C, h, w). Returns (noise in x_t, noise in the target)."""
        ...


@dataclass(frozen=True)
class Plain:
    """Independent standard normal noise."""

    def __call__(self, draws: Draws, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        noise = draws.normal(Purpose.NOISE, shape)
        return noise, noise


@dataclass(frozen=True)
class Offset:
    """Plain noise and one more draw per channel, equal at all positions: covariance I + strength^2 within a channel.

    Lets a network whose schedule leaves a remainder of the picture (alpha > 0 at the end) learn very dark and very
    bright pictures. Guttenberg 2023, "Diffusion with offset noise" (there 0.1; 0.0357 is usual for fine-tuning).
    """

    strength: float = 0.0357

    def __post_init__(self) -> None:
        _check_at_least_zero("strength", self.strength)

    def __call__(self, draws: Draws, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        noise = draws.normal(Purpose.NOISE, shape)
        noise = noise + self.strength * draws.normal(Purpose.NOISE_OFFSET, (shape[0], 1, 1))
        return noise, noise


@dataclass(frozen=True)
class Pyramid:
    """Plain noise and coarser grids of it, cells of 2, 4, 8 ... positions, each by `discount` fainter than the last.

    Unit variance at every position; the covariance of two positions of a channel is the share of the grids in which
    they have a cell in common. Whitaker 2023, "Multi-resolution noise for diffusion model training", there with cell
    sizes drawn at random and scaled by the measured deviation; fixed sizes make its covariance known and its shapes
    static.

    num_grids: coarser grids at most; they end where one cell holds the whole latent.
    """

    discount: float = 0.3
    num_grids: int = 6

    def __post_init__(self) -> None:
        _check_at_least_zero("discount", self.discount)
        if self.num_grids < 1:
            raise ValueError(f"num_grids must be at least 1, not {self.num_grids}")

    def __call__(self, draws: Draws, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        channels, height, width = shape
        num_grids = min(self.num_grids, math.ceil(math.log2(max(height, width, 2))))
        cells = [2 ** (i + 1) for i in range(num_grids)]
        sizes = [(math.ceil(height / cell), math.ceil(width / cell)) for cell in cells]
        noise = draws.normal(Purpose.NOISE, shape)
        values = draws.normal(Purpose.NOISE_OFFSET, (channels, sum(rows * columns for rows, columns in sizes)))
        grids = values.split([rows * columns for rows, columns in sizes], dim=-1)
        for i, (grid, cell, size) in enumerate(zip(grids, cells, sizes, strict=True)):
            fine = grid.unflatten(-1, size).repeat_interleave(cell, -2).repeat_interleave(cell, -1)
            noise = noise + self.discount ** (i + 1) * fine[..., :height, :width]
        noise = noise / math.sqrt(sum(self.discount ** (2 * i) for i in range(num_grids + 1)))
        return noise, noise


@dataclass(frozen=True)
class Perturbed:
    """x_t is made with noise of variance 1 + strength^2, the target names its plain part.

    Training then sees inputs as wrong as sampling makes them. Ning et al. 2023, arXiv:2301.11706, algorithm 3.
    """

    strength: float = 0.1

    def __post_init__(self) -> None:
        _check_at_least_zero("strength", self.strength)

    def __call__(self, draws: Draws, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        noise = draws.normal(Purpose.NOISE, shape)
        return noise + self.strength * draws.normal(Purpose.NOISE_OFFSET, shape), noise


def _check_at_least_zero(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and 0 <= value < math.inf):
        raise ValueError(f"{name} must be a number of at least 0, not {value}")
