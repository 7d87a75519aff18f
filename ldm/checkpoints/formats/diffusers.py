"""The folder of diffusers: one model and one config.json for each part. Names of weights are ours already."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints.formats import clip, keymap
from ldm.checkpoints.formats.description import DIFFUSERS_VERSION, XL, Foreign, Part, kind_of
from ldm.checkpoints.formats.keymap import KeyMap, Place
from ldm.checkpoints.formats.reading import read_json, read_part
from ldm.checkpoints.formats.schedules import read_scheduler_config
from ldm.checkpoints.formats.settings import read_unet_config, read_vae_config
from ldm.errors import LdmError

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionXLPipeline")

# The autoencoder's attention before diffusers 0.14, as the published files of SD1 still name it.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_UNET_MODULES = (
    r"conv_in|conv_norm_out|conv_out|(time|add)_embedding\.linear_[12]|"
    r"((down|up)_blocks\.\d+|mid_block)\.resnets\.\d+\.(norm[12]|conv[12]|conv_shortcut|time_emb_proj)|"
    r"(down|up)_blocks\.\d+\.(down|up)samplers\.0\.conv|"
    r"((down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\.(norm|proj_in|proj_out|"
    r"transformer_blocks\.\d+\.(norm[123]|attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)))"
)
_VAE_MODULES = (
    r"(post_)?quant_conv|(en|de)coder\.(conv_in|conv_norm_out|conv_out|"
    r"((down|up)_blocks\.\d+|mid_block)\.resnets\.\d+\.(norm[12]|conv[12]|conv_shortcut)|"
    r"(down|up)_blocks\.\d+\.(down|up)samplers\.0\.conv|"
    r"mid_block\.attentions\.0\.(group_norm|to_[qkv]|to_out\.0))"
)


# ---- key maps


def map_unet(names: Iterable[str]) -> KeyMap:
    """Names of `UNet` -> themselves. Raises LdmError naming a part that UNet2DConditionModel does not have."""
    return _same(names, _UNET_MODULES, "UNet2DConditionModel")


def map_vae(names: Iterable[str]) -> KeyMap:
    """Names of `AutoencoderKL`, without its statistics, -> themselves."""
    return _same(names, _VAE_MODULES, "AutoencoderKL")


map_text = clip.map_transformers
"""Names of `OpenClipText` -> those of transformers' CLIPTextModel."""


def _same(names: Iterable[str], modules: str, model: str) -> KeyMap:
    pattern = re.compile(rf"({modules})\.(weight|bias)")

    def rule(name: str) -> Place:
        if not pattern.fullmatch(name):
            raise LdmError("EXPORT", f"diffusers' {model} has no place for {name}", where="--format diffusers")
        return Place((name,))

    return keymap.make(names, rule)


# ---- reading


def read(folder: Path, prediction: str | None = None) -> Foreign:
    """What a folder holds. prediction: the user's word; must agree with the scheduler's. Raises LdmError FORMAT."""
    index = read_json(folder / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in _PIPELINES:
        raise LdmError(
            "FORMAT", f"is a {pipeline}, not a text-to-image pipeline of Stable Diffusion", where=str(folder),
            limit=", ".join(_PIPELINES),
        )  # fmt: skip
    homes = {name: folder / name / "config.json" for name in ("unet", "vae")}
    settings = {name: read_json(path) for name, path in homes.items()}
    network = read_unet_config(settings["unet"], str(homes["unet"]))
    autoencoder, mean, std = read_vae_config(settings["vae"], str(homes["vae"]))
    kind = kind_of(network, str(homes["unet"]))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    steps = read_scheduler_config(read_json(scheduler), str(scheduler), forced_offset=None if kind == XL else 1)
    if prediction not in (None, steps["prediction"]):
        raise LdmError(
            "FORMAT", f"the scheduler says prediction {steps['prediction']}, not {prediction}", where=str(folder),
            next="leave --prediction out, or correct scheduler_config.json",
        )  # fmt: skip
    notes: list[str] = steps["notes"]
    tensors = {name: _read_part(folder / name, notes) for name in homes}
    vae = {modern_name(name): tensor for name, tensor in tensors["vae"].items()}
    parts = {"unet": Part(tensors["unet"], map_unet), "vae": Part(vae, map_vae)}
    text, towers = _read_towers(folder, kind, notes)
    if kind == XL and index.get("force_zeros_for_empty_prompt", True):
        notes.append('without a negative prompt its pipeline compares with zeros; a run does what it does for ""')
    downsampling = 2 ** (len(autoencoder["block_channels"]) - 1)
    return Foreign(
        kind=f"{kind}, folder of diffusers",
        network=network,
        autoencoder=autoencoder,
        text=text,
        schedule=steps["schedule"],
        zero_snr=steps["zero_snr"],
        prediction=steps["prediction"],
        image_size=_side(settings["unet"].get("sample_size"), str(homes["unet"])) * downsampling,
        sampler=steps["sampler"],
        parts={**parts, **towers},
        mean=mean,
        std=std,
        notes=tuple(notes),
    )


def _read_part(folder: Path, notes: list[str]) -> dict[str, Tensor]:
    """The tensors, with a note where they are not those that diffusers itself would take."""
    tensors, file = read_part(folder)
    if ".bin" in file.name or ".fp16" in file.name:
        notes.append(f"{folder.name} is read from {file.name}")
    return tensors


def _side(size: Any, where: str) -> int:
    """Latents' side: a number, or the larger of two."""
    sides = size if isinstance(size, list) else [64 if size is None else size]
    if not sides or not all(isinstance(side, int) and 0 < side <= 4096 for side in sides):
        raise LdmError("FORMAT", f"sample_size is {size!r}", where=where)
    return max(sides)


def modern_name(name: str) -> str:
    """The name of a tensor of the autoencoder since diffusers 0.14."""
    match = re.fullmatch(r"(.*mid_block\.attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)", name)
    return f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}" if match else name


def _read_towers(folder: Path, kind: str, notes: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, Part]]:
    """Arguments of `OpenClipText` for each text tower, and those that the folder holds; XL may come without."""
    if kind != XL:
        args, part = _read_tower(folder / "text_encoder", folder / "tokenizer", notes)
        return {"text": args}, {"text": part}
    text, towers = clip.xl_towers(), {}
    for name, number in (("clip", ""), ("open_clip", "_2")):
        home = folder / f"text_encoder{number}"
        if home.is_dir():
            args, towers[name] = _read_tower(home, folder / f"tokenizer{number}", notes)
            text[name] = clip.as_in_xl(args, pooled=name == "open_clip")
    return text, towers


def _read_tower(home: Path, tokenizer: Path, notes: list[str]) -> tuple[dict[str, Any], Part]:
    settings, where = read_json(home / "config.json"), f"{home}/config.json"
    pad_id = _read_pad_id(tokenizer)
    tensors = {k: v for k, v in _read_part(home, notes).items() if not k.endswith("embeddings.position_ids")}
    projection = "text_projection.weight" in tensors
    args = clip.arguments_from_transformers(settings, where, projection=projection, pad_id=pad_id)
    bare = not any(name.startswith("text_model.") for name in tensors)  # as transformers 5.6 has them in memory

    def names(ours: Iterable[str]) -> KeyMap:
        return clip.map_transformers(ours, text_model="" if bare else "text_model.")

    return args, Part(tensors, names)


def _read_pad_id(folder: Path) -> int:
    """From the files that transformers writes: vocab.json until version 4, tokenizer.json since 5."""
    words, whole = folder / "vocab.json", folder / "tokenizer.json"
    if words.is_file() or not whole.is_file():
        tokens: Any = read_json(words)
    else:
        model = read_json(whole).get("model")
        tokens = model.get("vocab") if isinstance(model, dict) else None
    said: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            said |= read_json(folder / name)
    return clip.read_pad_id(said, tokens if isinstance(tokens, dict) else {}, str(folder))


# ---- writing


def pipeline_index() -> dict[str, Any]:
    """model_index.json of a StableDiffusionPipeline."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
