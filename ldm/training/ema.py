"""Exponential moving average of all trained parameters, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Average of the trained parameters with a half-life counted in images.

    half_life_images: after so many images an old weight counts half.   warmup: the decay of update u is at most
    (1 + u) / (10 + u), so that the first, random weights are forgotten early.
    The decay is a pure function of the number of updates; the averages are the only state.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, half_life_images: float, batch_size: int, warmup: bool = True
    ) -> None:
        if not half_life_images > 0:
            raise ValueError(f"half_life_images must be positive, not {half_life_images}")
        self.parameters = dict(parameters)
        self.decay = 0.5 ** (batch_size / half_life_images)
        self.warmup = warmup
        self.averages = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    def decay_at(self, updates: int) -> float:
        """Decay of the update that follows `updates` earlier ones."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, updates: int) -> None:
        weights = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1.0 - self.decay_at(updates))

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor]) -> None:
        for name, value in self.averages.items():
            value.copy_(averages[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages stand in for the weights inside the block; the raw weights are back after it, bit for bit."""
        raw = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, p in self.parameters.items():
                p.data = self.averages[name].to(p.dtype)
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = raw[name]
