"""Where a sampler stops on its way from noise to picture: a list of `Level`, noisy to clean.

All values are float64 scalars on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ldm.diffusion.schedule import Schedule
from ldm.types import Level, Levels

CLEAN = Level(*(torch.tensor(v, dtype=torch.float64) for v in (0.0, 1.0, 0.0)))


def sampling_levels(
    schedule: Schedule,
    num_steps: int,
    *,
    spacing: str = "trailing",
    offset: int = 0,
    final: str = "clean",
    strength: float = 1.0,
) -> Levels:
    """`num_steps + 1` levels from t_max down to clean, or the tail of them for a strength below 1.

    spacing: "uniform" (evenly from t_max to 0, both ends included), "leading" (multiples of N // num_steps, as
        Stable Diffusion's DDIM; never starts at pure noise), "trailing" (ends of equal intervals, from t_max; Lin et
        al. 2023, arXiv:2305.08891, table 2). In continuous time uniform and trailing are the same.
    offset: added to the steps of "leading" (Stable Diffusion: 1).
    final: what follows the last network call: "clean" (alpha 1, sigma 0) or "first", the schedule's level at t = 0,
        where Stable Diffusion's own DDIM ends.
    strength: share of the way that is walked, for image to image; 1 starts from noise.
    Raises ValueError naming the argument.
    """
    if num_steps < 1:
        raise ValueError(f"steps must be at least 1, not {num_steps}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1], not {strength}")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, not {spacing!r}")
    if final not in ("clean", "first"):
        raise ValueError(f"final must be 'clean' or 'first', not {final!r}")
    times = SPACINGS[spacing](schedule, num_steps, offset)
    kept = times[num_steps - max(1, round(num_steps * strength)) :]
    last = CLEAN if final == "clean" else schedule.at(torch.tensor(0.0, dtype=torch.float64))
    return [*(schedule.at(t) for t in kept), last]


def _uniform(schedule: Schedule, num_steps: int, offset: int) -> torch.Tensor:
    if schedule.num_timesteps is None:
        return _trailing(schedule, num_steps, offset)
    return torch.linspace(schedule.t_max, 0, num_steps, dtype=torch.float64)


def _leading(schedule: Schedule, num_steps: int, offset: int) -> torch.Tensor:
    if schedule.num_timesteps is None:
        raise ValueError("spacing 'leading' belongs to discrete schedules: choose trailing")
    if num_steps > schedule.num_timesteps:
        raise ValueError(f"steps must be at most {schedule.num_timesteps} with spacing 'leading', not {num_steps}")
    ratio = schedule.num_timesteps // num_steps
    steps = torch.arange(num_steps - 1, -1, -1, dtype=torch.float64) * ratio + offset
    return steps.clamp(max=schedule.t_max)


def _trailing(schedule: Schedule, num_steps: int, offset: int) -> torch.Tensor:
    ends = 1.0 - torch.arange(num_steps, dtype=torch.float64) / num_steps
    if schedule.num_timesteps is None:
        return schedule.from_unit(ends)
    return (ends * schedule.num_timesteps).round() - 1


SPACINGS: dict[str, Callable[[Schedule, int, int], torch.Tensor]] = {
    "uniform": _uniform,
    "leading": _leading,
    "trailing": _trailing,
}


def marginal_std(level: Level) -> torch.Tensor:
    """Standard deviation of x_t when the data have unit variance: what the first noise is scaled by."""
    return torch.sqrt(level.alpha**2 + level.sigma**2)


def is_variance_preserving(levels: Levels) -> bool:
    """True if alpha^2 + sigma^2 = 1 at every level, as in DDPM and Stable Diffusion."""
    return all(abs(float(level.alpha**2 + level.sigma**2) - 1.0) < 1e-5 for level in levels)
