"""What a resumed stage must have in common with its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from inspect import signature
from typing import Any

from ldm.checkpoints.drift import compare, notes
from ldm.checkpoints.store import Checkpoint
from ldm.data.captions import Captions
from ldm.data.datamodule import DataModule
from ldm.reconstruction.objective import ReconstructionObjective
from ldm.reconstruction.perceptual import FeatureDistance
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.diffusion_module import DiffusionModule
from ldm.training.place import Config, Place
from ldm.training.stage_module import StageModule

_WITHOUT_EFFECT = ("weights", "sha256", "gradient_checkpointing")  # of a model: a start's files; memory against time
_FILES = ("weights", "run")  # of a perceptual distance: they may move, for what they hold is recorded
_CAPTIONS = tuple(f"data.{name}" for name in asdict(Captions()))  # the autoencoder looks at pictures only
_OBJECTIVE = ("pixel", "kl_weight")  # of the autoencoder's, what runs have recorded from the beginning
_ORDER = tuple(f"data.{name}" for name in ("lanes", "window_mb", "remainder", "num_train", "manifest", "uses"))


def settings_of(cfg: Config, stage: str) -> dict[str, Any]:
    """The settings that decide what a step computes; what depends on hardware is not among them."""
    node = cfg["stage"][stage]
    flat: dict[str, Any] = {"seed": cfg["seed"]}
    for key in ("image_size", "crop", "flip_prob", "upscale", "background", "caption_prefix", "caption_suffix"):
        flat[f"data.{key}"] = cfg["data"].get(key)
    for key, default in {"repeats": None, "weights": None, **asdict(Captions())}.items():
        if cfg["data"].get(key, default) != default:  # left out by default: runs from before these settings go on
            flat[f"data.{key}"] = cfg["data"][key]
    if (bucket := cfg["data"].get("bucket") or {}).get("enable_bucket"):
        _flatten(flat, "data.bucket", bucket)
    for key in ("max_steps", "batch_size", "grad_clip", "optimizer", "lr_schedule"):
        _flatten(flat, f"stage.{stage}.{key}", node[key])
    if node["param_groups"]:  # left out by default, as above; of several that fit the first decides
        flat[f"stage.{stage}.param_groups"] = list(node["param_groups"])
        _flatten(flat, f"stage.{stage}.param_groups", node["param_groups"])
    _flatten(flat, f"stage.{stage}.ema", _averages(node["ema"]))
    if stage == "autoencoder":
        later = {k: p.default for k, p in signature(ReconstructionObjective).parameters.items() if k not in _OBJECTIVE}
        objective = {k: v for k, v in node["objective"].items() if k not in later or v != later[k]}  # as above
        _flatten(flat, f"stage.{stage}.objective", objective)
        if objective.get("adversarial") is not None:
            _flatten(flat, f"stage.{stage}.discriminator_optimizer", node["discriminator_optimizer"])
        if node["train"] != "all":  # as above
            flat[f"stage.{stage}.train"] = node["train"]
        if node["statistics_images"] is not None:  # as above
            flat[f"stage.{stage}.statistics_images"] = node["statistics_images"]
        _flatten(flat, "model.autoencoder", cfg["model"]["autoencoder"])
    elif stage == "features":
        _flatten(flat, "model.features", cfg["model"]["features"])
    else:
        _flatten(flat, "data.columns", cfg["data"].get("columns") or {})
        for key in ("network", "conditioner"):
            _flatten(flat, f"model.{key}", cfg["model"][key])
        scheduler = dict(cfg["scheduler"])
        if not scheduler.get("unmasked_weight"):  # as above
            scheduler.pop("unmasked_weight", None)
        _flatten(flat, "scheduler", scheduler)
    # derived from max_steps: one accepted difference must not need two names
    flat.pop(f"stage.{stage}.lr_schedule.max_steps", None)
    return _deciding(flat, stage)


def _averages(node: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Which averages there are; how often they are stored, and how, changes none of them."""
    if node is None:
        return None
    later = {"lengths": [], "warmup": True}  # left out by default, as above
    return {
        key: value
        for key, value in node.items()
        if not key.startswith("snapshot_") and not (key in later and value == later[key])
    }


def recorded_settings(checkpoint: Checkpoint, stage: str) -> dict[str, Any]:
    """`settings_of` as it was when the checkpoint was written: its fingerprint without what was found."""
    saved = _deciding(checkpoint.document("state")["fingerprint"], stage)
    return {key: value for key, value in saved.items() if key not in (*_ORDER, "latent_id", "perceptual")}


def _deciding(settings: Mapping[str, Any], stage: str) -> dict[str, Any]:
    without = _CAPTIONS if stage == "autoencoder" else ("data.on_missing_caption",)  # told by the number of samples
    perceptual = "stage.autoencoder.objective.perceptual."
    return {
        key: value
        for key, value in settings.items()
        if key not in without
        and not (key.startswith("model.") and key.rpartition(".")[2] in _WITHOUT_EFFECT)
        and not (key.startswith(perceptual) and key.rpartition(".")[2] in _FILES)
    }


def fingerprint_of(cfg: Config, stage: str, data: DataModule, module: StageModule) -> dict[str, Any]:
    """The settings, and the data, latents and perceptual weights that were found."""
    flat = settings_of(cfg, stage)
    _flatten(flat, "data", data.order_fingerprint)
    if isinstance(module, DiffusionModule) or (isinstance(module, AutoencoderModule) and module.decoder_only):
        flat["latent_id"] = module.latent_id
    if isinstance(module, AutoencoderModule) and isinstance(module.objective.perceptual, FeatureDistance):
        flat["perceptual"] = module.objective.perceptual.identity
    return flat


def check_drift(
    checkpoint: Checkpoint, stage: str, fingerprint: Config, environment: Config, allow: list[str], place: Place
) -> None:
    state = checkpoint.document("state")
    said = compare(_deciding(state["fingerprint"], stage), fingerprint, allow)
    said += notes(state["environment"], environment)
    if place.rank == 0:
        for line in said:
            print(f"resume: {line}", flush=True)


def _flatten(flat: dict[str, Any], prefix: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, child in value.items():
            _flatten(flat, f"{prefix}.{key}", child)
    else:
        flat[prefix] = value
