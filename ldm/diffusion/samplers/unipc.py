"""UniPC: a predictor of order up to three, corrected by the network call that the next step needs anyway."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.levels import log_snr
from ldm.types import Denoise, Level, Levels, Noise, OnStep, ignore

Point = tuple[Tensor, Tensor]
"""lambda = log(alpha / sigma) of a level, and x0 there."""


def sample_unipc(
    denoise: Denoise,
    x: Tensor,
    levels: Levels,
    *,
    noise: Noise | None = None,
    on_step: OnStep = ignore,
    order: int = 2,
    variant: str = "bh2",
) -> Tensor:
    """Multistep predictor and corrector in lambda, data prediction: UniPC-p is of order p + 1 for one call a step.

    order: p, 1 to 3; 2 suits guided sampling, 3 unguided (the paper, section 4).   variant: "bh1", B(h) = h, or "bh2",
    B(h) = e^h - 1. B stands where a single difference is used; larger systems are solved exactly and it cancels.
    The order rises from 1 at the start, and comes down to 1 towards sigma = 0, where lambda is infinite; a step from
    alpha = 0 is first order, uncorrected, and is not remembered.
    x: [B, C, h, w] at levels[0].  Returns latents at levels[-1], same shape and dtype.  `noise` is not used.
    Raises ValueError.
    Source: Zhao et al. 2023, arXiv:2302.04867, algorithms 1 and 2, in the appendix's form for data prediction.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, not {order}")
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"variant must be 'bh1' or 'bh2', not {variant!r}")
    last = len(levels) - 1
    ends_clean = float(levels[-1].sigma) == 0
    known: list[Point] = []  # newest last
    start, used = x, 0  # where the step that led here began, and its order; 0: it cannot be corrected
    for step, (now, then) in enumerate(pairwise(levels)):
        x0 = denoise(x, now)
        point = log_snr(now), x0
        if used:
            x = _step(start, levels[step - 1], now, known[-used:], variant, arrived=point)
        start = x
        if float(now.alpha) == 0 or float(then.sigma) == 0:
            used = 0
            x = then.alpha * x0 + then.sigma / now.sigma * (x - now.alpha * x0)
        else:
            known = [*known[-2:], point]
            used = min(order, len(known), last - step if ends_clean else order)
            x = _step(start, now, then, known[-used:], variant)
        on_step(step, x, x0)
    return x


def _step(x: Tensor, now: Level, then: Level, known: list[Point], variant: str, arrived: Point | None = None) -> Tensor:
    """UniP of order len(known) from `now` to `then`; with x0 at `then`, UniC of that order."""
    *behind, (here, x0) = known
    others = [*reversed(behind), *([arrived] if arrived is not None else [])]
    h = log_snr(then) - here
    phi = torch.expm1(-h)
    out = then.sigma / now.sigma * x - then.alpha * phi * x0
    if not others:
        return out
    r = torch.stack([(there - here) / h for there, _ in others])
    if len(others) == 1:
        weights = (-h if variant == "bh1" else phi).view(1) / 2
    else:
        rows, factorial = [], 1.0
        for k in range(1, len(others) + 1):  # k! phi_(k+1)(-h) (-h)
            phi = phi / -h - 1 / factorial
            rows.append(phi * factorial)
            factorial *= k + 1
        powers = torch.arange(len(others), dtype=r.dtype)[:, None]
        weights = torch.linalg.solve(r**powers, torch.stack(rows))
    for weight, ratio, (_, other) in zip(weights, r, others, strict=True):
        out = out - then.alpha * (weight / ratio) * (other - x0)
    return out
