"""Learning-rate schedules: pure functions from the number of applied updates to a factor of the base rate."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    """Linear warm-up over `warmup_steps` updates, then the base rate."""

    warmup_steps: int = 0

    def __call__(self, updates: int) -> float:
        return _warmup(updates, self.warmup_steps)


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine down to `final_factor` at `max_steps`.

    Loshchilov and Hutter 2016, arXiv:1608.03983, without restarts.
    """

    max_steps: int
    warmup_steps: int = 0
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps <= self.max_steps:
            raise ValueError(f"warmup_steps must be within 0 and max_steps {self.max_steps}, not {self.warmup_steps}")

    def __call__(self, updates: int) -> float:
        span = max(1, self.max_steps - self.warmup_steps)
        progress = min(1.0, max(0.0, (updates - self.warmup_steps) / span))
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        return _warmup(updates, self.warmup_steps) * (self.final_factor + (1.0 - self.final_factor) * cosine)


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warm-up, a plateau, then a linear fall to `final_factor` over the last `decay_steps` of `max_steps`.

    The plateau does not depend on the horizon, so a run can be extended. Hägele et al. 2024, arXiv:2405.18392.
    """

    max_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    final_factor: float = 0.0

    def __call__(self, updates: int) -> float:
        left = max(0, self.max_steps - updates)
        fall = 1.0 if self.decay_steps == 0 else min(1.0, left / self.decay_steps)
        return _warmup(updates, self.warmup_steps) * (self.final_factor + (1.0 - self.final_factor) * fall)


def _warmup(updates: int, steps: int) -> float:
    return 1.0 if steps == 0 else min(1.0, (updates + 1) / steps)
