"""`python -m ldm ema RUN --length 0.05`: another average of a run's weights becomes a run of its own.

The new run holds the average as the weights of its one checkpoint, finished, at the step that it is of; what else a
model needs of RUN is taken along unchanged. Nothing of RUN changes, and it may be in training meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.build import build_saved
from ldm.checkpoints.run import StagePaths, find_run, has_stage, open_autoencoder, open_run, open_stage, write_config
from ldm.checkpoints.snapshots import Snapshots
from ldm.checkpoints.store import Checkpoint, Store
from ldm.errors import LdmError
from ldm.model import load_weights
from ldm.tools.ema_options import Options, parse
from ldm.tools.interchange import refuse_existing, whole
from ldm.training.ema import HalfLife
from ldm.training.finetune import adopt_autoencoder, adopt_denoiser
from ldm.training.posthoc import expressible, solve

Tensors = dict[str, Tensor]
_KEPT = ("latent_id", "latent_shape", "latent_mean", "latent_std", "latent_images", "latent_source", "versions")
_NOTHING = 1e-12  # of a weight: the file is not read for it


def main(argv: Sequence[str]) -> int:
    parsed = parse(argv)
    if parsed is not None:
        make_run(*parsed)
    return 0


def make_run(path: str | Path, options: Options, trusted: tuple[str, ...] = ()) -> Path:
    """Returns the new folder. Raises LdmError, and then nothing was written.   trusted: packages of the user's own."""
    run, stage = find_run(path), options.stage
    source = open_autoencoder(run) if stage == "autoencoder" else open_stage(run, stage)
    if options.length is not None:
        averages, about = combine(run, options, options.length)
        name = f"{run.resolve().name}-ema-{options.length:g}".replace(".", "-")
    else:
        assert options.half_life_images is not None
        averages, about = read_kept(run, options, options.half_life_images)
        name = f"{run.resolve().name}-ema-{options.half_life_images:.0f}-images"
    out = Path(options.out or name)
    out = out if len(out.parts) > 1 else run.resolve().parent / out
    refuse_existing(out)
    raw = source.tensors("model")
    if strange := [name for name, value in averages.items() if name not in raw or raw[name].shape != value.shape]:
        what = f"the average holds {strange[0]}, which the checkpoint does not hold in this shape"
        raise LdmError("SHAPE", what, where=str(source.path))
    tensors = {**raw, **{name: value.to(raw[name].dtype) for name, value in averages.items()}}
    write(run, stage, source, tensors, {"run": run.resolve().name, "stage": stage, **about}, out, trusted)
    print(f"{out}: a run of its own; RUN is unchanged")
    return out


# ---- where the average comes from


def combine(run: Path, options: Options, length: float) -> tuple[Tensors, dict[str, Any]]:
    """(the average of this length, where it comes from), from the snapshots of the power-function averages."""
    folder = StagePaths(run / options.stage).ema
    found = Snapshots(folder, verify="size").all()
    if not found:
        raise LdmError(
            "EMA",
            "the stage keeps no snapshots of averages",
            where=str(folder),
            next=f"train with stage.{options.stage}.ema.lengths=[0.05,0.1]: nothing brings back what is past",
        )
    steps = [snapshot.step for snapshot in found]
    if options.step is not None and options.step not in steps:
        raise LdmError(
            "EMA", f"there is no snapshot of step {options.step}", where=str(folder), limit=f"have: {_shown(steps)}",
            next="choose one of them, or leave step out for the last",
        )  # fmt: skip
    used = [snapshot for snapshot in found if snapshot.updates > 0 and snapshot.step <= (options.step or steps[-1])]
    if not used:
        raise LdmError("EMA", "no step was applied until this snapshot", where=str(folder), next="choose a later step")
    # two snapshots without an update between them hold the same
    files = {(s.updates, own): (s.step, name) for s in used for name, own in s.lengths.items()}
    updates = used[-1].updates
    solved = solve(list(files), updates, length)
    if solved.error > options.max_error:
        possible = expressible(list(files), updates, options.max_error)
        nearest = f"the nearest that they can is {min(possible, key=lambda p: abs(p - length)):g}; " if possible else ""
        have = f"lengths {_shown(sorted({own for _, own in files}))} at {len(used)} steps"
        raise LdmError(
            "EMA",
            f"the snapshots cannot express length {length:g}",
            where=str(folder),
            limit=f"relative error {solved.error:.2g}, at most {options.max_error:g}; they hold {have}",
            next=nearest
            + "a training with more lengths or a smaller snapshot_every gives more; max_error= accepts more",
        )
    parts = [
        {"step": files[key][0], "length": key[1], "weight": weight}
        for key, weight in zip(files, solved.weights, strict=True)
    ]
    print(f"length {length:g} of {options.stage} at step {used[-1].step}, from steps {_shown([s.step for s in used])}")
    total = sum(solved.weights)
    print(f"  {len(parts)} averages, sum of their weights {total:.6f}; predicted relative error {solved.error:.2e}")
    about = {
        "length": length, "step": used[-1].step, "updates": updates, "error": solved.error, "sum": total, "from": parts,
    }  # fmt: skip
    weights = {files[key]: weight for key, weight in zip(files, solved.weights, strict=True)}
    return weighted_sum(Snapshots(folder), weights), about


def weighted_sum(snapshots: Snapshots, weights: dict[tuple[int, str], float]) -> Tensors:
    """In float64, one file at a time.   weights: by (step, name of the file)."""
    total: Tensors = {}
    needed = {key: weight for key, weight in weights.items() if abs(weight) > _NOTHING}
    for step, group in groupby(sorted(needed), key=itemgetter(0)):
        checkpoint = snapshots.open(step)
        for key in group:
            for name, value in checkpoint.tensors(key[1]).items():
                total[name] = total.get(name, torch.zeros(())).double() + needed[key] * value.double()
    return {name: value.float() for name, value in total.items()}


def read_kept(run: Path, options: Options, images: float) -> tuple[Tensors, dict[str, Any]]:
    """(the average of this half-life, where it comes from): one that the checkpoint holds."""
    store = Store(StagePaths(run / options.stage).ckpt)
    checkpoint = store.load(options.step) if options.step is not None else open_stage(run, options.stage)
    state = checkpoint.document("state")
    given = state["fingerprint"].get(f"stage.{options.stage}.ema.half_life_images")
    names = [float(value) for value in (given if isinstance(given, list) else [given] if given else [])]
    if images not in names:
        raise LdmError(
            "EMA", f"the stage keeps no average of {images:g} images", where=str(checkpoint.path),
            limit=f"have: {_shown(names) or 'none'}",
            next=f"choose one of them, or length=; a new run keeps several: stage.{options.stage}.ema."
            f"half_life_images=[4000,{images:g}]",
        )  # fmt: skip
    file = "ema" if images == names[0] else f"ema_{HalfLife(images, 1).name}"
    about = {"half_life_images": images, "step": checkpoint.step, "updates": state["updates"]}
    print(f"half-life {images:g} images of {options.stage} at step {checkpoint.step}, as its checkpoint holds it")
    return checkpoint.tensors(file), about


# ---- the run


def write(
    run: Path,
    stage: str,
    source: Checkpoint,
    tensors: Tensors,
    about: dict[str, Any],
    out: Path,
    trusted: tuple[str, ...] = (),
) -> None:
    """The run folder, prepared beside its place."""
    config, before = source.document("config"), source.document("state")
    state = {key: before[key] for key in _KEPT if key in before}
    if stage == "autoencoder":
        autoencoder = build_saved(config["autoencoder"], where="config.json: autoencoder", trusted=trusted)
        load_weights(autoencoder, tensors, source.path)
        state["latent_id"] = autoencoder.latent_id()
        if state["latent_id"] != before["latent_id"]:
            state["latent_source"] = f"{before['latent_source']}; kept for this average"
            print("autoencoder: other latents than before: denoisers and caches of the old ones do not fit")
    # not the settings of a training: this run is begun from, and not continued
    fingerprint = {key: value for key, value in before["fingerprint"].items() if key == "data.image_size"}
    step = about["step"]
    state |= {"train_step": step, "finished": True, "fingerprint": fingerprint, "average": about}

    def fill(folder: Path) -> None:
        with open_run(folder, out.name) as new:
            documents = {"state": state, "config": config}
            Store(new.stage(stage).ckpt).save(step, tensors={"model": tensors}, trees={}, documents=documents)
            new.update_stage(stage)
            if stage == "diffusion" and has_stage(run, "autoencoder"):
                adopt_autoencoder(new, run)
            elif stage == "autoencoder":
                adopt_denoiser(new, run, state["latent_id"])
            if (run / "config.yaml").exists():
                write_config(new.folder, (run / "config.yaml").read_text())

    whole(out, fill)


def _shown(values: Sequence[float]) -> str:
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return ", ".join(texts if len(texts) <= 12 else [*texts[:3], "...", *texts[-2:]])
