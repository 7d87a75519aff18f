"""sample.py: prompts from the command line or a file, pictures with their recipe, a captioned grid."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm import __version__
from ldm.build import build
from ldm.data.transforms import to_images
from ldm.diffusion.schedule import for_size
from ldm.errors import LdmError, nearest
from ldm.model import LatentDiffusion
from ldm.models.conditioner.compose import parts_of
from ldm.sampling.outputs import grid_of_prompts, save_png, strip, to_uint8
from ldm.sampling.request import Picture, Request, cannot_write, no_prompt
from ldm.sampling.tasks import Sampling, one_for_each, subtitles, text_to_image
from ldm.sampling.trajectory import Trajectory
from ldm.types import ignore

MAX_STRIPS = 16
LEVEL_KEYS = ("spacing", "offset", "final", "rho", "sigma_min", "sigma_max", "shift")  # of the sampler, in the recipe


def sample(cfg: Mapping[str, Any], request: Request, trusted: tuple[str, ...] = ()) -> None:
    """Everything that sample.py does; `cfg` is configs/sample.yaml composed, `request` what was read from it."""
    device = choose_device(cfg["device"])
    model = LatentDiffusion.load(request.run, weights=cfg["weights"], device=device, trusted=trusted)
    prompts, columns = one_for_each(prompts_for(request, cfg, model.reads), read_columns(cfg, model.reads))
    node = choose_sampler(cfg["sampler"], model)
    sampling: Sampling = build(node, where="sampler", trusted=trusted)
    height, width = cfg["height"] or model.image_size, cfg["width"] or model.image_size
    shape = model.latent_shape(height, width)  # refuses a size that does not fit before anything is written
    model.check_tile(cfg["tile"])
    start = None if request.start is None else start_of(request.start, height, width)
    sampling.check(for_size(model.denoiser.schedule, shape), cfg["strength"] if start is not None else 1.0)
    folder = request.folder

    jobs = [(j, cfg["seed"] + i) for j in range(len(prompts)) for i in range(cfg["count"])]
    words = subtitles(prompts, columns)
    told = [{"prompt": prompt, **{k: v[j] for k, v in columns.items()}} for j, prompt in enumerate(prompts)]
    recipe = {
        "negative_prompt": cfg["negative_prompt"],
        "sampler": node["function"]["_target_"].rpartition(".")[2],
        "steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
        "guidance_interval": sampling.guidance_interval,
        "guidance_rescale": sampling.guidance_rescale,
        "sampler_options": {key: value for key, value in node["function"].items() if not key.startswith("_")},
        **{key: getattr(sampling, key) for key in LEVEL_KEYS},
        "height": height,
        "width": width,
        "tile": cfg["tile"],
        **image_to_image(request.start, cfg["strength"]),
        "model": model.source,
        "ldm": __version__,
    }
    began, paths, strips = time.monotonic(), [], []
    rows: list[list[Image.Image]] = [[] for _ in prompts]
    for at in range(0, len(jobs), cfg["batch_size"]):
        part = jobs[at : at + cfg["batch_size"]]
        shown = min(len(part), MAX_STRIPS - at) if cfg["trajectory"] else 0
        watch = Trajectory(sampling.steps, shown) if shown > 0 else None
        pictures = text_to_image(
            model,
            [prompts[j] for j, _ in part],
            [seed for _, seed in part],
            sampling,
            columns={name: [values[j] for j, _ in part] for name, values in columns.items()},
            negative_prompt=cfg["negative_prompt"],
            size=(height, width),
            images=None if start is None else start.expand(len(part), -1, -1, -1),
            strength=cfg["strength"],
            tile=cfg["tile"],
            on_step=ignore if watch is None else watch,
        )
        refuse_non_finite(pictures)
        for i, ((j, seed), picture) in enumerate(zip(part, to_uint8(pictures), strict=True)):
            path = write(picture, folder, f"{model.source['step']:09d}-{seed}", {**told[j], "seed": seed, **recipe})
            paths.append(path)
            rows[j].append(picture)
            if watch is not None and i < watch.count:
                frames = strip(to_uint8(watch.pictures(model, i, cfg["tile"])), [f"step {s + 1}" for s in watch.steps])
                strips.append(write(frames, folder, f"{path.stem}-trajectory", {**told[j], "seed": seed, **recipe}))
    seconds = time.monotonic() - began
    print(f"{len(paths)} pictures in {seconds:.1f} s: {folder}/")
    if strips:
        of = f"the first {len(strips)} of them" if len(strips) < len(paths) else "each"
        print(f"from noise to picture, of {of}: {strips[0]}" + ", ..." * (len(strips) > 1))
    if len(paths) == 1:
        print(paths[0])
    else:
        print(f"grid: {write(grid_of_prompts(rows, words), folder, 'grid', recipe)}")
    for tokenizer in (part.tokenizer for part in parts_of(model.conditioner) if hasattr(part, "tokenizer")):
        if too_long := sum(tokenizer.is_cut(prompt) for prompt in set(prompts)):
            print(f"{too_long} prompts were longer than {tokenizer.length} tokens and were cut")


def choose_sampler(node: Mapping[str, Any], model: LatentDiffusion) -> dict[str, Any]:
    """The sampler of the command line, or the run's own with the command line's values in it."""
    if node["function"] is not None:
        return dict(node)
    return {**(model.sampler or {}), **{key: value for key, value in node.items() if value is not None}}


def read_columns(cfg: Mapping[str, Any], reads: tuple[str, ...]) -> dict[str, Any]:
    """`columns=`: refuses names that the model does not read."""
    known = [name for name in reads if name != "caption"]
    for name in cfg["columns"]:
        if name not in known:
            raise LdmError("COLUMN", f"the model reads no column {name!r}", where="columns", next=nearest(name, known))
    return dict(cfg["columns"])


def prompts_for(request: Request, cfg: Mapping[str, Any], reads: tuple[str, ...]) -> list[str]:
    """The prompts of the request; one empty prompt for a model that reads no text."""
    if "caption" not in reads:
        if request.prompts not in (None, [""]) or cfg["negative_prompt"]:
            hint = f"it reads columns.{reads[0]}=..." if reads else "it is unconditional"
            raise LdmError("PROMPT", "this model reads no text", where="prompt", next=f"leave the prompt out; {hint}")
        return [""]
    if request.prompts is None:
        raise no_prompt()
    return request.prompts


def choose_device(name: str) -> torch.device:
    """ "auto" takes the GPU when there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise LdmError(
            "DEVICE", f"cannot use the device {name!r}", where="device", next="device=auto or cpu"
        ) from error
    return device


def start_of(picture: Picture, height: int, width: int) -> Tensor:
    """[1, 3, H, W] in [-1, 1], resized and cropped to the size of the result."""
    return to_images([np.asarray(ImageOps.fit(picture.image, (width, height), Image.Resampling.BICUBIC))])


def refuse_non_finite(pictures: Tensor) -> None:
    if not bool(torch.isfinite(pictures).all()):
        raise LdmError(
            "NON-FINITE", "the model gave values that are not finite", next="try weights=raw or another checkpoint"
        )


def image_to_image(start: Picture | None, strength: float) -> dict[str, Any]:
    """What the recipe says about the start: the name without its folder, for a picture may be handed on."""
    if start is None:
        return {"image": None, "strength": None}
    return {"image": {"file": start.file, "sha256": start.sha256}, "strength": strength}


def write(picture: Image.Image, folder: Path, stem: str, recipe: Mapping[str, Any]) -> Path:
    """Saves under a name that is free. Raises LdmError when the disk refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = free_path(folder, stem)
        save_png(picture, path, recipe)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return path


def free_path(folder: Path, stem: str) -> Path:
    """A file that does not exist yet: nothing is overwritten."""
    path, n = folder / f"{stem}.png", 1
    while path.exists():
        n += 1
        path = folder / f"{stem}-{n}.png"
    return path
