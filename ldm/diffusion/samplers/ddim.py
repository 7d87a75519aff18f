"""DDIM: deterministic at eta = 0, the ancestral DDPM step at eta = 1."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ldm.types import Denoise, Levels, Noise, OnStep, ignore


def sample_ddim(
    denoise: Denoise,
    x: Tensor,
    levels: Levels,
    *,
    noise: Noise | None = None,
    on_step: OnStep = ignore,
    eta: float = 0.0,
) -> Tensor:
    """x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s z, with s = eta times the posterior's deviation.

    x: [B, C, h, w] at levels[0].  Returns latents at levels[-1], same shape and dtype.
    Source: Song et al. 2020, arXiv:2010.02502, equation 12.
    """
    if eta and noise is None:
        raise ValueError("eta > 0 needs noise")
    for step, (now, then) in enumerate(pairwise(levels)):
        x0 = denoise(x, now)
        eps = (x - now.alpha * x0) / now.sigma
        # variance of q(x_then | x_now, x0), written so that alpha = 0 at `now` is regular
        added = (now.sigma**2 - (now.alpha * then.sigma / then.alpha) ** 2).clamp(min=0)
        s = eta * then.sigma * torch.sqrt(added) / now.sigma
        x_next = then.alpha * x0 + torch.sqrt((then.sigma**2 - s**2).clamp(min=0)) * eps
        if eta and float(s) > 0:
            x_next = x_next + s * noise(step, x.shape).to(x)  # type: ignore[misc]
        on_step(step, x_next, x0)
        x = x_next
    return x
