"""Noise schedules, predictions and sampler settings: diffusers' scheduler_config.json and tables of betas <-> ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.formats.description import DIFFUSERS_VERSION, Node
from ldm.checkpoints.formats.reading import setting
from ldm.diffusion.schedule import DiscreteVP
from ldm.errors import LdmError

PREDICTIONS = {
    "epsilon": "ldm.diffusion.prediction.Epsilon",
    "v": "ldm.diffusion.prediction.Velocity",
    "x0": "ldm.diffusion.prediction.X0",
}
MAX_TIMESTEPS = 100_000
SD_SCHEDULE = {"betas": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_timesteps": 1000}

_DISCRETE = "ldm.diffusion.schedule.DiscreteVP"
_ZERO_SNR = "ldm.diffusion.schedule.ZeroTerminalSNR"
_BETAS = ("scaled_linear", "linear", "sigmoid")
_BY_NAME = ("scaled_linear", "linear")  # the others go to diffusers' DDIMScheduler as a table
_PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
_SPACINGS = {"leading": "leading", "trailing": "trailing", "linspace": "uniform"}
_ALONE = "export the networks alone: --parts unet,vae"


# ---- our nodes


def schedule_node(schedule: Mapping[str, Any], zero_snr: bool) -> Node:
    node: Node = {"class": _DISCRETE, "args": dict(schedule)}
    return {"class": _ZERO_SNR, "args": {"schedule": node}} if zero_snr else node


def read_schedule_node(node: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Arguments of `DiscreteVP`, and whether they are rescaled. Raises LdmError for any other schedule."""
    zero_snr = node["class"] == _ZERO_SNR
    inner = node["args"].get("schedule", {"class": _DISCRETE, "args": {}}) if zero_snr else node
    if inner["class"] != _DISCRETE:
        name = inner["class"].rpartition(".")[2]
        raise LdmError(
            "EXPORT", f"the schedule {name} has no name in Stable Diffusion's formats", where="scheduler.schedule",
            limit="DiscreteVP, or ZeroTerminalSNR of it", next=_ALONE,
        )  # fmt: skip
    return {**SD_SCHEDULE, **inner["args"]}, zero_snr


def read_prediction_node(node: Mapping[str, Any]) -> str:
    """The prediction's short name. Raises LdmError for one that these formats cannot name."""
    for name, target in PREDICTIONS.items():
        if node["class"] == target:
            return name
    raise LdmError(
        "EXPORT", f"the prediction {node['class'].rpartition('.')[2]} has no name in Stable Diffusion's formats",
        where="scheduler.prediction", limit="Epsilon, Velocity, X0", next=_ALONE,
    )  # fmt: skip


# ---- tables of betas


def betas_of(schedule: Mapping[str, Any]) -> Tensor:
    """[num_timesteps] float64: the betas of `DiscreteVP` with these arguments."""
    log_alphas = DiscreteVP(**schedule).log_alphas_cumprod()
    return -torch.expm1(log_alphas.diff(prepend=torch.zeros(1, dtype=torch.float64)))


def recognise_betas(betas: Tensor, where: str) -> dict[str, Any]:
    """Arguments of `DiscreteVP` for a table of betas, within the rounding of its type. Raises LdmError if none give it.

    The ends are tried as round numbers first: Stable Diffusion's 0.00085 is 0.00085020 in half precision.
    """
    exact = betas.double()
    rtol = max(1e-5, torch.finfo(betas.dtype).eps) if betas.is_floating_point() else 0.0
    usable = betas.ndim == 1 and len(betas) >= 2 and bool(((exact > 0) & (exact < 1)).all())
    for digits in (2, 3, 6) if usable else ():
        for kind in _BETAS:
            start, end = (float(f"{value:.{digits}g}") for value in _ends(kind, float(exact[0]), float(exact[-1])))
            if not 0 < start <= end < 1:
                continue
            schedule = {"betas": kind, "beta_start": start, "beta_end": end, "num_timesteps": len(betas)}
            if torch.allclose(betas_of(schedule), exact, rtol=rtol, atol=0):
                return schedule
    raise LdmError("FORMAT", f"its betas are none of {', '.join(_BETAS)}", where=where)


def _ends(kind: str, first: float, last: float) -> tuple[float, float]:
    """beta_start and beta_end of a table that begins and ends so: a sigmoid from -6 to 6 does not reach its ends."""
    if kind != "sigmoid":
        return first, last
    margin = (last - first) / math.expm1(6.0)  # sigmoid(-6) / (sigmoid(6) - sigmoid(-6))
    return first - margin, last + margin


# ---- scheduler_config.json


def read_scheduler_config(config: Mapping[str, Any], where: str, *, forced_offset: int | None = 1) -> dict[str, Any]:
    """scheduler_config.json -> schedule, zero_snr, prediction and sampler in our words, and notes for people.

    forced_offset: the pipelines of Stable Diffusion 1 and 2 take 1, whatever the file says; None = the file's (XL).
    Raises LdmError FORMAT for what `DiscreteVP` and our predictions do not have.
    """
    name = setting(config, "_class_name", "DDIMScheduler", where)
    table = config.get("trained_betas")
    if table is not None:
        if not isinstance(table, list) or not all(isinstance(beta, int | float) for beta in table):
            raise LdmError("FORMAT", "trained_betas is no list of numbers", where=where)
        # whoever saves such a table has it from float32
        schedule = recognise_betas(torch.tensor(table, dtype=torch.float64), where)
    else:
        betas = setting(config, "beta_schedule", "linear", where)
        if betas not in _BETAS:
            raise LdmError("FORMAT", f"beta_schedule is {betas!r}", where=where, limit=", ".join(_BETAS))
        schedule = {
            "betas": betas,
            "beta_start": setting(config, "beta_start", 1e-4, where),
            "beta_end": setting(config, "beta_end", 0.02, where),
            "num_timesteps": setting(config, "num_train_timesteps", 1000, where),
        }
        if not 2 <= schedule["num_timesteps"] <= MAX_TIMESTEPS:
            limit = f"2 to {MAX_TIMESTEPS}"
            raise LdmError("FORMAT", f"num_train_timesteps is {schedule['num_timesteps']}", where=where, limit=limit)
    prediction = setting(config, "prediction_type", "epsilon", where)
    if prediction not in _PREDICTION_TYPES:
        limit = ", ".join(_PREDICTION_TYPES)
        raise LdmError("FORMAT", f"prediction_type is {prediction!r}", where=where, limit=limit)
    # what a file leaves out is its scheduler's default
    old = name in ("DDIMScheduler", "PNDMScheduler", "DDPMScheduler")
    spacing = setting(config, "timestep_spacing", "leading" if old else "linspace", where)
    if spacing not in _SPACINGS:
        raise LdmError("FORMAT", f"timestep_spacing is {spacing!r}", where=where, limit=", ".join(_SPACINGS))
    offset = setting(config, "steps_offset", 0, where) if forced_offset is None else forced_offset
    to_clean = setting(config, "set_alpha_to_one", name != "PNDMScheduler", where)
    notes = [] if name == "DDIMScheduler" else [f"the folder names {name}: the run draws with DDIM"]
    if spacing == "linspace" and not to_clean:  # there the last level would stand twice
        to_clean = True
        notes.append("its steps end at the schedule's first level already: the run's last step goes on to clean")
    return {
        "schedule": schedule,
        "zero_snr": setting(config, "rescale_betas_zero_snr", False, where),
        "prediction": _PREDICTION_TYPES[prediction],
        "sampler": {
            "spacing": _SPACINGS[spacing],
            "offset": offset if spacing == "leading" else 0,  # "leading" alone reads it
            "final": "clean" if to_clean else "first",
        },
        "notes": notes,
    }


def scheduler_config(
    schedule: Mapping[str, Any], zero_snr: bool, prediction: str, sampler: Mapping[str, Any]
) -> dict[str, Any]:
    """Ours -> scheduler_config.json of a DDIMScheduler; sampler: arguments of `Sampling`."""
    theirs = {ours: other for other, ours in _PREDICTION_TYPES.items()}
    spacings = {ours: other for other, ours in _SPACINGS.items()}
    named = schedule["betas"] in _BY_NAME
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": schedule["num_timesteps"],
        "beta_start": schedule["beta_start"],
        "beta_end": schedule["beta_end"],
        "beta_schedule": schedule["betas"] if named else "linear",
        "trained_betas": None if named else betas_of(schedule).tolist(),  # goes before the two ends
        "clip_sample": False,
        "set_alpha_to_one": sampler["final"] == "clean",
        "steps_offset": 1,
        "timestep_spacing": spacings.get(sampler["spacing"], "trailing"),
        "rescale_betas_zero_snr": zero_snr,
        "prediction_type": theirs[prediction],
    }


def call_of(sampler: Mapping[str, Any]) -> str:
    """What a pipeline must be called with: its folder holds neither steps nor guidance.

    sampler: arguments of `Sampling`, the function as {"_target_", its options}.
    """
    words = {"num_inference_steps": sampler["steps"], "guidance_scale": sampler["guidance_scale"]}
    if sampler["guidance_rescale"]:
        words["guidance_rescale"] = sampler["guidance_rescale"]
    if sampler["function"].get("eta"):
        words["eta"] = sampler["function"]["eta"]
    return ", ".join(f"{key}={value}" for key, value in words.items())


def what_differs(sampler: Mapping[str, Any], num_timesteps: int, prediction: str) -> list[str]:
    """The settings of `Sampling` with which a pipeline of the exported folder draws another picture than sample.py.

    prediction: the short name, as in `PREDICTIONS`.
    The pipeline walks DDIM, and from step t always to t - num_timesteps // steps.
    """
    function, spacing, steps = sampler["function"], sampler["spacing"], sampler["steps"]
    name = function["_target_"].rpartition(".sample_")[2]
    found = []
    if name not in ("ddim", "euler"):  # Euler's step is DDIM's on these schedules
        found.append(f"sampler={name} becomes ddim")
    elif function.get("eta"):
        found.append(f"eta={function['eta']} takes its noise from elsewhere")
    if spacing not in ("leading", "trailing"):
        found.append(f"spacing={spacing} becomes {'linspace' if spacing == 'uniform' else 'trailing'} of DDIM")
    elif spacing == "leading" and sampler["offset"] != 1:
        found.append(f"offset={sampler['offset']} becomes 1")
    elif spacing == "trailing" and num_timesteps % steps:
        found.append(f"steps={steps} does not divide {num_timesteps}")
    if sampler["shift"] != 1:
        found.append(f"shift={sampler['shift']} is lost")
    if sampler["guidance_rescale"] and prediction != "v":
        found.append(f"guidance_rescale={sampler['guidance_rescale']} is of v here, of the network's output there")
    if sampler["guidance_interval"] is not None:
        found.append("guidance_interval is lost")
    return found
