"""Prompts to pictures: text to image, and image to image from a partial way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.guidance import check_guidance, conditioned, guided
from ldm.diffusion.levels import marginal_std, sampling_levels
from ldm.diffusion.schedule import Schedule, for_size
from ldm.errors import LdmError
from ldm.model import LatentDiffusion
from ldm.random import Draws, Purpose, fold, normal
from ldm.types import Conditioning, Levels, Noise, OnStep, ignore

SAMPLING_KEY = 0  # a picture depends on its own seed alone, not on the seed of the run that trained the model


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: the choice that a `sampler` config makes.

    function: the sampler with its own options bound.   steps: network calls (twice that for heun and edm).
    guidance_scale, guidance_interval, guidance_rescale: see `guided`.
    spacing, offset, final, rho, sigma_min, sigma_max, shift: see `sampling_levels`.
    """

    function: Callable[..., Tensor]
    steps: int = 25
    guidance_scale: float = 3.0
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    spacing: str = "trailing"
    offset: int = 0
    final: str = "clean"
    rho: float = 7.0
    sigma_min: float | None = None
    sigma_max: float | None = None
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        check_guidance(self.guidance_interval, self.guidance_rescale)

    @property
    def name(self) -> str:
        """The sampler's, without its prefix: "euler"."""
        function = self.function.func if isinstance(self.function, partial) else self.function
        return function.__name__.removeprefix("sample_")

    def levels(self, schedule: Schedule, strength: float = 1.0) -> Levels:
        """The stops of these settings on a schedule. Raises LdmError naming the setting."""
        try:
            return sampling_levels(
                schedule,
                self.steps,
                spacing=self.spacing,
                offset=self.offset,
                final=self.final,
                strength=strength,
                rho=self.rho,
                sigma_min=self.sigma_min,
                sigma_max=self.sigma_max,
                shift=self.shift,
            )
        except ValueError as error:
            raise LdmError("CONFIG", str(error), where="sampler") from error

    def check(self, schedule: Schedule, strength: float = 1.0) -> None:
        """Rehearses the sampler on a single number that is known to end at x0 = 1; no network is called.

        Whatever the sampler has against the schedule or its own options is said at composition, in milliseconds.
        Raises LdmError naming sampler and schedule.
        """
        levels = self.levels(schedule, strength)
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        start = (levels[0].alpha + levels[0].sigma) * one
        try:
            end = self.function(lambda x, level: one, start, levels, noise=lambda step, shape: one, on_step=ignore)
            if not bool(torch.isfinite(end).all()):
                raise ValueError("its formula gives values that are not finite on these levels")
        except ValueError as error:
            what = f"the sampler {self.name} does not fit the schedule {schedule}"
            raise LdmError("CONFIG", what, where="sampler", limit=str(error)) from error


@torch.inference_mode()
def text_to_image(
    model: LatentDiffusion,
    prompts: list[str],
    seeds: list[int],
    sampling: Sampling,
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    negative_prompt: str = "",
    size: tuple[int, int] | None = None,
    images: Tensor | None = None,
    strength: float = 1.0,
    tile: int | None = None,
    on_step: OnStep = ignore,
) -> Tensor:
    """One picture for each prompt and seed: [B, 3, H, W] in [-1, 1].

    columns: further conditions by name, B values each; what the model reads and is not given counts as absent, but
        for "size", which is that of the picture with nothing cut off.
    sampling.guidance_scale acts where the model has a null to compare with: text, or columns that training dropped.
    size: (height, width), default the model's training size.
    images: [B, 3, H, W] in [-1, 1], starting points for image to image; strength: share of the way that is walked
        from noise, 0 < strength <= 1 (small keeps the picture).
    tile: encode and decode in tiles of so many pixels, for pictures too large for the memory; None is in one piece.
    The same seed starts from bit-equal noise whatever the batch.
    """
    if len(prompts) != len(seeds):
        raise LdmError("PROMPT", "each prompt needs a seed", limit=f"{len(prompts)} prompts, {len(seeds)} seeds")
    device = next(model.denoiser.parameters()).device
    height, width = size or (images.shape[-2:] if images is not None else (model.image_size, model.image_size))
    shape = model.latent_shape(height, width)
    draws = Draws(SAMPLING_KEY, torch.tensor(seeds, dtype=torch.int64, device=device))
    schedule = for_size(model.denoiser.schedule, shape)
    levels = sampling.levels(schedule, strength if images is not None else 1.0)
    noise = draws.normal(Purpose.SAMPLE_INIT, shape)
    if images is None:
        x = noise * marginal_std(levels[0])
    else:
        x0 = model.encode(images.to(device), tile=tile)
        x = levels[0].alpha * x0 + levels[0].sigma * noise
    given = {"size": [(height, width, 0, 0, height, width)] * len(prompts), **(columns or {})}
    given = {name: given[name] for name in model.reads if name in given}
    cond = model.condition(prompts, given)
    if sampling.guidance_scale == 1.0 or not model.has_null(given):
        denoise = conditioned(model.denoiser, cond)
    else:
        null = model.null(negative_prompt, given, len(prompts))
        denoise = guided(
            model.denoiser,
            *_same_length(cond, null),
            sampling.guidance_scale,
            interval=sampling.guidance_interval,
            rescale=sampling.guidance_rescale,
        )
    latents = sampling.function(denoise, x, levels, noise=step_noise(draws), on_step=on_step)
    return model.decode(latents, tile=tile)


def one_for_each(prompts: Sequence[str], columns: Mapping[str, Any]) -> tuple[list[str], dict[str, list[Any]]]:
    """Prompts and columns, as many of each as pictures are wanted: N values, or one that goes for all.

    A list in `columns` holds one value for each picture, anything else is one value for all.
    Raises LdmError if the numbers differ.
    """
    lists = {"caption": list(prompts)} | {k: v if isinstance(v, list) else [v] for k, v in columns.items()}
    counts = {name: len(values) for name, values in lists.items()}
    most = max(counts.values())
    if any(count not in (1, most) for count in counts.values()):
        said = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise LdmError("PROMPT", "prompts and columns differ in number", limit=said, next="give one, or one each")
    full = {name: values * (most // len(values)) for name, values in lists.items()}
    return full.pop("caption"), full


def subtitles(prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """What stands below each picture: its prompt, then its columns."""
    rows = [[f"{name}: {values[i]}" for name, values in columns.items()] for i in range(len(prompts))]
    return [", ".join([prompt] * bool(prompt) + row) for prompt, row in zip(prompts, rows, strict=True)]


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
