"""Where a sampler stops on its way from noise to picture: a list of `Level`, noisy to clean.

All values are float64 scalars on the CPU: a sampler reads them without waiting for the device. The noise of a level is
measured by the ratio sigma / alpha, which is EDM's sigma on every schedule (Karras et al. 2022, arXiv:2206.00364,
section 2): infinite for pure noise, 0 for the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.types import Level, Levels

CLEAN = Level(*(torch.tensor(v, dtype=torch.float64) for v in (0.0, 1.0, 0.0)))
NOISIEST, CLEANEST = 80.0, 0.002
"""Where Karras and exponential spacing begin and end if the schedule itself has no bound: EDM's, table 1."""


def sampling_levels(
    schedule: Schedule,
    num_steps: int,
    *,
    spacing: str = "trailing",
    offset: int = 0,
    final: str = "clean",
    strength: float = 1.0,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    shift: float = 1.0,
) -> Levels:
    """`num_steps + 1` levels of strictly falling noise, from the schedule's end down to clean.

    spacing:
        "uniform"      evenly in time from t_max to 0, both included
        "leading"      multiples of N // num_steps, as Stable Diffusion's DDIM; never starts at pure noise
        "trailing"     ends of equal intervals of time, from t_max (Lin et al. 2023, arXiv:2305.08891, table 2);
                       in continuous time the same as uniform
        "karras"       evenly in (sigma / alpha)^(1 / rho) (Karras et al. 2022, arXiv:2206.00364, equation 5)
        "exponential"  evenly in log(sigma / alpha)
    offset: added to the steps of "leading" (Stable Diffusion: 1).
    final: what follows the last network call: "clean" (alpha 1, sigma 0) or "first", the schedule's level at t = 0,
        where Stable Diffusion's own DDIM ends.
    strength: share of the steps that is walked, for image to image; 1 starts from noise.
    rho, sigma_min, sigma_max: of "karras" and "exponential"; the bounds are in units of sigma / alpha. None: the ends
        of the schedule. Where those are infinite or 0, as in rectified flow, pure noise comes first and the others lie
        between 80 and 0.002.
    shift: on top of any spacing, sigma / alpha times this factor with the schedule's two ends kept; above 1 more steps
        at high noise. On rectified flow Esser et al. 2024, arXiv:2403.03206, equation 23; away from the
        ends the shift of the log-SNR by -2 log(shift), Hoogeboom et al. 2023, arXiv:2301.11093.
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
    if offset and spacing != "leading":
        raise ValueError(f"offset={offset} belongs to spacing=leading: with {spacing} set it to 0")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be a positive number, not {shift}")
    if spacing in RAMPS:
        times = schedule.t_at(RAMPS[spacing](*_bounds(schedule, num_steps, sigma_min, sigma_max), rho))
    elif sigma_min is not None or sigma_max is not None:
        raise ValueError(f"sigma_min and sigma_max belong to karras and exponential: with spacing={spacing} use null")
    else:
        times = TIMES[spacing](schedule, num_steps, offset)
    if shift != 1:
        times = _shifted(schedule, times, shift)
    kept = times[num_steps - max(1, round(num_steps * strength)) :]
    last = CLEAN if final == "clean" else schedule.at(torch.tensor(0.0, dtype=torch.float64))
    levels = [*(schedule.at(t) for t in kept), last]
    _must_fall(levels, spacing, final)
    return levels


def noise_ratio(level: Level) -> Tensor:
    """sigma / alpha: 0 for the picture, infinite for pure noise."""
    return level.sigma / level.alpha


def log_snr(level: Level) -> Tensor:
    """lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio; infinite at both ends."""
    return torch.log(level.alpha) - torch.log(level.sigma)


def marginal_std(level: Level) -> Tensor:
    """Standard deviation of x_t when the data have unit variance: what the first noise is scaled by."""
    return torch.sqrt(level.alpha**2 + level.sigma**2)


def is_variance_preserving(levels: Levels) -> bool:
    """True if alpha^2 + sigma^2 = 1 at every level, as in DDPM and Stable Diffusion."""
    return all(abs(float(level.alpha**2 + level.sigma**2) - 1.0) < 1e-5 for level in levels)


# ---- spacings: times ------------------------------------------------------------------------------------------------


def _uniform(schedule: Schedule, num_steps: int, offset: int) -> Tensor:
    if schedule.num_timesteps is None:
        return _trailing(schedule, num_steps, offset)
    return torch.linspace(schedule.t_max, 0, num_steps, dtype=torch.float64)


def _leading(schedule: Schedule, num_steps: int, offset: int) -> Tensor:
    if schedule.num_timesteps is None:
        raise ValueError("spacing 'leading' belongs to discrete schedules: choose trailing")
    if num_steps > schedule.num_timesteps:
        raise ValueError(f"steps must be at most {schedule.num_timesteps} with spacing 'leading', not {num_steps}")
    stride = schedule.num_timesteps // num_steps
    steps = torch.arange(num_steps - 1, -1, -1, dtype=torch.float64) * stride + offset
    if steps[0] > schedule.t_max or offset < 0:
        raise ValueError(f"offset must be within 0 and {int(schedule.t_max - steps[0] + offset)}, not {offset}")
    return steps


def _trailing(schedule: Schedule, num_steps: int, offset: int) -> Tensor:
    ends = 1.0 - torch.arange(num_steps, dtype=torch.float64) / num_steps
    if schedule.num_timesteps is None:
        return schedule.from_unit(ends)
    if num_steps > schedule.num_timesteps:
        raise ValueError(f"steps must be at most {schedule.num_timesteps} with spacing 'trailing', not {num_steps}")
    return (ends * schedule.num_timesteps).round() - 1


TIMES: dict[str, Callable[[Schedule, int, int], Tensor]] = {
    "uniform": _uniform,
    "leading": _leading,
    "trailing": _trailing,
}


# ---- spacings: ratios sigma / alpha ---------------------------------------------------------------------------------


def _karras(head: Tensor, count: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be a positive number, not {rho}")
    ramp = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), count, dtype=torch.float64)
    return torch.cat([head, ramp**rho])


def _exponential(head: Tensor, count: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    ramp = torch.linspace(math.log(sigma_max), math.log(sigma_min), count, dtype=torch.float64)
    return torch.cat([head, ramp.exp()])


RAMPS: dict[str, Callable[[Tensor, int, float, float, float], Tensor]] = {
    "karras": _karras,
    "exponential": _exponential,
}
SPACINGS = (*TIMES, *RAMPS)


def _ends(schedule: Schedule) -> tuple[float, float]:
    """sigma / alpha at t = 0 and at t_max."""
    ends = (schedule.at(torch.tensor(t, dtype=torch.float64)) for t in (0.0, schedule.t_max))
    low, high = (float(noise_ratio(level)) for level in ends)
    return low, high


def _bounds(
    schedule: Schedule, num_steps: int, sigma_min: float | None, sigma_max: float | None
) -> tuple[Tensor, int, float, float]:
    """What comes before the ramp (pure noise or nothing), the ramp's number of levels, and its two ends."""
    low, high = _ends(schedule)
    head = torch.full((1,) if sigma_max is None and high == math.inf else (0,), math.inf, dtype=torch.float64)
    if sigma_min is None:
        sigma_min = low or CLEANEST
    if sigma_max is None:
        sigma_max = high if high < math.inf else NOISIEST
    slack = 1e-9  # of the division sigma / alpha
    if not max(low * (1 - slack), 0) <= sigma_min < sigma_max <= high * (1 + slack) or sigma_min <= 0:
        raise ValueError(
            f"need {low:.4g} <= sigma_min < sigma_max <= {high:.4g}, the ends of {schedule} in units of sigma / alpha, "
            f"not sigma_min={sigma_min:.4g} and sigma_max={sigma_max:.4g}"
        )
    return head, num_steps - len(head), sigma_min, sigma_max


# ---- on top of any spacing ------------------------------------------------------------------------------------------


def _shifted(schedule: Schedule, times: Tensor, shift: float) -> Tensor:
    low, high = _ends(schedule)
    ratio = noise_ratio(schedule.at(times))
    above = shift * (ratio - low)
    if high == math.inf:
        return schedule.t_at(low + above)
    below = high - ratio
    return schedule.t_at((low * below + high * above) / (below + above))


def _must_fall(levels: Levels, spacing: str, final: str) -> None:
    """Two stops of the same noise would make a solver divide by zero."""
    ratio = torch.stack([noise_ratio(level) for level in levels])
    flat = (~(ratio[1:] < ratio[:-1] * (1 - 1e-9))).nonzero()  # more than rounding
    if len(flat):
        at = int(flat[0]) + 1
        way_out = "choose final=clean" if at == len(levels) - 1 and final == "first" else "take fewer steps"
        raise ValueError(
            f"with spacing={spacing}, final={final} the stops {at} and {at + 1} of {len(levels)} have the same noise, "
            f"sigma / alpha = {float(ratio[at]):.4g}: {way_out}"
        )
