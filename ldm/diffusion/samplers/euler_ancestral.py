"""Euler ancestral: an Euler step to less noise than wanted, and fresh noise up to it."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.samplers.ddim import sample_ddim
from ldm.types import Denoise, Levels, Noise, OnStep, ignore


def sample_euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    levels: Levels,
    *,
    noise: Noise | None = None,
    on_step: OnStep = ignore,
    eta: float = 1.0,
) -> Tensor:
    """On VE (k-diffusion, `sample_euler_ancestral`): up = eta sigma' sqrt(1 - (sigma' / sigma)^2),
    x' = x0 + sqrt(sigma'^2 - up^2) eps + up z.

    With r = sigma / alpha in the place of sigma and x / alpha in the place of x this is DDIM's step on every schedule
    (Song et al. 2020, arXiv:2010.02502, section 4.3), so one body of code serves both names: at
    eta = 1 it is DDPM's posterior, at eta = 0 Euler. On flow, other implementations split the noise differently.
    eta: 0 to 1.   x: [B, C, h, w] at levels[0].  Returns latents at levels[-1], same shape and dtype.
    """
    return sample_ddim(denoise, x, levels, noise=noise, on_step=on_step, eta=eta)
