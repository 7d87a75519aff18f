"""Schedules against their formulas, predictions against their own inverse."""

import itertools

import pytest
import torch

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.levels import is_variance_preserving, sampling_levels
from ldm.diffusion.prediction import Epsilon, Flow, Velocity
from ldm.diffusion.schedule import DiscreteVP, RectifiedFlow
from ldm.diffusion.timesteps import LogitNormal, Uniform
from ldm.diffusion.weighting import MinSNR, Unit
from ldm.random import Draws, run_key

f64 = torch.float64
SCHEDULES = [DiscreteVP(), DiscreteVP("linear", 1e-4, 0.02), RectifiedFlow(), RectifiedFlow(shift=3.0)]
PREDICTIONS = [Epsilon(), Velocity(), Flow()]


def test_stable_diffusion_values():
    """alphas_cumprod of Stable Diffusion 1.5 by its definition, at both ends and in the middle."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=f64) ** 2
    expected = torch.cumprod(1 - betas, 0)
    level = DiscreteVP().at(torch.arange(1000, dtype=f64))
    torch.testing.assert_close(level.alpha**2, expected, rtol=1e-12, atol=0)
    assert abs(float(level.alpha[-1] ** 2) - 0.00466) < 1e-5  # the known remainder of the picture at t = 999
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones(1000, dtype=f64))


def test_between_the_steps_the_table_is_continued_smoothly():
    level = DiscreteVP().at(torch.tensor([500.0, 500.5, 501.0], dtype=f64))
    log_alpha = level.alpha.log()
    torch.testing.assert_close(log_alpha[1], (log_alpha[0] + log_alpha[2]) / 2)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_levels_walk_from_noise_to_picture(schedule):
    for spacing, steps in itertools.product(("uniform", "trailing"), (1, 7, 50)):
        levels = sampling_levels(schedule, steps, spacing=spacing)
        assert len(levels) == steps + 1
        sigmas = torch.stack([lv.sigma / (lv.alpha + lv.sigma) for lv in levels])
        assert (sigmas[1:] < sigmas[:-1]).all()
        assert float(levels[0].t) == schedule.t_max and float(levels[-1].sigma) == 0


def test_leading_steps_of_stable_diffusion():
    """DDIM of Stable Diffusion with 50 steps: 981, 961, ..., 1, ending at the first training level."""
    levels = sampling_levels(DiscreteVP(), 50, spacing="leading", offset=1, final="first")
    assert [int(lv.t) for lv in levels] == [*range(981, 0, -20), 0]
    assert float(levels[-1].sigma) > 0


def test_strength_keeps_the_tail():
    whole = sampling_levels(RectifiedFlow(), 20)
    part = sampling_levels(RectifiedFlow(), 20, strength=0.25)
    assert [float(lv.t) for lv in part] == [float(lv.t) for lv in whole[15:]]


@pytest.mark.parametrize(
    "words,options",
    [
        ("steps", {"num_steps": 0}),
        ("strength", {"num_steps": 4, "strength": 0.0}),
        ("spacing", {"num_steps": 4, "spacing": "karass"}),
        ("final", {"num_steps": 4, "final": "dirty"}),
        ("1000", {"num_steps": 1001, "spacing": "leading"}),
    ],
)
def test_bad_levels_are_named(words, options):
    with pytest.raises(ValueError, match=words):
        sampling_levels(DiscreteVP(), **options)


@pytest.mark.parametrize("prediction,schedule", itertools.product(PREDICTIONS, SCHEDULES), ids=str)
def test_to_x0_inverts_target(prediction, schedule):
    if prediction.needs_alpha and isinstance(schedule, RectifiedFlow):
        pytest.skip("refused when built, see below")
    generator = torch.manual_seed(0)
    x0, eps = torch.randn(2, 64, dtype=f64, generator=generator)
    for u in (0.0, 0.1, 0.5, 0.99, 0.999):
        level = schedule.at(schedule.from_unit(torch.tensor(u, dtype=f64)))
        x_t = level.alpha * x0 + level.sigma * eps
        target = prediction.target(x0, eps, level.alpha, level.sigma)
        torch.testing.assert_close(prediction.to_x0(target, x_t, level.alpha, level.sigma), x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction,schedule", itertools.product(PREDICTIONS, SCHEDULES), ids=str)
def test_x0_factor_is_the_ratio_of_the_errors(prediction, schedule):
    """A perturbed prediction: squared error of the target = x0_factor / sigma^2 * squared error of x0."""
    level = schedule.at(schedule.from_unit(torch.tensor(0.4, dtype=f64)))
    x0, eps, wrong = torch.randn(3, 32, dtype=f64, generator=torch.manual_seed(1))
    x_t = level.alpha * x0 + level.sigma * eps
    target = prediction.target(x0, eps, level.alpha, level.sigma)
    x0_error = (prediction.to_x0(target + wrong, x_t, level.alpha, level.sigma) - x0).square()
    factor = prediction.x0_factor(level.alpha, level.sigma) / level.sigma**2
    torch.testing.assert_close(factor * x0_error, wrong.square())


def test_min_snr_on_epsilon_is_the_published_weight():
    level = DiscreteVP().at(torch.arange(0, 1000, 37, dtype=f64))
    snr = (level.alpha / level.sigma) ** 2
    torch.testing.assert_close(
        MinSNR(5.0)(Epsilon(), level.alpha, level.sigma), torch.minimum(snr, torch.tensor(5.0)) / snr
    )
    torch.testing.assert_close(
        MinSNR(5.0)(Velocity(), level.alpha, level.sigma), torch.minimum(snr, torch.tensor(5.0)) / (snr + 1)
    )


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=str)
def test_weights_are_finite_at_both_ends(prediction):
    ends = torch.tensor([0.0, 1.0], dtype=f64)
    for weighting in (Unit(), MinSNR()):
        if not prediction.needs_alpha:
            assert torch.isfinite(weighting(prediction, ends, ends.flip(0))).all()


def test_epsilon_without_signal_is_refused():
    with pytest.raises(ValueError, match="divides by alpha"):
        Denoiser(torch.nn.Identity(), RectifiedFlow(), Epsilon())
    Denoiser(torch.nn.Identity(), DiscreteVP(), Epsilon())


def test_only_vp_preserves_variance():
    assert is_variance_preserving(sampling_levels(DiscreteVP(), 5))
    assert not is_variance_preserving(sampling_levels(RectifiedFlow(), 5))


@pytest.mark.parametrize("timesteps", [Uniform(), Uniform(False), LogitNormal(), LogitNormal(low_discrepancy=False)])
def test_timesteps_have_their_distribution(timesteps):
    u = timesteps(Draws(run_key(0), torch.arange(20_000)))
    assert u.min() >= 0 and u.max() < 1
    z = torch.logit(u.double()) if isinstance(timesteps, LogitNormal) else (u.double() - 0.5) * 12**0.5
    # mean 0 and variance 1 within four standard errors
    assert abs(z.mean()) < 4 / 20_000**0.5 and abs(z.var() - 1) < 4 * (2 / 20_000) ** 0.5


def test_low_discrepancy_covers_every_batch_and_any_cut_agrees():
    draws = Draws(run_key(7), torch.arange(640, 704))
    u = Uniform()(draws)
    counts = torch.histc(u, 16, 0, 1)
    assert counts.min() >= 3 and counts.max() <= 5  # 4 of 64 expected in each sixteenth
    assert torch.equal(Uniform()(Draws(run_key(7), torch.arange(656, 672))), u[16:32])
    independent = torch.histc(Uniform(low_discrepancy=False)(draws), 16, 0, 1)
    assert independent.max() - independent.min() > 2  # the control: independent draws do clump
