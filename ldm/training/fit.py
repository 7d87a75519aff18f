"""The way of one training command: run folder, and the stages that are left, one after the other."""

from __future__ import annotations

import secrets
from pathlib import Path

from ldm.checkpoints.drift import compare
from ldm.checkpoints.run import Run, StagePaths, find_run, open_run
from ldm.checkpoints.store import Checkpoint, Store
from ldm.data.cache import Cache
from ldm.data.order import check_cut
from ldm.errors import LdmError
from ldm.training.acceleration import check_compiler
from ldm.training.assemble import check_parts, fixed_autoencoder
from ldm.training.finetune import adopt
from ldm.training.fingerprint import recorded_settings, settings_of
from ldm.training.group import hear_decision, join_group, losses_named, tell_decision
from ldm.training.place import Config, Place
from ldm.training.run_stage import run_stage
from ldm.training.signals import handling, leave_now


def train(cfg: Config, trusted: tuple[str, ...] = ()) -> None:
    """Trains the stages of a run that are left; the same command again continues it."""
    with handling(leave_now), losses_named():
        _train(cfg, trusted)


def _train(cfg: Config, trusted: tuple[str, ...]) -> None:
    from ldm.training.launch import launch, local_devices

    outer = Place.outer()
    if len(cfg["stages"]) != 1 and (outer is not None or cfg["resume"]["step"] is not None):
        raise LdmError(
            "STAGES",
            "under torchrun or SLURM, and with resume.step, give exactly one stage",
            where="stages",
            limit=f"given {list(cfg['stages'])}",
            next="stages=[autoencoder], then stages=[diffusion]",
        )
    check_compiler(cfg["trainer"])
    check_parts(cfg, trusted)
    world_size = outer.world_size if outer is not None else local_devices(cfg["trainer"])
    for stage in cfg["stages"]:
        check_cut(cfg["stage"][stage]["batch_size"], world_size, cfg["stage"][stage]["accumulate"])
    if cfg["init_from"]:
        find_run(cfg["init_from"], where="init_from")
    if "diffusion" in cfg["stages"] and cfg["data"].get("cache"):
        Cache.open(cfg["data"]["cache"])
    folder, resume = Path(cfg["output_dir"]) / cfg["name"], cfg["resume"]
    if outer is not None:
        outer.nodes_or(int(cfg["trainer"]["nodes"]))
        join_group(cfg["trainer"], outer)
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
            prepare_stage(cfg, run, existing, stage, trusted)
            if outer is not None or world_size == 1:
                tell_decision("train")
                run_stage(cfg, trusted, stage, folder, outer or Place())
            else:
                launch(cfg, trusted, stage, folder)


def is_finished(cfg: Config, checkpoint: Checkpoint | None, stage: str) -> bool:
    """True when the newest checkpoint says so; refuses settings that are not those it was trained with."""
    resume = cfg["resume"]
    if checkpoint is None or resume["mode"] == "never" or resume["step"] is not None:
        return False
    state = checkpoint.document("state")
    if not state["finished"]:
        return False
    compare(recorded_settings(checkpoint, stage), settings_of(cfg, stage), resume["allow"])
    return state["train_step"] >= cfg["stage"][stage]["max_steps"]


def prepare_stage(
    cfg: Config, run: Run, existing: Checkpoint | None, stage: str, trusted: tuple[str, ...] = ()
) -> None:
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
    if cfg["init_from"]:
        adopt(cfg, run, stage, has_autoencoder=fixed_autoencoder(cfg, trusted) is None)


def _existing(cfg: Config, paths: StagePaths) -> Checkpoint | None:
    return Store(paths.ckpt, verify=cfg["checkpoint"]["verify"]).newest(fallback=cfg["resume"]["fallback"])
