"""Every sampler against diffusers' scheduler of the same name: same network function, same noise, 20 steps.

The network is the exact denoiser of data at -1 and +1 with a deviation of 0.4: not linear, so that a wrong level, a
wrong order or a wrong coefficient shows. The live comparison needs diffusers; `FROZEN` keeps the ends of its
trajectories, so that the core tests compare with the same numbers. After a deliberate change:
`python -m tests.diffusion.test_sampler_references` prints them anew from diffusers.

The reference's tables are replaced by ours in float64 (its own are float32, a relative error of 1e-6 in sigma); several
schedulers compute a step in float32 all the same, which is what `TOLERANCE` allows for.

Where the reference leaves the paper we follow the paper, and the case is driven so that both agree:
- DDPM adds noise wherever t > 0 instead of at every step but the last (Ho et al., algorithm 2): seen with variance
  "large" unless the last t is 0. The cases end at t = 0.
- LCM's c_skip and c_out belong to the network's parametrisation: `timestep_scaling` is set so high that they vanish.
- EDMEuler with s_churn calls the network before it adds the noise (Karras et al., algorithm 2: after) and takes no
  second-order step: algorithm 2 is compared with its own text in test_samplers.py.
- Schedulers that work with sigma / alpha begin a zero-terminal-SNR schedule at alpha = 2^-12 and a flow at 1 - sigma =
  1e-6 or 1e-3 instead of 0: there DDIM and the flow schedulers without lambda are compared, and for the others
  the levels are those of the reference.
- UniPC with bh1 is infinite times 0 at sigma = 0: those cases end at the first training level.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from ldm.diffusion.levels import CLEAN, sampling_levels
from ldm.diffusion.samplers.ddim import sample_ddim
from ldm.diffusion.samplers.ddpm import sample_ddpm
from ldm.diffusion.samplers.dpmpp import sample_dpmpp_2m, sample_dpmpp_2m_sde
from ldm.diffusion.samplers.edm import sample_edm
from ldm.diffusion.samplers.euler import sample_euler
from ldm.diffusion.samplers.euler_ancestral import sample_euler_ancestral
from ldm.diffusion.samplers.heun import sample_heun
from ldm.diffusion.samplers.lcm import sample_lcm
from ldm.diffusion.samplers.plms import sample_plms
from ldm.diffusion.samplers.unipc import sample_unipc
from ldm.diffusion.schedule import DiscreteVP, RectifiedFlow, VarianceExploding, ZeroTerminalSNR
from ldm.types import Level

f64 = torch.float64
STEPS = 20
SHAPE = (2, 1, 2, 2)
TOLERANCE = 2e-5
START = torch.tensor([-1.9, 0.3, 0.05, 1.2, -0.4, 2.2, -0.02, 0.9], dtype=f64).view(SHAPE)


def two_modes(x, level):
    """E[x0 | x] for x0 = +-1 + 0.4 z."""
    variance = 0.16 * level.alpha**2 + level.sigma**2
    return (0.16 * level.alpha * x + level.sigma**2 * torch.tanh(level.alpha * x / variance)) / variance


def noise(step, shape):
    """Eight fixed numbers of the size of normal ones, other ones at every step."""
    return 1.4 * torch.cos((torch.arange(8, dtype=f64) + 1) * (step + 1.3) * 0.77).view(shape)


@dataclass(frozen=True)
class Case:
    """A sampler on levels, and the scheduler of diffusers that does the same.

    scale: the scheduler's x is x / alpha ("ratio") or x.   output: what it wants of the network.
    spacing: how both place their steps.   calls: network calls of step k, as the reference counts them.
    """

    sampler: Any
    scheduler: str
    config: dict[str, Any]
    schedule: Any = field(default_factory=DiscreteVP)
    spacing: dict[str, Any] = field(default_factory=lambda: {"spacing": "trailing"})
    scale: str = "plain"
    output: str = "epsilon"
    calls: Any = lambda step: 1


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
TRAILING = {**SD, "timestep_spacing": "trailing"}
LEADING = {**SD, "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
LIKE_SD = {"spacing": "leading", "offset": 1, "final": "first"}
FROM_T0 = {"spacing": "leading"}
KARRAS = {"spacing": "karras"}
EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
VE, RF = VarianceExploding(), RectifiedFlow()
two_calls_but_last = lambda step: 1 if step == STEPS - 1 else 2  # noqa: E731

CASES = {
    "ddim": Case(sample_ddim, "DDIMScheduler", {**LEADING, "clip_sample": False}, spacing=LIKE_SD),
    "ddim eta 0.7": Case(partial(sample_ddim, eta=0.7), "DDIMScheduler", {**TRAILING, "clip_sample": False}),
    "ddim zero snr": Case(
        sample_ddim,
        "DDIMScheduler",
        {**TRAILING, "clip_sample": False, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        ZeroTerminalSNR(DiscreteVP()),
        output="velocity",
    ),
    "ddpm small": Case(
        sample_ddpm,
        "DDPMScheduler",
        {**SD, "timestep_spacing": "leading", "clip_sample": False, "variance_type": "fixed_small"},
        spacing=FROM_T0,
    ),
    "ddpm large": Case(
        partial(sample_ddpm, variance="large"),
        "DDPMScheduler",
        {**SD, "timestep_spacing": "leading", "clip_sample": False, "variance_type": "fixed_large"},
        spacing=FROM_T0,
    ),
    "euler": Case(sample_euler, "EulerDiscreteScheduler", TRAILING, scale="ratio"),
    "euler karras": Case(
        sample_euler, "EulerDiscreteScheduler", {**SD, "use_karras_sigmas": True}, spacing=KARRAS, scale="ratio"
    ),
    "euler exponential": Case(
        sample_euler,
        "EulerDiscreteScheduler",
        {**SD, "use_exponential_sigmas": True},
        spacing={"spacing": "exponential"},
        scale="ratio",
    ),
    "euler ancestral": Case(sample_euler_ancestral, "EulerAncestralDiscreteScheduler", TRAILING, scale="ratio"),
    "heun": Case(sample_heun, "HeunDiscreteScheduler", TRAILING, scale="ratio", calls=two_calls_but_last),
    "dpmpp_2m": Case(sample_dpmpp_2m, DPM, TRAILING),
    "dpmpp_2m_sde": Case(sample_dpmpp_2m_sde, DPM, {**TRAILING, "algorithm_type": "sde-dpmsolver++"}),
    "plms": Case(
        sample_plms,
        "PNDMScheduler",
        {**LEADING, "skip_prk_steps": True},
        spacing=LIKE_SD,
        calls=lambda step: 2 if step == 0 else 1,
    ),
    **{
        f"unipc {order} bh2": Case(
            partial(sample_unipc, order=order), UNIPC, {**TRAILING, "solver_order": order, "final_sigmas_type": "zero"}
        )
        for order in (1, 2, 3)
    },
    **{
        f"unipc {order} bh1": Case(
            partial(sample_unipc, order=order, variant="bh1"),
            UNIPC,
            {**TRAILING, "solver_order": order, "solver_type": "bh1", "lower_order_final": False}
            | {"final_sigmas_type": "sigma_min"},
            spacing={"spacing": "trailing", "final": "first"},
        )
        for order in (1, 2, 3)
    },
    "lcm": Case(
        sample_lcm, "LCMScheduler", {**SD, "clip_sample": False, "timestep_scaling": 1e9, "set_alpha_to_one": True}
    ),
    "euler ve": Case(sample_euler, "EDMEulerScheduler", EDM, VE, KARRAS, output="edm"),
    "edm without churn": Case(
        partial(sample_edm, s_churn=0.0),
        "HeunDiscreteScheduler",
        TRAILING,
        "ratio of VP",
        scale="ratio",
        calls=two_calls_but_last,
    ),
    "euler ancestral ve": Case(
        sample_euler_ancestral, "EulerAncestralDiscreteScheduler", TRAILING, "ratio of VP", scale="ratio"
    ),
    "dpmpp_2m ve": Case(sample_dpmpp_2m, "EDMDPMSolverMultistepScheduler", EDM, VE, KARRAS, output="edm"),
    "dpmpp_2m_sde ve": Case(
        sample_dpmpp_2m_sde,
        "EDMDPMSolverMultistepScheduler",
        {**EDM, "algorithm_type": "sde-dpmsolver++"},
        VE,
        KARRAS,
        output="edm",
    ),
    "euler flow": Case(sample_euler, "FlowMatchEulerDiscreteScheduler", {}, RF, output="flow"),
    "euler flow shift 3": Case(
        sample_euler, "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, RF, {"shift": 3.0}, output="flow"
    ),
    "heun flow": Case(sample_heun, "FlowMatchHeunDiscreteScheduler", {}, RF, output="flow", calls=two_calls_but_last),
    "lcm flow": Case(sample_lcm, "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, RF, output="flow"),
    "dpmpp_2m flow": Case(sample_dpmpp_2m, DPM, FLOW, RF, output="flow"),
    "dpmpp_2m_sde flow": Case(
        sample_dpmpp_2m_sde, DPM, {**FLOW, "algorithm_type": "sde-dpmsolver++"}, RF, output="flow"
    ),
    "unipc 3 flow": Case(partial(sample_unipc, order=3), UNIPC, {**FLOW, "solver_order": 3}, RF, output="flow"),
}


def levels_of(case):
    if case.schedule == "ratio of VP":  # the same levels seen as VE: sigma / alpha in the place of sigma
        levels = sampling_levels(DiscreteVP(), STEPS, **case.spacing)
        return [Level(lv.t, torch.ones((), dtype=f64), lv.sigma / lv.alpha) for lv in levels]
    if case.schedule == RF and case.scheduler in (DPM, UNIPC):  # the reference begins where lambda is finite
        low = 0.0 if case.scheduler == DPM else 1e-3
        shares = torch.linspace(low + 0.999, low, STEPS + 1, dtype=f64)[:-1].clamp(max=1 - 1e-6)
        return [*(RF.at(1000 * share) for share in shares), CLEAN]
    return sampling_levels(case.schedule, STEPS, **case.spacing)


def ours(case):
    """[STEPS, 8] x after every step."""
    levels, seen = levels_of(case), []
    x = START * torch.sqrt(levels[0].alpha ** 2 + levels[0].sigma ** 2)
    case.sampler(two_modes, x, levels, noise=noise, on_step=lambda step, x, x0: seen.append(x.flatten()))
    return torch.stack(seen)


def reference(case):
    """[STEPS, 8] the same from diffusers, in our scale."""
    import diffusers

    levels, ratio = levels_of(case), case.scale == "ratio"
    scheduler = getattr(diffusers, case.scheduler)(**case.config)
    prepare(scheduler, case, levels)
    x = START * torch.sqrt(levels[0].alpha ** 2 + levels[0].sigma ** 2)
    x = x / levels[0].alpha if ratio else x
    seen, timesteps = [], list(scheduler.timesteps)
    with pytest.MonkeyPatch.context() as patch:
        for step in range(STEPS):
            hand_over(patch, noise(step, SHAPE))
            for call in range(case.calls(step)):
                t, level = timesteps.pop(0), levels[step + call]
                if hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(x, t)  # some insist
                scaled = x * level.alpha if ratio else x
                output = network_output(case, scaled, two_modes(scaled, level), level)
                x = scheduler.step(output, t, x, **extras(case, step)).prev_sample.double()
            seen.append((x * levels[step + 1].alpha if ratio else x).flatten())
    return torch.stack(seen)


def hand_over(patch, z):
    """Let diffusers draw our noise."""
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.schedulers.") and hasattr(module, "randn_tensor"):
            patch.setattr(module, "randn_tensor", lambda shape, **_: z)
    patch.setattr(torch, "randn_like", lambda like, **_: z)


def network_output(case, x, x0, level):
    eps = (x - level.alpha * x0) / level.sigma
    if case.output == "edm":
        skip = 0.25 / (level.sigma**2 + 0.25)
        return (x0 - skip * x) / (level.sigma * 0.5 / torch.sqrt(level.sigma**2 + 0.25))
    return {"epsilon": eps, "velocity": level.alpha * eps - level.sigma * x0, "flow": eps - x0}[case.output]


def extras(case, step):
    if case.config.get("algorithm_type") == "sde-dpmsolver++" and case.scheduler == DPM:
        return {"variance_noise": noise(step, SHAPE)}
    if case.scheduler == "DDIMScheduler":
        return {
            "eta": case.sampler.keywords["eta"] if isinstance(case.sampler, partial) else 0.0,
            "variance_noise": noise(step, SHAPE),
        }
    return {}


def prepare(scheduler, case, levels):
    """Same timesteps; their tables in float64."""
    ratio = torch.stack([lv.sigma / lv.alpha for lv in levels])
    if hasattr(scheduler, "alphas_cumprod") and case.schedule != RF:
        schedule = DiscreteVP() if case.schedule == "ratio of VP" else case.schedule
        table = schedule.at(torch.arange(1000, dtype=f64)).alpha ** 2
        torch.testing.assert_close(scheduler.alphas_cumprod.double(), table, rtol=1e-4, atol=1e-7)
        scheduler.alphas_cumprod = table
        if case.config.get("set_alpha_to_one") is False:
            scheduler.final_alpha_cumprod = table[0]
    if case.scheduler.startswith("FlowMatchEuler"):
        scheduler.set_timesteps(sigmas=[1 - k / STEPS for k in range(STEPS)])
    elif case.scheduler == "LCMScheduler":
        scheduler.set_timesteps(timesteps=[int(lv.t) for lv in levels[:-1]], original_inference_steps=1000)
    else:
        scheduler.set_timesteps(STEPS)
    if not hasattr(scheduler, "sigmas") or case.scheduler in ("DDIMScheduler", "DDPMScheduler", "LCMScheduler"):
        return
    wanted = torch.stack([lv.sigma for lv in levels]) if case.output == "flow" else ratio
    if case.scheduler == "FlowMatchHeunDiscreteScheduler":
        scheduler.timesteps = torch.cat([1000 * wanted[:1], 1000 * wanted[1:-1].repeat_interleave(2)])
        scheduler.sigmas = torch.cat([wanted[:1], wanted[1:-1].repeat_interleave(2), wanted[-1:]])
        return
    if case.scheduler == "HeunDiscreteScheduler":
        wanted = torch.cat([wanted[:1], wanted[1:-1].repeat_interleave(2), wanted[-1:]])
    torch.testing.assert_close(scheduler.sigmas.double(), wanted, rtol=1e-4, atol=1e-6)  # the levels agree
    scheduler.sigmas = wanted


def distance(a, b):
    """Largest difference at any step, relative to the largest value of that step."""
    return float(((a - b).abs().amax(1) / b.abs().amax(1)).max())


@pytest.mark.parametrize("name", CASES)
def test_the_end_equals_the_frozen_end_of_the_reference(name):
    end = ours(CASES[name])[-1, :4]
    assert float((end - torch.tensor(FROZEN[name], dtype=f64)).abs().max()) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_the_trajectory_equals_the_reference(name):
    pytest.importorskip("diffusers")
    assert distance(ours(CASES[name]), reference(CASES[name])) < TOLERANCE


def test_a_slightly_wrong_coefficient_would_be_noticed(monkeypatch):
    from ldm.diffusion.samplers import plms

    monkeypatch.setattr(plms, "COEFFICIENTS", (*plms.COEFFICIENTS[:3], (55 / 24, -59 / 24, 36 / 24, -8 / 24)))
    with pytest.raises(AssertionError):
        test_the_end_equals_the_frozen_end_of_the_reference("plms")


OURS = {"ddpm", "ddim", "euler", "euler_ancestral", "heun", "edm", "dpmpp_2m", "dpmpp_2m_sde", "plms", "unipc", "lcm"}


def test_every_sampler_has_a_reference(configs):
    """A new sampler needs no case here, but ours must not lose theirs."""
    covered = {(c.sampler.func if isinstance(c.sampler, partial) else c.sampler).__name__ for c in CASES.values()}
    assert covered >= {f"sample_{name}" for name in OURS}
    assert {path.stem for path in (configs / "sampler").glob("*.yaml")} >= OURS


FROZEN = {  # x after the last step, of the first picture
    "ddim": [-1.5377694, 0.7024871, 0.2572436, 1.2403825],
    "ddim eta 0.7": [-0.9670122, -0.4567983, -0.4533951, 0.7390581],
    "ddim zero snr": [-1.5051362, 0.7163755, 0.2722764, 1.2248457],
    "ddpm small": [-0.6022193, -0.3959444, -0.4495080, 0.5850693],
    "ddpm large": [-0.6363235, -0.4463880, -0.2445059, 0.3501257],
    "euler": [-1.5122513, 0.7170173, 0.2769040, 1.2291986],
    "euler karras": [-1.5549035, 0.6576493, 0.2278857, 1.2388599],
    "euler exponential": [-1.5570443, 0.6545413, 0.2292759, 1.2379550],
    "euler ancestral": [-0.5497620, -0.4333265, -0.2599579, 0.3816165],
    "heun": [-1.5563205, 0.7488637, 0.3489640, 1.2616933],
    "dpmpp_2m": [-1.5518947, 0.7578553, 0.3474330, 1.2595460],
    "dpmpp_2m_sde": [-0.3914107, -0.5289508, -0.4719802, 0.5872403],
    "plms": [-1.6172140, 0.7160999, 0.3301953, 1.2890584],
    "unipc 1 bh2": [-1.5361974, 0.7448944, 0.3138874, 1.2500272],
    "unipc 2 bh2": [-1.5522561, 0.7548542, 0.3561201, 1.2588214],
    "unipc 3 bh2": [-1.5523186, 0.7527061, 0.3620618, 1.2583917],
    "unipc 1 bh1": [-1.5618740, 0.7366181, 0.3027371, 1.2627298],
    "unipc 2 bh1": [-1.9419654, 0.6338453, 0.6512203, 1.4412285],
    "unipc 3 bh1": [-1.6034969, 0.3028594, 0.0539502, 1.2778849],
    "lcm": [0.8807968, -0.3897033, 0.6070403, -0.1132919],
    "euler ve": [-1.5068141, 0.6170062, 0.1869998, 1.2010503],
    "edm without churn": [-1.5563205, 0.7488637, 0.3489640, 1.2616933],
    "euler ancestral ve": [-0.5497620, -0.4333265, -0.2599579, 0.3816165],
    "dpmpp_2m ve": [-1.6846073, 0.7378793, 0.2820291, 1.3404671],
    "dpmpp_2m_sde ve": [-1.2268274, 0.6138526, -0.2234185, 0.1684257],
    "euler flow": [-1.5619654, 0.6807073, 0.2559713, 1.2475458],
    "euler flow shift 3": [-1.5141790, 0.6836057, 0.2365247, 1.2250315],
    "heun flow": [-1.6267023, 0.7136592, 0.3030774, 1.2936278],
    "lcm flow": [-0.6218626, 0.2179046, -0.4042366, -0.0163561],
    "dpmpp_2m flow": [-1.6358317, 0.7130326, 0.3107109, 1.2978810],
    "dpmpp_2m_sde flow": [-0.3781835, -0.5914905, -0.4573780, -0.3238589],
    "unipc 3 flow": [-1.6312128, 0.7098524, 0.2948416, 1.2954834],
}

if __name__ == "__main__":
    for name, case in CASES.items():
        trajectory = reference(case)
        values = ", ".join(f"{v:.7f}" for v in trajectory[-1, :4].tolist())
        print(f'    "{name}": [{values}],  # {distance(ours(case), trajectory):.0e}')
