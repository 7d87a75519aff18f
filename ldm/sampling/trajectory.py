"""The visible way from noise to picture: predicted x0 at some of the steps, decoded."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.model import LatentDiffusion


class Trajectory:
    """An `on_step` that keeps the predicted x0 of the first `count` pictures at about `frames` evenly spaced steps."""

    def __init__(self, num_steps: int, count: int, frames: int = 8) -> None:
        frames = min(frames, num_steps)
        self.wanted = {round(i * (num_steps - 1) / max(1, frames - 1)) for i in range(frames)}
        self.count = count
        self.steps: list[int] = []
        self.latents: list[Tensor] = []

    def __call__(self, step: int, x: Tensor, x0: Tensor) -> None:
        if step in self.wanted:
            self.steps.append(step)
            self.latents.append(x0[: self.count].clone())

    def pictures(self, model: LatentDiffusion, index: int, tile: int | None = None) -> Tensor:
        """[frames, 3, H, W] in [-1, 1]: the way of one picture.   tile: see `LatentDiffusion.decode`."""
        return model.decode(torch.stack([x0[index] for x0 in self.latents]), tile=tile)
