"""DDPM: ancestral sampling from the Gaussian posterior."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ldm.types import Denoise, Levels, Noise, OnStep, ignore


def sample_ddpm(
    denoise: Denoise,
    x: Tensor,
    levels: Levels,
    *,
    noise: Noise | None = None,
    on_step: OnStep = ignore,
    variance: str = "small",
) -> Tensor:
    """x' ~ q(x_then | x_now, x0) for the pair of levels, any distance apart.

    variance: "small", the posterior's own, or "large", the forward step's (Ho et al. 2020, section 3.2).
    x: [B, C, h, w] at levels[0].  Returns latents at levels[-1], same shape and dtype.
    Source: Ho et al. 2020, arXiv:2006.11239, equations 6 and 7; Kingma et al. 2021, arXiv:2107.00630, appendix A.
    """
    if noise is None:
        raise ValueError("ddpm draws noise at every step: hand it `noise`")
    if variance not in ("small", "large"):
        raise ValueError(f"variance must be 'small' or 'large', not {variance!r}")
    for step, (now, then) in enumerate(pairwise(levels)):
        x0 = denoise(x, now)
        ratio = now.alpha / then.alpha
        forward = now.sigma**2 - (ratio * then.sigma) ** 2  # variance of q(x_now | x_then)
        mean = (ratio * then.sigma**2 * x + then.alpha * forward * x0) / now.sigma**2
        spread = forward * then.sigma**2 / now.sigma**2 if variance == "small" else forward
        x = mean if float(then.sigma) == 0 else mean + torch.sqrt(spread) * noise(step, x.shape).to(x)
        on_step(step, x, x0)
    return x
