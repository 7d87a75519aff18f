"""PLMS: a linear multistep method on the noise, the second sampler of the first latent diffusion models."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from ldm.types import Denoise, Levels, Noise, OnStep, ignore

# Adams-Bashforth for equal steps, newest first
COEFFICIENTS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def sample_plms(
    denoise: Denoise, x: Tensor, levels: Levels, *, noise: Noise | None = None, on_step: OnStep = ignore
) -> Tensor:
    """DDIM's step with the noise averaged over up to four levels; the first step takes two network calls.

    The coefficients are those of equal steps whatever the levels, hence second order. A first step at alpha = 0 is
    Euler's, and its noise is not remembered: sigma / alpha is infinite there.
    x: [B, C, h, w] at levels[0].  Returns latents at levels[-1], same shape and dtype.  `noise` is not used.
    Source: Liu et al. 2022, arXiv:2202.09778, section 3, the transfer being equation 9; the start is improved Euler
    instead of Runge-Kutta, as in latent-diffusion's `plms.py` and diffusers' `skip_prk_steps`.
    """
    history: list[Tensor] = []  # eps of up to four levels, newest first
    for step, (now, then) in enumerate(pairwise(levels)):
        x0 = denoise(x, now)
        eps = (x - now.alpha * x0) / now.sigma
        euler = then.alpha * x0 + then.sigma * eps
        if float(now.alpha) == 0:
            x = euler
        else:
            history = [eps, *history[:3]]
            if len(history) == 1 and float(then.sigma) > 0:
                mean = (eps + (euler - then.alpha * denoise(euler, then)) / then.sigma) / 2
            else:
                mean = sum(c * e for c, e in zip(COEFFICIENTS[len(history) - 1], history, strict=True))  # type: ignore[assignment]
            x = then.alpha * (x - now.sigma * mean) / now.alpha + then.sigma * mean
        on_step(step, x, x0)
    return x
