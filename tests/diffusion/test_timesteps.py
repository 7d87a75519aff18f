"""Training times have their stated distribution, on every schedule."""

import math

import pytest
import torch

from ldm.diffusion.schedule import DiscreteVP, RectifiedFlow, VarianceExploding
from ldm.diffusion.timesteps import LogitNormal, LogNormalSigma, Uniform
from ldm.random import Draws, run_key
from tests.diffusion.combinations import options

COUNT = 20_000
DRAWS = Draws(run_key(0), torch.arange(COUNT))
FLOW, WIDE = RectifiedFlow(), VarianceExploding(1e-6, 1e6)  # so wide that nothing is cut off


@pytest.mark.parametrize("low_discrepancy", [True, False])
@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "log_normal_sigma"])
def test_timesteps_have_their_distribution(kind, low_discrepancy):
    if kind == "uniform":
        z = (Uniform(low_discrepancy)(DRAWS, FLOW).double() / 1000 - 0.5) * 12**0.5
    elif kind == "logit_normal":
        z = (torch.logit(LogitNormal(0.3, 0.7, low_discrepancy)(DRAWS, FLOW).double() / 1000) - 0.3) / 0.7
    else:
        level = WIDE.at(LogNormalSigma(-1.2, 1.2, low_discrepancy)(DRAWS, WIDE).double())
        z = (level.sigma.log() + 1.2) / 1.2
    # mean 0 and variance 1 within four standard errors
    assert abs(z.mean()) < 4 / COUNT**0.5 and abs(z.var() - 1) < 4 * (2 / COUNT) ** 0.5
    if kind != "uniform":
        quantiles = torch.quantile(z, torch.tensor([0.1587, 0.5, 0.8413], dtype=torch.float64))
        assert (quantiles - torch.tensor([-1.0, 0.0, 1.0])).abs().max() < 0.04


@pytest.mark.parametrize("schedule", options("schedule").values(), ids=str)
@pytest.mark.parametrize("timesteps", options("timesteps").values(), ids=str)
def test_times_belong_to_the_schedule(timesteps, schedule):
    t = timesteps(DRAWS, schedule)
    assert t.dtype == torch.float32 and t.shape == (COUNT,)
    assert (t >= 0).all() and (t <= schedule.t_max).all()
    if schedule.num_timesteps is not None:
        assert torch.equal(t, t.round())


def test_log_normal_sigma_means_the_same_noise_everywhere():
    """The share of samples noisier than a ratio is that of the normal distribution, on steps and on flow alike."""
    for schedule in (DiscreteVP(), FLOW, VarianceExploding()):
        level = schedule.at(LogNormalSigma(-0.5, 1.0)(DRAWS, schedule).double())
        noisier = float((level.sigma / level.alpha > 0.5).double().mean())
        expected = 0.5 * math.erfc((math.log(0.5) + 0.5) / 2**0.5)
        assert abs(noisier - expected) < 0.01


def test_low_discrepancy_covers_every_batch_and_any_cut_agrees():
    draws = Draws(run_key(7), torch.arange(640, 704))
    for timesteps in (Uniform(), LogitNormal(), LogNormalSigma()):
        t = timesteps(draws, FLOW)
        assert torch.equal(timesteps(Draws(run_key(7), torch.arange(656, 672)), FLOW), t[16:32])
    counts = torch.histc(Uniform()(draws, FLOW), 16, 0, 1000)
    assert counts.min() >= 3 and counts.max() <= 5  # 4 of 64 expected in each sixteenth
    independent = torch.histc(Uniform(low_discrepancy=False)(draws, FLOW), 16, 0, 1000)
    assert independent.max() - independent.min() > 2  # the control: independent draws do clump


@pytest.mark.parametrize("kind", [LogitNormal, LogNormalSigma])
def test_a_deviation_of_zero_is_refused(kind):
    with pytest.raises(ValueError, match="std"):
        kind(std=0.0)
