"""What a foreign model is, in the words of our constructors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.formats.keymap import KeyMap
from ldm.errors import LdmError

Node = dict[str, Any]
"""{"class": ..., "args": {...}}, as checkpoints hold it."""

PREDICTIONS = {
    "epsilon": "ldm.diffusion.prediction.Epsilon",
    "v": "ldm.diffusion.prediction.Velocity",
    "x0": "ldm.diffusion.prediction.X0",
}
_DISCRETE = "ldm.diffusion.schedule.DiscreteVP"
_ZERO_SNR = "ldm.diffusion.schedule.ZeroTerminalSNR"
SD_SCHEDULE = {"betas": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_timesteps": 1000}


@dataclass(frozen=True)
class Part:
    """One model inside a file: its tensors under their names, and the key map of our names.

    key_map: from the names of our module to theirs.
    """

    tensors: Mapping[str, Tensor]
    key_map: Callable[[Iterable[str]], KeyMap]


@dataclass(frozen=True)
class Foreign:
    """A model that was found.

    kind: in words, for people.   network, autoencoder, text: arguments of `UNet`, `AutoencoderKL` and `OpenClipText`
    (None: its text encoders are not imported).   schedule: arguments of `DiscreteVP`; zero_snr: rescaled to end in
    pure noise.   prediction: "epsilon", "v", "x0", or None where the file does not say.
    mean, std: of the raw latents, one number or one for each channel.   sampler: spacing, offset and final.
    parts: "unet", "vae", "text".   averaged: the UNet's averaged weights, if the file holds both.
    notes: what should be said.
    """

    kind: str
    network: dict[str, Any]
    autoencoder: dict[str, Any]
    text: dict[str, Any] | None
    schedule: dict[str, Any]
    prediction: str | None
    image_size: int
    sampler: dict[str, Any]
    parts: Mapping[str, Part]
    mean: float | list[float] = 0.0
    std: float | list[float] = 1 / 0.18215
    zero_snr: bool = False
    averaged: Part | None = None
    notes: tuple[str, ...] = field(default=())


def kind_of(network: Mapping[str, Any], where: str) -> str:
    """Which family a UNet belongs to; refuses those whose further input nothing here gives."""
    if network["concat_channels"]:
        count = network["in_channels"] + network["concat_channels"]
        raise LdmError("FORMAT", f"its UNet takes {count} channels: an inpainting or depth model", where=where)
    if network["vector_size"]:
        return "Stable Diffusion XL"
    return "Stable Diffusion 2" if network["linear_projection"] else "Stable Diffusion 1"


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
            limit="DiscreteVP, or ZeroTerminalSNR of it", next="export the networks alone: --parts unet,vae",
        )  # fmt: skip
    return {**SD_SCHEDULE, **inner["args"]}, zero_snr


def read_prediction_node(node: Mapping[str, Any]) -> str:
    """The prediction's short name. Raises LdmError for one that these formats cannot name."""
    for name, target in PREDICTIONS.items():
        if node["class"] == target:
            return name
    raise LdmError(
        "EXPORT", f"the prediction {node['class'].rpartition('.')[2]} has no name in Stable Diffusion's formats",
        where="scheduler.prediction", limit="Epsilon, Velocity, X0", next="export the networks alone: --parts unet,vae",
    )  # fmt: skip


def betas_of(schedule: Mapping[str, Any]) -> Tensor:
    """[num_timesteps] float64. Source: Rombach et al. 2022, arXiv:2112.10752; `DiscreteVP` computes the same."""
    start, end, n = schedule["beta_start"], schedule["beta_end"], schedule["num_timesteps"]
    if schedule["betas"] == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2
    return torch.linspace(start, end, n, dtype=torch.float64)


def recognise_betas(betas: Tensor, where: str) -> dict[str, Any]:
    """Arguments of `DiscreteVP` for a table of betas. Raises LdmError if none give it."""
    betas = betas.double()
    if betas.ndim == 1 and len(betas) >= 2:
        ends = [float(f"{float(value):.6g}") for value in (betas[0], betas[-1])]
        for kind in ("scaled_linear", "linear"):
            schedule = {"betas": kind, "beta_start": ends[0], "beta_end": ends[1], "num_timesteps": len(betas)}
            if torch.allclose(betas_of(schedule), betas, rtol=1e-5, atol=0):
                return schedule
    raise LdmError("FORMAT", "its betas are neither linear nor scaled_linear", where=where)


def scaling_factor(mean: Tensor, std: Tensor) -> float | None:
    """1 / std as the one number that Stable Diffusion's pipelines know; None where channels differ or are shifted."""
    if bool((mean == 0).all()) and bool((std == std[0]).all()):
        exact = 1 / float(std[0])
        short = float(f"{exact:.6g}")  # 0.18215, not 0.18214999977
        return short if torch.equal((1 / torch.tensor(short, dtype=torch.float64)).to(std.dtype), std[0]) else exact
    return None
