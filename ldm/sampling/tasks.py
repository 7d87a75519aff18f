"""Prompts to pictures: text to image, and image to image from a partial way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.guidance import conditioned, guided
from ldm.diffusion.levels import marginal_std, sampling_levels
from ldm.errors import LdmError
from ldm.model import LatentDiffusion
from ldm.random import Draws, Purpose, fold, normal
from ldm.types import Conditioning, Noise, OnStep, ignore

SAMPLING_KEY = 0  # a picture depends on its own seed alone, not on the seed of the run that trained the model


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: the choice that a `sampler` config makes.

    function: the sampler with its own options bound.   steps: network calls (twice that for heun).
    guidance_scale, guidance_interval, guidance_rescale: see `guided`.
    spacing, offset, final: see `sampling_levels`.
    """

    function: Callable[..., Tensor]
    steps: int = 25
    guidance_scale: float = 3.0
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    spacing: str = "trailing"
    offset: int = 0
    final: str = "clean"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if self.guidance_interval is not None and len(tuple(self.guidance_interval)) != 2:
            raise ValueError(f"guidance_interval must be [low, high], not {self.guidance_interval}")


@torch.inference_mode()
def text_to_image(
    model: LatentDiffusion,
    prompts: list[str],
    seeds: list[int],
    sampling: Sampling,
    *,
    negative_prompt: str = "",
    size: tuple[int, int] | None = None,
    images: Tensor | None = None,
    strength: float = 1.0,
    on_step: OnStep = ignore,
) -> Tensor:
    """One picture for each prompt and seed: [B, 3, H, W] in [-1, 1].

    size: (height, width), default the model's training size.
    images: [B, 3, H, W] in [-1, 1], starting points for image to image; strength: share of the way that is walked
        from noise, 0 < strength <= 1 (small keeps the picture).
    The same seed starts from bit-equal noise whatever the batch.
    """
    if len(prompts) != len(seeds):
        raise LdmError("PROMPT", "each prompt needs a seed", limit=f"{len(prompts)} prompts, {len(seeds)} seeds")
    device = next(model.denoiser.parameters()).device
    height, width = size or (images.shape[-2:] if images is not None else (model.image_size, model.image_size))
    shape = model.latent_shape(height, width)
    draws = Draws(SAMPLING_KEY, torch.tensor(seeds, dtype=torch.int64, device=device))
    try:
        levels = sampling_levels(
            model.denoiser.schedule,
            sampling.steps,
            spacing=sampling.spacing,
            offset=sampling.offset,
            final=sampling.final,
            strength=strength if images is not None else 1.0,
        )
    except ValueError as error:
        raise LdmError("CONFIG", str(error), where="sampler") from error
    noise = draws.normal(Purpose.SAMPLE_INIT, shape)
    if images is None:
        x = noise * marginal_std(levels[0])
    else:
        x0 = model.encode(images.to(device))
        x = levels[0].alpha * x0 + levels[0].sigma * noise
    cond = model.condition(prompts)
    if sampling.guidance_scale == 1.0:
        denoise = conditioned(model.denoiser, cond)
    else:
        null = model.condition([negative_prompt]).repeat(len(prompts))
        denoise = guided(
            model.denoiser,
            *_same_length(cond, null),
            sampling.guidance_scale,
            interval=sampling.guidance_interval,
            rescale=sampling.guidance_rescale,
        )
    latents = sampling.function(denoise, x, levels, noise=step_noise(draws), on_step=on_step)
    return model.decode(latents)


def step_noise(draws: Draws) -> Noise:
    """Noise for each picture and step, keyed by the picture's seed and the step."""
    keys = draws.keys(Purpose.SAMPLE_STEP)

    def noise(step: int, shape: Sequence[int]) -> Tensor:
        index = torch.full_like(keys, step)
        return normal(fold(keys, Purpose.SAMPLE_STEP, index), tuple(shape[1:]))

    return noise


def _same_length(cond: Conditioning, null: Conditioning) -> tuple[Conditioning, Conditioning]:
    """Both with the same number of tokens: the shorter one is padded with masked zeros."""
    if cond.tokens is None or null.tokens is None:
        return cond, null
    length = max(cond.tokens.shape[1], null.tokens.shape[1])
    return cond.padded(length), null.padded(length)
