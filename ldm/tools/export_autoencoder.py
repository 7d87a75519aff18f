"""The autoencoder of a run alone, in diffusers' folder or one file; what exporting a whole model shares with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints import files, manifest
from ldm.checkpoints.formats import compvis, diffusers, keymap
from ldm.checkpoints.formats.autoencoders import SCALING, SHIFT
from ldm.checkpoints.formats.compvis import SD_SCALE
from ldm.checkpoints.formats.keymap import KeyMap
from ldm.checkpoints.formats.reading import read_file
from ldm.checkpoints.formats.settings import vae_config
from ldm.checkpoints.formats.statistics import factors, fold_statistics
from ldm.checkpoints.run import find_run, has_stage, open_autoencoder
from ldm.checkpoints.store import Checkpoint
from ldm.checkpoints.tensorfile import write_tensors
from ldm.errors import LdmError
from ldm.tools.interchange import AUTOENCODER, refuse_existing, whole, with_defaults

Tensors = dict[str, Tensor]
_SAMPLE_SIZE = 512  # of an autoencoder that was not trained here: Stable Diffusion's


def export_autoencoder(path: Path, out: Path, layout: str, dtype: torch.dtype | None = None) -> None:
    """OUT becomes a folder for `AutoencoderKL.from_pretrained`, or a file in CompVis' names without a prefix, whose
    metadata say the factors. One scaling and one shift for all channels are written as they are; statistics of each
    channel are worked into the convolutions around the latents.

    Raises LdmError, and then nothing was written.
    """
    run = find_run(path)
    if has_stage(run, "diffusion") and not has_stage(run, "autoencoder"):
        raise LdmError("EXPORT", "the run works on pixels: it has no autoencoder", where=str(run))
    checkpoint = open_autoencoder(run)
    args = arguments(checkpoint.document("config")["autoencoder"], AUTOENCODER, "model.autoencoder")
    tensors = mapped(checkpoint, "ema")
    mean, std = tensors["statistics.mean"], tensors["statistics.std"]
    weights = {name: value for name, value in tensors.items() if not name.startswith("statistics.")}
    found = factors(mean, std)
    if found is None:
        found = SD_SCALE, 0.0
        weights, args = fold_statistics(weights, mean, std, SD_SCALE), {**args, "quant_conv": True}
    scaling, shift = found
    if dtype is not None:
        weights = cast(weights, dtype)
    config = vae_config(args, scaling, checkpoint.document("state")["fingerprint"].get("data.image_size", _SAMPLE_SIZE))
    if layout == "diffusers":
        config |= {SHIFT: shift} if shift else {}
        name = "diffusion_pytorch_model.safetensors"
        write_folder(out, {"config.json": config, name: renamed(weights, diffusers.map_vae)})
        return
    if args["norm_groups"] != 32:
        raise LdmError(
            "EXPORT", f"the single file cannot say norm_groups={args['norm_groups']}: its readers take 32",
            where="model.autoencoder.norm_groups", next="--format diffusers",
        )  # fmt: skip
    theirs = keymap.to_theirs(compvis.map_vae(weights, prefix=""), weights)
    write_file(out, theirs, {"format": "pt", SCALING: repr(scaling), SHIFT: repr(shift)})


# ---- what exporting a whole model shares


def mapped(checkpoint: Checkpoint, weights: str) -> Tensors:
    """What `read_weights` gives, as views of the files: exporting copies from disk to disk."""

    def tensors(name: str) -> Tensors:
        found, _ = read_file(manifest.check_file(checkpoint.path, checkpoint.manifest, f"{name}.safetensors"))
        return found | {alias: found[first] for alias, first in checkpoint.manifest["aliases"].get(name, {}).items()}

    averaged = weights == "ema" and "ema.safetensors" in checkpoint.manifest["files"]
    return {**tensors("model"), **(tensors("ema") if averaged else {})}


def arguments(node: Mapping[str, Any], expected: str, where: str) -> dict[str, Any]:
    """All arguments of a node of that class. Raises LdmError EXPORT for another class."""
    if node["class"] != expected:
        name, ours = (text.rpartition(".")[2] for text in (node["class"], expected))
        raise LdmError("EXPORT", f"Stable Diffusion's layouts have no {name}", where=where, limit=f"{ours} only")
    return with_defaults(node)["args"]


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}


def renamed(tensors: Tensors, rule: Any) -> Tensors:
    table: KeyMap = rule(tensors)
    return keymap.to_theirs(table, tensors)


def check_file(out: Path) -> None:
    """Refuse a place or a name that no single file can have."""
    if out.suffix != ".safetensors":
        raise LdmError("EXPORT", "the single file ends in .safetensors", where=str(out), next=f"OUT={out}.safetensors")
    refuse_existing(out)


def write_file(out: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """One file, whole or not at all."""
    check_file(out)

    def fill(folder: Path) -> None:
        with files.new_file(folder / out.name) as file:
            write_tensors(file, tensors, metadata)

    whole(out, fill)


def write_folder(out: Path, contents: Mapping[str, Any]) -> None:
    """A folder of JSON, text and tensors, whole or not at all. "format": what the libraries ask of their files."""
    refuse_existing(out)

    def fill(folder: Path) -> None:
        for name, value in contents.items():
            path = folder / out.name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.new_file(path) as file:
                if name.endswith(".safetensors"):
                    write_tensors(file, value, {"format": "pt"})
                else:
                    file.write(value.encode() if isinstance(value, str) else files.json_bytes(value))

    whole(out, fill)
