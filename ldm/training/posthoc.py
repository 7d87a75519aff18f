"""An average of any length from stored ones: the weights that bring their profiles closest to the wanted one.

Source: Karras et al. 2024, arXiv:2312.02696, section 3.2 and appendix C.2. Everything is in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.training.ema import LONGEST, PowerFunction


@dataclass(frozen=True)
class Fit:
    """weights: [N], of the stored averages, with sum 1.   error: distance of their profile from the wanted one, in
    units of its own norm; 0 is the wanted average itself.
    """

    weights: list[float]
    error: float


def inner_products(times_a: Tensor, gammas_a: Tensor, times_b: Tensor, gammas_b: Tensor) -> Tensor:
    """Integral of p_a(t) p_b(t), where p(t) = (gamma + 1) t^gamma / T^(gamma + 1) up to T = time, and 0 after it.

    All of shapes that broadcast. Appendix C.2: for T_a <= T_b it is
    (gamma_a + 1) (gamma_b + 1) (T_a / T_b)^gamma_b / ((gamma_a + gamma_b + 1) T_b).
    """
    earlier, later = torch.minimum(times_a, times_b), torch.maximum(times_a, times_b)
    gamma_of_later = torch.where(times_a <= times_b, gammas_b, gammas_a)
    factor = (gammas_a + 1) * (gammas_b + 1) / ((gammas_a + gammas_b + 1) * later)
    return factor * (earlier / later) ** gamma_of_later


def solve(stored: Sequence[tuple[int, float]], updates: int, length: float) -> Fit:
    """The combination of `stored` averages, (updates, length) of each, that is closest to `length` at `updates`.

    What a run counts in steps is exact: the weight of update t is the integral of p from t - 1 to t, so the error of
    the counted profiles is at most that of the continuous ones.
    The sum of the weights is held at 1, which the paper leaves free: so a weight that stands still is itself again
    however few averages there are, and what is left of the error concerns its movement alone.
    """
    times = torch.tensor([float(u) for u, _ in stored], dtype=torch.float64)
    gammas = torch.tensor([PowerFunction(own).gamma for _, own in stored], dtype=torch.float64)
    time, gamma = torch.tensor(float(updates), dtype=torch.float64), times.new_tensor(PowerFunction(length).gamma)
    gram = inner_products(times[:, None], gammas[:, None], times, gammas)
    wanted = inner_products(times, gammas, time, gamma)
    norm = inner_products(time, gamma, time, gamma)
    scale = gram.diagonal().rsqrt()  # profiles of norm 1: early ones are narrow and high
    both = torch.stack([wanted, torch.ones_like(wanted)], 1)
    solved = torch.linalg.lstsq(gram * scale * scale[:, None], both * scale[:, None], driver="gelsd").solution
    free, ones = (solved * scale[:, None]).unbind(1)
    weights = free + ones * (1 - free.sum()) / ones.sum()
    error = (norm - 2 * weights @ wanted + weights @ gram @ weights).clamp_min(0) / norm
    return Fit(weights.tolist(), float(error.sqrt()))


def expressible(stored: Sequence[tuple[int, float]], updates: int, max_error: float) -> list[float]:
    """The lengths, in steps of 0.005, that `stored` averages give with at most this error."""
    return [length for length in _grid() if solve(stored, updates, length).error <= max_error]


def _grid() -> Iterable[float]:
    return (i / 200 for i in range(1, int(200 * LONGEST) + 1))
