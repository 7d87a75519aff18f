"""What a resumed stage must have in common with its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ldm.checkpoints.drift import compare, notes
from ldm.checkpoints.store import Checkpoint
from ldm.data.captions import Captions
from ldm.data.datamodule import DataModule
from ldm.training.diffusion_module import DiffusionModule
from ldm.training.place import Config, Place
from ldm.training.stage_module import StageModule

_WITHOUT_EFFECT = ("weights", "sha256", "gradient_checkpointing")  # a start's files; memory against time


def settings_of(cfg: Config, stage: str) -> dict[str, Any]:
    """The settings that decide what a step computes; what depends on hardware is not among them."""
    node = cfg["stage"][stage]
    flat: dict[str, Any] = {"seed": cfg["seed"]}
    for key in ("image_size", "crop", "flip_prob", "upscale", "background", "caption_prefix", "caption_suffix"):
        flat[f"data.{key}"] = cfg["data"].get(key)
    for key, default in {"repeats": None, **asdict(Captions())}.items():
        if cfg["data"].get(key, default) != default:  # left out by default: runs from before these settings go on
            flat[f"data.{key}"] = cfg["data"][key]
    for key in ("max_steps", "batch_size", "grad_clip", "optimizer", "lr_schedule", "ema"):
        _flatten(flat, f"stage.{stage}.{key}", node[key])
    if stage == "autoencoder":
        _flatten(flat, f"stage.{stage}.objective", node["objective"])
        _flatten(flat, "model.autoencoder", cfg["model"]["autoencoder"])
    else:
        _flatten(flat, "data.columns", cfg["data"].get("columns") or {})
        for key in ("network", "conditioner"):
            _flatten(flat, f"model.{key}", cfg["model"][key])
        _flatten(flat, "scheduler", cfg["scheduler"])
    # derived from max_steps: one accepted difference must not need two names
    flat.pop(f"stage.{stage}.lr_schedule.max_steps", None)
    return {key: value for key, value in flat.items() if key.rpartition(".")[2] not in _WITHOUT_EFFECT}


def fingerprint_of(cfg: Config, stage: str, data: DataModule, module: StageModule) -> dict[str, Any]:
    """The settings, and the data and latents that were found."""
    flat = settings_of(cfg, stage)
    _flatten(flat, "data", data.order_fingerprint)
    if isinstance(module, DiffusionModule):
        flat["latent_id"] = module.latent_id
    return flat


def check_drift(
    checkpoint: Checkpoint, fingerprint: Config, environment: Config, allow: list[str], place: Place
) -> None:
    state = checkpoint.document("state")
    said = compare(state["fingerprint"], fingerprint, allow) + notes(state["environment"], environment)
    if place.rank == 0:
        for line in said:
            print(f"resume: {line}", flush=True)


def _flatten(flat: dict[str, Any], prefix: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, child in value.items():
            _flatten(flat, f"{prefix}.{key}", child)
    else:
        flat[prefix] = value
