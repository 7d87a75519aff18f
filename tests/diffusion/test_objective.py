"""Noise has its stated covariance, losses their formulas, and the objective puts the parts together."""

import itertools
import math

import pytest
import torch

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.loss import MSE, Huber, SmoothL1
from ldm.diffusion.noising import Offset, Perturbed, Plain, Pyramid
from ldm.diffusion.objective import Objective, denoising_error
from ldm.diffusion.prediction import EDM as Karras
from ldm.diffusion.prediction import X0, Epsilon, Flow, Velocity
from ldm.diffusion.schedule import CosineVP, DiscreteVP, RectifiedFlow, VarianceExploding
from ldm.diffusion.timesteps import LogitNormal, LogNormalSigma, Uniform
from ldm.diffusion.weighting import EDM, P2, SNR, MinSNR, SoftMinSNR, Unit
from ldm.errors import LdmError
from ldm.random import Draws, Purpose, run_key
from ldm.types import Conditioning
from tests.diffusion.combinations import holds, options, pairs

f64 = torch.float64
SHAPE = (2, 4, 6)


def draws(count, start=0):
    return Draws(run_key(5), torch.arange(start, start + count))


# ---- noise ----------------------------------------------------------------------------------------------------------


def covariance(noise):
    """[N, N] over the values of a sample."""
    flat = noise.double().flatten(1)
    assert flat.mean(0).abs().max() < 5 / len(flat) ** 0.5
    return flat.T @ flat / len(flat)


def same_channel():
    channel = torch.arange(math.prod(SHAPE)) // (SHAPE[1] * SHAPE[2])
    return (channel[:, None] == channel).double()


def same_cell(cell):
    """1 where two values lie in one channel and in one cell of `cell` x `cell` positions."""
    c, y, x = torch.meshgrid(*(torch.arange(n) for n in SHAPE), indexing="ij")
    names = torch.stack([c.flatten(), y.flatten() // cell, x.flatten() // cell])
    return (names[:, :, None] == names[:, None, :]).all(0).double()


COVARIANCES = {
    Plain(): torch.eye(48, dtype=f64),
    Offset(0.5): torch.eye(48, dtype=f64) + 0.25 * same_channel(),
    Pyramid(0.6, 2): (same_cell(1) + 0.36 * same_cell(2) + 0.6**4 * same_cell(4)) / (1 + 0.36 + 0.6**4),
    # 6 positions: grids of 2, 4 and 8, the last one cell; further ones are not made
    Pyramid(0.6, 6): sum(0.36**i * same_cell(2**i) for i in range(4)) / sum(0.36**i for i in range(4)),
    Perturbed(0.5): 1.25 * torch.eye(48, dtype=f64),
}


@pytest.mark.parametrize("kind", COVARIANCES, ids=str)
def test_noise_has_its_covariance(kind):
    count = 40_000
    noise, target = kind(draws(count), SHAPE)
    # standard error of a covariance of variances up to 1.25: 1.25 sqrt(2 / count); the largest of 2304 within 5 of it
    assert (covariance(noise) - COVARIANCES[kind]).abs().max() < 5 * 1.25 * (2 / count) ** 0.5
    if isinstance(kind, Perturbed):
        assert (covariance(target) - torch.eye(48)).abs().max() < 5 * (2 / count) ** 0.5
        assert abs(float((noise * target).mean()) - 1) < 0.01  # the target is the plain part of the noise
    else:
        assert target is noise


def test_another_covariance_would_be_noticed():
    error = (covariance(Plain()(draws(40_000), SHAPE)[0]) - COVARIANCES[Offset(0.5)]).abs().max()
    assert error > 5 * 1.25 * (2 / 40_000) ** 0.5


@pytest.mark.parametrize("kind", [Plain(), Offset(), Pyramid(), Perturbed()], ids=str)
def test_noise_belongs_to_the_sample(kind):
    """Any cut of the batch gives the same bits; the plain part is the same for every kind."""
    whole, part = kind(draws(8), SHAPE), kind(draws(3, start=4), SHAPE)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[4:7], b) and a.dtype == torch.float32
    assert not torch.equal(whole[0][0], whole[0][1])
    if isinstance(kind, Perturbed):
        assert torch.equal(whole[1], draws(8).normal(Purpose.NOISE, SHAPE))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 64), (4, 1, 7)])
def test_pyramid_of_any_size(shape):
    noise, _ = Pyramid()(draws(2), shape)
    assert noise.shape == (2, *shape) and noise.isfinite().all()


@pytest.mark.parametrize("make", [lambda: Offset(-1.0), lambda: Pyramid(discount=-0.1), lambda: Perturbed(-0.1)])
def test_negative_strength_is_refused(make):
    with pytest.raises(ValueError, match="at least 0"):
        make()


# ---- loss -----------------------------------------------------------------------------------------------------------


def losses_at(loss, error, t):
    level = DiscreteVP().at(torch.full((1,), float(t), dtype=f64))
    return loss(error, torch.zeros_like(error), level, DiscreteVP())


@pytest.mark.parametrize("kind,schedule", itertools.product([Huber, SmoothL1], ["constant", "exponential", "snr"]))
def test_robust_losses_are_those_of_sd_scripts(kind, schedule):
    """Formulas and thresholds as kohya's sd-scripts defines them (conditional_loss, get_huber_threshold_if_needed)."""
    error = torch.linspace(-3, 3, 61, dtype=f64).view(1, 1, 1, -1)
    for t in (0, 300, 999):
        sigma = float((1 / DiscreteVP().at(torch.tensor(float(t), dtype=f64)).alpha ** 2 - 1) ** 0.5)
        c = {
            "constant": 0.1,
            "exponential": math.exp(math.log(0.1) / 1000 * t),
            "snr": (1 - 0.1) / (1 + sigma) ** 2 + 0.1,
        }[schedule]
        expected = 2 * ((error**2 + c**2) ** 0.5 - c) * (c if kind is Huber else 1)
        torch.testing.assert_close(losses_at(kind(0.1, schedule), error, t), expected)


def test_small_errors_are_squared_and_large_ones_linear():
    small, large = torch.full((1, 1, 1, 1), 1e-4), torch.full((1, 1, 1, 1), 1e4)
    huber, smooth = Huber(0.1, "constant"), SmoothL1(0.1, "constant")
    torch.testing.assert_close(losses_at(huber, small, 0), small**2, rtol=1e-5, atol=0)  # in single precision
    torch.testing.assert_close(losses_at(smooth, small, 0), small**2 / 0.1, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses_at(huber, large, 0), 0.2 * large, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses_at(smooth, large, 0), 2 * large, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses_at(MSE(), large, 0), large**2)


def test_threshold_of_the_snr_schedule_at_pure_noise():
    level = RectifiedFlow().at(torch.tensor([0.0, 1000.0]))
    torch.testing.assert_close(Huber(0.1, "snr").threshold(level, RectifiedFlow()), torch.tensor([1.0, 0.1]))


@pytest.mark.parametrize("words,options_", [("c must", {"c": 0.0}), ("schedule", {"schedule": "cosine"})])
def test_bad_losses_are_named(words, options_):
    for kind in (Huber, SmoothL1):
        with pytest.raises(ValueError, match=words):
            kind(**options_)


# ---- the objective --------------------------------------------------------------------------------------------------


class Small(torch.nn.Module):
    """A network that depends on all that it is given."""

    def forward(self, x, time, cond):
        return torch.tanh(x) + 0.001 * time.to(x)[:, None, None, None]


def x0_like(count, dtype=torch.float32):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(9), dtype=dtype)


def test_objective_is_its_formula():
    """Everything written out once, with each part different from its default."""
    schedule, prediction = DiscreteVP(), Velocity()
    denoiser, x0 = Denoiser(Small(), schedule, prediction), x0_like(5)
    mask = torch.zeros(5, 1, 8, 12)
    mask[:, :, :, 6:] = 1
    objective = Objective(LogitNormal(), MinSNR(), Perturbed(0.3), Huber(0.2, "exponential"), masked=True)
    level = schedule.at(LogitNormal()(draws(5), schedule))
    noise, plain = Perturbed(0.3)(draws(5), SHAPE)
    alpha, sigma = level.alpha.view(5, 1, 1, 1), level.sigma.view(5, 1, 1, 1)
    x_t = alpha * x0 + sigma * noise
    error = Small()(x_t, level.t, None) - (alpha * plain - sigma * x0)
    c = (0.2 ** (level.t / 1000)).view(5, 1, 1, 1)
    pointwise = 2 * c * ((error**2 + c**2).sqrt() - c)
    pointwise[..., :3] = 0  # the half that the mask leaves out
    snr = (level.alpha / level.sigma) ** 2
    expected = snr.clamp(max=5) / (snr + 1) * pointwise.mean((1, 2, 3))
    actual = objective.loss(denoiser, x0, Conditioning(), draws(5), mask)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_plain_objective_is_the_validation_error_at_its_level():
    schedule = RectifiedFlow()
    denoiser, x0 = Denoiser(Small(), schedule, Flow()), x0_like(4)
    level = schedule.at(Uniform()(draws(4), schedule))
    expected = denoising_error(denoiser, x0, draws(4).normal(Purpose.NOISE, SHAPE), level, Conditioning())
    assert torch.equal(Objective(Uniform(), Unit()).loss(denoiser, x0, Conditioning(), draws(4)), expected)


def test_loss_of_a_sample_does_not_depend_on_its_batch():
    denoiser, x0 = Denoiser(Small(), DiscreteVP(), Epsilon()), x0_like(6)
    objective = Objective(Uniform(), Unit(), noise=Pyramid())
    whole = objective.loss(denoiser, x0, Conditioning(), draws(6))
    part = objective.loss(denoiser, x0[2:4], Conditioning(), draws(2, start=2))
    torch.testing.assert_close(whole[2:4], part)


def test_mask_counts_by_area():
    denoiser, x0 = Denoiser(Small(), RectifiedFlow(), Flow()), x0_like(3)
    masked = Objective(Uniform(), Unit(), masked=True)
    full = masked.loss(denoiser, x0, Conditioning(), draws(3), torch.ones(3, 1, 32, 48))
    torch.testing.assert_close(full, Objective(Uniform(), Unit()).loss(denoiser, x0, Conditioning(), draws(3)))
    mask = torch.full((3, 1, 32, 48), 0.25)
    mask[2] = 0
    quarter = masked.loss(denoiser, x0, Conditioning(), draws(3), mask)
    torch.testing.assert_close(quarter, full * torch.tensor([0.25, 0.25, 0.0]))
    # one pixel of 8 x 8 is a 64th of its latent, and of no other
    mask = torch.zeros(3, 1, 32, 48)
    mask[:, :, 0, 0] = 1
    corner = masked.loss(denoiser, x0, Conditioning(), draws(3), mask)
    assert (corner > 0).all() and (corner < full / 64).all()


class Field(torch.nn.Module):
    """A network that is one free number for each latent of each sample."""

    def __init__(self, count):
        super().__init__()
        self.values = torch.nn.Parameter(x0_like(count))

    def forward(self, x, time, cond):
        return self.values


@pytest.mark.parametrize("distance", [MSE(), Huber(), SmoothL1()])
def test_outside_of_a_mask_the_gradient_is_exactly_zero(distance):
    """A mask of 0 and 1 whose borders lie on latents; without the mask no gradient is zero."""
    inside = torch.rand(3, 1, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = inside.float().repeat_interleave(8, 2).repeat_interleave(8, 3)
    inside = inside.expand(3, *SHAPE)
    for masked in (True, False):
        field = Field(3)
        objective = Objective(Uniform(), Unit(), distance=distance, masked=masked)
        loss = objective.loss(Denoiser(field, RectifiedFlow(), Flow()), x0_like(3), Conditioning(), draws(3), mask)
        (gradient,) = torch.autograd.grad(loss.sum(), field.values)
        assert (gradient[inside] != 0).all()
        assert (gradient[~inside] == 0).all() if masked else (gradient[~inside] != 0).all()


@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_what_a_mask_leaves_out_counts_at_least_its_weight(weight):
    denoiser, x0 = Denoiser(Field(3), RectifiedFlow(), Flow()), x0_like(3)
    mask = torch.rand(3, 1, 8, 12, generator=torch.Generator().manual_seed(1)).round()
    objective = Objective(Uniform(), Unit(), masked=True, unmasked_weight=weight)
    level = RectifiedFlow().at(Uniform()(draws(3), RectifiedFlow()))
    noise = Plain()(draws(3), SHAPE)[0]
    area = mask.unflatten(2, (4, 2)).unflatten(4, (6, 2)).mean((3, 5))
    error = (denoiser.network.values - (noise - x0)).square()
    expected = (error * torch.maximum(area, torch.tensor(weight))).mean((1, 2, 3))
    torch.testing.assert_close(objective.loss(denoiser, x0, Conditioning(), draws(3), mask), expected)
    counts = objective.counts(mask, x0)
    torch.testing.assert_close(denoising_error(denoiser, x0, noise, level, Conditioning(), counts), expected)
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match="unmasked_weight"):
            Objective(Uniform(), Unit(), masked=True, unmasked_weight=wrong)
    with pytest.raises(ValueError, match="masked=true"):
        Objective(Uniform(), Unit(), unmasked_weight=0.5)


@pytest.mark.parametrize(
    "mask", [None, ["a.png"] * 3, torch.ones(3, 8, 8), torch.ones(2, 1, 8, 8), torch.ones(3, 3, 8, 8)]
)
def test_masked_loss_without_a_fitting_mask_is_refused(mask):
    objective = Objective(Uniform(), Unit(), masked=True)
    with pytest.raises(LdmError, match="mask") as caught:
        objective.loss(Denoiser(Small(), RectifiedFlow(), Flow()), x0_like(3), Conditioning(), draws(3), mask)
    assert caught.value.code == "MASK"


def test_flow_shift_of_the_objective_follows_the_latents():
    """Latents of four times the area are trained at twice the noise-to-picture ratio."""

    class Times(Small):
        def forward(self, x, time, cond):
            self.time = time
            return x

    schedule = RectifiedFlow(base_positions=4 * 6)
    ratios = []
    for size in ((4, 6), (8, 12)):
        network = Times()
        x0 = torch.zeros(16, 1, *size)
        Objective(Uniform(), Unit()).loss(Denoiser(network, schedule, Flow()), x0, Conditioning(), draws(16))
        ratios.append(network.time / (1000 - network.time))
    torch.testing.assert_close(ratios[1], 2 * ratios[0])


@pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_every_combination_trains(stride):
    """The whole product of what is not refused (or every 17th of it): finite loss and gradients in single precision."""
    weightings, times = (Unit(), SNR(), MinSNR(), SoftMinSNR(), P2(), EDM(1.0)), options("timesteps").values()
    product = list(itertools.product(pairs(), weightings, times))[::stride]
    noises, distances = itertools.cycle(options("noise").values()), itertools.cycle(options("loss").values())
    x0, counted = x0_like(4), 0
    for (schedule, prediction), weighting, timesteps in product:
        objective = Objective(timesteps, weighting, next(noises), next(distances))
        if not holds(objective.check, schedule, prediction):
            continue
        scale = torch.ones(1, requires_grad=True)
        loss = objective.loss(Denoiser(Small(), schedule, prediction), x0 * scale, Conditioning(), draws(4))
        loss.sum().backward()
        assert loss.shape == (4,) and loss.isfinite().all() and scale.grad.isfinite().all()
        counted += 1
    assert counted > 700 / stride


@pytest.mark.parametrize(
    "schedule,prediction,objective",
    [
        (DiscreteVP(), Epsilon(), Objective(Uniform(), MinSNR(), Offset(), Huber(), masked=True)),
        (CosineVP(), Velocity(), Objective(LogNormalSigma(), P2(), Pyramid(), SmoothL1(0.1, "exponential"))),
        (RectifiedFlow(3.0, 24), Flow(), Objective(LogitNormal(), EDM(), Perturbed(), MSE())),
        (VarianceExploding(), X0(), Objective(LogNormalSigma(), SoftMinSNR(), Plain(), Huber(0.1, "constant"))),
    ],
    ids=str,
)
def test_no_value_is_read_back_from_the_device(schedule, prediction, objective):
    """On the meta device there are no values: a branch on one, or a shape that depends on one, raises."""
    there = Draws(run_key(0), torch.arange(4, device="meta"))
    x0, mask = torch.empty(4, *SHAPE, device="meta"), torch.empty(4, 1, 8, 12, device="meta")
    assert objective.loss(Denoiser(Small(), schedule, prediction), x0, Conditioning(), there, mask).shape == (4,)


def test_reading_a_value_back_would_be_noticed():
    class Reading(Small):
        def forward(self, x, time, cond):
            return x if float(time.sum()) > 0 else -x

    there, x0 = Draws(run_key(0), torch.arange(4, device="meta")), torch.empty(4, *SHAPE, device="meta")
    with pytest.raises(Exception, match="meta"):
        Objective(Uniform(), Unit()).loss(Denoiser(Reading(), RectifiedFlow(), Flow()), x0, Conditioning(), there)


def test_check_names_both_sides():
    for objective, schedule, prediction in (
        (Objective(Uniform(), Unit()), RectifiedFlow(), Epsilon()),
        (Objective(Uniform(), SNR()), RectifiedFlow(), X0()),
    ):
        with pytest.raises(ValueError, match=f"{type(prediction).__name__}.*RectifiedFlow"):
            objective.check(schedule, prediction)
    Objective(Uniform(), SNR()).check(VarianceExploding(), X0())
    karras = VarianceExploding()
    with pytest.raises(ValueError, match=r"weighting\.sigma_data=1\.0, scheduler\.prediction\.sigma_data=0\.5"):
        Objective(LogNormalSigma(), EDM(1.0)).check(karras, Karras(0.5))
    Objective(LogNormalSigma(), EDM(1.0)).check(karras, Karras(1.0))
