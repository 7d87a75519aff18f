"""The parts of a stage, built from its configuration and checked against each other before anything is trained."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from ldm.build import build, to_saved
from ldm.checkpoints.run import Run, find_run
from ldm.checkpoints.store import Store
from ldm.data.buckets import Buckets
from ldm.data.columns import checked, kind_of
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import Objective
from ldm.diffusion.schedule import for_size
from ldm.errors import LdmError
from ldm.model import LatentDiffusion, check_fit, load_autoencoder, load_source, load_weights, open_stage, read_weights
from ldm.models.autoencoder.identity import Identity
from ldm.models.autoencoder.kl import AutoencoderKL
from ldm.random import Purpose, fold, run_key
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.diffusion_module import DiffusionModule
from ldm.training.place import Config
from ldm.training.stage_module import StageModule, StageSettings

STAGES = ("autoencoder", "diffusion")


def check_parts(cfg: Config, trusted: tuple[str, ...] = ()) -> None:
    """Refuses parts that cannot work together, before anything is trained: what `train.py` and `ldm doctor` ask."""
    if "diffusion" in cfg["stages"]:
        build_objective(cfg, trusted)
        check_sampler(cfg, trusted)
    check_model(cfg, trusted)


def check_model(cfg: Config, trusted: tuple[str, ...] = ()) -> None:
    """Refuses parts of the model that do not fit together or to the data, before anything is trained."""
    check_buckets(cfg, trusted)
    if "autoencoder" in cfg["stages"] and fixed_autoencoder(cfg, trusted) is not None:
        raise LdmError("STAGES", "this autoencoder has nothing to train", where="stages", next="set stages=[diffusion]")
    if "diffusion" not in cfg["stages"]:
        return
    model = cfg["model"]
    with torch.device("meta"):
        autoencoder, network, conditioner = (
            build(model[key], where=f"model.{key}", trusted=trusted)
            for key in ("autoencoder", "network", "conditioner")
        )
    check_fit(autoencoder, conditioner, network)
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


def check_buckets(cfg: Config, trusted: tuple[str, ...] = ()) -> None:
    """Refuses sizes of pictures that the autoencoder cannot encode. A UNet takes latents of every size."""
    bucket = cfg["data"].get("bucket") or {}
    if not bucket.get("enable_bucket"):
        return
    with torch.device("meta"):
        factor = build(cfg["model"]["autoencoder"], where="model.autoencoder", trusted=trusted).downsampling
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
        ema_half_life_images=node["ema"]["half_life_images"] if node["ema"] else None,
        accumulate=node["accumulate"],
        grad_clip=node["grad_clip"],
        precision=precision,
        seed=cfg["seed"],
    )
    # initial weights are a function of seed and stage, whatever ran before in this process
    torch.manual_seed(int(fold(run_key(cfg["seed"]), Purpose.INIT, STAGES.index(stage))))
    source = find_run(cfg["init_from"], where="init_from") if cfg["init_from"] else None
    if stage == "autoencoder":
        autoencoder = build(cfg["model"]["autoencoder"], where="model.autoencoder", trusted=trusted)
        if source is not None:
            before = open_stage(source, stage)
            load_weights(autoencoder, read_weights(before, "ema"), before.path)
        objective = build(node["objective"], where="stage.autoencoder.objective", trusted=trusted)
        return AutoencoderModule(settings, autoencoder, objective, to_saved(cfg["model"]["autoencoder"]))

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


def trained_autoencoder(folder: Path, trusted: tuple[str, ...] = ()) -> AutoencoderKL:
    """The finished autoencoder of a run."""
    if not Store(folder / "autoencoder" / "ckpt").steps():
        raise LdmError(
            "NO-AUTOENCODER",
            "the diffusion stage needs a trained autoencoder",
            where=str(folder / "autoencoder"),
            next="train both stages, stages=[autoencoder,diffusion], or take one with init_from=RUN",
        )
    trained = open_stage(folder, "autoencoder")
    if not trained.document("state")["finished"]:
        raise LdmError(
            "LATENTS",
            "the training of the autoencoder did not finish: it has no latent statistics yet",
            where=str(folder / "autoencoder"),
            next=f"finish it: python train.py name={folder.name} stages=[autoencoder]",
        )
    return load_autoencoder(trained, trusted)


def adopt_autoencoder(run: Run, source: Path) -> None:
    """Copies the finished autoencoder of `source` into a run that has none, so that the run is complete on its own."""
    target = run.stage("autoencoder").ckpt
    if Store(target).steps():
        return
    before = open_stage(source, "autoencoder")
    temporary = target / f".tmp-{before.path.name}-{os.getpid()}"
    shutil.copytree(before.path, temporary)
    temporary.rename(target / before.path.name)
    print(f"autoencoder: taken from {source} (step {before.step}), unchanged", flush=True)
