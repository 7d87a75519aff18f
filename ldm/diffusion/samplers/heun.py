"""Heun: Euler with a correction, second order, two network calls a step."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from ldm.diffusion.levels import is_variance_preserving
from ldm.types import Denoise, Levels, Noise, OnStep, ignore


def sample_heun(
    denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise | None = None, on_step: OnStep = ignore
) -> Tensor:
    """Trapezoid rule for the probability-flow ODE; the last step to sigma = 0 is Euler's.

    On VP schedules the rule is taken in (x / alpha, sigma / alpha), as k-diffusion does; elsewhere, and for a first
    step at alpha = 0, in (alpha, sigma) directly.
    x: [B, C, h, w] at levels[0].  Returns latents at levels[-1], same shape and dtype.  `noise` is not used.
    Source: Karras et al. 2022, arXiv:2206.00364, algorithm 1.
    """
    in_ratio = is_variance_preserving(levels)
    for step, (now, then) in enumerate(pairwise(levels)):
        x0 = denoise(x, now)
        eps = (x - now.alpha * x0) / now.sigma
        x_next = then.alpha * x0 + then.sigma * eps
        if float(then.sigma) > 0:
            x0_then = denoise(x_next, then)
            eps_then = (x_next - then.alpha * x0_then) / then.sigma
            if in_ratio and float(now.alpha) > 0:
                slope = (eps + eps_then) / 2
                x_next = then.alpha * (x / now.alpha + (then.sigma / then.alpha - now.sigma / now.alpha) * slope)
            else:
                drift = (then.alpha - now.alpha) * (x0 + x0_then) + (then.sigma - now.sigma) * (eps + eps_then)
                x_next = x + drift / 2
        on_step(step, x_next, x0)
        x = x_next
    return x
