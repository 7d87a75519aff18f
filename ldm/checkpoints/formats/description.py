"""What a foreign model is, in the words of our constructors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ldm.checkpoints.formats.keymap import KeyMap
from ldm.errors import LdmError

Node = dict[str, Any]
"""{"class": ..., "args": {...}}, as checkpoints hold it."""

DIFFUSERS_VERSION = "0.38.0"  # the oldest that our tests compare with
XL = "Stable Diffusion XL"


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

    kind: in words, for people; XL in it means two text towers and the sizes.
    network, autoencoder: arguments of `UNet` and `AutoencoderKL`.
    text: arguments of `OpenClipText` for each text tower: "text", of XL "clip" and "open_clip". A tower that is not
    among `parts` came without weights and is the one that XL was published with.
    schedule: arguments of `DiscreteVP`; zero_snr: rescaled to end in pure noise.
    prediction: "epsilon", "v" or "x0".   mean, std: of the raw latents, one number or one for each channel.
    sampler: spacing, offset and final.   parts: "unet", "vae" and the text towers.
    averaged: the UNet's averaged weights, if the file holds both.   notes: what should be said.
    """

    kind: str
    network: dict[str, Any]
    autoencoder: dict[str, Any]
    text: Mapping[str, dict[str, Any]]
    schedule: dict[str, Any]
    prediction: str
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
        return XL
    return "Stable Diffusion 2" if network["linear_projection"] else "Stable Diffusion 1"
