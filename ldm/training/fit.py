"""The way of one training command: run folder, the stages that are left, one Trainer for each."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import signal
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.utilities.exceptions import SIGTERMException

from ldm.build import build, to_saved
from ldm.checkpoints.drift import compare, notes
from ldm.checkpoints.files import truncate_jsonl
from ldm.checkpoints.run import Run, StagePaths, find_run, open_run, redact
from ldm.checkpoints.store import Checkpoint, Store
from ldm.data.datamodule import DataModule
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import Objective
from ldm.errors import LdmError
from ldm.model import (
    LatentDiffusion,
    check_fit,
    load_autoencoder,
    load_pretrained,
    load_weights,
    open_stage,
    read_weights,
)
from ldm.models.autoencoder.identity import Identity
from ldm.models.autoencoder.kl import AutoencoderKL
from ldm.random import Purpose, fold, run_key
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.callbacks.checkpointing import Checkpointing
from ldm.training.callbacks.monitor import Monitor, choose_mode
from ldm.training.callbacks.progress import ProgressBar
from ldm.training.callbacks.recorder import Recorder, StopClock
from ldm.training.callbacks.samples import Samples
from ldm.training.callbacks.validation import Validation
from ldm.training.diffusion_module import DiffusionModule
from ldm.training.signals import StopOnSignal, Stopped, not_saved
from ldm.training.stage_module import StageModule, StageSettings
from ldm.training.step import per_device

STAGES = ("autoencoder", "diffusion")
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a process stands among those that train together."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def outer(cls) -> Place | None:
        """From torchrun or SLURM, when one of them started this process."""
        env = os.environ
        if "RANK" in env and "WORLD_SIZE" in env:
            return cls(int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"]))
        return None


def train(cfg: Config, trusted: tuple[str, ...] = ()) -> None:
    """Trains the stages of a run that are left; the same command again continues it."""
    from ldm.training.launch import launch, local_devices

    outer = Place.outer()
    if len(cfg["stages"]) != 1 and (outer is not None or cfg["resume"]["step"] is not None):
        raise LdmError(
            "STAGES",
            "under torchrun, and with resume.step, give exactly one stage",
            where="stages",
            limit=f"given {list(cfg['stages'])}",
            next="stages=[autoencoder], then stages=[diffusion]",
        )
    if "diffusion" in cfg["stages"]:
        build_objective(cfg, trusted)
        check_sampler(cfg, trusted)
    check_model(cfg, trusted)
    folder, resume = Path(cfg["output_dir"]) / cfg["name"], cfg["resume"]
    if outer is not None:
        join_group(cfg["trainer"])
        if outer.rank > 0:
            if hear_decision() == "train":
                run_stage(cfg, trusted, cfg["stages"][0], folder, outer)
            return
    with open_run(
        cfg["output_dir"], cfg["name"], steal_lock=resume["steal_lock"], trust_dir=resume["trust_dir"]
    ) as run:
        for stage in cfg["stages"]:
            existing = _existing(cfg, run.stage(stage))  # read and verified once
            if is_finished(cfg, existing, stage):
                print(f"{stage}: already finished, nothing to do", flush=True)
                tell_decision("nothing left")
                continue
            prepare_stage(cfg, run, existing, stage)
            run.write_config(json.dumps(cfg, indent=2))
            run.point_latest()
            if outer is not None or local_devices(cfg["trainer"]) == 1:
                tell_decision("train")
                run_stage(cfg, trusted, stage, folder, outer or Place())
            else:
                launch(cfg, trusted, stage, folder)


def build_objective(cfg: Config, trusted: tuple[str, ...] = ()) -> Objective:
    """The objective that `scheduler` chooses; refuses parts that cannot work together, before anything is trained."""
    parts = build(cfg["scheduler"], where="scheduler", trusted=trusted)
    objective = Objective(
        parts["timesteps"], parts["weighting"], noise=parts["noise"], distance=parts["loss"], masked=parts["masked"]
    )
    try:
        objective.check(parts["schedule"], parts["prediction"])
    except ValueError as error:
        raise LdmError("CONFIG", str(error), where="scheduler") from error
    return objective


def check_sampler(cfg: Config, trusted: tuple[str, ...] = ()) -> None:
    """Refuses a sampler that does not fit the schedule, before anything is trained."""
    schedule = build(cfg["scheduler"]["schedule"], where="scheduler.schedule", trusted=trusted)
    build(cfg["sampler"], where="sampler", trusted=trusted).check(schedule)


def check_model(cfg: Config, trusted: tuple[str, ...] = ()) -> None:
    """Refuses parts of the model that do not fit together or to the data, before anything is trained."""
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


def fixed_autoencoder(cfg: Config, trusted: tuple[str, ...] = ()) -> Identity | None:
    """The autoencoder if it has no weights: then it needs no stage, and its place is the denoiser's checkpoint."""
    node = cfg["model"]["autoencoder"]
    with torch.device("meta"):
        if any(True for _ in build(node, where="model.autoencoder", trusted=trusted).parameters()):
            return None
    return build(node, where="model.autoencoder", trusted=trusted)


def join_group(node: Config) -> None:
    """Under torchrun: all processes meet before rank 0 looks at the run folder, so that all begin at one step."""
    dist.init_process_group("nccl" if node["accelerator"] in ("gpu", "cuda") else "gloo")
    if dist.get_backend() == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


def tell_decision(decision: str) -> None:
    """From rank 0 to the others under torchrun; nothing to tell elsewhere."""
    if dist.is_available() and dist.is_initialized() and dist.get_rank() == 0:
        dist.broadcast_object_list([decision])


def hear_decision() -> str:
    heard: list[Any] = [None]
    dist.broadcast_object_list(heard)
    return heard[0]


def is_finished(cfg: Config, checkpoint: Checkpoint | None, stage: str) -> bool:
    """True when the newest checkpoint says so; refuses settings that are not those it was trained with."""
    resume = cfg["resume"]
    if checkpoint is None or resume["mode"] == "never" or resume["step"] is not None:
        return False
    state = checkpoint.document("state")
    if not state["finished"]:
        return False
    now = settings_of(cfg, stage)
    compare({key: state["fingerprint"].get(key, "absent") for key in now}, now, resume["allow"])
    return state["train_step"] >= cfg["stage"][stage]["max_steps"]


def prepare_stage(cfg: Config, run: Run, existing: Checkpoint | None, stage: str) -> None:
    """What only the owner of the run folder does, before any worker starts."""
    resume, paths = cfg["resume"], run.stage(stage)
    store = Store(paths.ckpt)
    if resume["mode"] not in ("auto", "must", "never"):
        raise LdmError("CONFIG", "resume.mode must be auto, must or never", where="resume.mode")
    if resume["mode"] == "must" and existing is None:
        raise LdmError("RESUME", f"there is nothing to resume in stage {stage!r}", where=str(paths.folder))
    if resume["mode"] == "never" and existing is not None:
        raise LdmError(
            "RESUME",
            "the run exists already",
            where=str(paths.folder),
            next="choose another name=, or continue it without resume.mode=never",
        )
    if resume["step"] is not None:
        if resume["step"] >= cfg["stage"][stage]["max_steps"]:
            raise LdmError(
                "RESUME",
                f"resume.step={resume['step']} is not before the end of the stage",
                limit=f"stage.{stage}.max_steps={cfg['stage'][stage]['max_steps']}",
                next="raise max_steps, or choose an earlier step",
            )
        newest = max(store.steps(), default=None)
        store.load(resume["step"])
        if newest is not None and newest > resume["step"]:
            if not resume["truncate"]:
                raise LdmError(
                    "RESUME",
                    f"step {resume['step']} is older than the newest checkpoint",
                    where=str(paths.ckpt),
                    limit=f"newest {newest}",
                    next="add resume.truncate=true to set the newer ones aside",
                )
            store.truncate(resume["step"])
    store.claim()
    if run.stage_record(stage)["wandb_id"] is None:
        run.update_stage(stage, wandb_id=secrets.token_hex(6))
    if stage == "diffusion" and cfg["init_from"] and fixed_autoencoder(cfg) is None:
        adopt_autoencoder(run, find_run(cfg["init_from"]))


def _existing(cfg: Config, paths: StagePaths) -> Checkpoint | None:
    return Store(paths.ckpt, verify=cfg["checkpoint"]["verify"]).newest(fallback=cfg["resume"]["fallback"])


def run_stage(cfg: Config, trusted: tuple[str, ...], stage: str, folder: Path, place: Place) -> None:
    """Trains one stage in this process, which may be one of several."""
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    settings_node = cfg["stage"][stage]
    paths = StagePaths(folder / stage)
    store = Store(
        paths.ckpt,
        keep_last=cfg["checkpoint"]["keep_last"],
        keep_every=cfg["checkpoint"]["keep_every"],
        keep_best=cfg["checkpoint"]["keep_best"],
        verify=cfg["checkpoint"]["verify"],
    )
    checkpoint = store.newest()
    micro_batch = per_device(settings_node["batch_size"], place.world_size, settings_node["accumulate"])

    precision = choose_precision(str(settings_node["precision"]), cfg["trainer"]["accelerator"])

    data: DataModule = build(cfg["data"], where="data", trusted=trusted)
    data.open()
    start_step = checkpoint.document("state")["train_step"] if checkpoint else 0
    data.configure(
        seed=cfg["seed"],
        batch_size=settings_node["batch_size"],
        accumulate=settings_node["accumulate"],
        rank=place.rank,
        world_size=place.world_size,
        start_step=start_step,
        num_workers=cfg["loader"]["num_workers"],
        timeout_s=cfg["loader"]["timeout_s"],
        pin_memory=cfg["trainer"]["accelerator"] in ("gpu", "cuda"),
        bad_samples_file=paths.bad_samples if place.rank == 0 else None,
    )
    module = build_module(cfg, trusted, stage, folder, precision)
    fingerprint = _fingerprint(cfg, stage, data, module)
    environment = {
        "precision": precision,
        "device": cfg["trainer"]["accelerator"],
        "world_size": place.world_size,
        "micro_batch": micro_batch,
        "threads": torch.get_num_threads(),
    }
    if checkpoint is not None:
        _check_drift(checkpoint, fingerprint, environment, cfg["resume"]["allow"], place)
        module.resume_from(checkpoint)
        data.ledger.load_state_dict(checkpoint.document("state")["bad_samples"])
    elif isinstance(module, DiffusionModule) and not cfg["init_from"]:
        load_pretrained(module.model.conditioner)
    if place.rank == 0:
        for log_file in (paths.metrics, paths.nonfinite):  # of a life that was cut off after its last save
            truncate_jsonl(log_file, "train/step", start_step)
        if checkpoint is not None:
            print(f"{stage}: continuing at step {start_step}", flush=True)
    if place.rank == 0:
        _announce(stage, module, settings_node, place, micro_batch, data)

    monitor = _monitor(cfg, stage, folder) if place.rank == 0 else None
    validation = Validation(settings_node["validate_every"])
    samples = Samples(
        settings_node["sample_every"],
        paths.samples,
        prompts=settings_node.get("sample_prompts"),
        columns=settings_node.get("sample_columns"),
        sampling=build(cfg["sampler"], where="sampler", trusted=trusted) if stage == "diffusion" else None,
    )
    recorder = Recorder(paths, validation, samples, monitor)
    stop = StopOnSignal(module)
    checkpointing = Checkpointing(
        store,
        validation,
        save_every=settings_node["save_every"],
        every_minutes=cfg["checkpoint"]["every_minutes"],
        max_failed_saves=cfg["checkpoint"]["max_failed_saves"],
        fingerprint=fingerprint,
        environment=environment,
    )
    callbacks = [StopClock(recorder), validation, samples, recorder, ProgressBar(recorder), checkpointing, stop]
    trainer = make_trainer(cfg["trainer"], precision, callbacks, folder, place)
    try:
        trainer.fit(module, datamodule=data)
    except SIGTERMException as error:  # Lightning's own handler, between its registration and ours
        raise not_saved(signal.SIGTERM) from error
    finally:
        stop.restore()
        if monitor is not None:
            monitor.close(timeout_s=30.0 if stop.received is None else 5.0)
    if stop.received is not None:
        raise Stopped(stop.received, module.step.train_step)


def choose_precision(wanted: str, accelerator: str) -> str:
    """ "auto": bfloat16 where the hardware computes in it, else float32."""
    if wanted != "auto":
        return wanted
    if accelerator in ("gpu", "cuda"):
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32"


def make_trainer(node: Config, precision: str, callbacks: list[pl.Callback], folder: Path, place: Place) -> pl.Trainer:
    """Lightning for the loop, the devices and autocast; clock, steps, checkpoints, logs and bar are ours."""
    plugins: list[Any] = []
    device = "cuda" if node["accelerator"] in ("gpu", "cuda") else "cpu"
    if precision == "16-mixed":
        # our own scaler: Lightning's would unscale only inside optimizer.step(), after the norm was taken
        plugins.append(MixedPrecision("16-mixed", device, scaler=torch.amp.GradScaler(device, enabled=False)))
    strategy: Any = node["strategy"]
    if place.world_size > 1:
        from ldm.training.launch import environment_plugin

        plugins.append(environment_plugin())
        if strategy in ("auto", "ddp"):
            from pytorch_lightning.strategies import DDPStrategy

            strategy = DDPStrategy(
                process_group_backend="nccl" if device == "cuda" else "gloo",
                find_unused_parameters=False,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
    nodes = int(node["nodes"])
    options: dict[str, Any] = {"plugins": plugins} if plugins else {}
    if precision != "16-mixed":
        options["precision"] = "32-true" if precision == "32" else precision
    return pl.Trainer(
        accelerator=node["accelerator"],
        devices=place.world_size // nodes if place.world_size > 1 else 1,
        num_nodes=nodes,
        strategy=strategy,
        **options,
        max_steps=-1,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=callbacks,
        default_root_dir=str(folder),
        inference_mode=False,
    )


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
    source = find_run(cfg["init_from"]) if cfg["init_from"] else None
    if stage == "autoencoder":
        autoencoder = build(cfg["model"]["autoencoder"], where="model.autoencoder", trusted=trusted)
        if source is not None:
            before = open_stage(source, stage)
            load_weights(autoencoder, read_weights(before, "ema"), before.path)
        objective = build(node["objective"], where="stage.autoencoder.objective", trusted=trusted)
        return AutoencoderModule(settings, autoencoder, objective, to_saved(cfg["model"]["autoencoder"]))

    autoencoder = fixed if fixed is not None else trained_autoencoder(folder)
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
        before = open_stage(source, stage)
        weights = read_weights(before, "ema")
        load_weights(model, weights, before.path, ignore="autoencoder.")
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


def trained_autoencoder(folder: Path) -> AutoencoderKL:
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
    return load_autoencoder(trained)


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


def settings_of(cfg: Config, stage: str) -> dict[str, Any]:
    """The settings that decide what a step computes; what depends on hardware is not among them."""
    node = cfg["stage"][stage]
    flat: dict[str, Any] = {"seed": cfg["seed"]}
    for key in ("image_size", "crop", "flip_prob", "upscale", "background", "caption_prefix", "caption_suffix"):
        flat[f"data.{key}"] = cfg["data"].get(key)
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
    return flat


def _fingerprint(cfg: Config, stage: str, data: DataModule, module: StageModule) -> dict[str, Any]:
    """The settings, and the data and latents that were found."""
    flat = settings_of(cfg, stage)
    _flatten(flat, "data", data.order_fingerprint)
    if isinstance(module, DiffusionModule):
        flat["latent_id"] = module.latent_id
    return flat


def _flatten(flat: dict[str, Any], prefix: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, child in value.items():
            _flatten(flat, f"{prefix}.{key}", child)
    else:
        flat[prefix] = value


def _check_drift(
    checkpoint: Checkpoint, fingerprint: Config, environment: Config, allow: list[str], place: Place
) -> None:
    state = checkpoint.document("state")
    said = compare(state["fingerprint"], fingerprint, allow) + notes(state["environment"], environment)
    if place.rank == 0:
        for line in said:
            print(f"resume: {line}", flush=True)


def _announce(stage: str, module: StageModule, node: Config, place: Place, micro_batch: int, data: DataModule) -> None:
    count = sum(p.numel() for p in module.trained().parameters() if p.requires_grad)
    print(
        f"{stage}: {count / 1e6:.1f} M parameters, {data.num_train} training and {data.num_val} validation pictures, "
        f"{node['max_steps']} steps of {node['batch_size']} images "
        f"({place.world_size} x {micro_batch} x {node['accumulate']}), precision {module.settings.precision}",
        flush=True,
    )


def _monitor(cfg: Config, stage: str, folder: Path) -> Monitor | None:
    mode = choose_mode(cfg["logger"]["mode"])
    if mode == "disabled":
        return None
    record = json.loads((folder / "run.json").read_text())
    return Monitor(
        mode=mode,
        project=cfg["logger"]["project"],
        name=cfg["name"],
        stage=stage,
        run_id=record["stages"][stage]["wandb_id"],
        folder=folder / stage,
        config=redact(dict(cfg)),
    )
