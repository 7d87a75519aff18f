"""Every sampler of configs/sampler: its contract on every schedule, its order, its mean and variance.

A sampler is found by its YAML; nothing here names one that needs no exception. The data are Gaussian, where the ideal
denoiser and the exact solution are known in closed form: x0 ~ N(mu, s^2) gives
E[x0 | x_t] = mu + alpha s^2 / (alpha^2 s^2 + sigma^2) (x_t - alpha mu), and the probability-flow ODE carries
x_t = alpha mu + sqrt(alpha^2 s^2 + sigma^2) z along constant z.
"""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from ldm.diffusion.levels import SPACINGS, marginal_std, sampling_levels
from ldm.diffusion.samplers.ddim import sample_ddim
from ldm.diffusion.samplers.ddpm import sample_ddpm
from ldm.diffusion.samplers.dpmpp import sample_dpmpp_2m, sample_dpmpp_2m_sde
from ldm.diffusion.samplers.edm import sample_edm
from ldm.diffusion.samplers.euler import sample_euler
from ldm.diffusion.samplers.heun import sample_heun
from ldm.diffusion.samplers.unipc import sample_unipc
from ldm.diffusion.schedule import CosineVP, DiscreteVP, RectifiedFlow, VarianceExploding
from ldm.errors import LdmError
from ldm.random import Draws
from ldm.sampling.tasks import step_noise
from tests.conftest import CONFIGS
from tests.diffusion import sampler_table
from tests.diffusion.combinations import options
from tests.diffusion.sampler_table import counts, samplers_in

MU, S = 0.7, 0.5
f64 = torch.float64
SAMPLERS = samplers_in(CONFIGS / "sampler")
SCHEDULES = {**options("schedule"), "flow of shift 3": RectifiedFlow(shift=3.0)}
DRAWS_NOISE = {name: counts(sampling, 10)[1] > 0 for name, sampling in SAMPLERS.items()}


def ideal(x, level):
    gain = level.alpha * S**2 / (level.alpha**2 * S**2 + level.sigma**2)
    return MU + gain * (x - level.alpha * MU)


def consistent(x, level):
    """Where the ODE ends: what a consistency model knows."""
    return MU + S * (x - level.alpha * MU) / torch.sqrt(level.alpha**2 * S**2 + level.sigma**2)


def marginal(level, z):
    return level.alpha * MU + torch.sqrt(level.alpha**2 * S**2 + level.sigma**2) * z


def noise_for(count):
    """Noise as sampling draws it, from the pictures' own keys."""
    noise = step_noise(Draws(5, torch.arange(count)))
    return lambda step, shape: noise(step, shape).double()


# ---- the contract: works, or refuses before the first network call --------------------------------------------------


def works_or_refuses(sampling, schedule):
    """On every spacing: a network that knows x0 is led to x0, or the sampler says no before it is asked anything."""
    truth = torch.linspace(-1.5, 1.5, 8, dtype=f64).view(2, 1, 2, 2)
    start = torch.linspace(2.0, -1.0, 8, dtype=f64).view(2, 1, 2, 2)
    calls = []

    def knowing(x, level):
        calls.append(level)
        return truth

    def noise(step, shape):
        return torch.full(shape, math.cos(step), dtype=f64)

    for spacing, (steps, strength) in itertools.product(SPACINGS, ((1, 1.0), (6, 1.0), (6, 0.5))):
        settings = replace(sampling, spacing=spacing, steps=steps)
        calls.clear()
        try:
            levels = settings.levels(schedule, strength)
        except LdmError as error:
            assert f"'{spacing}'" in str(error) and schedule.num_timesteps is None
            continue
        x = levels[0].alpha * truth + levels[0].sigma * start
        try:
            end = sampling.function(knowing, x, levels, noise=noise)
        except ValueError as error:
            assert not calls, "refused after the first network call"
            with pytest.raises(LdmError) as refusal:
                settings.check(schedule, strength)
            for words in (sampling.name, str(schedule), str(error)):
                assert words in str(refusal.value)
            continue
        settings.check(schedule, strength)
        assert float((end - truth).abs().max()) < 1e-9, f"{spacing}, {steps} steps: does not end at x0"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_pair_works_or_is_refused(name, schedule):
    works_or_refuses(SAMPLERS[name], SCHEDULES[schedule])


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_is_announced_and_dtype_stays(name):
    schedule = next(s for s in SCHEDULES.values() if sampler_table.fits(SAMPLERS[name], s))
    levels = sampling_levels(schedule, 6)
    seen = []
    x = torch.linspace(-1, 1, 8).view(2, 1, 2, 2)
    end = SAMPLERS[name].function(
        ideal, x, levels, noise=noise_for(2), on_step=lambda step, x, x0: seen.append((step, x.dtype, x0.shape))
    )
    assert seen == [(i, torch.float32, x.shape) for i in range(6)]
    assert end.dtype == torch.float32


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_reads_a_value_of_the_latents(name):
    """Tensors on "meta" have no values: reading one, which on a GPU would wait for it, raises."""
    schedule = next(s for s in SCHEDULES.values() if sampler_table.fits(SAMPLERS[name], s))
    levels = sampling_levels(schedule, 4)
    x = torch.empty(2, 1, 2, 2, device="meta")
    end = SAMPLERS[name].function(ideal, x, levels, noise=lambda step, shape: torch.empty(*shape, device="meta"))
    assert end.device.type == "meta" and end.dtype == torch.float32


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_depends_on_its_own_noise_alone(name):
    schedule = next(s for s in SCHEDULES.values() if sampler_table.fits(SAMPLERS[name], s))
    levels = sampling_levels(schedule, 6)
    x = torch.linspace(-2, 2, 12, dtype=f64).view(3, 1, 2, 2)
    together = SAMPLERS[name].function(ideal, x, levels, noise=noise_for(3))
    alone = SAMPLERS[name].function(ideal, x[:1], levels, noise=noise_for(1))
    assert torch.equal(together[:1], alone)


@pytest.mark.parametrize("name", [name for name, draws in DRAWS_NOISE.items() if draws])
def test_stochastic_samplers_ask_for_noise_before_they_begin(name):
    schedule = next(s for s in SCHEDULES.values() if sampler_table.fits(SAMPLERS[name], s))
    with pytest.raises(ValueError, match="noise"):
        SAMPLERS[name].function(pytest.fail, torch.zeros(1, 1, 1, 1), sampling_levels(schedule, 2))


@pytest.mark.parametrize(
    "words,sampler",
    [
        ("eta", partial(sample_ddim, eta=1.5)),
        ("eta", partial(sample_dpmpp_2m_sde, eta=-1.0)),
        ("variance", partial(sample_ddpm, variance="huge")),
        ("order", partial(sample_unipc, order=4)),
        ("variant", partial(sample_unipc, variant="bh3")),
        ("s_churn", partial(sample_edm, s_churn=-1.0)),
        ("s_tmax", partial(sample_edm, s_tmin=2.0, s_tmax=1.0)),
    ],
)
def test_bad_options_are_refused_at_composition(words, sampler):
    with pytest.raises(LdmError, match=words):
        replace(SAMPLERS["euler"], function=sampler).check(VarianceExploding())


def test_a_formula_that_breaks_at_pure_noise_is_refused_by_the_rehearsal():
    def sample_needs_alpha(denoise, x, levels, *, noise=None, on_step=None):
        for now, then in itertools.pairwise(levels):
            x = then.alpha * (x / now.alpha) - (then.alpha * now.sigma / now.alpha - then.sigma) * denoise(x, now)
        return x

    settings = replace(SAMPLERS["euler"], function=sample_needs_alpha)
    settings.check(DiscreteVP())
    with pytest.raises(LdmError, match=r"needs_alpha .* RectifiedFlow.*not finite"):
        settings.check(RectifiedFlow())


NEW_SAMPLER = """
from itertools import pairwise

def sample_mine(denoise, x, levels, *, noise=None, on_step=lambda *_: None, factor=1.0):
    for step, (now, then) in enumerate(pairwise(levels)):
        x0 = denoise(x, now)
        x = then.alpha * x0 + factor * then.sigma / now.sigma * (x - now.alpha * x0)
        on_step(step, x, x0)
    return x
"""


def test_one_file_and_one_yaml_add_a_sampler_and_these_tests_find_its_faults(tmp_path, monkeypatch):
    (tmp_path / "my_sampler.py").write_text(NEW_SAMPLER)
    for name, factor in (("mine", 1.0), ("wrong", 1.1)):
        text = (CONFIGS / "sampler" / "euler.yaml").read_text()
        text = text.replace("ldm.diffusion.samplers.euler.sample_euler", "my_sampler.sample_mine")
        text = text.replace("_partial_: true", f"_partial_: true\n  factor: {factor}")
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = samplers_in(tmp_path, trusted=("my_sampler",))
    assert set(found) == {"mine", "wrong"}
    works_or_refuses(found["mine"], RectifiedFlow())
    assert abs(order_of(found["mine"].function, CosineVP()) - 1) < 0.1
    assert order_of(found["wrong"].function, CosineVP()) < 0.9
    found["wrong"] = replace(found["wrong"], function=lambda *a, **k: 1.01 * found["mine"].function(*a, **k))
    with pytest.raises(AssertionError, match="does not end at x0"):
        works_or_refuses(found["wrong"], RectifiedFlow())


# ---- order of convergence ------------------------------------------------------------------------------------------

THEORY = {  # by name; a new deterministic sampler is held to at least 1
    "euler": 1,
    "ddim": 1,
    "euler_ancestral eta 0": 1,
    "heun": 2,
    "edm without churn": 2,
    "dpmpp_2m": 2,
    "dpmpp_2m_sde eta 0": 2,
    "plms": 2,
    "unipc": 3,
    "unipc order 1": 2,
    "unipc bh1": 3,
    "unipc order 3": 4,
}
DETERMINISTIC = {
    **{name: sampling.function for name, sampling in SAMPLERS.items() if not DRAWS_NOISE[name]},
    "euler_ancestral eta 0": partial(SAMPLERS["euler_ancestral"].function, eta=0.0),
    "edm without churn": partial(sample_edm, s_churn=0.0),
    "dpmpp_2m_sde eta 0": partial(sample_dpmpp_2m_sde, eta=0.0),
    "unipc order 1": partial(sample_unipc, order=1),
    "unipc bh1": partial(sample_unipc, variant="bh1"),
    "unipc order 3": partial(sample_unipc, order=3),
}
SMOOTH = {  # the discrete table is interpolated and has kinks
    "vp": CosineVP(),
    "ve": VarianceExploding(),
    "flow": RectifiedFlow(),
}


def interior(schedule, steps):
    """Levels evenly spaced in time on the inside of the range, where the orders of the solvers hold."""
    times = torch.linspace(0.98, 0.02, steps + 1, dtype=f64) * schedule.t_max
    return [schedule.at(t) for t in times]


def order_of(sampler, schedule, steps=320):
    """log2 of the error's fall when the number of steps is doubled."""
    z = torch.linspace(-2, 2, 9, dtype=f64).view(1, 1, 3, 3)
    errors = []
    for count in (steps, 2 * steps):
        levels = interior(schedule, count)
        end = sampler(ideal, marginal(levels[0], z), levels)
        errors.append(float((end - marginal(levels[-1], z)).abs().max()))
    return math.log2(errors[0] / errors[1])


def pairs_of(samplers, schedules):
    """Every name of a sampler with every name of a schedule, but for what is refused."""
    pairs = itertools.product(samplers, schedules)
    return [(name, key) for name, key in pairs if not name.startswith("edm") or key in ("ve", "edm")]


@pytest.mark.parametrize("name,schedule", pairs_of(DETERMINISTIC, SMOOTH))
def test_order_of_convergence(name, schedule):
    theory = THEORY.get(name)
    measured = order_of(DETERMINISTIC[name], SMOOTH[schedule], steps=480 if theory == 4 else 320)
    assert measured > 0.9 if theory is None else abs(measured - theory) < 0.1, measured


def test_a_solver_of_another_order_would_be_noticed():
    assert abs(order_of(sample_euler, RectifiedFlow()) - 2) > 0.9
    assert abs(order_of(partial(sample_unipc, order=2), RectifiedFlow()) - 4) > 0.9


@pytest.mark.parametrize("schedule", ["sd", "sd_zero_snr", "cosine_continuous", "edm", "flow"])
@pytest.mark.parametrize("name", [name for name, draws in DRAWS_NOISE.items() if not draws])
def test_full_range_reaches_the_data(name, schedule):
    """From pure noise to clean, alpha = 0 and sigma = 0 included: close to the exact end."""
    levels = sampling_levels(SCHEDULES[schedule], 200)
    z = torch.linspace(-2, 2, 9, dtype=f64).view(1, 1, 3, 3)
    end = SAMPLERS[name].function(ideal, marginal(levels[0], z), levels)
    assert float((end - (MU + S * z)).abs().max()) < 0.05  # the first-order solvers' error at 200 steps


# ---- mean and variance of the stochastic ones ----------------------------------------------------------------------

STOCHASTIC = {
    **{name: sampling.function for name, sampling in SAMPLERS.items() if DRAWS_NOISE[name]},
    "ddim eta 1": partial(sample_ddim, eta=1.0),
    "dpmpp_2m_sde eta 0.5": partial(sample_dpmpp_2m_sde, eta=0.5),
    "edm everywhere": partial(sample_edm, s_tmin=0.0, s_tmax=None, s_noise=1.0),
}
FEW = {"dpmpp_2m_sde": 200, "dpmpp_2m_sde eta 0.5": 200, "edm": 200, "edm everywhere": 200, "lcm": 8}
# first-order samplers are 3 % short of the deviation at 100 steps, and on sd_zero_snr 1 % at its own 1000
STEPS = 1200


def moments(sampler, schedule, steps, network=ideal):
    """Exact mean and variance of the result: for Gaussian data it is linear in the start and in every draw.

    Row 0 starts one deviation up, row i + 1 has noise 1 at step i only, the last row has neither.
    """
    levels = sampling_levels(schedule, steps, spacing="trailing" if steps <= 1000 else "uniform")

    def noise(step, shape):
        z = torch.zeros(shape, dtype=f64)
        z[step + 1] = 1.0
        return z

    z = torch.zeros(steps + 2, 1, 1, 1, dtype=f64)
    z[0] = 1.0
    end = sampler(network, marginal(levels[0], z), levels, noise=noise).flatten()
    return float(end[-1]), float((end[:-1] - end[-1]).square().sum())


@pytest.mark.parametrize("name,schedule", pairs_of(STOCHASTIC, ["sd", "sd_zero_snr", "edm", "flow"]))
def test_mean_and_variance_are_those_of_the_data(name, schedule):
    network = consistent if name == "lcm" else ideal
    mean, variance = moments(STOCHASTIC[name], SCHEDULES[schedule], FEW.get(name, STEPS), network)
    assert abs(mean / MU - 1) < 0.02 and abs(variance / S**2 - 1) < 0.02, (mean, variance)


def test_too_much_noise_would_be_noticed():
    _, variance = moments(partial(sample_edm, s_tmin=0.0, s_tmax=None, s_noise=1.05), VarianceExploding(), 200)
    assert variance / S**2 > 1.02


# ---- one body of code, many names ----------------------------------------------------------------------------------


def test_equal_samplers_are_equal():
    """Relations between names that the papers state, to rounding."""
    x = torch.linspace(-2, 2, 8, dtype=f64).view(2, 1, 2, 2)
    noise = noise_for(2)
    for schedule in (DiscreteVP(), VarianceExploding(), RectifiedFlow()):
        levels = sampling_levels(schedule, 12)
        pairs = [
            (sample_euler, sample_ddim),
            (sample_ddpm, partial(sample_ddim, eta=1.0)),
            (sample_ddpm, SAMPLERS["euler_ancestral"].function),
            (sample_dpmpp_2m, partial(sample_dpmpp_2m_sde, eta=0.0)),
        ]
        if isinstance(schedule, VarianceExploding):
            pairs.append((sample_heun, partial(sample_edm, s_churn=0.0)))
        for one, other in pairs:
            a, b = (f(ideal, x * marginal_std(levels[0]), levels, noise=noise) for f in (one, other))
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_edm_is_algorithm_2():
    """Karras et al. 2022, arXiv:2206.00364, algorithm 2, line by line, on one number."""
    s_churn, s_tmin, s_tmax, s_noise = 9.0, 0.05, 20.0, 1.003
    levels = sampling_levels(VarianceExploding(), 12, spacing="karras")
    t = [float(level.sigma) for level in levels]
    count = len(t) - 1

    def network(x, sigma):
        return math.tanh(x / (1 + sigma)) + 0.1 * sigma / (1 + sigma)

    x = 31.0
    for i in range(count):
        gamma = min(s_churn / count, math.sqrt(2) - 1) if s_tmin <= t[i] <= s_tmax else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * s_noise * math.cos(i)
        d = (x_hat - network(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_next = (x - network(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_next / 2)
    ours = sample_edm(
        lambda x, level: torch.tanh(x / (1 + level.sigma)) + 0.1 * level.sigma / (1 + level.sigma),
        torch.full((1, 1, 1, 1), 31.0, dtype=f64),
        levels,
        noise=lambda step, shape: torch.full(shape, math.cos(step), dtype=f64),
        s_churn=s_churn,
        s_tmin=s_tmin,
        s_tmax=s_tmax,
        s_noise=s_noise,
    )
    assert abs(float(ours) - x) < 1e-12


def test_the_network_is_told_the_time_of_a_raised_level():
    """Churn leaves the levels: the denoiser finds t by sigma, as training would have told it."""
    from ldm.diffusion.denoiser import Denoiser
    from ldm.diffusion.prediction import X0
    from ldm.types import Conditioning

    told = []

    class Network(torch.nn.Module):
        def forward(self, x, time, cond):
            told.append(float(time[0]))
            return torch.zeros_like(x)

    schedule = VarianceExploding()
    levels = sampling_levels(schedule, 4, spacing="karras")
    denoiser = Denoiser(Network(), schedule, X0())
    sample_edm(
        lambda x, level: denoiser(x, level, Conditioning()),
        torch.zeros(1, 1, 1, 1),
        levels,
        noise=lambda step, shape: torch.zeros(shape),
    )
    raised = levels[1].sigma * 2**0.5  # the first level is above s_tmax
    assert abs(told[2] - float(schedule.t_at(raised))) < 1e-3 and told[2] > float(levels[1].t)


def test_training_refuses_a_sampler_that_its_pictures_could_not_use():
    from ldm.cli import compose
    from ldm.training.assemble import check_sampler

    with pytest.raises(LdmError, match=r"sampler edm does not fit the schedule RectifiedFlow.*alpha = 1"):
        check_sampler(compose("train", ["sampler=edm"]))
    check_sampler(compose("train", ["sampler=edm", "scheduler=edm"]))


# ---- the document --------------------------------------------------------------------------------------------------


def test_the_tables_of_the_document_are_those_of_the_code():
    text = sampler_table.DOCUMENT.read_text()
    assert sampler_table.generated(text) == text, "run python -m tests.diffusion.sampler_table --write"
