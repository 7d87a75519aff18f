"""The stochastic sampler of EDM: Heun with a little noise added before each step."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ldm.types import Denoise, Level, Levels, Noise, OnStep, ignore


def sample_edm(
    denoise: Denoise,
    x: Tensor,
    levels: Levels,
    *,
    noise: Noise | None = None,
    on_step: OnStep = ignore,
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float | None = 50.0,
    s_noise: float = 1.003,
) -> Tensor:
    """Raises sigma by the factor 1 + min(s_churn / steps, sqrt(2) - 1) where s_tmin <= sigma <= s_tmax, then a Heun
    step from there; s_churn = 0 is the deterministic sampler.

    s_tmax: null for no bound. Kept below the schedule's sigma_max / sqrt(2), the network is never asked above it.
    s_noise: deviation of the added noise. The defaults are the paper's for ImageNet, table 5.
    x: [B, C, h, w] at levels[0].  Returns latents at levels[-1], same shape and dtype.
    Raises ValueError unless alpha = 1 at every level (VE): elsewhere adding noise does not lead to another level.
    Source: Karras et al. 2022, arXiv:2206.00364, algorithm 2.
    """
    if any(float(level.alpha) != 1.0 for level in levels):
        raise ValueError("its churn needs alpha = 1 at every level, as in EDM and VE; heun is its kin for VP and flow")
    if s_churn < 0 or s_tmin < 0 or s_noise < 0 or (s_tmax is not None and s_tmax < s_tmin):
        raise ValueError("s_churn, s_tmin and s_noise must not be negative, nor s_tmax below s_tmin")
    if s_churn and noise is None:
        raise ValueError("s_churn > 0 needs noise")
    gamma = min(s_churn / (len(levels) - 1), 2**0.5 - 1)
    for step, (now, then) in enumerate(pairwise(levels)):
        sigma = now.sigma
        if gamma and s_tmin <= float(sigma) and (s_tmax is None or float(sigma) <= s_tmax):
            sigma = (1 + gamma) * now.sigma
            added = torch.sqrt(sigma**2 - now.sigma**2) * s_noise
            x = x + added * noise(step, x.shape).to(x)  # type: ignore[misc]
            now = Level(None, now.alpha, sigma)  # between the levels: the denoiser asks its schedule for t
        x0 = denoise(x, now)
        slope = (x - x0) / sigma
        x_next = x + (then.sigma - sigma) * slope
        if float(then.sigma) > 0:
            slope_then = (x_next - denoise(x_next, then)) / then.sigma
            x_next = x + (then.sigma - sigma) * (slope + slope_then) / 2
        on_step(step, x_next, x0)
        x = x_next
    return x
