"""Joins a network with a schedule and a prediction: (x_t, level, conditioning) -> x0."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule
from ldm.types import Conditioning, Level


class Denoiser(nn.Module):
    """The one place where a network's output gets its meaning.

    Raises ValueError if schedule and prediction cannot work together, see `check_pair`.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, prediction: Prediction) -> None:
        super().__init__()
        check_pair(schedule, prediction)
        self.network, self.schedule, self.prediction = network, schedule, prediction

    def predict(self, x: Tensor, level: Level, cond: Conditioning) -> Tensor:
        """The network's raw prediction, in the dtype of x.  x: [B, C, h, w]."""
        if level.t is None:  # a sampler's own stop between its levels
            level = replace(level, t=self.schedule.t_at(level.sigma / level.alpha))
        time = self.prediction.time_input(level)
        if time.ndim == 0:  # by a product: copying the scalar to the device would wait for it
            time = time * torch.ones(len(x), device=x.device)
        time = time.to(device=x.device, dtype=torch.float32)
        scale = per_sample(self.prediction.input_scale(level.alpha, level.sigma), x)
        return self.network(x * scale, time, cond).to(x.dtype)

    def forward(self, x: Tensor, level: Level, cond: Conditioning) -> Tensor:
        """Estimate of x0, [B, C, h, w]."""
        alpha, sigma = per_sample(level.alpha, x), per_sample(level.sigma, x)
        return self.prediction.to_x0(self.predict(x, level, cond), x, alpha, sigma)


def check_pair(schedule: Schedule, prediction: Prediction) -> None:
    """Raises ValueError, naming both, if the prediction's formulas do not hold everywhere on the schedule."""
    name = type(prediction).__name__
    ends = schedule.at(torch.tensor([0.0, schedule.t_max], dtype=torch.float64))
    if prediction.needs_alpha and float(ends.alpha[-1]) == 0.0:
        raise ValueError(
            f"the prediction {name} divides by alpha, which is 0 at the end of {schedule}: "
            "choose Velocity, Flow or X0 as the prediction"
        )
    if prediction.needs_alpha_one and not bool((ends.alpha == 1).all()):
        raise ValueError(
            f"the prediction {name} is defined for alpha = 1, which {schedule} leaves: "
            "choose VarianceExploding as the schedule, or Velocity as the prediction"
        )


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """A level's value shaped to broadcast with x [B, ...]: [B] becomes [B, 1, 1, 1]; scalars stay scalars.

    A float64 scalar on the CPU keeps x's dtype and needs no transfer, so a sampler never waits for the device.
    """
    if value.ndim == 0:
        return value
    return value.to(device=x.device, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))
