"""What a training that begins from another run takes from it: `init_from`, its checks, and the stages it adopts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ldm.build import to_saved, with_defaults
from ldm.checkpoints.run import Run, find_run, has_stage, open_autoencoder, open_stage
from ldm.checkpoints.store import Checkpoint
from ldm.errors import LdmError
from ldm.training.place import Config

_MAY_DIFFER = ("revive_every",)  # arguments that change nothing of what weights compute


def check_source(cfg: Config, trusted: tuple[str, ...] = ()) -> None:
    """Refuses a run that the autoencoder's training cannot begin from, before anything is trained."""
    if not cfg["init_from"]:
        return
    run = find_run(cfg["init_from"], where="init_from")
    if "autoencoder" not in cfg["stages"]:
        return
    where = f"init_from={cfg['init_from']}"
    if not (run / "run.json").exists():
        hint = f"import it first: python -m ldm import {cfg['init_from']} runs/NAME"
        raise LdmError("RUN", "this is no run", where=where, next=hint)
    if not has_stage(run, "autoencoder") and has_stage(run, "diffusion"):
        hint = "name a run that has an autoencoder"
        raise LdmError("STAGES", "this run works on pixels: it has no autoencoder", where=where, next=hint)
    opened = (
        open_autoencoder(run, verify="size") if decoder_only(cfg) else open_stage(run, "autoencoder", verify="size")
    )
    check_same(cfg, opened, where, trusted)


def source_of(cfg: Config, stage: str) -> Path | None:
    """The run that the first weights of a stage come from. One with an autoencoder that never had a denoiser, as an
    imported autoencoder, gives the latents that a new denoiser is trained on.
    """
    if not cfg["init_from"]:
        return None
    run = find_run(cfg["init_from"], where="init_from")
    anew = stage == "diffusion" and has_stage(run, "autoencoder") and not (run / stage).exists()
    return None if anew else run


def decoder_only(cfg: Config) -> bool:
    """Whether the autoencoder's training leaves the latents as they are."""
    return cfg["stage"]["autoencoder"]["train"] == "decoder"


def check_same(cfg: Config, before: Checkpoint, where: str, trusted: tuple[str, ...] = ()) -> None:
    """Weights mean something in the network that they were trained in and in no other, even where shapes agree."""
    ours = with_defaults(to_saved(cfg["model"]["autoencoder"]), trusted)
    theirs = with_defaults(before.document("config")["autoencoder"], trusted)
    if ours["class"] != theirs["class"]:
        names = [node["class"].rpartition(".")[2] for node in (theirs, ours)]
        what = f"it holds an {names[0]}, and model.autoencoder is an {names[1]}"
        raise LdmError("SHAPE", what, where=where, next="choose the model/autoencoder that it was trained with")
    pairs = {key: (theirs["args"].get(key), ours["args"].get(key)) for key in {**theirs["args"], **ours["args"]}}
    differ = {key: pair for key, pair in pairs.items() if key not in _MAY_DIFFER and pair[0] != pair[1]}
    if differ:
        raise LdmError(
            "SHAPE",
            "model.autoencoder is not the autoencoder that it holds",
            where=where,
            limit="; ".join(
                f"{key} is {_shown(has)} there, {_shown(wants)} here" for key, (has, wants) in differ.items()
            ),
            next="set " + " ".join(f"model.autoencoder.{key}={_shown(has)}" for key, (has, _) in differ.items()),
        )


def _shown(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


# ---- adopting


def adopt(cfg: Config, run: Run, stage: str, *, has_autoencoder: bool) -> None:
    """Takes over what this run does not train itself, before `stage` is trained."""
    source = find_run(cfg["init_from"])
    if stage == "diffusion" and has_autoencoder:
        adopt_autoencoder(run, source)
    if source_of(cfg, stage) is None and not has_stage(run.folder, stage):
        print(f"{stage}: {source} has none to begin from: it begins anew", flush=True)
    if stage == "autoencoder" and decoder_only(cfg) and "diffusion" not in cfg["stages"]:
        adopt_denoiser(run, source, open_autoencoder(source).document("state")["latent_id"])


def adopt_autoencoder(run: Run, source: Path) -> None:
    """Takes the finished autoencoder of `source` into a run that has none, so that the run is complete on its own."""
    if has_stage(run.folder, "autoencoder"):
        return
    _take(run, open_autoencoder(source), "autoencoder", source)


def adopt_denoiser(run: Run, source: Path, latent_id: str) -> None:
    """Takes the finished denoiser of `source` into a run that trains a decoder for the same latents and has none,
    so that `sample.py` draws with both. One that did not finish is left out, which is said.
    """
    if has_stage(run.folder, "diffusion") or not has_stage(source, "diffusion"):
        return
    before = open_stage(source, "diffusion")
    state = before.document("state")
    if not state["finished"]:
        print(f"diffusion: not taken from {source}: its training did not finish", flush=True)
    elif state.get("latent_id") != latent_id:
        print(f"diffusion: not taken from {source}: it was trained on other latents", flush=True)
    else:
        _take(run, before, "diffusion", source)


def _take(run: Run, checkpoint: Checkpoint, stage: str, source: Path) -> None:
    """Committed files never change, and runs only ever remove their own names of them: links do."""
    target = run.stage(stage).ckpt
    temporary = target / f".tmp-{checkpoint.path.name}-{os.getpid()}"
    shutil.copytree(checkpoint.path, temporary, copy_function=_link_or_copy)
    temporary.rename(target / checkpoint.path.name)
    run.adopted.add(stage)
    print(f"{stage}: taken from {source} (step {checkpoint.step}), unchanged", flush=True)


def _link_or_copy(file: str, to: str) -> None:
    try:
        os.link(file, to, follow_symlinks=False)
    except OSError:  # another file system, or one without links, or a file that may not be linked
        shutil.copy2(file, to)
