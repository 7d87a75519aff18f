"""Averages of all trained parameters, in float32: one that is used, and others beside it.

A profile says how much each update's weights count. Its decay is a pure function of the number of updates, so the
averages are the only state: they are stored beside the raw weights and never stand in their place across a save.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

LONGEST = 12**-0.5  # the length of the plain mean of all updates, gamma = 0


class Profile(Protocol):
    @property
    def name(self) -> str:
        """Of the average's file in a checkpoint, behind `ema_`."""

    def decay_at(self, updates: int) -> float:
        """Decay of the update that follows `updates` earlier ones."""


@dataclass(frozen=True)
class HalfLife:
    """Exponential: after so many images an old weight counts half.

    warmup: the decay of update u is at most (1 + u) / (10 + u), so that the first, random weights are forgotten early.
    """

    images: float
    batch_size: int
    warmup: bool = True

    def __post_init__(self) -> None:
        if not self.images > 0:
            raise ValueError(f"half_life_images must be positive, not {self.images}")

    @property
    def name(self) -> str:
        return f"half_life_{_in_a_name(self.images)}"

    @property
    def decay(self) -> float:
        return 0.5 ** (self.batch_size / self.images)

    def decay_at(self, updates: int) -> float:
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay


@dataclass(frozen=True)
class PowerFunction:
    """The weights of update t count as t^gamma: the profile keeps its shape and grows with the training.

    length: its standard deviation in units of the training so far, sigma_rel, between 0 and 1 / sqrt(12).
    After T updates, update t counts (t^(gamma + 1) - (t - 1)^(gamma + 1)) / T^(gamma + 1), and the initial weights
    nothing. Source: Karras et al. 2024, arXiv:2312.02696, section 3.1 and appendix C.
    """

    length: float

    def __post_init__(self) -> None:
        if not 0 < self.length < LONGEST:
            raise ValueError(f"a length must be above 0 and below {LONGEST:.4f}, not {self.length}")

    @property
    def name(self) -> str:
        return f"length_{_in_a_name(self.length)}"

    @cached_property
    def gamma(self) -> float:
        """The largest root of length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic equation."""
        r = self.length**-2
        return float(np.roots([1.0, 7.0, 16.0 - r, 12.0 - r]).real.max())

    def decay_at(self, updates: int) -> float:
        return (1.0 - 1.0 / (updates + 1)) ** (self.gamma + 1.0)


class EMA:
    """Averages of `parameters`: `main` validates, samples and is called `ema` in a checkpoint; `further` are kept too.

    averages: the main one by the parameters' names.   further: the others, by the names of their files.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], main: Profile, further: Sequence[Profile] = ()) -> None:
        self.parameters, self.main = dict(parameters), main
        self.profiles = {f"ema_{profile.name}": profile for profile in further}
        self.averages = self._begin()
        self.further = {name: self._begin() for name in self.profiles}

    def _begin(self) -> dict[str, Tensor]:
        return {name: p.detach().float().clone() for name, p in self.parameters.items()}

    def files(self) -> dict[str, dict[str, Tensor]]:
        """All averages by the names of their files."""
        return {"ema": self.averages, **self.further}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take the weights of the update that follows `updates` earlier ones."""
        weights = [p.detach().float() for p in self.parameters.values()]
        for profile, averages in zip((self.main, *self.profiles.values()), self.files().values(), strict=True):
            torch._foreach_lerp_(list(averages.values()), weights, 1.0 - profile.decay_at(updates))

    @torch.no_grad()
    def load(self, file: str, averages: Mapping[str, Tensor]) -> None:
        """file: one of `files()`."""
        for name, value in self.files()[file].items():
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


def profiles_of(node: Mapping[str, Any] | None, batch_size: int) -> tuple[Profile, ...]:
    """What `stage.<name>.ema` asks for, the main one first; empty for none."""
    if node is None:
        return ()
    given = node["half_life_images"]
    half_lives = given if isinstance(given, list) else [given]
    lengths = [PowerFunction(length) for length in node["lengths"]]
    return (*(HalfLife(images, batch_size, node["warmup"]) for images in half_lives), *lengths)


def _in_a_name(number: float) -> str:
    """20000 and 0-05: the names of files have no dots."""
    return f"{number:f}".rstrip("0").rstrip(".").replace(".", "-")
