"""Joins a network with a schedule and a prediction: (x_t, level, conditioning) -> x0."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule
from ldm.types import Conditioning, Level


class Denoiser(nn.Module):
    """The one place where a network's output gets its meaning.

    Raises ValueError if the prediction divides by alpha and the schedule reaches alpha = 0.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, prediction: Prediction) -> None:
        super().__init__()
        self.network, self.schedule, self.prediction = network, schedule, prediction
        last = schedule.at(torch.tensor(schedule.t_max, dtype=torch.float64))
        if prediction.needs_alpha and float(last.alpha) == 0.0:
            raise ValueError(
                f"{type(prediction).__name__} divides by alpha, which is 0 at the end of {schedule}: "
                "choose Velocity or Flow as the prediction"
            )

    def predict(self, x: Tensor, level: Level, cond: Conditioning) -> Tensor:
        """The network's raw prediction, in the dtype of x.  x: [B, C, h, w]."""
        time = level.t.to(device=x.device, dtype=torch.float32).expand(len(x))
        return self.network(x, time, cond).to(x.dtype)

    def forward(self, x: Tensor, level: Level, cond: Conditioning) -> Tensor:
        """Estimate of x0, [B, C, h, w]."""
        alpha, sigma = per_sample(level.alpha, x), per_sample(level.sigma, x)
        return self.prediction.to_x0(self.predict(x, level, cond), x, alpha, sigma)


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """A level's value shaped to broadcast with x [B, ...]: [B] becomes [B, 1, 1, 1]; scalars stay scalars.

    A float64 scalar on the CPU keeps x's dtype and needs no transfer, so a sampler never waits for the device.
    """
    if value.ndim == 0:
        return value
    return value.to(device=x.device, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))
