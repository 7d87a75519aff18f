"""The loss of one denoising step, per sample. Validation uses the same formula at levels of its own choice."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser, check_pair, per_sample
from ldm.diffusion.loss import MSE, Loss
from ldm.diffusion.noising import Noising, Plain
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule, for_size
from ldm.diffusion.timesteps import Timesteps
from ldm.diffusion.weighting import Weighting, check_finite
from ldm.errors import LdmError
from ldm.random import Draws
from ldm.types import Conditioning, Level


@dataclass(frozen=True)
class Objective:
    """Random level, random noise, weighted distance from the prediction's target.

    masked: the distance counts where the sample's mask is 1 and not where it is 0.
    unmasked_weight: from 0 to 1, what it counts at least, everywhere; OneTrainer's setting of that name.

    `loss` returns [B]: the mean over the latents of each sample, in the units of the target, weighted.
    """

    timesteps: Timesteps
    weighting: Weighting
    noise: Noising = field(default_factory=Plain)
    distance: Loss = field(default_factory=MSE)
    masked: bool = False
    unmasked_weight: float = 0.0

    def __post_init__(self) -> None:
        if not (isinstance(self.unmasked_weight, int | float) and 0 <= self.unmasked_weight <= 1):
            raise ValueError(f"unmasked_weight must lie between 0 and 1, not {self.unmasked_weight}")
        if self.unmasked_weight and not self.masked:
            raise ValueError("unmasked_weight is for a masked loss: set masked=true")

    def check(self, schedule: Schedule, prediction: Prediction) -> None:
        """Raises ValueError, naming both sides, if the parts cannot work together."""
        check_pair(schedule, prediction)
        check_finite(self.weighting, schedule, prediction)
        ours, theirs = (getattr(part, "sigma_data", None) for part in (self.weighting, prediction))
        if None not in (ours, theirs) and ours != theirs:
            raise ValueError(
                f"scheduler.weighting.sigma_data={ours}, scheduler.prediction.sigma_data={theirs}: both are the data's "
                "standard deviation"
            )

    def loss(
        self, denoiser: Denoiser, x0: Tensor, cond: Conditioning, draws: Draws, mask: Tensor | None = None
    ) -> Tensor:
        """x0: [B, C, h, w] standardised latents.  draws: the samples' own draws.

        mask: [B, 1, H, W] from 0 to 1 at the size of the pictures or of the latents; used if `masked`.
        """
        schedule = for_size(denoiser.schedule, x0.shape)
        level = schedule.at(self.timesteps(draws, schedule))
        noise, target_noise = (part.to(x0) for part in self.noise(draws, x0.shape[1:]))
        output, target = output_and_target(denoiser, x0, noise, target_noise, level, cond)
        error = self.distance(output, target, level, schedule)
        if (counts := self.counts(mask, x0)) is not None:
            error = error * counts
        weight = self.weighting(denoiser.prediction, level.alpha, level.sigma)
        return weight.to(error) * error.flatten(1).mean(1)

    def counts(self, mask: Tensor | None, x0: Tensor) -> Tensor | None:
        """[B, 1, h, w], how much the distance counts in each latent; None where nothing is masked."""
        return latent_mask(mask, x0).clamp(min=self.unmasked_weight) if self.masked else None


def denoising_error(
    denoiser: Denoiser, x0: Tensor, noise: Tensor, level: Level, cond: Conditioning, counts: Tensor | None = None
) -> Tensor:
    """[B] mean squared error of the prediction's target at `level` ([B] or scalar). counts: see `Objective.counts`."""
    output, target = output_and_target(denoiser, x0, noise, noise, level, cond)
    error = (output - target).square()
    return (error if counts is None else error * counts).flatten(1).mean(1)


def output_and_target(
    denoiser: Denoiser, x0: Tensor, noise: Tensor, target_noise: Tensor, level: Level, cond: Conditioning
) -> tuple[Tensor, Tensor]:
    """What the network says of x_t = alpha x0 + sigma noise, and what it should say; both like x0."""
    alpha, sigma = per_sample(level.alpha, x0), per_sample(level.sigma, x0)
    target = denoiser.prediction.target(x0, target_noise, alpha, sigma)
    return denoiser.predict(alpha * x0 + sigma * noise, level, cond), target


def latent_mask(mask: Tensor | None, x0: Tensor) -> Tensor:
    """[B, 1, h, w]: the share of each latent's pixels that counts. Raises LdmError if the mask is missing or unfit.

    A sample counts in proportion to the area of its mask (sd-scripts does the same), so an empty one gives 0, not NaN.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[:2] != (len(x0), 1):
        found = f"{list(mask.shape)} for {len(x0)} samples" if isinstance(mask, Tensor) else type(mask).__name__
        raise LdmError(
            "MASK",
            "the loss is masked, but the batch has no mask [B, 1, H, W]",
            where="scheduler.masked",
            limit=f"found {found}",
            next="name the masks of the data, data.columns.mask=.mask.png, or set scheduler.masked=false",
        )
    return torch.nn.functional.interpolate(mask.to(x0), size=x0.shape[-2:], mode="area")
