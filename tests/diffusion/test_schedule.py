"""Schedules against their formulas, against diffusers, and against their own inverse."""

import itertools
import math

import pytest
import torch

from ldm.diffusion.levels import is_variance_preserving, sampling_levels
from ldm.diffusion.schedule import (
    CosineVP,
    DiscreteVP,
    DiscretizedVP,
    LinearVP,
    RectifiedFlow,
    SigmoidVP,
    VarianceExploding,
    ZeroTerminalSNR,
    for_size,
)
from tests.diffusion.combinations import options

f64 = torch.float64
DDPM = DiscreteVP("linear", 1e-4, 0.02)
SCHEDULES = [
    *options("schedule").values(),
    DiscreteVP("sigmoid", 1e-4, 0.02),
    DiscretizedVP(LinearVP()),
    SigmoidVP(tau=0.3),
    SigmoidVP(start=0.0, tau=0.7),
    ZeroTerminalSNR(LinearVP()),
    ZeroTerminalSNR(DiscretizedVP()),
    VarianceExploding(0.01, 50.0),
]
VP = [s for s in SCHEDULES if not isinstance(s, RectifiedFlow | VarianceExploding)]

# betas and alphas_cumprod of diffusers 0.42's DDPMScheduler (float32) at the steps below
STEPS = [0, 1, 250, 500, 750, 998, 999]
FROZEN = {
    "linear": (
        DDPM,
        {"beta_schedule": "linear"},
        [9.99999975e-05, 0.000119919918, 0.00507998001, 0.0100599593, 0.0150399394, 0.0199800804, 0.0199999996],
        [0.999899983, 0.999780059, 0.521422982, 0.0777966529, 0.00330015854, 4.11819419e-05, 4.03583035e-05],
    ),
    "scaled_linear": (
        DiscreteVP(),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        [0.000849999953, 0.000854698592, 0.00242776098, 0.00481495354, 0.00801157858, 0.0119823748, 0.0119999992],
        [0.999149978, 0.998296022, 0.673792303, 0.276332468, 0.0561698042, 0.00471669575, 0.00466009509],
    ),
    "squaredcos_cap_v2": (
        DiscretizedVP(),
        {"beta_schedule": "squaredcos_cap_v2"},
        [4.12842237e-05, 4.61417512e-05, 0.00132722396, 0.00315569155, 0.00757912267, 0.749999404, 0.999000013],
        [0.999958694, 0.99991256, 0.845888019, 0.492285043, 0.143178657, 2.42876627e-06, 2.42873499e-09],
    ),
    "sigmoid": (
        DiscreteVP("sigmoid", 1e-4, 0.02),
        {"beta_schedule": "sigmoid"},
        [0.000149205196, 0.000149798318, 0.00104647828, 0.0100798784, 0.0190642904, 0.0199501999, 0.0199507959],
        [0.99985081, 0.999701023, 0.90279901, 0.298887581, 0.00562291965, 4.04896236e-05, 3.96818214e-05],
    ),
    "scaled_linear_zero_snr": (
        ZeroTerminalSNR(DiscreteVP()),
        {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "rescale_betas_zero_snr": True,
        },
        [0.000850021839, 0.000917255878, 0.00264769793, 0.00553047657, 0.0112257004, 0.751131773, 1.0],
        [0.999149978, 0.998233497, 0.65245676, 0.241018638, 0.03279908, 1.96796336e-07, 0.0],
    ),
    "linear_zero_snr": (
        ZeroTerminalSNR(DDPM),
        {"beta_schedule": "linear", "rescale_betas_zero_snr": True},
        [0.000100016594, 0.000120639801, 0.00512486696, 0.0102925897, 0.0168861747, 0.75226593, 1.0],
        [0.999899983, 0.999779344, 0.518860519, 0.0752462, 0.00264410605, 4.21327329e-09, 0.0],
    ),
}


def over_time(schedule, points=1234):
    t = torch.linspace(0, schedule.t_max, points, dtype=f64)
    return t, schedule.at(t)


def tables(schedule):
    """betas and alphas_cumprod of a schedule of steps."""
    alphas_cumprod = schedule.at(torch.arange(schedule.num_timesteps, dtype=f64)).alpha ** 2
    before = torch.cat([torch.ones(1, dtype=f64), alphas_cumprod[:-1]])
    return 1 - alphas_cumprod / before, alphas_cumprod


def assert_like_float32(schedule, betas, alphas_cumprod, steps):
    """The reference computes in float32. Where its zero-SNR tables are a difference of nearly equal square roots the
    quotients in beta lose digits (measured: 1.3e-6 at step 973, 3e-6 at 987), so there alpha alone is compared.
    """
    ours = [table[steps] for table in tables(schedule)]
    exact = alphas_cumprod > (1e-3 if alphas_cumprod[-1] == 0 else 0)
    torch.testing.assert_close(ours[0][exact], betas[exact], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours[1].sqrt(), alphas_cumprod.sqrt(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FROZEN)
def test_tables_are_those_of_diffusers_frozen(name):
    schedule, _, *tables_ = FROZEN[name]
    assert_like_float32(schedule, *(torch.tensor(table, dtype=f64) for table in tables_), STEPS)


@pytest.mark.parametrize("name", FROZEN)
def test_tables_are_those_of_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    schedule, options_, *_ = FROZEN[name]
    reference = diffusers.DDPMScheduler(**options_)
    assert_like_float32(schedule, reference.betas.double(), reference.alphas_cumprod.double(), range(1000))


def test_another_schedule_would_be_noticed():
    with pytest.raises(AssertionError):
        assert_like_float32(DDPM, *(torch.tensor(t, dtype=f64) for t in FROZEN["sigmoid"][2:]), STEPS)


def test_stable_diffusion_values():
    """alphas_cumprod of Stable Diffusion 1.5 by its definition, at both ends and in the middle."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=f64) ** 2
    expected = torch.cumprod(1 - betas, 0)
    level = DiscreteVP().at(torch.arange(1000, dtype=f64))
    torch.testing.assert_close(level.alpha**2, expected, rtol=1e-12, atol=0)
    assert abs(float(level.alpha[-1] ** 2) - 0.00466) < 1e-5  # the known remainder of the picture at t = 999


def test_between_the_steps_the_table_is_continued_smoothly():
    level = DiscreteVP().at(torch.tensor([500.0, 500.5, 501.0], dtype=f64))
    log_alpha = level.alpha.log()
    torch.testing.assert_close(log_alpha[1], (log_alpha[0] + log_alpha[2]) / 2)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_noise_grows_with_time_and_the_ends_are_finite(schedule):
    level = over_time(schedule)[1]
    share = level.sigma / (level.alpha + level.sigma)
    assert (share.diff() > 0).all() and share.isfinite().all()
    assert share[0] < 0.03 and share[-1] > 0.93


@pytest.mark.parametrize("schedule", VP, ids=str)
def test_vp_schedules_preserve_variance(schedule):
    level = over_time(schedule)[1]
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones_like(level.t), rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_t_at_inverts_at(schedule):
    t, level = over_time(schedule)
    torch.testing.assert_close(schedule.t_at(level.sigma / level.alpha), t, rtol=0, atol=1e-9)
    single = schedule.t_at((level.sigma / level.alpha).float())
    assert single.dtype == f64  # a ratio of single precision still gives a time of double
    edges = schedule.t_at(torch.tensor([0.0, 1e-9, 1e9, math.inf], dtype=f64))
    assert (edges >= 0).all() and (edges <= schedule.t_max).all()
    assert abs(float(edges[0])) < 1e-9 and abs(float(edges[-1]) - schedule.t_max) < 1e-9


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_levels_have_the_dtype_of_time(schedule):
    t = torch.tensor([0.0, 0.3, 1.0]) * schedule.t_max
    single, double = schedule.at(t), schedule.at(t.double())
    assert single.alpha.dtype == single.sigma.dtype == torch.float32
    assert double.alpha.dtype == double.sigma.dtype == f64
    for a, b in ((single.alpha, double.alpha), (single.sigma, double.sigma)):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_unit_interval_covers_the_schedule(schedule):
    t = schedule.from_unit(torch.linspace(0, 1 - 2.0**-24, 5001, dtype=f64))
    assert t[0] == 0 and abs(float(t[-1]) - schedule.t_max) < 1e-3 and (t.diff() >= 0).all()
    if schedule.num_timesteps is not None:
        assert torch.equal(t, t.round()) and len(t.unique()) == schedule.num_timesteps


def test_continuous_schedules_are_their_papers_formulas():
    s = torch.linspace(0.001, 0.999, 500, dtype=f64)
    cosine = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(CosineVP().at(1000 * s).alpha ** 2, cosine, rtol=1e-10, atol=0)
    for start, end, tau in ((-3.0, 3.0, 1.0), (0.0, 3.0, 0.7)):
        low, high = (torch.sigmoid(torch.tensor(v / tau, dtype=f64)) for v in (start, end))
        sigmoid = (high - torch.sigmoid((s * (end - start) + start) / tau)) / (high - low)
        torch.testing.assert_close(SigmoidVP(start, end, tau).at(1000 * s).alpha ** 2, sigmoid, rtol=1e-10, atol=0)
    log_alpha = -0.25 * s**2 * (20.0 - 0.1) - 0.5 * s * 0.1  # Song et al., equation 33
    torch.testing.assert_close(LinearVP().at(1000 * s).alpha, log_alpha.exp(), rtol=1e-12, atol=0)


def test_steps_of_a_curve_lie_on_it_until_beta_is_clipped():
    for curve in (LinearVP(), CosineVP(), SigmoidVP()):
        k = torch.arange(990, dtype=f64)
        torch.testing.assert_close(DiscretizedVP(curve).at(k).alpha, curve.at(k + 1).alpha, rtol=1e-9, atol=0)
    assert float(DiscretizedVP(CosineVP()).at(torch.tensor(999.0, dtype=f64)).alpha) > 0


def test_thousand_linear_steps_approach_their_limit():
    k = torch.arange(0, 1000, 37, dtype=f64)
    difference = DDPM.at(k).alpha - LinearVP().at(k + 1).alpha
    assert 1e-5 < difference.abs().max() < 2e-3  # the steps' own coarseness: beta / 2 at the most


@pytest.mark.parametrize("schedule", VP, ids=str)
def test_zero_terminal_snr_of_any_vp_schedule(schedule):
    """Algorithm 1 on alpha, and exactly nothing of the picture at the end, in both precisions."""
    rescaled = ZeroTerminalSNR(schedule)
    t, level = over_time(schedule)
    first, last = level.alpha[0], level.alpha[-1]
    expected = (level.alpha - last) * first / (first - last)
    torch.testing.assert_close(rescaled.at(t).alpha, expected, rtol=1e-12, atol=1e-15)
    for dtype in (torch.float32, f64):
        end = rescaled.at(torch.tensor(schedule.t_max, dtype=dtype))
        assert float(end.alpha) == 0.0 and float(end.sigma) == 1.0


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VarianceExploding()], ids=str)
def test_zero_terminal_snr_of_another_schedule_is_refused(schedule):
    with pytest.raises(ValueError, match=type(schedule).__name__):
        ZeroTerminalSNR(schedule)


def test_variance_exploding_runs_evenly_in_log_sigma():
    t = torch.tensor([0.0, 500.0, 1000.0], dtype=f64)
    expected = torch.tensor([0.002, (0.002 * 80) ** 0.5, 80.0], dtype=f64)
    torch.testing.assert_close(VarianceExploding().at(t).sigma, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_shifted_flow_begins_at_pure_noise_exactly(dtype):
    """An alpha of 1e-16 instead of 0 is a number to divide by, and one of -1e-16 turns the levels round."""
    of_sizes = [(h * w / 1024) ** 0.5 for h in range(8, 128, 12) for w in (8, 28, 60)]
    for shift in [n / 10 for n in range(1, 100)] + of_sizes:
        level = RectifiedFlow(shift=shift).at(RectifiedFlow(shift=shift).from_unit(torch.ones(1, dtype=dtype)))
        assert (float(level.alpha), float(level.sigma), float(level.t)) == (0.0, 1.0, 1000.0), shift


def test_flow_shift_follows_the_size_of_the_latents():
    """Equation 23 of Esser et al.: the same time at m positions instead of n has sqrt(m / n) the noise-to-picture
    ratio."""
    base = RectifiedFlow(shift=1.5, base_positions=32 * 32)
    large = for_size(base, (2, 16, 64, 128))
    u = torch.linspace(0.1, 0.9, 9, dtype=f64)
    levels = [schedule.at(schedule.from_unit(u)) for schedule in (base, large)]
    ratios = [level.sigma / level.alpha for level in levels]
    torch.testing.assert_close(ratios[1], ratios[0] * math.sqrt(64 * 128 / (32 * 32)))
    assert for_size(base, (16, 32, 32)) == base
    assert for_size(large, (16, 64, 128)) == large
    for schedule in (RectifiedFlow(3.0), DiscreteVP()):
        assert for_size(schedule, (16, 64, 128)) is schedule


@pytest.mark.parametrize(
    "words,make",
    [
        ("betas", lambda: DiscreteVP(betas="cosine")),
        ("beta_start", lambda: DiscreteVP(beta_start=0.0)),
        ("max_beta", lambda: DiscretizedVP(max_beta=1.0)),
        ("curve", lambda: DiscretizedVP(RectifiedFlow())),
        ("beta_min", lambda: LinearVP(beta_min=0.0)),
        ("offset", lambda: CosineVP(offset=-0.1)),
        ("tau", lambda: SigmoidVP(tau=0.0)),
        ("sigma_min", lambda: VarianceExploding(sigma_min=0.0)),
        ("shift", lambda: RectifiedFlow(shift=0.0)),
        ("shift", lambda: RectifiedFlow(shift=math.inf)),
        ("base_positions must be a whole number", lambda: RectifiedFlow(base_positions=1.5)),
        ("num_timesteps must be a whole number", lambda: DiscreteVP(num_timesteps=2.5)),
        ("base_positions", lambda: RectifiedFlow(base_positions=0)),
    ],
)
def test_bad_values_are_named(words, make):
    with pytest.raises(ValueError, match=words):
        make()


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


def test_only_vp_preserves_variance():
    assert is_variance_preserving(sampling_levels(DiscreteVP(), 5))
    assert not is_variance_preserving(sampling_levels(RectifiedFlow(), 5))
