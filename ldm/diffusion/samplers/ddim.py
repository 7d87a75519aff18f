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

    eta: 0 to 1; above 0 `noise` is needed.
    x: [B, C, h, w] at levels[0].  Returns latents at levels[-1], same shape and dtype.  Raises ValueError.
    Source: Song et al. 2020, arXiv:2010.02502, equations 12 and 16.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be within 0 and 1, not {eta}")
    if eta and noise is None:
        raise ValueError("eta > 0 needs noise")
    for step, (now, then) in enumerate(pairwise(levels)):
        x0 = denoise(x, now)
        eps = (x - now.alpha * x0) / now.sigma
        # deviation of q(x_then | x_now, x0), written so that alpha = 0 at `now` is regular
        shrink = now.alpha * then.sigma / (then.alpha * now.sigma)  # of the noise sigma / alpha
        s = eta * then.sigma * torch.sqrt((1 - shrink**2).clamp(min=0))
        x = then.alpha * x0 + torch.sqrt(then.sigma**2 - s**2) * eps
        if float(s) > 0:
            x = x + s * noise(step, x.shape).to(x)  # type: ignore[misc]
        on_step(step, x, x0)
    return x
