"""Where samplers stop: published tables, falling noise on every schedule, and refusals by name."""

import itertools

import pytest
import torch

from ldm.diffusion.levels import SPACINGS, marginal_std, noise_ratio, sampling_levels
from ldm.diffusion.schedule import DiscreteVP, RectifiedFlow, VarianceExploding, ZeroTerminalSNR
from tests.diffusion.combinations import options

f64 = torch.float64
SCHEDULES = options("schedule")


def ratios(levels):
    return torch.stack([noise_ratio(level) for level in levels])


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_falls_strictly_and_values_are_float64_scalars_on_the_cpu(name):
    schedule = SCHEDULES[name]
    for spacing, steps, shift, strength in itertools.product(SPACINGS, (1, 2, 7, 50), (1.0, 3.0, 0.5), (1.0, 0.6)):
        if spacing == "leading" and schedule.num_timesteps is None:
            continue
        levels = sampling_levels(schedule, steps, spacing=spacing, shift=shift, strength=strength)
        assert len(levels) == max(1, round(steps * strength)) + 1
        ratio = ratios(levels)
        assert (ratio[1:] < ratio[:-1]).all() and ratio[-1] == 0
        for value in (levels[0].t, levels[0].alpha, levels[0].sigma):
            assert value.dtype == f64 and value.ndim == 0 and value.device.type == "cpu"
        if strength == 1 and spacing != "leading":
            assert abs(float(levels[0].t) - schedule.t_max) < 1e-6


def test_leading_steps_of_stable_diffusion():
    """DDIM of Stable Diffusion with 50 steps: 981, 961, ..., 1, ending at the first training level."""
    levels = sampling_levels(DiscreteVP(), 50, spacing="leading", offset=1, final="first")
    assert [int(level.t) for level in levels] == [*range(981, 0, -20), 0]
    assert float(levels[-1].sigma) > 0


def test_karras_levels_are_those_of_the_paper():
    """Equation 5 of arXiv:2206.00364 with its table 1: 18 steps from 80 to 0.002, rho 7."""
    levels = sampling_levels(VarianceExploding(0.002, 80.0), 18, spacing="karras")
    i = torch.arange(18, dtype=f64)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(ratios(levels)[:-1], expected, rtol=1e-12, atol=0)


def test_karras_and_exponential_of_stable_diffusion():
    """From 14.61 to 0.0292, the ends that k-diffusion finds in alphas_cumprod; every t lies between its neighbours."""
    for spacing, middle in (("karras", 1.274), ("exponential", 0.653)):
        levels = sampling_levels(DiscreteVP(), 11, spacing=spacing)
        ratio = ratios(levels)
        assert abs(float(ratio[0]) - 14.6146) < 1e-3 and abs(float(ratio[10]) - 0.0292) < 1e-4
        assert abs(float(ratio[5]) / middle - 1) < 0.01
        assert float(levels[0].t) == pytest.approx(999) and float(levels[10].t) == pytest.approx(0, abs=1e-9)
    steps = ratios(sampling_levels(DiscreteVP(), 11, spacing="exponential"))[:-1].log().diff()
    torch.testing.assert_close(steps, steps[:1].expand(10), rtol=1e-9, atol=0)


def test_rho_one_is_even_and_larger_rho_puts_more_steps_near_the_picture():
    even = ratios(sampling_levels(VarianceExploding(), 9, spacing="karras", rho=1.0))[:-1].diff()
    torch.testing.assert_close(even, even[:1].expand(8), rtol=1e-9, atol=0)
    low = [
        int((ratios(sampling_levels(VarianceExploding(), 20, spacing="karras", rho=r)) < 1).sum()) for r in (1, 3, 7)
    ]
    assert low[0] < low[1] < low[2]


def test_own_bounds_of_karras():
    levels = sampling_levels(DiscreteVP(), 10, spacing="karras", sigma_min=0.1, sigma_max=10.0)
    ratio = ratios(levels)
    assert abs(float(ratio[0]) - 10) < 1e-9 and abs(float(ratio[9]) - 0.1) < 1e-9


@pytest.mark.parametrize("schedule", [RectifiedFlow(), ZeroTerminalSNR(DiscreteVP())], ids=["flow", "zero snr"])
def test_unbounded_schedules_begin_at_pure_noise_and_go_on_at_80(schedule):
    for spacing in ("karras", "exponential"):
        levels = sampling_levels(schedule, 10, spacing=spacing)
        assert float(levels[0].alpha) == 0
        assert abs(float(noise_ratio(levels[1])) - 80) < 1e-6
    own = sampling_levels(schedule, 10, spacing="karras", sigma_max=20.0)
    assert abs(float(noise_ratio(own[0])) - 20) < 1e-9


@pytest.mark.parametrize("spacing", ["trailing", "karras"])
def test_shift_is_that_of_the_flow_paper(spacing):
    """Esser et al. 2024, equation 23: sigma' = shift sigma / (1 + (shift - 1) sigma)."""
    plain = sampling_levels(RectifiedFlow(), 12, spacing=spacing)
    shifted = sampling_levels(RectifiedFlow(), 12, spacing=spacing, shift=3.0)
    for a, b in zip(plain, shifted, strict=True):
        torch.testing.assert_close(b.sigma, 3 * a.sigma / (1 + 2 * a.sigma), rtol=1e-12, atol=1e-12)


def test_a_trained_shift_and_a_sampling_shift_multiply():
    trained = sampling_levels(RectifiedFlow(shift=2.0), 8, shift=1.5)
    at_once = sampling_levels(RectifiedFlow(shift=3.0), 8)
    torch.testing.assert_close([lv.sigma for lv in trained], [lv.sigma for lv in at_once], rtol=1e-12, atol=1e-12)


def test_shift_on_vp_keeps_both_ends_and_multiplies_sigma_over_alpha_between():
    plain = ratios(sampling_levels(DiscreteVP(), 20, spacing="uniform"))
    shifted = ratios(sampling_levels(DiscreteVP(), 20, spacing="uniform", shift=2.0))
    torch.testing.assert_close(shifted[[0, -2]], plain[[0, -2]], rtol=1e-6, atol=0)
    assert abs(float(shifted[14] / plain[14]) - 2) < 0.15  # sigma / alpha 0.4 there, far from both ends


def test_strength_keeps_the_tail():
    for spacing in ("trailing", "karras"):
        whole = sampling_levels(RectifiedFlow(), 20, spacing=spacing)
        part = sampling_levels(RectifiedFlow(), 20, spacing=spacing, strength=0.25)
        assert [float(level.t) for level in part] == [float(level.t) for level in whole[15:]]


def test_the_first_noise_has_the_deviation_of_standardised_data():
    assert float(marginal_std(sampling_levels(DiscreteVP(), 5)[0])) == pytest.approx(1.0)
    assert float(marginal_std(sampling_levels(RectifiedFlow(), 5)[0])) == 1.0
    assert float(marginal_std(sampling_levels(VarianceExploding(), 5)[0])) == pytest.approx((1 + 80**2) ** 0.5)


@pytest.mark.parametrize(
    "words,schedule,bad",
    [
        ("steps", DiscreteVP(), {"num_steps": 0}),
        ("strength", DiscreteVP(), {"strength": 0.0}),
        ("spacing", DiscreteVP(), {"spacing": "karass"}),
        ("final", DiscreteVP(), {"final": "dirty"}),
        ("at most 1000 .*leading", DiscreteVP(), {"num_steps": 1001, "spacing": "leading"}),
        ("at most 1000 .*trailing", DiscreteVP(), {"num_steps": 1001}),
        ("discrete", RectifiedFlow(), {"spacing": "leading"}),
        ("offset=1 belongs to spacing=leading", DiscreteVP(), {"offset": 1}),
        ("offset must be within 0 and 249", DiscreteVP(), {"spacing": "leading", "offset": 300}),
        ("offset must be within", DiscreteVP(), {"spacing": "leading", "offset": -1}),
        ("rho", DiscreteVP(), {"spacing": "karras", "rho": 0.0}),
        ("shift", DiscreteVP(), {"shift": -1.0}),
        ("sigma_min and sigma_max belong", DiscreteVP(), {"sigma_max": 3.0}),
        (r"0\.02917 <= sigma_min < sigma_max <= 14\.61", DiscreteVP(), {"spacing": "karras", "sigma_max": 80.0}),
        ("sigma_min", DiscreteVP(), {"spacing": "exponential", "sigma_min": 0.001}),
        ("sigma_min", RectifiedFlow(), {"spacing": "karras", "sigma_min": 0.0}),
        ("sigma_min", RectifiedFlow(), {"spacing": "karras", "sigma_min": 5.0, "sigma_max": 2.0}),
        ("same noise.*final=clean", DiscreteVP(), {"spacing": "uniform", "final": "first"}),
        ("same noise.*final=clean", DiscreteVP(), {"spacing": "leading", "final": "first"}),
        ("same noise.*final=clean", DiscreteVP(), {"spacing": "karras", "final": "first"}),
    ],
)
def test_bad_levels_are_named(words, schedule, bad):
    with pytest.raises(ValueError, match=words):
        sampling_levels(schedule, **{"num_steps": 4, **bad})
