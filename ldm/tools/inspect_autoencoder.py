"""`python -m ldm inspect-autoencoder CHECKPOINT DATA [CHECKPOINT ...]`: is this autoencoder good enough for my images?

Every picture is encoded and decoded by every candidate; what is found goes to the terminal and to one page. Exit code 0
whatever the verdict.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ldm.checkpoints import files
from ldm.checkpoints.run import find_run, has_stage, open_stage
from ldm.checkpoints.store import Checkpoint, Store
from ldm.config import CONFIGS
from ldm.data.datamodule import DataModule
from ldm.data.index import BAD_KINDS
from ldm.errors import OK, LdmError
from ldm.evaluation.fitness import Candidate, Features, check_size, choose, measure, show
from ldm.evaluation.fitness_page import MARK, Report, page
from ldm.evaluation.fitness_verdict import judge
from ldm.model import load_autoencoder
from ldm.tools.inspect_autoencoder_options import PAGE, Words, parse
from ldm.tools.inspect_autoencoder_view import show_report
from ldm.tools.pool import progress
from ldm.tools.samples import own_words

_FOREIGN = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
NO_FEATURES = (
    "not measured: no network was given. features=RUN takes the image tower of a run of experiment=features_toy, "
    "lpips=FILE torchvision's VGG16."
)


def main(argv: Sequence[str]) -> int:
    words = parse(argv)
    if words is None:
        return OK
    with own_words():
        opened = [Opened(path, words.trusted) for path in words.checkpoints]
        out = Path(words.options.out) if words.options.out else opened[0].run / PAGE
        check_place(out)
        report = inspect(words, opened)
    write(out, page(report))
    show_report(report, str(out))
    return OK


class Opened:
    """A CHECKPOINT of the command line.

    run: its folder.   checkpoint: the one read.   newest: whether the run has no later one.   node: the autoencoder's
    description.   image_size: of the pictures it was trained on, or None.   Raises LdmError if there is no autoencoder.
    """

    def __init__(self, path: str, trusted: tuple[str, ...] = ()) -> None:
        self.path = path
        self.run, self.checkpoint = _open(path)
        self.newest = self.checkpoint.step == max(Store(self.run / "autoencoder" / "ckpt").steps())
        self.node = self.checkpoint.document("config")["autoencoder"]
        self.autoencoder = load_autoencoder(self.checkpoint, trusted)
        self.image_size = _image_size(self.run)
        if self.autoencoder.in_channels != 3:
            what = f"the autoencoder takes pictures of {self.autoencoder.in_channels} channels"
            raise LdmError("SHAPE", what, where=path, limit="3 are looked at here")

    @property
    def finished(self) -> bool:
        return bool(self.checkpoint.document("state")["finished"])

    @property
    def has_statistics(self) -> bool:
        return self.finished or self.checkpoint.document("state").get("latent_source") is not None

    @property
    def about(self) -> dict[str, str]:
        state = self.checkpoint.document("state")
        done = "" if self.finished else ", not finished"
        size = sum(p.numel() for p in self.autoencoder.parameters()) / 1e6
        step = "imported" if "imported" in state else f"step {self.checkpoint.step}{done}"
        return {"checkpoint": step, "parameters": f"{size:.1f} M", "latent_id": self.autoencoder.latent_id()[:12]}


def inspect(words: Words, opened: Sequence[Opened]) -> Report:
    """Measures and judges. Raises LdmError."""
    options = words.options
    size = options.image_size or _common_size(opened)
    names = _names(opened)
    candidates = [
        Candidate(name, one.autoencoder, command(one), one.about, one.finished, one.has_statistics)
        for name, one in zip(names, opened, strict=True)
    ]
    for candidate in candidates:
        check_size(candidate, (size, size))
    device = _device(options.device)
    features = _features(words)
    data = DataModule(
        words.data,
        image_size=size,
        crop=options.crop,
        val_fraction=options.val_fraction,
        max_val_samples=10**9,
        on_missing_caption="empty",  # no caption is read
        max_bad_fraction=1.0,  # counted in the report instead
        index_dir=options.index_dir,
    )
    data.open().configure(seed=0, batch_size=1, num_workers=options.workers, pin_memory=device.type == "cuda")
    split = options.split or ("val" if data.num_val else "train")
    total = data.dataset(split).num_samples
    ids = np.unique(np.linspace(0, total - 1, min(total, options.max_samples)).round().astype(np.int64))
    for module in (*(c.autoencoder for c in candidates), features):
        if isinstance(module, torch.nn.Module):
            module.to(device)
    stream = data.encode_dataloader(split, options.batch_size, chosen=ids)
    with progress("encoding and decoding", len(ids)) as done:
        originals, fitness = measure(candidates, stream, len(ids), features=features, device=device, done=done)
    data_words = f"{_data_words(data, words.data)} data.crop={options.crop}"
    verdicts = [judge(c, f, originals, data_words) for c, f in zip(candidates, fitness, strict=True)]
    worst, typical = choose(fitness, options.pictures)
    chosen = ids[originals.slots[[*worst, *typical]]]
    shown = []
    if len(chosen):
        shown = show(candidates, data.encode_dataloader(split, options.batch_size, chosen=chosen), device)
    return Report(
        candidates,
        fitness,
        verdicts,
        originals,
        shown[: len(worst)],
        shown[len(worst) :],
        data=[
            ("data", words.data),
            ("pictures", f"{len(originals.keys):,} of {total:,}, {split}, {size}x{size}"),
        ],
        features=NO_FEATURES if features is None else _about(features, len(originals.keys)),
        cautions=_cautions(split, opened, len(originals.keys)),
        left_out={k: n for k, n in data.problems.items() if k in BAD_KINDS and k != "caption_missing"},
    )


# ---- checkpoints


def _open(path: str) -> tuple[Path, Checkpoint]:
    """(run folder, checkpoint of the autoencoder): of a run, of its stage's folder, or of one step."""
    place = Path(path)
    if re.fullmatch(r"step-\d{9,}", place.name) and place.parent.name == "ckpt":
        stage = place.absolute().parent.parent
        if stage.name != "autoencoder":
            what = f"this is a checkpoint of the stage {stage.name!r}"
            raise LdmError("NO-AUTOENCODER", what, where=path, next="name a run, or a step of its stage autoencoder")
        return stage.parent, Store(stage / "ckpt").load(int(place.name.removeprefix("step-")))
    if place.name == "autoencoder" and (place / "ckpt").is_dir():
        place = place.parent
    run = find_run(place, where="CHECKPOINT")
    if run.suffix in _FOREIGN or (run.is_dir() and not (run / "run.json").exists() and _is_foreign(run)):
        hint = f"import it first: python -m ldm import {path} runs/NAME"
        raise LdmError("RUN", "this is no run", where=path, next=hint)
    if not has_stage(run, "autoencoder") and has_stage(run, "diffusion"):
        what = "this run works on pixels: it has no autoencoder, and loses nothing"
        raise LdmError("NO-AUTOENCODER", what, where=path, next="name a run that has an autoencoder")
    return run, open_stage(run, "autoencoder")


def _is_foreign(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("model_index.json", "config.json", "vae"))


def _recorded(run: Path) -> Mapping[str, Any]:
    """The configuration that the run was started with; empty where there is none that can be read."""
    try:
        found = yaml.safe_load((run / "config.yaml").read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _image_size(run: Path) -> int | None:
    data = _recorded(run).get("data")
    size = data.get("image_size") if isinstance(data, dict) else None
    return size if isinstance(size, int) else None


def _common_size(opened: Sequence[Opened]) -> int:
    sizes = {one.path: one.image_size for one in opened}
    if len(set(sizes.values())) == 1 and (size := opened[0].image_size) is not None:
        return size
    words = ", ".join(f"{path} {size or 'unknown'}" for path, size in sizes.items())
    many = len(sizes) > 1
    what = "the checkpoints were trained on pictures of different sizes" if many else "the size is not recorded"
    largest = max((size for size in sizes.values() if size), default=256)
    raise LdmError("SIZE", what, where="image_size", limit=words, next=f"say which: image_size={largest}")


def _names(opened: Sequence[Opened]) -> list[str]:
    """The runs' names where they differ, with the step, or else the paths; each once."""
    for names in (
        [one.run.resolve().name for one in opened],
        [f"{one.run.resolve().name} {one.checkpoint.step}" for one in opened],
        [one.path for one in opened],
    ):
        if len(set(names)) == len(names):
            return names
    twice = next(name for name in names if names.count(name) > 1)
    raise LdmError("CONFIG", "a checkpoint is given twice", where=twice, next="name each once")


def command(one: Opened) -> str:
    """What train.py needs to go on from this autoencoder: its run, and the same architecture. Nothing for a step that
    is not the newest: `init_from` takes the newest."""
    if not one.newest:
        return ""
    run = str(one.run)
    tuned = f"{one.run.resolve().name}-tuned"
    name = tuned if re.fullmatch(r"[a-z0-9_-]{1,64}", tuned) else "tuned"
    return f"init_from={shlex.quote(run)} name={name} {architecture(one.node)}"


def architecture(node: Mapping[str, Any]) -> str:
    """The words of `model.autoencoder` for a saved description: the nearest file of the group, and what differs."""
    found: list[list[str]] = []
    for path in sorted((CONFIGS / "model" / "autoencoder").glob("*.yaml")):
        known = yaml.safe_load(path.read_text())
        if known.pop("_target_", None) == node["class"]:  # some only name another file
            differ = {key: value for key, value in node["args"].items() if key in known and known[key] != value}
            values = [f"model.autoencoder.{k}={json.dumps(v, separators=(',', ':'))}" for k, v in differ.items()]
            found.append([f"model/autoencoder={path.stem}", *values])
    if not found:  # of the user's own
        return f"model.autoencoder._target_={node['class']}"
    return " ".join(shlex.quote(word) if " " in word else word for word in min(found, key=len))


# ---- what is measured with what


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise LdmError("DEVICE", "there is no GPU", where="device=cuda", next="device=cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _features(words: Words) -> Features | None:
    """The network of the perceptual figures, or None if none is given."""
    from ldm.distances import trained_features, vgg16

    options = words.options
    if options.features:
        return trained_features(options.features)
    if options.lpips:
        try:
            return vgg16(None if options.lpips == "cache" else options.lpips)
        except LdmError as error:
            hint = "lpips=FILE names another file; features=RUN takes a network that this project trained"
            raise LdmError(error.code, error.what, where=error.where, limit=error.limit, next=hint) from error
    return None


def _about(features: Features, count: int) -> str:
    fd = f"fd_{features.label} is the Fréchet distance of its mean features"
    few = f"; over {count} pictures it is far too large, and compares only with the same pictures" * (count < 10_000)
    return f"perceptual_{features.label} is the distance in the features of {features.label}; {fd}{few}."


def _cautions(split: str, opened: Sequence[Opened], count: int) -> list[str]:
    found = []
    if split == "train":
        found.append(
            "These pictures are not held out: if an autoencoder was trained on them, its figures flatter it. split=val "
            "takes val-*.tar, or with val_fraction= the share that a run held out."
        )
    if count < 20:
        found.append(
            f"These are {count} pictures: the worst twentieth is little more than the worst one, and all is rough."
        )
    for one in opened:
        if not one.finished:
            found.append(f"The training of {one.path} did not finish.")
    return found


def _data_words(data: DataModule, path: str) -> str:
    shards = data.dataset("train").shards
    group = "folder" if len(shards) == 1 and shards[0].is_dir() else "shards"
    return f"data={group} data.path={shlex.quote(path)}"


# ---- the page


def check_place(out: Path) -> None:
    """Refuses, before anything is measured, a place that cannot be written or that holds another file than our page."""
    if out.is_dir():
        raise LdmError("DISK", "this is a folder", where=str(out), next=f"out={out / PAGE}")
    if not out.parent.is_dir():
        raise LdmError("DISK", "there is no such folder", where=str(out.parent), next="make it, or choose another out=")
    if not out.exists():
        return
    with open(out, "rb") as file:
        if MARK.encode() not in file.read(1024):
            raise LdmError("EXISTS", "there is another file already", where=str(out), next="choose another out=")


def write(out: Path, text: str) -> None:
    try:
        files.replace_file(out, text.encode())
    except OSError as error:
        hint = "choose another place: out=FILE.html"
        raise LdmError("DISK", f"cannot write the page: {error.strerror}", where=str(out), next=hint) from error
