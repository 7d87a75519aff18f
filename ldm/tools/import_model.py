"""`python -m ldm import PATH OUT`: Stable Diffusion in a folder or a file becomes a run of ours.

PATH: a folder of diffusers, or a single file of CompVis' layout. OUT: the run folder, which must not exist. All names
and shapes are compared before anything is written, and a folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ldm import __version__, build
from ldm.checkpoints import files
from ldm.checkpoints.formats import compvis, diffusers, keymap
from ldm.checkpoints.formats.description import PREDICTIONS, Foreign, Node, Part, schedule_node
from ldm.checkpoints.run import open_run
from ldm.checkpoints.store import Store
from ldm.errors import LdmError, nearest, raise_all

UNET = "ldm.models.unet.unet.UNet"
AUTOENCODER = "ldm.models.autoencoder.kl.AutoencoderKL"
TEXT = "ldm.models.conditioner.open_clip.OpenClipText"
NO_TEXT: Node = {"class": "ldm.models.conditioner.compose.Compose", "args": {"parts": {}}}
NETWORK, CONDITIONER = "denoiser.network.", "conditioner."


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m ldm import", description=__doc__, allow_abbrev=False)
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--prediction", choices=sorted(PREDICTIONS), help="for a file that does not say")
    options = parse(parser, argv)
    import_model(options.path, options.out, options.prediction)
    return 0


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The options, with a wrong one refused in our words and the usage behind it."""

    def refuse(message: str) -> None:
        raise LdmError("CONFIG", message, next=" ".join(parser.format_usage().split()))

    parser.error = refuse  # type: ignore[method-assign,assignment]
    return parser.parse_args(argv)


def import_model(path: Path, out: Path, prediction: str | None = None) -> None:
    """Read, compare, write. Raises LdmError, and then nothing was written."""
    began = time.monotonic()
    if not path.exists():
        near = nearest(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
        raise LdmError("FORMAT", "there is no such file or folder", where=str(path), next=near)
    refuse_existing(out)
    found = diffusers.read(path, prediction) if path.is_dir() else compvis.read(path, prediction)
    config, autoencoder_node = nodes(found)
    modules = build_on_meta(config, autoencoder_node)
    check(found, modules, path)
    dtypes = sorted(
        {str(t.dtype).removeprefix("torch.") for part in found.parts.values() for t in part.tensors.values()}
    )
    sizes = ", ".join(f"{name} {_millions(modules[name])}" for name in found.parts)
    print(f"found: {found.kind}: {sizes}; {', '.join(dtypes)}")
    steps = found.schedule
    print(
        f"  predicts {found.prediction}; {steps['betas']} betas {steps['beta_start']:g} to {steps['beta_end']:g} in "
        f"{steps['num_timesteps']} steps{', rescaled to end in pure noise' if found.zero_snr else ''}; "
        f"pictures of {found.image_size} pixels"
    )
    for note in found.notes:
        print(f"  {note}")
    write(found, config, autoencoder_node, modules, out, {"file": path.name, "kind": found.kind})
    print(f"{out} in {time.monotonic() - began:.1f} s")
    if found.text is not None:
        print(f'try: python sample.py run={out} prompt="..."')
        print(f"to fine-tune: cp {out}/experiment.yaml configs/experiment/{out.name}.yaml")
        print(f"              python train.py experiment={out.name} data.path=...")


def refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise LdmError("EXISTS", "there is something at this place already", where=str(out), next="choose another name")


# ---- from the description to our models


def nodes(found: Foreign) -> tuple[dict[str, Any], Node]:
    """config.json of the diffusion stage, and the autoencoder's node."""
    sampler = {
        "_target_": "ldm.sampling.tasks.Sampling",
        "function": {"_target_": "ldm.diffusion.samplers.ddim.sample_ddim", "_partial_": True, "eta": 0.0},
        "steps": 50,
        "guidance_scale": 7.5,
        **found.sampler,
    }
    text: Node = NO_TEXT if found.text is None else {"class": TEXT, "args": found.text}
    config = {
        "conditioner": with_defaults(text),
        "denoiser": {
            "class": "ldm.diffusion.denoiser.Denoiser",
            "args": {
                "network": with_defaults({"class": UNET, "args": found.network}),
                "schedule": schedule_node(found.schedule, found.zero_snr),
                "prediction": {"class": PREDICTIONS[str(found.prediction)], "args": {}},
            },
        },
        "image_size": found.image_size,
        "sampler": sampler,
    }
    return config, with_defaults({"class": AUTOENCODER, "args": found.autoencoder})


def with_defaults(node: Mapping[str, Any]) -> Node:
    """A node of a checkpoint with every argument of its constructor."""
    parameters = inspect.signature(build.resolve(node["class"])).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {"class": node["class"], "args": json.loads(json.dumps({**defaults, **node["args"]}))}


def build_on_meta(config: Mapping[str, Any], autoencoder: Node) -> dict[str, nn.Module]:
    """The models without memory: their names and shapes."""
    with torch.device("meta"):
        return {
            "unet": build.build_saved(config["denoiser"]["args"]["network"], where="network"),
            "vae": build.build_saved(autoencoder, where="autoencoder"),
            "text": build.build_saved(config["conditioner"], where="conditioner"),
        }


def shapes_of(module: nn.Module) -> dict[str, keymap.Shape]:
    """Names and shapes of a model's weights; the statistics of the latents are no weights."""
    return {k: tuple(v.shape) for k, v in module.state_dict().items() if not k.startswith("statistics.")}


def check(found: Foreign, modules: Mapping[str, nn.Module], path: Path) -> None:
    """Compare the names and shapes of every part with those of our models, all at once."""
    problems = []
    for name, part in [*found.parts.items(), *([("unet", found.averaged)] if found.averaged else [])]:
        ours = shapes_of(modules[name])
        expected = keymap.their_shapes(part.key_map(ours), ours)
        try:
            keymap.check_fit(expected, {k: tuple(v.shape) for k, v in part.tensors.items()}, f"{name} of {path}")
        except LdmError as error:
            problems.append(error)
    raise_all(problems)


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"


# ---- writing the run


def write(
    found: Foreign, config: dict[str, Any], autoencoder: Node, modules: Mapping[str, nn.Module], out: Path, source: Node
) -> None:
    """The run folder, prepared beside its place."""
    kept = {"train_step": 0, "finished": True, "fingerprint": {}, "imported": source, "versions": {"ldm": __version__}}

    def ours(name: str, part: Part, prefix: str = "") -> dict[str, Tensor]:
        table = part.key_map(shapes_of(modules[name]))
        return {prefix + key: value for key, value in keymap.to_ours(table, part.tensors).items()}

    vae = {**ours("vae", found.parts["vae"]), **statistics(found)}
    modules["vae"].load_state_dict(vae, assign=True)  # views of the file: no copy
    latent_id = modules["vae"].latent_id()  # type: ignore[operator]
    mean, std = vae["statistics.mean"].tolist(), vae["statistics.std"].tolist()
    weights = {"model": ours("unet", found.parts["unet"], NETWORK)}
    if found.text is not None:
        weights["model"] |= ours("text", found.parts["text"], CONDITIONER)
    if found.averaged is not None:
        weights["ema"] = ours("unet", found.averaged, NETWORK)

    def fill(folder: Path) -> None:
        with open_run(folder, out.name) as run:
            measured = {"latent_id": latent_id, "latent_mean": mean, "latent_std": std, "latent_images": 0}
            for stage, tensors, state, document in (
                ("autoencoder", {"model": vae}, measured, {"autoencoder": autoencoder}),
                ("diffusion", weights, {"latent_id": latent_id}, config),
            ):
                store = Store(run.stage(stage).ckpt)
                documents = {"state": {**kept, **state}, "config": document}
                store.save(0, tensors=tensors, trees={}, documents=documents)
                run.update_stage(stage)
            recipe = experiment(config, autoencoder, out)
            run.write_config(yaml.safe_dump(recipe, sort_keys=False))
            if found.text is not None:
                text = f"# @package _global_\n# Fine-tunes {found.kind}, imported.\n" + _headlines(out)
                files.replace_file(
                    run.folder / "experiment.yaml", (text + yaml.safe_dump(recipe, sort_keys=False)).encode()
                )

    whole(out, fill)


def whole(out: Path, fill: Callable[[Path], None]) -> None:
    """`fill(folder)` makes `folder / out.name`, which then moves to `out` at once; on failure nothing is left."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = files.temporary(out)
    temporary.mkdir()
    try:
        fill(temporary)
        refuse_existing(out)
        os.rename(temporary / out.name, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    files.sync_folder(out.parent)


def statistics(found: Foreign) -> dict[str, Tensor]:
    """What a scaling factor says about the latents. Nothing was measured, so `count` stays 0."""
    channels = found.autoencoder["latent_channels"]

    def each(value: float | list[float]) -> Tensor:
        return torch.tensor(value, dtype=torch.float64).expand(channels).float().contiguous()

    return {
        "statistics.mean": each(found.mean),
        "statistics.std": each(found.std),
        "statistics.count": torch.zeros((), dtype=torch.int64),
    }


def experiment(config: Mapping[str, Any], autoencoder: Node, out: Path) -> dict[str, Any]:
    """A configuration that trains the denoiser further: everything that must agree with the imported weights."""
    denoiser = config["denoiser"]["args"]
    velocity = denoiser["prediction"]["class"] == PREDICTIONS["v"]
    zero_snr = "schedule" in denoiser["schedule"]["args"]
    return {
        "defaults": [
            {"override /model/autoencoder": "kl_sd"},
            {"override /model/network": "unet_sd"},
            {"override /model/conditioner": "open_clip"},
            {"override /scheduler": "sd_zero_snr" if zero_snr else "sd_velocity" if velocity else "sd"},
            {"override /sampler": "ddim"},
            {"override /data": "shards"},
        ],
        "name": f"{out.name}-tuned",
        "stages": ["diffusion"],
        "init_from": str(out),
        "data": {"image_size": config["image_size"]},
        "model": {
            "autoencoder": _target(autoencoder),
            "network": _target(denoiser["network"]),
            "conditioner": _target(config["conditioner"]),
        },
        "scheduler": {"schedule": _target(denoiser["schedule"]), "prediction": _target(denoiser["prediction"])},
        "sampler": {key: value for key, value in config["sampler"].items() if key not in ("_target_", "function")},
        "stage": {"diffusion": {"optimizer": {"lr": 1e-5}}},
    }


def _headlines(out: Path) -> str:
    return (
        f"# command: python train.py experiment={out.name} data.path=PATH_OF_THE_SHARDS trainer=gpu\n"
        "# hardware: one GPU of 40 GB at full size\n# result: none yet\n"
    )


def _target(node: Any) -> Any:
    """A node of a checkpoint as one of a configuration."""
    if isinstance(node, Mapping):
        if "class" in node:
            return {"_target_": node["class"], **{key: _target(value) for key, value in node["args"].items()}}
        return {key: _target(value) for key, value in node.items()}
    return node
