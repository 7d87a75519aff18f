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

    cond, null: [B] rows each; null is the empty or the negative prompt.
    scale: 1 switches guidance off and halves the work.  Ho and Salimans 2022, arXiv:2207.12598.
    interval: (low, high) of the noise share sigma / (alpha + sigma), 0 clean and 1 noise; outside it guidance is off.
        Kynkäänniemi et al. 2024, arXiv:2404.07724.
    rescale: 0 to 1, pulls the standard deviation of x0 back to that of the conditional one.
        Lin et al. 2023, arXiv:2305.08891, section 3.4, there on v.
    """
    if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"guidance interval must be ordered within 0 and 1, not {interval}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale must be within 0 and 1, not {rescale}")
    both = cond.cat(null)

    def denoise(x: Tensor, level: Level) -> Tensor:
        share = float(level.sigma / (level.alpha + level.sigma))
        if scale == 1.0 or (interval is not None and not interval[0] <= share <= interval[1]):
            return denoiser(x, level, cond)
        with_prompt, without = denoiser(torch.cat([x, x]), level, both).chunk(2)
        x0 = without + scale * (with_prompt - without)
        if rescale:
            dims = tuple(range(1, x.ndim))
            ratio = with_prompt.std(dims, keepdim=True) / x0.std(dims, keepdim=True)
            x0 = x0 * (rescale * ratio + (1 - rescale))
        return x0

    return denoise


def _call(denoiser: Denoiser, cond: Conditioning, x: Tensor, level: Level) -> Tensor:
    return denoiser(x, level, cond)
