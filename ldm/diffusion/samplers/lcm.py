"""LCM: few steps with a network that was distilled to be consistent."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from ldm.types import Denoise, Levels, Noise, OnStep, ignore


def sample_lcm(
    denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise | None = None, on_step: OnStep = ignore
) -> Tensor:
    """x' = alpha' x0 + sigma' z: jump to the picture, and back to the next level with fresh noise.

    Right when x0 is the end of the ODE (a consistency model); with an ordinary denoiser, x0 is the mean of what is
    possible and the picture comes out smooth.
    x: [B, C, h, w] at levels[0].  Returns latents at levels[-1], same shape and dtype.
    Source: Song et al. 2023, arXiv:2303.01469, algorithm 1; Luo et al. 2023, arXiv:2310.04378. The
    boundary factors c_skip and c_out of the latter belong to its network's parametrisation.
    """
    if noise is None:
        raise ValueError("lcm draws noise at every step: hand it `noise`")
    for step, (now, then) in enumerate(pairwise(levels)):
        x0 = denoise(x, now)
        x = then.alpha * x0
        if float(then.sigma) > 0:
            x = x + then.sigma * noise(step, x.shape).to(x)
        on_step(step, x, x0)
    return x
