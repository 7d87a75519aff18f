"""Steering a denoiser: classifier-free guidance in one doubled call."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.types import Conditioning, Denoise, Level


def conditioned(denoiser: Denoiser, cond: Conditioning) -> Denoise:
    """The denoiser for a fixed conditioning, without guidance."""
    return partial(_call, denoiser, cond)


def guided(
    denoiser: Denoiser,
    cond: Conditioning,
    null: Conditioning,
    scale: float,
    *,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
) -> Denoise:
    """x0 = null + scale * (cond - null), with both halves in one call of twice the batch.

    At one x_t every prediction is an affine function of x0, with factors that sum up to the same for both halves: the
    formula is the same for noise, velocity and x0, and here it is written once.

    cond, null: [B] rows each; null is the empty or the negative prompt. Both are joined once, before the first step.
    scale: 1 switches guidance off and halves the work; 1 + w in Ho and Salimans 2022, arXiv:2207.12598, equation 6.
    interval: (low, high) of the noise share sigma / (alpha + sigma), 0 clean and 1 noise; outside it guidance is off.
        Kynkäänniemi et al. 2024, arXiv:2404.07724; their bounds on EDM's sigma are share / (1 - share).
    rescale: 0 to 1, pulls the standard deviation of v = alpha eps - sigma x0 back to that of the conditional one.
        Lin et al. 2023, arXiv:2305.08891, section 3.4, whose network predicts v.
    Raises ValueError if interval or rescale is out of range.
    """
    check_guidance(interval, rescale)
    both = cond.cat(null)

    def denoise(x: Tensor, level: Level) -> Tensor:
        share = float(level.sigma / (level.alpha + level.sigma))
        if scale == 1.0 or (interval is not None and not interval[0] <= share <= interval[1]):
            return denoiser(x, level, cond)
        with_prompt, without = denoiser(torch.cat([x, x]), level, both).chunk(2)
        x0 = without + scale * (with_prompt - without)
        return _rescaled(x, x0, with_prompt, level, rescale) if rescale else x0

    return denoise


def check_guidance(interval: tuple[float, float] | None, rescale: float) -> None:
    """Raises ValueError naming the value that is out of its range."""
    if interval is not None and not (len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1):
        raise ValueError(f"guidance_interval must be [low, high], ordered within 0 and 1, not {list(interval)}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale must be within 0 and 1, not {rescale}")


def _rescaled(x: Tensor, x0: Tensor, with_prompt: Tensor, level: Level, rescale: float) -> Tensor:
    """x0 whose v has, by the share `rescale`, the standard deviation per picture of the prompt's own v."""
    power = level.alpha**2 + level.sigma**2

    def velocity(estimate: Tensor) -> Tensor:
        return (level.alpha * x - power * estimate) / level.sigma

    v, dims = velocity(x0), tuple(range(1, x.ndim))
    ratio = velocity(with_prompt).std(dims, keepdim=True) / v.std(dims, keepdim=True)
    v = v * (rescale * ratio + (1 - rescale))
    return (level.alpha * x - level.sigma * v) / power


def _call(denoiser: Denoiser, cond: Conditioning, x: Tensor, level: Level) -> Tensor:
    return denoiser(x, level, cond)
