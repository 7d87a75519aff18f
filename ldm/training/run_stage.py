"""Trains one stage in this process: data, module, callbacks and one Trainer."""

from __future__ import annotations

import json
import logging
import signal
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.utilities.exceptions import SIGTERMException

from ldm.build import build
from ldm.checkpoints.files import truncate_jsonl
from ldm.checkpoints.run import StagePaths, redact
from ldm.checkpoints.snapshots import Snapshots
from ldm.checkpoints.store import Store
from ldm.data.bad_samples import in_words
from ldm.data.cache import Cache
from ldm.data.datamodule import DataModule
from ldm.data.index import BAD_KINDS
from ldm.data.order import efficient_sizes
from ldm.model import load_pretrained
from ldm.precompute.statistics import chosen_images
from ldm.training.acceleration import accelerate
from ldm.training.assemble import build_module
from ldm.training.callbacks.alarms import Alarms
from ldm.training.callbacks.autoencoder_alarms import AutoencoderAlarms
from ldm.training.callbacks.average_snapshots import AverageSnapshots
from ldm.training.callbacks.checkpointing import VERSIONS, Checkpointing
from ldm.training.callbacks.monitor import Monitor, choose_mode
from ldm.training.callbacks.movement import Movement
from ldm.training.callbacks.progress import ProgressBar
from ldm.training.callbacks.recorder import Begin, Recorder, StopClock
from ldm.training.callbacks.samples import Samples
from ldm.training.callbacks.validation import Validation
from ldm.training.diffusion_module import DiffusionModule
from ldm.training.finetune import source_of
from ldm.training.fingerprint import check_drift, fingerprint_of
from ldm.training.group import START_TIMEOUT, Joined, Timeouts, check_agreement, leave_together
from ldm.training.place import Config, Place
from ldm.training.signals import StopOnSignal, Stopped, not_saved
from ldm.training.stage_module import StageModule
from ldm.training.step import per_device


def run_stage(cfg: Config, trusted: tuple[str, ...], stage: str, folder: Path, place: Place) -> None:
    """Trains one stage in this process, which may be one of several."""
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
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
    if stage == "autoencoder":  # refused now, not after the last step
        chosen_images(data.num_train, settings_node["statistics_images"])
    if checkpoint is not None and data.lanes is None:  # what was chosen then, whatever would be chosen now
        lanes = checkpoint.document("state")["fingerprint"].get("data.lanes")
        data.lanes = lanes if lanes and settings_node["batch_size"] % lanes == 0 else None
    start_step = checkpoint.document("state")["train_step"] if checkpoint else 0
    data.configure(
        seed=cfg["seed"],
        batch_size=settings_node["batch_size"],
        accumulate=settings_node["accumulate"],
        rank=place.rank,
        world_size=place.world_size,
        ranks_here=place.world_size // place.nodes_or(int(cfg["trainer"]["nodes"])),
        start_step=start_step,
        num_workers=cfg["loader"]["num_workers"],
        timeout_s=cfg["loader"]["timeout_s"],
        pin_memory=cfg["trainer"]["accelerator"] in ("gpu", "cuda"),
        bad_samples_file=paths.bad_samples,
    )
    module = build_module(cfg, trusted, stage, folder, precision)
    cache = Cache.open(data.cache) if data.cache and isinstance(module, DiffusionModule) else None
    fingerprint = fingerprint_of(cfg, stage, data, module)
    environment = {
        "precision": precision,
        "device": cfg["trainer"]["accelerator"],
        "world_size": place.world_size,
        "micro_batch": micro_batch,
        "threads": torch.get_num_threads(),
    }
    environment |= {key: True for key in ("compile", "channels_last") if cfg["trainer"][key]}
    if cache is not None and cache.about["dtype"] != "float32":
        environment["latents"] = f"of a cache in {cache.about['dtype']}"
    settings = {key: value for key, value in cfg.items() if key not in ("data", "logger", "traceback")}
    check_agreement(settings=settings, training=fingerprint, versions=VERSIONS)
    if checkpoint is not None:
        check_drift(checkpoint, stage, fingerprint, environment, cfg["resume"]["allow"], place)
        module.resume_from(checkpoint)
        data.ledger.load_state_dict(checkpoint.document("state")["bad_samples"])
    elif source_of(cfg, stage) is None:
        load_pretrained(module.trained())
    accelerate(module.networks(), cfg["trainer"])
    if cache is not None and isinstance(module, DiffusionModule):
        module.use_cache(cache, data, trusted)
    if place.rank == 0:
        for log_file in (paths.metrics, paths.nonfinite, paths.alarms):  # of a life cut off after its last save
            truncate_jsonl(log_file, "train/step", start_step)
        Snapshots(paths.ema).begin(start_step)
        if checkpoint is not None:
            print(f"{stage}: continuing at step {start_step}", flush=True)
    if place.rank == 0:
        _announce(stage, module, settings_node, place, micro_batch, data)
        if (buckets := data.bucket_report()) is not None:
            print(f"{stage}: {buckets}", flush=True)

    monitor = _monitor(cfg, stage, folder) if place.rank == 0 else None
    validation = Validation(settings_node["validate_every"])
    samples = Samples(
        settings_node.get("sample_every"),
        paths.samples,
        prompts=settings_node.get("sample_prompts"),
        columns=settings_node.get("sample_columns"),
        sampling=build(cfg["sampler"], where="sampler", trusted=trusted) if stage == "diffusion" else None,
    )
    recorder = Recorder(paths, validation, samples, monitor)
    stop = StopOnSignal(module, only_process=place.world_size == 1)
    checkpointing = Checkpointing(
        store,
        validation,
        save_every=settings_node["save_every"],
        every_minutes=cfg["checkpoint"]["every_minutes"],
        max_failed_saves=cfg["checkpoint"]["max_failed_saves"],
        async_save=cfg["checkpoint"]["async_save"],
        grace_s=float(cfg["checkpoint"]["grace_s"]),
        fingerprint=fingerprint,
        environment=environment,
    )
    begin = Begin(folder, cfg)
    callbacks = [begin, StopClock(recorder), validation, samples, recorder, ProgressBar(recorder), checkpointing, stop]
    callbacks.insert(0, Timeouts())
    alarms = _alarms(stage, settings_node["alarms"], paths, validation)
    watching = [Movement(alarms)] if alarms is None else [alarms, Movement(alarms)]
    place_of = callbacks.index(checkpointing)
    callbacks[place_of:place_of] = watching  # before a checkpoint of what they find
    if (ema := settings_node["ema"]) is not None and ema["lengths"]:  # before the checkpoint of the same step
        averages = AverageSnapshots(Snapshots(paths.ema), ema["snapshot_every"], getattr(torch, ema["snapshot_dtype"]))
        callbacks.insert(callbacks.index(checkpointing), averages)
    trainer = make_trainer(cfg["trainer"], precision, callbacks, folder, place)
    well = False
    try:
        try:
            trainer.fit(module, datamodule=data)
            well = stop.received is None
        except SIGTERMException as error:  # Lightning's own handler, between its registration and ours
            raise not_saved(signal.SIGTERM) from error
        finally:
            if monitor is not None:
                monitor.close(timeout_s=30.0 if well else 5.0)
        if place.rank == 0:
            _summarise(stage, data, checkpointing.bad_samples["counts"], recorder.captions_cut, paths)
        number = leave_together(stop.received)
    finally:
        stop.restore()
    if number is not None:
        raise Stopped(number, module.step.train_step)


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
    nodes = place.nodes_or(int(node["nodes"]))
    plugins.append(Joined(place, nodes))
    strategy: Any = node["strategy"]
    if place.world_size > 1 and strategy in ("auto", "ddp"):
        from pytorch_lightning.strategies import DDPStrategy

        strategy = DDPStrategy(
            process_group_backend="nccl" if device == "cuda" else "gloo",
            timeout=START_TIMEOUT,
            find_unused_parameters=False,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    options: dict[str, Any] = {"plugins": plugins}
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


def _announce(stage: str, module: StageModule, node: Config, place: Place, micro_batch: int, data: DataModule) -> None:
    count = sum(p.numel() for p in module.trained().parameters() if p.requires_grad)
    own = [f"{pattern} {group['lr']:g}" for pattern, group in node["param_groups"].items() if "lr" in group]
    rate = f"{node['optimizer']['lr']:g}" + (f" (but {', '.join(own)})" if own else "")
    print(
        f"{stage}: {count / 1e6:.1f} M parameters, {data.num_train} training and {data.num_val} validation pictures, "
        f"{node['max_steps']} steps of {node['batch_size']} images "
        f"({place.world_size} x {micro_batch} x {node['accumulate']}), learning rate {rate}, "
        f"precision {module.settings.precision}",
        flush=True,
    )
    lanes = data.order_fingerprint["lanes"]
    if place.world_size not in (sizes := efficient_sizes(node["batch_size"], lanes, node["accumulate"])):
        print(
            f"{stage}: {place.world_size} processes do not fit {lanes} lanes: some read what they do not need; "
            f"{', '.join(map(str, sizes))} would not (docs/scaling.md)",
            flush=True,
        )


def _summarise(stage: str, data: DataModule, met: Mapping[str, int], cut: int, paths: StagePaths) -> None:
    """One line about the data where anything was wrong with them; silence where all was well."""
    left_out = {kind: count for kind, count in data.problems.items() if kind in BAD_KINDS}
    facts = [f"{sum(left_out.values())} left out by the index ({in_words(left_out)})"] if left_out else []
    facts += [f"{sum(met.values())} met in training and replaced ({in_words(met)})"] if met else []
    said = [f"bad samples: {', '.join(facts)}; named in {paths.bad_samples}"] if facts else []
    said += [f"{cut} captions were longer than the text encoder reads and were cut"] if cut else []
    if said:
        print(f"{stage}: {'; '.join(said)}", flush=True)


def _alarms(stage: str, policy: str | None, paths: StagePaths, validation: Validation) -> Alarms | None:
    if policy is None:
        return None
    if stage == "autoencoder":
        return AutoencoderAlarms(paths.alarms, validation, policy, paths.metrics)
    return Alarms(paths.alarms, policy, paths.metrics)


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
