"""Euler: one first-order step for every schedule."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from ldm.types import Denoise, Levels, Noise, OnStep, ignore


def sample_euler(
    denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise | None = None, on_step: OnStep = ignore
) -> Tensor:
    """First-order solver of dx = x0 d(alpha) + eps d(sigma); equals DDIM (eta = 0) on VP, Karras-Euler on VE.

    x: [B, C, h, w] at levels[0].  Returns latents at levels[-1], same shape and dtype.  `noise` is not used.
    """
    for step, (now, then) in enumerate(pairwise(levels)):
        x0 = denoise(x, now)
        eps = (x - now.alpha * x0) / now.sigma
        x = then.alpha * x0 + then.sigma * eps
        on_step(step, x, x0)
    return x
