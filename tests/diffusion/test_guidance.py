"""Guidance against the formulas of its papers, and one doubled call."""

import pytest
import torch

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import conditioned, guided
from ldm.diffusion.prediction import Epsilon, Flow, Velocity
from ldm.diffusion.schedule import DiscreteVP, RectifiedFlow, VarianceExploding
from ldm.types import Conditioning

f64 = torch.float64


class Network(torch.nn.Module):
    """Answers something not linear in x that depends on the conditioning's vector, and remembers the batch sizes."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x, time, cond):
        self.sizes.append(len(x))
        return torch.tanh(x) * cond.vector[:, :, None, None] + 0.1 * x


def conditioning(value):
    return Conditioning(vector=torch.full((2, 1), value, dtype=f64))


X = torch.linspace(-1.5, 2, 16, dtype=f64).view(2, 2, 2, 2)
COND, NULL = conditioning(1.0), conditioning(-0.25)


def at(schedule, share=0.5):
    return schedule.at(torch.tensor(share * schedule.t_max, dtype=f64))


@pytest.mark.parametrize(
    "schedule,prediction",
    [
        (DiscreteVP(), Epsilon()),
        (DiscreteVP(), Velocity()),
        (RectifiedFlow(), Flow()),
        (VarianceExploding(), Velocity()),
    ],
    ids=["epsilon", "velocity", "flow", "ve"],
)
def test_guidance_on_x0_is_guidance_on_the_prediction(schedule, prediction):
    """Ho and Salimans 2022, equation 6, eps + w (eps - eps_null) with scale = 1 + w, whatever is predicted."""
    denoiser, level, w = Denoiser(Network(), schedule, prediction), at(schedule), 2.5
    outputs = [denoiser.predict(X, level, cond) for cond in (COND, NULL)]
    expected = prediction.to_x0((1 + w) * outputs[0] - w * outputs[1], X, level.alpha, level.sigma)
    torch.testing.assert_close(guided(denoiser, COND, NULL, 1 + w)(X, level), expected, rtol=1e-12, atol=1e-12)


def test_both_halves_go_in_one_doubled_call_and_are_joined_once(monkeypatch):
    joined = []
    original = Conditioning.cat
    monkeypatch.setattr(Conditioning, "cat", lambda *a: joined.append(1) or original(*a))
    denoiser = Denoiser(Network(), RectifiedFlow(), Flow())
    denoise = guided(denoiser, COND, NULL, 3.0)
    for share in (0.9, 0.5, 0.1):
        denoise(X, at(RectifiedFlow(), share))
    assert denoiser.network.sizes == [4, 4, 4] and joined == [1]


def test_outside_the_interval_the_second_half_is_saved():
    denoiser = Denoiser(Network(), RectifiedFlow(), Flow())
    denoise = guided(denoiser, COND, NULL, 3.0, interval=(0.2, 0.8))
    plain = conditioned(denoiser, COND)
    for share, size in ((0.9, 2), (0.5, 4), (0.1, 2)):
        level = at(RectifiedFlow(), share)
        x0 = denoise(X, level)
        assert denoiser.network.sizes[-1] == size
        assert torch.equal(x0, plain(X, level)) == (size == 2)


def test_the_interval_counts_in_shares_on_every_schedule():
    """Bounds on EDM's sigma, 0.25 and 4, are the shares 0.2 and 0.8."""
    schedule = VarianceExploding()
    denoiser = Denoiser(Network(), schedule, Velocity())
    denoise = guided(denoiser, COND, NULL, 3.0, interval=(0.2, 0.8))
    for sigma, size in ((4.1, 2), (3.9, 4), (0.26, 4), (0.24, 2)):
        denoise(X, schedule.at(schedule.t_at(torch.tensor(sigma, dtype=f64))))
        assert denoiser.network.sizes[-1] == size


def test_scale_one_is_no_guidance():
    denoiser = Denoiser(Network(), RectifiedFlow(), Flow())
    level = at(RectifiedFlow())
    assert torch.equal(guided(denoiser, COND, NULL, 1.0)(X, level), conditioned(denoiser, COND)(X, level))
    assert denoiser.network.sizes == [2, 2]


@pytest.mark.parametrize("rescale", [0.7, 1.0])
def test_rescale_is_that_of_the_paper_on_v(rescale):
    """Lin et al. 2023, section 3.4, algorithm 2: the guided output times rescale * factor + 1 - rescale."""
    prediction = Velocity()
    denoiser, level = Denoiser(Network(), DiscreteVP(), prediction), at(DiscreteVP())
    pos, neg = (denoiser.predict(X, level, cond) for cond in (COND, NULL))
    cfg = neg + 7.5 * (pos - neg)
    factor = pos.std([1, 2, 3], keepdim=True) / cfg.std([1, 2, 3], keepdim=True)
    expected = prediction.to_x0(cfg * (rescale * factor + 1 - rescale), X, level.alpha, level.sigma)
    result = guided(denoiser, COND, NULL, 7.5, rescale=rescale)(X, level)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(result, guided(denoiser, COND, NULL, 7.5)(X, level))


def test_rescale_is_that_of_diffusers():
    pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    prediction = Velocity()
    denoiser, level = Denoiser(Network(), DiscreteVP(), prediction), at(DiscreteVP())
    pos, neg = (denoiser.predict(X, level, cond) for cond in (COND, NULL))
    v = rescale_noise_cfg(neg + 7.5 * (pos - neg), pos, guidance_rescale=0.7)
    expected = prediction.to_x0(v, X, level.alpha, level.sigma)
    result = guided(denoiser, COND, NULL, 7.5, rescale=0.7)(X, level)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_rescale_is_finite_at_pure_noise_and_at_the_first_level():
    for schedule, prediction in (
        (RectifiedFlow(), Flow()),
        (DiscreteVP(), Velocity()),
        (VarianceExploding(), Velocity()),
    ):
        denoise = guided(Denoiser(Network(), schedule, prediction), COND, NULL, 7.5, rescale=1.0)
        for share in (1.0, 0.001):
            assert torch.isfinite(denoise(X, at(schedule, share))).all()


@pytest.mark.parametrize(
    "words,options",
    [
        ("interval", {"interval": (0.8, 0.2)}),
        ("interval", {"interval": (0.2, 1.5)}),
        ("interval", {"interval": (0.2,)}),
        ("rescale", {"rescale": 1.5}),
    ],
)
def test_bad_values_are_refused_before_the_network_is_called(words, options):
    with pytest.raises(ValueError, match=words):
        guided(Denoiser(Network(), RectifiedFlow(), Flow()), COND, NULL, 3.0, **options)
