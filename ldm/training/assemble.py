"""The parts of a stage, built from its configuration and checked against each other before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from ldm.build import build, to_saved
from ldm.checkpoints.run import has_stage, open_autoencoder
from ldm.data.buckets import Buckets
from ldm.data.columns import checked, kind_of
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import Objective
from ldm.diffusion.schedule import for_size
from ldm.errors import LdmError, nearest
from ldm.model import LatentDiffusion, check_fit, load_autoencoder, load_source, load_weights, open_stage, read_weights
from ldm.models.autoencoder.convolutional import ConvolutionalAutoencoder
from ldm.models.autoencoder.identity import Identity
from ldm.random import Purpose, fold, run_key
from ldm.reconstruction.perceptual import FeatureDistance
from ldm.training.autoencoder_module import DECODER, AutoencoderModule
from ldm.training.diffusion_module import DiffusionModule
from ldm.training.ema import profiles_of
from ldm.training.features_module import FeaturesModule
from ldm.training.finetune import check_source, decoder_only, source_of
from ldm.training.place import Config
from ldm.training.stage_module import StageModule, StageSettings
from ldm.training.step import grouped
from ldm.validate import STAGES


def check_parts(cfg: Config, trusted: tuple[str, ...] = ()) -> None:
    """Refuses parts that cannot work together, before anything is trained: what `train.py` and `ldm doctor` ask."""
    if "diffusion" in cfg["stages"]:
        build_objective(cfg, trusted)
        check_sampler(cfg, trusted)
    if "features" in cfg["stages"]:
        with torch.device("meta"):
            features = build(cfg["model"]["features"], where="model.features", trusted=trusted)
        check_param_groups(cfg, "features", features.named_parameters(), trusted)
    if set(cfg["stages"]) != {"features"}:
        check_model(cfg, trusted)
    check_source(cfg, trusted)


def check_model(cfg: Config, trusted: tuple[str, ...] = ()) -> None:
    """Refuses parts of the model that do not fit together or to the data, before anything is trained."""
    check_sizes(cfg, trusted)
    if "autoencoder" in cfg["stages"]:
        if fixed_autoencoder(cfg, trusted) is not None:
            hint = "set stages=[diffusion]"
            raise LdmError("STAGES", "this autoencoder has nothing to train", where="stages", next=hint)
        check_reconstruction(cfg, trusted)
        check_averages(cfg)
        with torch.device("meta"):
            autoencoder = build(cfg["model"]["autoencoder"], where="model.autoencoder", trusted=trusted)
        trained = [(n, p) for n, p in autoencoder.named_parameters() if n.startswith(DECODER) or not decoder_only(cfg)]
        logvar = nn.Parameter(torch.zeros(()), requires_grad=cfg["stage"]["autoencoder"]["objective"]["learn_logvar"])
        check_param_groups(cfg, "autoencoder", [*trained, ("objective.logvar", logvar)], trusted)
    if "diffusion" not in cfg["stages"]:
        return
    model = cfg["model"]
    with torch.device("meta"):
        autoencoder, network, conditioner = (
            build(model[key], where=f"model.{key}", trusted=trusted)
            for key in ("autoencoder", "network", "conditioner")
        )
    check_fit(autoencoder, conditioner, network)
    parts = nn.ModuleDict({"conditioner": conditioner, "denoiser": nn.ModuleDict({"network": network})})
    check_param_groups(cfg, "diffusion", parts.named_parameters(), trusted)
    build(cfg["data"], where="data", trusted=trusted)  # has its own words about its settings
    offered = {"caption", *(cfg["data"].get("columns") or {})}
    for name in conditioner.reads:
        if name not in offered:
            raise LdmError(
                "CONFIG",
                f"model.conditioner reads the column {name!r}, which the data do not give",
                where="data.columns",
                limit=f"given: {', '.join(sorted(offered))}",
                next=f"name the field of the samples' JSON: data.columns.{name}=FIELD",
            )
    for name, given in (cfg["stage"]["diffusion"].get("sample_columns") or {}).items():
        for check in conditioner.checks.get(name, ()):
            for value in given if isinstance(given, list) else [given]:
                check(value)
    declared = checked(cfg["data"].get("columns") or {})
    if cfg["scheduler"]["masked"] and kind_of("mask", declared.get("mask", "")) != "mask":
        raise LdmError(
            "CONFIG",
            "scheduler.masked=true needs the column 'mask', a picture, which the data do not give",
            where="scheduler.masked",
            limit=f"given: {', '.join(sorted(offered))}",
            next="with KEY.mask.png beside KEY.jpg: data.columns.mask=.mask.png; or set scheduler.masked=false",
        )


def check_param_groups(
    cfg: Config, stage: str, named: Iterable[tuple[str, nn.Parameter]], trusted: tuple[str, ...] = ()
) -> None:
    """Refuses groups that are left without parameters, and settings that the optimizer does not have."""
    where, node = f"stage.{stage}.param_groups", cfg["stage"][stage]
    grouped({name: p for name, p in named if p.requires_grad}, node["param_groups"], where)
    optimizer = build(node["optimizer"], where=f"stage.{stage}.optimizer", trusted=trusted)
    one = [nn.Parameter(torch.zeros(1))]
    for pattern, settings in node["param_groups"].items():
        known = optimizer(one).defaults
        for name in settings.keys() - known.keys():
            what = f"the optimizer has no setting {name!r}"
            braces = f"a part whose name has dots goes into braces: {where}={{{pattern}.{name}:{{...}}}}"
            hint = braces if isinstance(settings[name], dict) else nearest(name, known)
            raise LdmError("CONFIG", what, where=f"{where}.{pattern}", next=hint)
        try:
            optimizer(one, **settings)
        except (TypeError, ValueError, IndexError) as error:
            raise LdmError("CONFIG", f"{settings}: {error}", where=f"{where}.{pattern}") from error


def check_averages(cfg: Config) -> None:
    """Refuses averages that cannot be combined later: a revived code is another one from then on."""
    ema, every = cfg["stage"]["autoencoder"]["ema"], cfg["model"]["autoencoder"].get("revive_every")
    if ema and ema["lengths"] and every is not None:
        raise LdmError(
            "CONFIG",
            "snapshots of the averages cannot be combined where codes are revived: a code is then another one",
            where="stage.autoencoder.ema.lengths",
            next="leave it out, or set model.autoencoder.revive_every=null",
        )


def check_reconstruction(cfg: Config, trusted: tuple[str, ...] = ()) -> None:
    """Refuses an objective of the autoencoder whose files are missing or that cannot look at the pictures."""
    where = "stage.autoencoder.objective"
    objective = build(cfg["stage"]["autoencoder"]["objective"], where=where, trusted=trusted)
    bucket, side = cfg["data"].get("bucket") or {}, cfg["data"]["image_size"]
    if bucket.get("enable_bucket"):
        side = bucket.get("min_bucket_reso") or side // 2
        if bucket.get("bucket_no_upscale"):  # a small picture may have a bucket of its own
            side = bucket.get("bucket_reso_steps", Buckets.bucket_reso_steps)
    if isinstance(objective.perceptual, FeatureDistance):
        objective.perceptual.check_size(side, side)
    if objective.adversarial is None:
        return
    if cfg["stage"]["autoencoder"]["discriminator_optimizer"] is None:
        raise LdmError(
            "CONFIG",
            "a discriminator needs an optimizer",
            where="stage.autoencoder.discriminator_optimizer",
            next="adversarial=patchgan brings both",
        )
    start, steps = objective.adversarial.start_step, cfg["stage"]["autoencoder"]["max_steps"]
    if start >= steps:
        raise LdmError(
            "CONFIG",
            "the discriminator would start after the last step",
            where=f"{where}.adversarial.start_step",
            limit=f"start_step={start}, stage.autoencoder.max_steps={steps}",
            next=f"let the pixels settle first: {where}.adversarial.start_step={steps // 3}",
        )
    smallest = getattr(objective.adversarial.discriminator, "smallest", 1)
    if side < smallest:
        raise LdmError(
            "CONFIG",
            f"pictures of {side} pixels are too small for the discriminator",
            where=f"{where}.adversarial.discriminator.layers",
            limit=f"at least {smallest} pixels",
            next="take fewer layers: they halve what it needs",
        )


def check_sizes(cfg: Config, trusted: tuple[str, ...] = ()) -> None:
    """Refuses sizes of pictures that the autoencoder cannot encode. A UNet takes latents of every size."""
    bucket, size = cfg["data"].get("bucket") or {}, cfg["data"]["image_size"]
    with torch.device("meta"):
        factor = build(cfg["model"]["autoencoder"], where="model.autoencoder", trusted=trusted).downsampling
    if not bucket.get("enable_bucket"):
        if size % factor:  # `validate` has said so of ours, by their block_channels
            raise LdmError(
                "CONFIG",
                f"data.image_size={size} is not a multiple of the autoencoder's downsampling {factor}",
                next=f"set data.image_size={max(factor, round(size / factor) * factor)}",
            )
        return
    build(cfg["data"], where="data", trusted=trusted)  # has its own words about its settings
    step = bucket.get("bucket_reso_steps", Buckets.bucket_reso_steps)
    if step % factor:
        raise LdmError(
            "CONFIG",
            f"sides in steps of {step} are no multiples of the autoencoder's downsampling {factor}",
            where="data.bucket.bucket_reso_steps",
            next=f"set data.bucket.bucket_reso_steps={-(-step // factor) * factor}",
        )


def build_objective(cfg: Config, trusted: tuple[str, ...] = ()) -> Objective:
    """The objective that `scheduler` chooses; refuses parts that cannot work together, before anything is trained."""
    parts = build(cfg["scheduler"], where="scheduler", trusted=trusted)
    others = {"noise": parts["noise"], "distance": parts["loss"]}
    mask = {name: parts[name] for name in ("masked", "unmasked_weight")}
    try:
        objective = Objective(parts["timesteps"], parts["weighting"], **others, **mask)
        objective.check(parts["schedule"], parts["prediction"])
    except ValueError as error:
        raise LdmError("CONFIG", str(error), where="scheduler") from error
    return objective


def check_sampler(cfg: Config, trusted: tuple[str, ...] = ()) -> None:
    """Refuses a sampler that does not fit the schedule, before anything is trained."""
    schedule = build(cfg["scheduler"]["schedule"], where="scheduler.schedule", trusted=trusted)
    with torch.device("meta"):
        autoencoder = build(cfg["model"]["autoencoder"], where="model.autoencoder", trusted=trusted)
    side = cfg["data"]["image_size"] // autoencoder.downsampling
    build(cfg["sampler"], where="sampler", trusted=trusted).check(for_size(schedule, (side, side)))


def fixed_autoencoder(cfg: Config, trusted: tuple[str, ...] = ()) -> Identity | None:
    """The autoencoder if it has no weights: then it needs no stage, and its place is the denoiser's checkpoint."""
    node = cfg["model"]["autoencoder"]
    with torch.device("meta"):
        if any(True for _ in build(node, where="model.autoencoder", trusted=trusted).parameters()):
            return None
    return build(node, where="model.autoencoder", trusted=trusted)


def build_module(cfg: Config, trusted: tuple[str, ...], stage: str, folder: Path, precision: str = "32") -> StageModule:
    """The LightningModule of a stage, freshly initialised or with the weights of `init_from`."""
    node = cfg["stage"][stage]
    fixed = fixed_autoencoder(cfg, trusted) if stage == "diffusion" else None
    settings = StageSettings(
        max_steps=node["max_steps"],
        batch_size=node["batch_size"],
        optimizer=build(node["optimizer"], where=f"stage.{stage}.optimizer", trusted=trusted),
        lr_schedule=build(node["lr_schedule"], where=f"stage.{stage}.lr_schedule", trusted=trusted),
        ema=profiles_of(node["ema"], node["batch_size"]),
        accumulate=node["accumulate"],
        grad_clip=node["grad_clip"],
        precision=precision,
        seed=cfg["seed"],
        param_groups=node["param_groups"],
    )
    # initial weights are a function of seed and stage, whatever ran before in this process
    torch.manual_seed(int(fold(run_key(cfg["seed"]), Purpose.INIT, STAGES.index(stage))))
    source = source_of(cfg, stage)
    if stage == "autoencoder":
        autoencoder = build(cfg["model"]["autoencoder"], where="model.autoencoder", trusted=trusted)
        if source is not None:
            before = open_stage(source, stage)
            load_weights(autoencoder, read_weights(before, "ema"), before.path)
        objective = build(node["objective"], where="stage.autoencoder.objective", trusted=trusted)
        module = AutoencoderModule(
            settings,
            autoencoder,
            objective,
            to_saved(cfg["model"]["autoencoder"]),
            build(node["discriminator_optimizer"], where="stage.autoencoder.discriminator_optimizer", trusted=trusted),
            statistics_images=node["statistics_images"],
            decoder_only=decoder_only(cfg),
        )
        if source is not None:
            module.latent_source = before.document("state").get("latent_source")
        return module

    if stage == "features":
        model = build(cfg["model"]["features"], where="model.features", trusted=trusted)
        if source is not None:
            before = open_stage(source, stage)
            load_weights(model, read_weights(before, "ema"), before.path)
        return FeaturesModule(settings, model, to_saved(cfg["model"]["features"]))

    autoencoder = fixed if fixed is not None else trained_autoencoder(folder, trusted)
    scheduler = cfg["scheduler"]
    nodes = {
        "conditioner": cfg["model"]["conditioner"],
        "denoiser": {
            "_target_": "ldm.diffusion.denoiser.Denoiser",
            "network": cfg["model"]["network"],
            "schedule": scheduler["schedule"],
            "prediction": scheduler["prediction"],
        },
    }
    conditioner = build(nodes["conditioner"], where="model.conditioner", trusted=trusted)
    denoiser: Denoiser = build(nodes["denoiser"], where="model", trusted=trusted)
    sampler = dict(cfg["sampler"])
    model = LatentDiffusion(autoencoder, conditioner, denoiser, image_size=cfg["data"]["image_size"], sampler=sampler)
    if source is not None:
        load_source(model, open_stage(source, stage))
    saved_config = {
        **{key: to_saved(value) for key, value in nodes.items()},
        "image_size": cfg["data"]["image_size"],
        "sampler": sampler,
    }
    if fixed is not None:
        saved_config["autoencoder"] = to_saved(cfg["model"]["autoencoder"])
    return DiffusionModule(
        settings,
        model,
        build_objective(cfg, trusted),
        cache_latents_mb=node["cache_latents_mb"],
        saved_config=saved_config,
    )


def trained_autoencoder(folder: Path, trusted: tuple[str, ...] = ()) -> ConvolutionalAutoencoder:
    """The finished autoencoder of a run."""
    if not has_stage(folder, "autoencoder"):
        raise LdmError(
            "NO-AUTOENCODER",
            "the diffusion stage needs a trained autoencoder",
            where=str(folder / "autoencoder"),
            next="train both stages, stages=[autoencoder,diffusion], or take one with init_from=RUN",
        )
    return load_autoencoder(open_autoencoder(folder), trusted)
