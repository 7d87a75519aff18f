"""DPM-Solver++(2M): second order from one network call a step."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ldm.types import Denoise, Level, Levels, Noise, OnStep, ignore


def sample_dpmpp_2m(
    denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise | None = None, on_step: OnStep = ignore
) -> Tensor:
    """Multistep solver in lambda = log(alpha / sigma), data prediction.

    The first step, and any step that touches an infinite lambda (alpha = 0 or sigma = 0), is first order.
    x: [B, C, h, w] at levels[0].  Returns latents at levels[-1], same shape and dtype.  `noise` is not used.
    Source: Lu et al. 2022, arXiv:2211.01095, algorithm 2.
    """
    previous: tuple[Tensor, Tensor] | None = None  # x0 and lambda of the step before
    for step, (now, then) in enumerate(pairwise(levels)):
        x0 = denoise(x, now)
        here, there = _log_snr(now), _log_snr(then)
        estimate = x0
        if previous is not None and torch.isfinite(torch.stack([previous[1], here, there])).all():
            r = (here - previous[1]) / (there - here)
            estimate = x0 + (x0 - previous[0]) / (2 * r)
        eps = (x - now.alpha * estimate) / now.sigma
        x = then.alpha * estimate + then.sigma * eps  # = sigma'/sigma x - alpha' (exp(-h) - 1) estimate
        previous = x0, here
        on_step(step, x, x0)
    return x


def _log_snr(level: Level) -> Tensor:
    return torch.log(level.alpha) - torch.log(level.sigma)
