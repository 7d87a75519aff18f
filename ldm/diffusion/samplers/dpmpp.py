"""DPM-Solver++(2M) and its SDE: second order from one network call a step."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.levels import log_snr
from ldm.types import Denoise, Levels, Noise, OnStep, ignore


def sample_dpmpp_2m(
    denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise | None = None, on_step: OnStep = ignore
) -> Tensor:
    """Multistep solver of the ODE in lambda = log(alpha / sigma), data prediction.

    The first step, and any step that touches an infinite lambda (alpha = 0 or sigma = 0), is first order.
    x: [B, C, h, w] at levels[0].  Returns latents at levels[-1], same shape and dtype.  `noise` is not used.
    Source: Lu et al. 2022, arXiv:2211.01095, algorithm 2.
    """
    return sample_dpmpp_2m_sde(denoise, x, levels, on_step=on_step, eta=0.0)


def sample_dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    levels: Levels,
    *,
    noise: Noise | None = None,
    on_step: OnStep = ignore,
    eta: float = 1.0,
) -> Tensor:
    """The same for the SDE, midpoint form; with h = lambda' - lambda and D the extrapolated x0,

    x' = sigma'/sigma e^(-eta h) x + alpha' (1 - e^(-(1 + eta) h)) D + sigma' sqrt(1 - e^(-2 eta h)) z.

    eta: 1 is SDE-DPM-Solver++(2M) as published, 0 the ODE, and between them k-diffusion's `sample_dpmpp_2m_sde`.
    x: [B, C, h, w] at levels[0].  Returns latents at levels[-1], same shape and dtype.  Raises ValueError.
    Source: Lu et al. 2022, arXiv:2211.01095, SDE-DPM-Solver++(2M).
    """
    if eta < 0:
        raise ValueError(f"eta must not be negative, not {eta}")
    if eta and noise is None:
        raise ValueError("eta > 0 needs noise")
    previous: tuple[Tensor, Tensor] | None = None  # x0 and lambda of the step before
    for step, (now, then) in enumerate(pairwise(levels)):
        x0 = denoise(x, now)
        here, there = log_snr(now), log_snr(then)
        estimate = x0
        if previous is not None and torch.isfinite(torch.stack([previous[1], here, there])).all():
            r = (here - previous[1]) / (there - here)
            estimate = x0 + (x0 - previous[0]) / (2 * r)
        k = now.alpha * then.sigma / (now.sigma * then.alpha)  # e^(-h), 0 where lambda is infinite
        x = then.sigma / now.sigma * k**eta * x + then.alpha * (1 - k ** (1 + eta)) * estimate
        if eta and float(then.sigma) > 0:
            x = x + then.sigma * torch.sqrt(1 - k ** (2 * eta)) * noise(step, x.shape).to(x)  # type: ignore[misc]
        previous = x0, here
        on_step(step, x, x0)
    return x
