"""Samplers on Gaussian data, where the ideal denoiser and the exact solution are known in closed form.

x0 ~ N(mu, s^2) gives E[x0 | x_t] = mu + alpha s^2 / (alpha^2 s^2 + sigma^2) (x_t - alpha mu), and the
probability-flow ODE carries x_t = alpha mu + sqrt(alpha^2 s^2 + sigma^2) z along constant z.
"""

import math

import pytest
import torch

from ldm.build import build
from ldm.diffusion.guidance import guided
from ldm.diffusion.levels import sampling_levels
from ldm.diffusion.samplers.ddim import sample_ddim
from ldm.diffusion.samplers.ddpm import sample_ddpm
from ldm.diffusion.samplers.dpmpp import sample_dpmpp_2m
from ldm.diffusion.samplers.euler import sample_euler
from ldm.diffusion.samplers.heun import sample_heun
from ldm.diffusion.schedule import DiscreteVP, RectifiedFlow
from ldm.random import Draws, Purpose, fold, normal
from ldm.types import Conditioning, Level

MU, S = 0.7, 0.5
f64 = torch.float64


def ideal(x, level):
    gain = level.alpha * S**2 / (level.alpha**2 * S**2 + level.sigma**2)
    return MU + gain * (x - level.alpha * MU)


def marginal(level, z):
    return level.alpha * MU + torch.sqrt(level.alpha**2 * S**2 + level.sigma**2) * z


def interior(schedule, steps):
    """Levels evenly spaced in time on the inside of the range, where the orders of the solvers hold."""
    times = torch.linspace(0.98, 0.02, steps + 1, dtype=f64) * schedule.t_max
    return [schedule.at(t) for t in times]


class SmoothVP:
    """The VP cosine path in continuous time: the discrete table is interpolated and has kinks."""

    t_max = 1.0

    def at(self, t):
        return Level(t, torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2))


def order_of(sampler, schedule):
    """Slope of log error over log steps."""
    z = torch.linspace(-2, 2, 9, dtype=f64).view(1, 1, 3, 3)
    errors = []
    counts = (160, 320, 640)
    for steps in counts:
        levels = interior(schedule, steps)
        end = sampler(ideal, marginal(levels[0], z), levels)
        errors.append(float((end - marginal(levels[-1], z)).abs().max()))
    return math.log(errors[0] / errors[-1]) / math.log(counts[-1] / counts[0])


@pytest.mark.parametrize("schedule", [SmoothVP(), RectifiedFlow()], ids=["vp", "flow"])
@pytest.mark.parametrize("sampler,order", [(sample_euler, 1), (sample_ddim, 1), (sample_heun, 2), (sample_dpmpp_2m, 2)])
def test_order_of_convergence(sampler, order, schedule):
    assert abs(order_of(sampler, schedule) - order) < 0.1


def test_a_solver_that_is_only_first_order_would_be_noticed():
    with pytest.raises(AssertionError):
        assert abs(order_of(sample_euler, RectifiedFlow()) - 2) < 0.1


@pytest.mark.parametrize("schedule", [DiscreteVP(), RectifiedFlow()], ids=["vp", "flow"])
@pytest.mark.parametrize("sampler", [sample_euler, sample_heun, sample_dpmpp_2m, sample_ddim])
def test_full_range_reaches_the_data(sampler, schedule):
    """From pure noise to clean, alpha = 0 and sigma = 0 included: finite, and close to the exact end."""
    levels = sampling_levels(schedule, 200)
    z = torch.linspace(-2, 2, 9, dtype=f64).view(1, 1, 3, 3)
    end = sampler(ideal, marginal(levels[0], z), levels)
    assert torch.isfinite(end).all()
    assert float((end - (MU + S * z)).abs().max()) < 0.05  # the first-order solvers' error at 200 steps


def noise_for(count):
    draws = Draws(5, torch.arange(count))
    keys = draws.keys(Purpose.SAMPLE_STEP)
    return lambda step, shape: normal(fold(keys, Purpose.SAMPLE_STEP, torch.full_like(keys, step)), shape[1:])


@pytest.mark.parametrize("schedule", [DiscreteVP(), RectifiedFlow()], ids=["vp", "flow"])
@pytest.mark.parametrize("sampler", [sample_ddpm, lambda *a, **k: sample_ddim(*a, eta=1.0, **k)], ids=["ddpm", "eta1"])
def test_ancestral_sampling_recovers_mean_and_variance(sampler, schedule):
    count = 20_000
    levels = sampling_levels(schedule, 1000)  # at 100 steps the deviation is 3 % short: the price of few steps
    torch.manual_seed(0)
    start = torch.randn(count, 1, 1, 1, dtype=f64)
    end = sampler(ideal, marginal(levels[0], start), levels, noise=lambda step, shape: torch.randn(shape, dtype=f64))
    assert abs(float(end.mean()) - MU) < 0.02 * MU
    assert abs(float(end.std()) - S) < 0.02 * S


def test_ddim_at_eta_one_is_ddpm():
    levels = sampling_levels(DiscreteVP(), 10)
    x = torch.randn(4, 1, 2, 2, dtype=f64, generator=torch.manual_seed(0))
    noise = noise_for(4)
    a = sample_ddpm(ideal, x, levels, noise=noise)
    b = sample_ddim(ideal, x, levels, noise=noise, eta=1.0)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_euler_is_ddim_on_vp():
    levels = sampling_levels(DiscreteVP(), 12)
    x = torch.randn(2, 1, 2, 2, dtype=f64, generator=torch.manual_seed(0))
    torch.testing.assert_close(sample_euler(ideal, x, levels), sample_ddim(ideal, x, levels), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", [sample_euler, sample_heun, sample_dpmpp_2m, sample_ddim, sample_ddpm])
def test_every_step_is_announced_and_dtype_stays(sampler):
    levels = sampling_levels(RectifiedFlow(), 6)
    seen = []
    x = torch.randn(2, 1, 2, 2, generator=torch.manual_seed(0))
    end = sampler(ideal, x, levels, noise=noise_for(2), on_step=lambda step, x, x0: seen.append((step, x0.shape)))
    assert seen == [(i, x.shape) for i in range(6)]
    assert end.dtype == torch.float32


def test_stochastic_samplers_ask_for_noise():
    levels = sampling_levels(RectifiedFlow(), 2)
    with pytest.raises(ValueError, match="noise"):
        sample_ddpm(ideal, torch.zeros(1, 1, 1, 1), levels)
    with pytest.raises(ValueError, match="noise"):
        sample_ddim(ideal, torch.zeros(1, 1, 1, 1), levels, eta=0.5)


class Recording(torch.nn.Module):
    """A denoiser that adds the conditioning's vector and remembers the batch sizes it was called with."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x, level, cond):
        self.sizes.append(len(x))
        return x * 0 + cond.vector[:, :, None, None]


def conditioning(value):
    return Conditioning(vector=torch.full((2, 1), value))


def test_guidance_extrapolates_in_one_doubled_call():
    denoiser = Recording()
    x = torch.zeros(2, 1, 1, 1)
    level = RectifiedFlow().at(torch.tensor(500.0, dtype=f64))
    out = guided(denoiser, conditioning(1.0), conditioning(0.25), 3.0)(x, level)
    assert float(out[0]) == 0.25 + 3 * 0.75
    assert denoiser.sizes == [4]


def test_guidance_interval_saves_the_second_half():
    denoiser = Recording()
    x = torch.zeros(2, 1, 1, 1)
    denoise = guided(denoiser, conditioning(1.0), conditioning(0.25), 3.0, interval=(0.2, 0.8))
    for t, size in ((900.0, 2), (500.0, 4), (100.0, 2)):
        denoise(x, RectifiedFlow().at(torch.tensor(t, dtype=f64)))
        assert denoiser.sizes[-1] == size


def test_scale_one_is_no_guidance():
    denoiser = Recording()
    out = guided(denoiser, conditioning(1.0), conditioning(0.25), 1.0)(
        torch.zeros(2, 1, 1, 1), RectifiedFlow().at(torch.tensor(500.0, dtype=f64))
    )
    assert denoiser.sizes == [2] and float(out[0]) == 1.0


def test_every_sampler_yaml_runs(configs):
    """A new sampler is one file and one YAML: this finds it."""
    for path in sorted((configs / "sampler").glob("*.yaml")):
        import yaml

        node = yaml.safe_load(path.read_text())
        if node["function"] is None:
            continue
        sampling = build(node)
        levels = sampling_levels(RectifiedFlow(), 20, spacing=sampling.spacing, final=sampling.final)
        count = 4000
        start = Draws(1, torch.arange(count)).normal(Purpose.SAMPLE_INIT, (1, 1, 1)).double()
        noise = noise_for(count)
        end = sampling.function(ideal, start, levels, noise=lambda s, shape, n=noise: n(s, shape).double())
        assert abs(float(end.mean()) - MU) < 0.1, path.name
        assert abs(float(end.std()) - S) < 0.1, path.name
