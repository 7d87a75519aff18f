"""The loss of one denoising step, per sample. Validation uses the same formula at levels of its own choice."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ldm.diffusion.denoiser import Denoiser, per_sample
from ldm.diffusion.timesteps import Timesteps
from ldm.diffusion.weighting import Unit, Weighting
from ldm.random import Draws, Purpose
from ldm.types import Conditioning, Level


@dataclass(frozen=True)
class Objective:
    """Random level, random noise, weighted squared error.

    `loss` returns [B]: the mean over the latents of each sample, in the units of the target, weighted.
    """

    timesteps: Timesteps
    weighting: Weighting

    def loss(self, denoiser: Denoiser, x0: Tensor, cond: Conditioning, draws: Draws) -> Tensor:
        """x0: [B, C, h, w] standardised latents.  draws: the samples' own draws."""
        level = denoiser.schedule.at(denoiser.schedule.from_unit(self.timesteps(draws)))
        noise = draws.normal(Purpose.NOISE, x0.shape[1:]).to(x0)
        return denoising_error(denoiser, x0, noise, level, cond, self.weighting)


def denoising_error(
    denoiser: Denoiser, x0: Tensor, noise: Tensor, level: Level, cond: Conditioning, weighting: Weighting | None = None
) -> Tensor:
    """[B] weighted mean squared error of the prediction's target at `level` ([B] or scalar)."""
    alpha, sigma = per_sample(level.alpha, x0), per_sample(level.sigma, x0)
    x_t = alpha * x0 + sigma * noise
    target = denoiser.prediction.target(x0, noise, alpha, sigma)
    error = (denoiser.predict(x_t, level, cond) - target).square().flatten(1).mean(1)
    weight = (weighting or Unit())(denoiser.prediction, level.alpha, level.sigma)
    return weight.to(error) * error
