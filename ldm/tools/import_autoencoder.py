"""An autoencoder alone becomes a run of ours with one finished stage; what importing a whole model shares with it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ldm import __version__, build
from ldm.checkpoints import files
from ldm.checkpoints.formats import keymap
from ldm.checkpoints.formats.autoencoders import ForeignAutoencoder
from ldm.checkpoints.formats.description import Node
from ldm.checkpoints.run import open_run, write_config
from ldm.checkpoints.store import Store
from ldm.tools.interchange import AUTOENCODER, whole, with_defaults

IMAGE_SIZE = 256  # of the recipe's pictures: what the published ones were trained with


def import_autoencoder(found: ForeignAutoencoder, path: Path, out: Path) -> None:
    """Compare and write. Raises LdmError, and then nothing was written."""
    began = time.monotonic()
    node = with_defaults({"class": AUTOENCODER, "args": found.args})
    with torch.device("meta"):
        module = build.build_saved(node, where="autoencoder")
    ours = shapes_of(module)
    table = found.part.key_map(ours)
    shapes = {name: tuple(tensor.shape) for name, tensor in found.part.tensors.items()}
    keymap.check_shapes(keymap.their_shapes(table, ours), shapes, f"the autoencoder of {path}")
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in found.part.tensors.values()})
    source = {"file": path.name, "kind": found.kind}
    weights = keymap.to_ours(table, found.part.tensors)
    tensors, measured = with_statistics(module, weights, found.mean, found.std, source)
    print(f"found: {found.kind}: {millions(module)}, f = {module.downsampling}; {', '.join(dtypes)}")
    print(f"  latents of {module.latent_channels} channels, {_in_words(found.mean, found.std)}")
    for note in found.notes:
        print(f"  {note}")

    def fill(folder: Path) -> None:
        with open_run(folder, out.name) as run:
            state = {**imported_state(source), **measured}
            documents = {"state": state, "config": {"autoencoder": node}}
            Store(run.stage("autoencoder").ckpt).save(0, tensors={"model": tensors}, trees={}, documents=documents)
            run.update_stage("autoencoder")
            recipe = yaml.safe_dump(_experiment(node, out), sort_keys=False)
            write_config(run.folder, recipe)
            text = f"# @package _global_\n# Fine-tunes the decoder of an imported {found.kind}.\n" + _headlines(out)
            files.replace_file(run.folder / "experiment.yaml", (text + recipe).encode())

    whole(out, fill)
    print(f"{out} in {time.monotonic() - began:.1f} s: a run with a finished autoencoder and no denoiser")
    print(f"to fine-tune: cp {out}/experiment.yaml configs/experiment/{out.name}.yaml")
    print(f"              python train.py experiment={out.name} data.path=...")


def _in_words(mean: float | list[float], std: float | list[float]) -> str:
    if isinstance(std, list):
        return "mean and deviation of each channel"
    return f"scaling_factor {1 / std:g}" + (f", shift_factor {mean:g}" if mean else "")


def _experiment(node: Node, out: Path) -> dict[str, Any]:
    """A configuration that trains the decoder further, with the shape of the imported weights."""
    return {
        "defaults": [{"override /model/autoencoder": "kl_sd"}, {"override /data": "shards"}],
        "name": f"{out.name}-tuned",
        "stages": ["autoencoder"],
        "init_from": str(out),
        "data": {"image_size": IMAGE_SIZE},
        "model": {"autoencoder": as_target(node)},
        "stage": {"autoencoder": {"train": "decoder", "optimizer": {"lr": 1e-4}}},
    }


def _headlines(out: Path) -> str:
    return (
        f"# command: python train.py experiment={out.name} data.path=PATH_OF_THE_SHARDS trainer=gpu\n"
        "# hardware: one GPU of 24 GB at full size\n# result: none yet\n"
    )


# ---- what importing a whole model shares


def imported_state(source: Node) -> dict[str, Any]:
    """state.json of an imported stage.   source: {"file", "kind"}."""
    return {
        "train_step": 0,
        "finished": True,
        "fingerprint": {},
        "imported": source,
        "versions": {"ldm": __version__},
    }


def shapes_of(module: nn.Module) -> dict[str, keymap.Shape]:
    """Names and shapes of a model's weights; the statistics of the latents are no weights."""
    return {k: tuple(v.shape) for k, v in module.state_dict().items() if not k.startswith("statistics.")}


def with_statistics(
    autoencoder: nn.Module,
    tensors: Mapping[str, Tensor],
    mean: float | list[float],
    std: float | list[float],
    source: Node,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of an imported autoencoder, and what state.json says of its latents.

    autoencoder: on the meta device; takes the tensors without copying them.   mean, std: what the factors say of the
    raw latents. Nothing was measured, so the count of images stays 0.   source: as for `imported_state`.
    """
    channels: int = autoencoder.latent_channels  # type: ignore[assignment]

    def each(value: float | list[float]) -> Tensor:
        return torch.tensor(value, dtype=torch.float64).expand(channels).float().contiguous()

    statistics = {
        "statistics.mean": each(mean),
        "statistics.std": each(std),
        "statistics.count": torch.zeros((), dtype=torch.int64),
    }
    complete = {**tensors, **statistics}
    autoencoder.load_state_dict(complete, assign=True)  # views of the file: no copy
    return complete, {
        "latent_id": autoencoder.latent_id(),  # type: ignore[operator]
        "latent_mean": statistics["statistics.mean"].tolist(),
        "latent_std": statistics["statistics.std"].tolist(),
        "latent_images": 0,
        "latent_source": f"{_in_words(mean, std)} of {source['file']} ({source['kind']}), not measured",
    }


def millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"


def as_target(node: Any) -> Any:
    """A node of a checkpoint as one of a configuration."""
    if isinstance(node, Mapping):
        if "class" in node:
            return {"_target_": node["class"], **{key: as_target(value) for key, value in node["args"].items()}}
        return {key: as_target(value) for key, value in node.items()}
    return node
