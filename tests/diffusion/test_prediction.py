"""Predictions against their own inverse and the papers' formulas, over every schedule that they go with."""

import itertools
import math

import pytest
import torch

from ldm.diffusion.denoiser import Denoiser, check_pair
from ldm.diffusion.prediction import EDM, X0, Epsilon, Flow, Velocity
from ldm.diffusion.schedule import CosineVP, DiscreteVP, RectifiedFlow, VarianceExploding, ZeroTerminalSNR
from ldm.diffusion.weighting import SIGMA_FLOOR
from ldm.types import Conditioning, Level
from tests.diffusion.combinations import pairs

f64 = torch.float64
PAIRS = pairs()
SHARES = torch.tensor([0.0, 1e-6, 0.1, 0.5, 0.9, 0.999, 1.0], dtype=f64)  # of t_max; both ends


def values(count, seed=0):
    """Rows of standard normal numbers [count, 64, 1], against times [7]."""
    return torch.randn(count, 64, 1, dtype=f64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("schedule,prediction", PAIRS, ids=str)
def test_to_x0_inverts_target(schedule, prediction):
    level = schedule.at(SHARES * schedule.t_max)
    x0, eps = values(2)
    x_t = level.alpha * x0 + level.sigma * eps
    target = prediction.target(x0, eps, level.alpha, level.sigma)
    assert target.isfinite().all()
    back = prediction.to_x0(target, x_t, level.alpha, level.sigma)
    # epsilon divides rounding errors by alpha, down to 5e-5 on the cosine; the others are exact to rounding, at
    # sigma = 80 relative to x_t
    magnified = (x_t.abs() / level.alpha.clamp(min=1e-9) if prediction.needs_alpha else x_t.abs()).max()
    torch.testing.assert_close(back, x0.expand_as(back), rtol=0, atol=1e-15 * max(10.0, float(magnified)))


@pytest.mark.parametrize("schedule,prediction", PAIRS, ids=str)
def test_x0_factor_is_the_ratio_of_the_errors(schedule, prediction):
    """A perturbed prediction: squared error of the target = x0_factor / sigma^2 * squared error of x0."""
    level = schedule.at(SHARES[2:-1] * schedule.t_max)
    x0, eps, wrong = values(3, seed=1)
    x_t = level.alpha * x0 + level.sigma * eps
    target = prediction.target(x0, eps, level.alpha, level.sigma)
    x0_error = (prediction.to_x0(target + wrong, x_t, level.alpha, level.sigma) - x0).square()
    expected = wrong.square() * level.sigma**2 / prediction.x0_factor(level.alpha, level.sigma)
    torch.testing.assert_close(x0_error.expand_as(expected), expected, rtol=1e-6, atol=1e-9)


def test_edm_is_the_papers_preconditioning():
    """Karras et al. 2022, table 1 and equation 7, literally."""
    sigma = torch.logspace(math.log10(0.002), math.log10(80), 50, dtype=f64)
    for sd in (0.5, 1.0):
        prediction, one = EDM(sd), torch.ones_like(sigma)
        x0, eps, network = values(3, seed=2)
        x_t = x0 + sigma * eps
        c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / (sd**2 + sigma**2).sqrt()
        torch.testing.assert_close(prediction.to_x0(network, x_t, one, sigma), c_skip * x_t + c_out * network)
        torch.testing.assert_close(prediction.target(x0, eps, one, sigma), (x0 - c_skip * x_t) / c_out)
        torch.testing.assert_close(prediction.input_scale(one, sigma), 1 / (sigma**2 + sd**2).sqrt())
        torch.testing.assert_close(prediction.time_input(Level(sigma, one, sigma)), sigma.log() / 4)


def test_edm_input_and_target_have_unit_variance():
    """What the preconditioning is for, when sigma_data is the data's deviation; a wrong one would be noticed."""
    generator = torch.Generator().manual_seed(3)
    x0, eps = 0.7 * torch.randn(100_000, dtype=f64, generator=generator), torch.randn(100_000, dtype=f64)
    for sigma in (0.002, 0.7, 80.0):
        level = Level(torch.zeros(()), torch.ones((), dtype=f64), torch.tensor(sigma, dtype=f64))
        for right, prediction in ((True, EDM(0.7)), (False, EDM(0.5))):
            seen = prediction.input_scale(level.alpha, level.sigma) * (x0 + sigma * eps)
            target = prediction.target(x0, eps, level.alpha, level.sigma)
            deviation = max(abs(float(seen.std()) - 1), abs(float(target.std()) - 1))
            assert (deviation < 0.01) == right


class Probe(torch.nn.Module):
    def forward(self, x, time, cond):
        self.x, self.time = x, time
        return torch.full_like(x, 0.25)


def test_denoiser_tells_the_network_what_the_prediction_wants():
    x = torch.full((2, 1, 1, 1), 3.0)
    probe = Probe()
    level = VarianceExploding().at(torch.tensor([400.0, 900.0]))
    x0 = Denoiser(probe, VarianceExploding(), EDM(0.5))(x, level, Conditioning())
    variance = (level.sigma**2 + 0.25).view(2, 1, 1, 1)
    torch.testing.assert_close(probe.x, x / variance.sqrt())
    torch.testing.assert_close(probe.time, level.sigma.log() / 4)
    sigma = level.sigma.view(2, 1, 1, 1)
    torch.testing.assert_close(x0, 0.25 / variance * x + 0.5 * sigma / variance.sqrt() * 0.25)

    level = DiscreteVP().at(torch.tensor([400.0, 900.0]))
    Denoiser(probe, DiscreteVP(), Velocity())(x, level, Conditioning())
    assert torch.equal(probe.x, x) and torch.equal(probe.time, level.t)


def test_one_level_for_the_whole_batch():
    """As samplers call it: float64 scalars on the CPU, x in single precision."""
    level = VarianceExploding().at(torch.tensor(400.0, dtype=f64))
    probe, x = Probe(), torch.ones(3, 1, 2, 2)
    assert Denoiser(probe, VarianceExploding(), EDM())(x, level, Conditioning()).dtype == torch.float32
    assert probe.time.shape == (3,) and probe.x.dtype == torch.float32


@pytest.mark.parametrize(
    "prediction,schedule",
    [
        *itertools.product([Epsilon()], [RectifiedFlow(), CosineVP(), ZeroTerminalSNR(), RectifiedFlow(shift=3.0)]),
        *itertools.product([EDM()], [DiscreteVP(), RectifiedFlow(), CosineVP(), ZeroTerminalSNR()]),
    ],
    ids=str,
)
def test_pairs_that_cannot_work_are_refused_with_both_names(prediction, schedule):
    with pytest.raises(ValueError) as caught:
        Denoiser(torch.nn.Identity(), schedule, prediction)
    for part in (prediction, schedule):
        assert type(part).__name__ in str(caught.value)


def test_every_other_pair_is_built():
    for prediction in (Velocity(), Flow(), X0()):
        for schedule in (RectifiedFlow(), CosineVP(), ZeroTerminalSNR(), DiscreteVP(), VarianceExploding()):
            check_pair(schedule, prediction)
    for schedule in (DiscreteVP(), VarianceExploding()):
        check_pair(schedule, Epsilon())
    check_pair(VarianceExploding(), EDM())


def test_the_floor_of_sigma_is_below_every_schedule():
    """The limit that the weights take at sigma = 0 must not replace a level that a schedule really has."""
    for schedule, _ in PAIRS:
        clean = schedule.at(torch.tensor(0.0, dtype=f64)).sigma
        assert float(clean) == 0 or float(clean) > 1e4 * SIGMA_FLOOR
