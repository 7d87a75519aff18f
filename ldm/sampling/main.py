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
from ldm.data.decode import BadSample, decode_image
from ldm.data.transforms import to_images
from ldm.diffusion.schedule import for_size
from ldm.errors import LdmError, nearest
from ldm.model import LatentDiffusion
from ldm.models.conditioner.compose import parts_of
from ldm.sampling.outputs import captioned_grid, save_png, strip, to_uint8
from ldm.sampling.tasks import Sampling, one_for_each, subtitles, text_to_image
from ldm.sampling.trajectory import Trajectory
from ldm.types import ignore

MAX_PROMPT_CHARACTERS = 10_000
LEVEL_KEYS = ("spacing", "offset", "final", "rho", "sigma_min", "sigma_max", "shift")  # of the sampler, in the recipe


def sample(cfg: Mapping[str, Any], trusted: tuple[str, ...] = ()) -> None:
    """Everything that sample.py does; `cfg` is configs/sample.yaml composed."""
    device = choose_device(cfg["device"])
    model = LatentDiffusion.load(cfg["run"], weights=cfg["weights"], device=device, trusted=trusted)
    prompts, columns = one_for_each(read_prompts(cfg, model.reads), read_columns(cfg, model.reads))
    node = choose_sampler(cfg["sampler"], model)
    sampling: Sampling = build(node, where="sampler", trusted=trusted)
    height, width = cfg["height"] or model.image_size, cfg["width"] or model.image_size
    shape = model.latent_shape(height, width)  # refuses a size that does not fit before anything is written
    start = load_image(cfg["image"], height, width) if cfg["image"] is not None else None
    sampling.check(for_size(model.denoiser.schedule, shape), cfg["strength"] if start is not None else 1.0)
    folder = Path(cfg["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)

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
        "strength": cfg["strength"] if start is not None else None,
        "model": model.source,
        "ldm": __version__,
    }
    began, paths, shown = time.monotonic(), [], []
    for at in range(0, len(jobs), cfg["batch_size"]):
        part = jobs[at : at + cfg["batch_size"]]
        watch = Trajectory(sampling.steps) if cfg["trajectory"] and at == 0 else None
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
            on_step=watch or ignore,
        )
        refuse_non_finite(pictures)
        for (j, seed), picture in zip(part, to_uint8(pictures), strict=True):
            path = free_path(folder, f"{model.source['step']:09d}-{seed}")
            save_png(picture, path, {**told[j], "seed": seed, **recipe})
            paths.append(path)
            shown.append(picture)
        if watch is not None:
            path = free_path(folder, "trajectory")
            frames = strip(to_uint8(watch.pictures(model)), [f"step {s + 1}" for s in watch.steps])
            save_png(frames, path, {**told[part[0][0]], "seed": part[0][1], **recipe})
            print(f"from noise to picture: {path}")
    seconds = time.monotonic() - began
    print(f"{len(paths)} pictures in {seconds:.1f} s: {folder}/")
    if len(paths) == 1:
        print(paths[0])
    else:
        grid = free_path(folder, "grid")
        save_png(captioned_grid(shown, [words[j] for j, _ in jobs]), grid, recipe)
        print(f"grid: {grid}")
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


def read_prompts(cfg: Mapping[str, Any], reads: tuple[str, ...]) -> list[str]:
    """`prompt=`, or the lines of `prompts_file=`; one empty prompt for a model that reads no text."""
    if "caption" not in reads:
        if cfg["prompt"] or cfg["prompts_file"] or cfg["negative_prompt"]:
            hint = f"it reads columns.{reads[0]}=..." if reads else "it is unconditional"
            raise LdmError("PROMPT", "this model reads no text", where="prompt", next=f"leave the prompt out; {hint}")
        return [""]
    if (cfg["prompt"] is None) == (cfg["prompts_file"] is None):
        raise LdmError(
            "PROMPT",
            "give either a prompt or a file of prompts",
            next='python sample.py prompt="a red star on a blue ground", or prompts_file=prompts.txt',
        )
    if cfg["prompt"] is not None:
        prompts = [cfg["prompt"]]
    else:
        try:
            text = Path(cfg["prompts_file"]).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise LdmError("PROMPT", f"cannot read the prompts: {error}", where="prompts_file") from error
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
        if not prompts:
            raise LdmError("PROMPT", "the file holds no prompt", where=cfg["prompts_file"], next="one prompt a line")
    for prompt in prompts:
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise LdmError("PROMPT", "a prompt is too long", limit=f"{MAX_PROMPT_CHARACTERS} characters, {len(prompt)}")
    return prompts


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


def load_image(path: str, height: int, width: int) -> Tensor:
    """[1, 3, H, W] in [-1, 1], resized and cropped to the size of the result."""
    try:
        image = decode_image(Path(path).read_bytes())
    except OSError as error:
        raise LdmError("IMAGE", f"cannot read the picture: {error.strerror}", where=path) from error
    except BadSample as error:
        raise LdmError("IMAGE", f"not a usable picture: {error}", where=path) from error
    return to_images([np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))])


def refuse_non_finite(pictures: Tensor) -> None:
    if not bool(torch.isfinite(pictures).all()):
        raise LdmError(
            "NON-FINITE", "the model gave values that are not finite", next="try weights=raw or another checkpoint"
        )


def free_path(folder: Path, stem: str) -> Path:
    """A file that does not exist yet: nothing is overwritten."""
    path, n = folder / f"{stem}.png", 1
    while path.exists():
        n += 1
        path = folder / f"{stem}-{n}.png"
    return path
