"""`python -m ldm import PATH OUT`: Stable Diffusion in a folder or a file becomes a run of ours.

PATH: a folder of diffusers, or a single file of CompVis' layout; of an autoencoder alone too (`import_autoencoder`).
OUT: the run folder, which must not exist. All names and shapes are compared before anything is written, and a folder
appears whole or not at all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ldm import build
from ldm.checkpoints import files
from ldm.checkpoints.formats import autoencoders, compvis, diffusers, keymap
from ldm.checkpoints.formats.autoencoders import Factors
from ldm.checkpoints.formats.description import XL, Foreign, Node, Part
from ldm.checkpoints.formats.schedules import PREDICTIONS, schedule_node
from ldm.checkpoints.run import open_run, write_config
from ldm.checkpoints.store import Store
from ldm.diffusion.denoiser import check_pair
from ldm.errors import LdmError, nearest, raise_all
from ldm.model import check_fit
from ldm.tools.import_autoencoder import (
    as_target,
    import_autoencoder,
    imported_state,
    millions,
    shapes_of,
    with_statistics,
)
from ldm.tools.interchange import (
    AUTOENCODER,
    CONDITIONER,
    NETWORK,
    TEXT,
    UNET,
    import_options,
    refuse_existing,
    whole,
    with_defaults,
)

COMPOSE = "ldm.models.conditioner.compose.Compose"
SIZE = "ldm.models.conditioner.size.Size"


def main(argv: Sequence[str]) -> int:
    options = import_options(argv)
    factors = Factors(options.scaling_factor, options.shift_factor)
    import_model(options.path, options.out, options.prediction, factors)
    return 0


def import_model(path: Path, out: Path, prediction: str | None = None, factors: Factors | None = None) -> None:
    """Read, compare, write. Raises LdmError, and then nothing was written.

    prediction: the user's word, of a whole model.   factors: the user's word, of an autoencoder alone.
    """
    began = time.monotonic()
    if not path.exists():
        near = nearest(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
        raise LdmError("FORMAT", "there is no such file or folder", where=str(path), next=near)
    refuse_existing(out)
    alone = autoencoders.read(path, factors or Factors())
    if alone is not None:
        if prediction is not None:
            raise LdmError("CONFIG", "--prediction is for a whole model", where=str(path), next="leave it out")
        import_autoencoder(alone, path, out)
        return
    found = diffusers.read(path, prediction) if path.is_dir() else compvis.read(path, prediction)
    if factors:
        what = "--scaling-factor and --shift-factor are for an autoencoder alone"
        raise LdmError("CONFIG", what, where=str(path), next="leave them out")
    config, autoencoder_node = nodes(found, path)
    modules = build_on_meta(config, autoencoder_node, found)
    check(found, modules, path)
    check_together(config, modules, path)
    dtypes = sorted(
        {str(t.dtype).removeprefix("torch.") for part in found.parts.values() for t in part.tensors.values()}
    )
    sizes = ", ".join(f"{name} {millions(modules[name])}" for name in found.parts)
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
    absent = without_weights(found)
    if absent:
        print(f"it held no weights of the text towers {', '.join(absent)}: sample.py cannot draw with this run.")
        print("import a file or folder that holds them, or give open_clip's own files when you fine-tune:")
    else:
        print(f'try: python sample.py run={out} prompt="..."')
    print(f"to fine-tune: cp {out}/experiment.yaml configs/experiment/{out.name}.yaml")
    files_of = "".join(f" model.conditioner.{_below(found, name)}weights=FILE" for name in absent)
    print(f"              python train.py experiment={out.name} data.path=...{files_of}")


def without_weights(found: Foreign) -> list[str]:
    """The text towers that the file or folder did not hold."""
    return [name for name in found.text if name not in found.parts]


# ---- from the description to our models


def nodes(found: Foreign, path: Path) -> tuple[dict[str, Any], Node]:
    """config.json of the diffusion stage, and the autoencoder's node."""
    sampler = {
        "_target_": "ldm.sampling.tasks.Sampling",
        "function": {"_target_": "ldm.diffusion.samplers.ddim.sample_ddim", "_partial_": True, "eta": 0.0},
        "steps": min(50, found.schedule["num_timesteps"]),
        "guidance_scale": 5.0 if _is_xl(found) else 7.5,  # the pipelines' own
        **found.sampler,
    }
    config = {
        "conditioner": with_defaults(_conditioner(found, path)),
        "denoiser": with_defaults(
            {
                "class": "ldm.diffusion.denoiser.Denoiser",
                "args": {
                    "network": {"class": UNET, "args": found.network},
                    "schedule": schedule_node(found.schedule, found.zero_snr),
                    "prediction": {"class": PREDICTIONS[found.prediction], "args": {}},
                },
            }
        ),
        "image_size": found.image_size,
        "sampler": sampler,
    }
    return config, with_defaults({"class": AUTOENCODER, "args": found.autoencoder})


def _is_xl(found: Foreign) -> bool:
    return "text" not in found.text


def _below(found: Foreign, tower: str) -> str:
    """Where the conditioner keeps a text tower."""
    return f"parts.{tower}." if _is_xl(found) else ""


def _conditioner(found: Foreign, path: Path) -> Node:
    """The text tower; of XL both, token by token, with the sizes (configs/model/conditioner/sdxl.yaml)."""
    towers: dict[str, Node] = {name: {"class": TEXT, "args": args} for name, args in found.text.items()}
    if not _is_xl(found):
        return towers["text"]
    context, vector = found.network["context_size"], found.network["vector_size"]
    width, pooled = sum(args["width"] for args in found.text.values()), found.text["open_clip"]["config"]["embed_dim"]
    sinusoids, rest = divmod(vector - pooled, 6)
    if context != width or rest or sinusoids < 2 or sinusoids % 2:
        raise LdmError(
            "FORMAT", f"its UNet takes tokens of width {context} and a vector of {vector}, which is not {XL}'s way",
            where=str(path), limit=f"its text towers give tokens of width {width}, and {pooled} and six sizes",
        )  # fmt: skip
    return {
        "class": COMPOSE,
        "args": {
            "parts": {**towers, "size": {"class": SIZE, "args": {"num_sinusoids": sinusoids}}},
            "tokens": list(towers),
            "vector": ["open_clip", "size"],
            "join": "channels",
            "width": width,
            "vector_size": vector,
            "drop_prob": 0.1,
            "keep": ["size"],
        },
    }


def build_on_meta(config: Mapping[str, Any], autoencoder: Node, found: Foreign) -> dict[str, nn.Module]:
    """The models without memory, for their names and shapes: every part, and the whole conditioner."""
    with torch.device("meta"):
        conditioner = build.build_saved(config["conditioner"], where="conditioner")
        towers = {name: conditioner.get_submodule(_below(found, name).rstrip(".")) for name in found.text}
        return {
            "unet": build.build_saved(config["denoiser"]["args"]["network"], where="network"),
            "vae": build.build_saved(autoencoder, where="autoencoder"),
            **towers,
            "conditioner": conditioner,
        }


def check_together(config: Mapping[str, Any], modules: Mapping[str, nn.Module], path: Path) -> None:
    """Refuse what would be refused when the run is used: parts that cannot work together, whatever their shapes."""
    denoiser = config["denoiser"]["args"]
    schedule = build.build_saved(denoiser["schedule"], where="schedule")
    try:
        check_pair(schedule, build.build_saved(denoiser["prediction"], where="prediction"))
    except ValueError as error:
        raise LdmError("FORMAT", "schedule and prediction contradict each other", where=str(path), limit=str(error),
                       next="correct the scheduler's settings, or say --prediction v") from error  # fmt: skip
    check_fit(modules["vae"], modules["conditioner"], modules["unet"])  # type: ignore[arg-type]
    build.build(config["sampler"], where="sampler").check(schedule)


def check(found: Foreign, modules: Mapping[str, nn.Module], path: Path) -> None:
    """Compare the names and shapes of every part with those of our models, all at once."""
    problems = []
    for name, part in [*found.parts.items(), *([("unet", found.averaged)] if found.averaged else [])]:
        ours = shapes_of(modules[name])
        expected = keymap.their_shapes(part.key_map(ours), ours)
        try:
            keymap.check_shapes(expected, {k: tuple(v.shape) for k, v in part.tensors.items()}, f"{name} of {path}")
        except LdmError as error:
            problems.append(error)
    raise_all(problems)


# ---- writing the run


def write(
    found: Foreign, config: dict[str, Any], autoencoder: Node, modules: Mapping[str, nn.Module], out: Path, source: Node
) -> None:
    """The run folder, prepared beside its place."""
    kept = imported_state(source)

    def ours(name: str, part: Part, prefix: str = "") -> dict[str, Tensor]:
        table = part.key_map(shapes_of(modules[name]))
        return {prefix + key: value for key, value in keymap.to_ours(table, part.tensors).items()}

    vae, measured = with_statistics(modules["vae"], ours("vae", found.parts["vae"]), found.mean, found.std, source)
    latent_id = measured["latent_id"]
    weights = {"model": ours("unet", found.parts["unet"], NETWORK)}
    for name in found.text:
        if name in found.parts:
            weights["model"] |= ours(name, found.parts[name], CONDITIONER + _below(found, name))
    if found.averaged is not None:
        weights["ema"] = ours("unet", found.averaged, NETWORK)

    def fill(folder: Path) -> None:
        with open_run(folder, out.name) as run:
            for stage, tensors, state, document in (
                ("autoencoder", {"model": vae}, measured, {"autoencoder": autoencoder}),
                ("diffusion", weights, {"latent_id": latent_id}, config),
            ):
                store = Store(run.stage(stage).ckpt)
                documents = {"state": {**kept, **state}, "config": document}
                store.save(0, tensors=tensors, trees={}, documents=documents)
                run.update_stage(stage)
            recipe = experiment(found, config, autoencoder, out)
            write_config(run.folder, yaml.safe_dump(recipe, sort_keys=False))
            text = f"# @package _global_\n# Fine-tunes {found.kind}, imported.\n" + _headlines(out)
            text += yaml.safe_dump(recipe, sort_keys=False)
            files.replace_file(run.folder / "experiment.yaml", text.encode())

    whole(out, fill)


def experiment(found: Foreign, config: Mapping[str, Any], autoencoder: Node, out: Path) -> dict[str, Any]:
    """A configuration that trains the denoiser further: everything that must agree with the imported weights."""
    denoiser, xl = config["denoiser"]["args"], _is_xl(found)
    scheduler = "sd_zero_snr" if found.zero_snr else "sd_velocity" if found.prediction == "v" else "sd"
    return {
        "defaults": [
            {"override /model/autoencoder": "kl_sd"},
            {"override /model/network": "unet_sdxl" if xl else "unet_sd"},
            {"override /model/conditioner": "sdxl" if xl else "open_clip"},
            {"override /scheduler": scheduler},
            {"override /sampler": "ddim"},
            {"override /data": "shards"},
        ],
        "name": f"{out.name}-tuned",
        "stages": ["diffusion"],
        "init_from": str(out),
        "data": {"image_size": config["image_size"], **({"columns": {"size": "@size"}} if xl else {})},
        "model": {
            "autoencoder": as_target(autoencoder),
            "network": as_target(denoiser["network"]),
            "conditioner": as_target(config["conditioner"]),
        },
        "scheduler": {"schedule": as_target(denoiser["schedule"]), "prediction": as_target(denoiser["prediction"])},
        "sampler": {key: value for key, value in config["sampler"].items() if key not in ("_target_", "function")},
        "stage": {"diffusion": {"optimizer": {"lr": 1e-5}}},
    }


def _headlines(out: Path) -> str:
    return (
        f"# command: python train.py experiment={out.name} data.path=PATH_OF_THE_SHARDS trainer=gpu\n"
        "# hardware: one GPU of 40 GB at full size\n# result: none yet\n"
    )
