"""Weights are the stated function of SNR on the x0 error, for every schedule, prediction and distribution of times."""

import itertools

import pytest
import torch

from ldm.diffusion.prediction import EDM as EDMPrediction
from ldm.diffusion.prediction import X0, Epsilon, Flow, Velocity
from ldm.diffusion.schedule import CosineVP, DiscreteVP, RectifiedFlow, VarianceExploding
from ldm.diffusion.weighting import EDM, P2, SNR, MinSNR, SoftMinSNR, Unit, check_finite
from ldm.random import Draws, run_key
from tests.diffusion.combinations import holds, options, pairs

f64 = torch.float64
OF_SNR = {
    SNR(): lambda snr: snr,
    MinSNR(): lambda snr: snr.clamp(max=5.0),
    MinSNR(1.0): lambda snr: snr.clamp(max=1.0),
    SoftMinSNR(): lambda snr: 4 * snr / (snr + 4),
    P2(): lambda snr: snr / (1 + snr),
    P2(k=2.0, gamma=0.5): lambda snr: snr / (2 + snr) ** 0.5,
    P2(gamma=1.5): lambda snr: snr / (1 + snr) ** 1.5,
    EDM(): lambda snr: snr + 4,
    EDM(1.0): lambda snr: snr + 1,
}
PRODUCT = list(itertools.product(pairs(), [Unit(), *OF_SNR]))


@pytest.mark.parametrize("weighting", OF_SNR, ids=str)
def test_weights_are_their_function_of_snr(weighting):
    """Inside the range, by the measured ratio of the two errors and nothing of the library's own factor."""
    for schedule, prediction in pairs():
        level = schedule.at(torch.linspace(0.01, 0.99, 200, dtype=f64) * schedule.t_max)
        one, zero = torch.ones_like(level.t), torch.zeros_like(level.t)
        slope = prediction.to_x0(one, zero, level.alpha, level.sigma)  # of x0 with respect to the output
        expected = OF_SNR[weighting]((level.alpha / level.sigma) ** 2) * slope**2
        torch.testing.assert_close(weighting(prediction, level.alpha, level.sigma), expected, rtol=1e-9, atol=0)


def test_weights_are_finite_at_both_ends_or_refused():
    """Both precisions, the exact ends included; at sigma = 0 the weight is the limit from above."""
    finite = refused = 0
    for (schedule, prediction), weighting in PRODUCT:
        if not holds(check_finite, weighting, schedule, prediction):
            refused += 1
            assert isinstance(prediction, X0) and float(schedule.at(torch.zeros((), dtype=f64)).sigma) == 0
            assert isinstance(weighting, SNR | EDM | P2)
            continue
        finite += 1
        for dtype in (torch.float32, f64):
            t = torch.tensor([0.0, 1.0], dtype=dtype) * schedule.t_max
            level = schedule.at(t)
            weights = weighting(prediction, level.alpha, level.sigma)
            assert weights.isfinite().all() and (weights >= 0).all()
            near = schedule.at(t + torch.tensor([1e-4, -1e-4], dtype=f64))
            beside = weighting(prediction, near.alpha, near.sigma)
            torch.testing.assert_close(weights.double(), beside, rtol=1e-2, atol=1e-3)
    assert refused == 6 * 4 and finite + refused == len(PRODUCT)  # x0 on 6 schedules to sigma = 0: SNR, 2 EDM, 1 P2


def test_timesteps_of_every_kind_give_finite_weights():
    """The whole product, as training meets it: single precision, drawn times."""
    draws = Draws(run_key(0), torch.arange(256))
    for schedule, timesteps in itertools.product(options("schedule").values(), options("timesteps").values()):
        level = schedule.at(timesteps(draws, schedule))
        for (_, prediction), weighting in (p for p in PRODUCT if p[0][0] == schedule):
            if holds(check_finite, weighting, schedule, prediction):
                assert weighting(prediction, level.alpha, level.sigma).isfinite().all()


def test_published_forms():
    """On the prediction that each paper trains."""
    level = DiscreteVP().at(torch.arange(0, 1000, 37, dtype=f64))
    snr, level_args = (level.alpha / level.sigma) ** 2, (level.alpha, level.sigma)
    five = torch.tensor(5.0, dtype=f64)
    torch.testing.assert_close(MinSNR(5.0)(Epsilon(), *level_args), torch.minimum(snr, five) / snr)
    torch.testing.assert_close(MinSNR(5.0)(Velocity(), *level_args), torch.minimum(snr, five) / (snr + 1))
    torch.testing.assert_close(MinSNR(5.0)(X0(), *level_args), torch.minimum(snr, five))
    torch.testing.assert_close(P2(1.0, 1.0)(Epsilon(), *level_args), 1 / (1 + snr))
    torch.testing.assert_close(SNR()(Epsilon(), *level_args), torch.ones_like(snr))
    flow = RectifiedFlow().at(torch.linspace(100, 900, 9, dtype=f64))
    flow_snr = (flow.alpha / flow.sigma) ** 2
    torch.testing.assert_close(SNR()(Flow(), flow.alpha, flow.sigma), flow_snr * flow.sigma**2)


def test_edm_weight_is_one_on_its_own_target():
    """lambda c_out^2 = 1, Karras et al. 2022, table 1; another sigma_data would be noticed."""
    level = VarianceExploding().at(torch.linspace(0, 1000, 50, dtype=f64))
    weights = EDM(0.7)(EDMPrediction(0.7), level.alpha, level.sigma)
    torch.testing.assert_close(weights, torch.ones_like(weights))
    other = EDM(0.5)(EDMPrediction(0.7), level.alpha, level.sigma)
    assert (other - 1).abs().max() > 0.5


def test_unbounded_weight_is_refused_with_all_names():
    with pytest.raises(ValueError, match=r"SNR.*X0.*CosineVP"):
        check_finite(SNR(), CosineVP(), X0())
    check_finite(SNR(), CosineVP(), Velocity())
    check_finite(SNR(), DiscreteVP(), X0())  # its clean end has SNR 1175
    check_finite(MinSNR(), CosineVP(), X0())


@pytest.mark.parametrize(
    "words,make",
    [
        ("gamma", lambda: MinSNR(0.0)),
        ("gamma", lambda: SoftMinSNR(-1.0)),
        ("k must", lambda: P2(k=0.0)),
        ("gamma", lambda: P2(gamma=-1.0)),
        ("sigma_data", lambda: EDM(0.0)),
    ],
)
def test_bad_values_are_named(words, make):
    with pytest.raises(ValueError, match=words):
        make()
