"""The single file of latent diffusion and Stable Diffusion 1, 2 and XL, as CompVis and Stability AI published them.

Networks count their blocks along the way: with n residual blocks a level, level i of the UNet begins at input block
1 + i (n + 1), its change of resolution is the last of these, and output blocks come in groups of n + 1. The decoder
of the autoencoder counts its levels from fine to coarse, and its attention is made of 1x1 convolutions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.formats import clip, keymap
from ldm.checkpoints.formats.description import XL, Foreign, Part, kind_of
from ldm.checkpoints.formats.keymap import KeyMap, Place, Shape
from ldm.checkpoints.formats.reading import read_file
from ldm.checkpoints.formats.schedules import PREDICTIONS, SD_SCHEDULE, betas_of, recognise_betas
from ldm.errors import LdmError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT_HF, TEXT_OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
_EMA = "model_ema."
XL_HF, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
_REFINER_TEXT = "conditioner.embedders.0.model."
SCALES = {XL: 0.13025}
SD_SCALE = 0.18215
_HEAD_SIZE = 64  # of every CLIP text tower

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_TRANSFORMER = (
    r"norm|proj_in|proj_out|"
    r"transformer_blocks\.\d+\.(norm[123]|attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"
)

# What such files hold beside the networks, and that nothing is read from.
_KNOWN_CONSTANTS = re.compile(
    r"(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|betas|posterior_.*|lvlb_weights|logvar|"
    r"scale_factor|v_pred|ztsnr|denoiser\.sigmas|model_ema\.(decay|num_updates)|first_stage_model\.(loss|model_ema)\..*|"
    r"(cond_stage_model|conditioner\.embedders\.[01])\."
    r"(logit_scale|transformer\.text_model\.embeddings\.position_ids|model\.(logit_scale|attn_mask))"
)


# ---- key maps


def map_unet(names: Iterable[str], *, prefix: str = UNET) -> KeyMap:
    """Names of `UNet` -> those of the file. Raises LdmError naming a part that the layout does not have."""
    names = list(names)
    modules = dict(_unet_modules(names))

    def rule(name: str) -> Place:
        return Place((prefix + _translate(name, modules, _unet_leaf),))

    return keymap.make(names, rule)


def map_vae(names: Iterable[str], *, prefix: str = VAE) -> KeyMap:
    """Names of `AutoencoderKL`, without its statistics, -> those of the file."""
    names = list(names)
    modules = dict(_vae_modules(names))

    def rule(name: str) -> Place:
        matrix = re.search(r"\.attentions\.0\.to_(q|k|v|out\.0)\.weight", name)
        return Place((prefix + _translate(name, modules, _vae_leaf),), "conv" if matrix else "same")

    return keymap.make(names, rule)


def map_text_transformers(names: Iterable[str], *, home: str = TEXT_HF) -> KeyMap:
    """Names of `OpenClipText` -> the text encoder of SD1, the first one of SDXL."""
    return clip.map_transformers(names, text_model=f"{home}text_model.")


def map_text_open_clip(names: Iterable[str], *, home: str = TEXT_OPEN_CLIP) -> KeyMap:
    """Names of `OpenClipText` -> the text encoder of SD2, the second one of SDXL: open_clip's own names."""
    return keymap.make(names, lambda name: Place((home + name.removeprefix("tower."),)))


def map_averages(names: Iterable[str]) -> KeyMap:
    """Names of `UNet` -> the averaged weights of training files, whose names have lost their dots."""
    flat = {
        name: f"{_EMA}{place.names[0].removeprefix('model.').replace('.', '')}"
        for name, place in map_unet(names).items()
    }
    return keymap.make(flat, lambda name: Place((flat[name],)))


def _count(names: Iterable[str], pattern: str) -> int:
    found = [int(match[1]) for name in names if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def _unet_modules(names: list[str]) -> Iterator[tuple[str, str]]:
    """Our module -> theirs."""
    levels, layers = _count(names, r"down_blocks\.(\d+)\."), _count(names, r"down_blocks\.0\.resnets\.(\d+)\.")
    yield from {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }.items()
    for i in range(levels):
        for j in range(layers):
            block = 1 + i * (layers + 1) + j
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{block}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{block}.1"
        yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{(i + 1) * (layers + 1)}.0.op"
        for j in range(layers + 1):
            block = i * (layers + 1) + j
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{block}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{block}.1"
        attends = any(name.startswith(f"up_blocks.{i}.attentions.") for name in names)
        place = f"output_blocks.{i * (layers + 1) + layers}.{2 if attends else 1}"
        yield f"up_blocks.{i}.upsamplers.0.conv", f"{place}.conv"


def _vae_modules(names: list[str]) -> Iterator[tuple[str, str]]:
    levels, layers = (
        _count(names, r"encoder\.down_blocks\.(\d+)\."),
        _count(names, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
    )
    for side in ("encoder", "decoder"):
        yield f"{side}.conv_in", f"{side}.conv_in"
        yield f"{side}.conv_out", f"{side}.conv_out"
        yield f"{side}.conv_norm_out", f"{side}.norm_out"
        yield f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1"
        for j in range(2):
            yield f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}"
    yield "quant_conv", "quant_conv"
    yield "post_quant_conv", "post_quant_conv"
    for i in range(levels):
        up = levels - 1 - i
        for j in range(layers):
            yield f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}"
        for j in range(layers + 1):
            yield f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{up}.block.{j}"
        yield f"encoder.down_blocks.{i}.downsamplers.0.conv", f"encoder.down.{i}.downsample.conv"
        yield f"decoder.up_blocks.{i}.upsamplers.0.conv", f"decoder.up.{up}.upsample.conv"


def _unet_leaf(module: str, leaf: str) -> str | None:
    if ".resnets." in module:
        return _RESNET.get(leaf)
    if ".attentions." in module:
        return leaf if re.fullmatch(_TRANSFORMER, leaf) else None
    return leaf if leaf == "" else None


def _vae_leaf(module: str, leaf: str) -> str | None:
    if ".resnets." in module:
        return _VAE_RESNET.get(leaf)
    if ".attentions." in module:
        return _VAE_ATTENTION.get(leaf)
    return leaf if leaf == "" else None


def _translate(name: str, modules: Mapping[str, str], leaf_rule: Any) -> str:
    layer, _, kind = name.rpartition(".")
    parts = layer.split(".")
    for cut in range(len(parts), 0, -1):
        module = ".".join(parts[:cut])
        if module in modules:
            leaf = leaf_rule(module, ".".join(parts[cut:]))
            if leaf is not None:
                return ".".join(filter(None, (modules[module], leaf, kind)))
            break
    raise LdmError("EXPORT", f"the CompVis layout has no place for {name}", where="--format compvis")


# ---- reading


def read(path: Path, prediction: str | None = None) -> Foreign:
    """What a single file holds. prediction: the user's word, for files that do not say. Raises LdmError FORMAT."""
    tensors, metadata = read_file(path)
    where = str(path)
    homes = {UNET: "unet", VAE: "vae", _EMA: "ema", **dict.fromkeys(_TOWERS, "text"), _REFINER_TEXT: "refiner"}
    groups: dict[str, dict[str, Tensor]] = {home: {} for home in (*homes.values(), "strange")}
    for name, tensor in tensors.items():
        if not _KNOWN_CONSTANTS.fullmatch(name):
            home = next((home for prefix, home in homes.items() if name.startswith(prefix)), "strange")
            groups[home][name] = tensor
    if not groups["unet"] or not groups["vae"]:
        some = ", ".join(sorted(tensors)[:3])
        raise LdmError(
            "FORMAT", "is no Stable Diffusion model in one file", where=where, limit=f"it holds {some}, ...",
            next=f"expected names that begin with {UNET} and {VAE}, or of an autoencoder alone encoder. and decoder.",
        )  # fmt: skip
    if groups["refiner"]:
        raise LdmError("FORMAT", "is the refiner of SDXL, which goes on from another model's pictures", where=where)
    keymap.check_shapes({}, {name: tuple(tensor.shape) for name, tensor in groups["strange"].items()}, where)
    network = describe_unet({name: tuple(t.shape) for name, t in groups["unet"].items()}, where)
    autoencoder = describe_vae({name: tuple(t.shape) for name, t in groups["vae"].items()}, where)
    kind = kind_of(network, where)
    text, towers = _describe_towers(groups["text"], kind, where)
    prediction, notes = _choose_prediction(kind, metadata, prediction, "v_pred" in tensors, where)
    scale = scale_in(tensors, where) or SCALES.get(kind, SD_SCALE)
    size = {XL: 1024, "Stable Diffusion 2": 768 if prediction == "v" else 512}.get(kind, 512)
    resolution = metadata.get("modelspec.resolution", "").partition("x")[0]
    size = int(resolution) if resolution.isdigit() and 8 <= int(resolution) <= 8192 else size
    zero_snr = "ztsnr" in tensors
    return Foreign(
        kind=f"{kind}, one file",
        network=network,
        autoencoder=autoencoder,
        text=text,
        schedule=recognise_betas(tensors["betas"], where) if "betas" in tensors else dict(SD_SCHEDULE),
        zero_snr=zero_snr,
        prediction=prediction,
        image_size=size,
        sampler={"spacing": "trailing", "final": "first"}
        if zero_snr
        else {"spacing": "leading", "offset": 1, "final": "first"},
        parts={"unet": Part(groups["unet"], map_unet), "vae": Part(groups["vae"], map_vae), **towers},
        std=1 / scale,
        averaged=Part(groups["ema"], map_averages) if groups["ema"] else None,
        notes=tuple(notes),
    )


def scale_in(tensors: Mapping[str, Tensor], where: str) -> float | None:
    """The factor of the latents, where training left it in the file."""
    if "scale_factor" not in tensors:
        return None
    stored = tensors["scale_factor"].reshape(-1)[:1].sum()
    scale = float(stored)
    if not 0 < scale < math.inf:
        raise LdmError("FORMAT", f"its scale_factor is {scale}", where=where, limit="a positive number")
    short = float(f"{scale:.6g}")  # 0.13025, not 0.1302500069
    return short if torch.equal(torch.tensor(short, dtype=stored.dtype), stored) else scale


def is_constant(name: str, home: str = VAE) -> bool:
    """Whether nothing is read from a tensor of this name.   home: before the names of the autoencoder."""
    return any(map(_KNOWN_CONSTANTS.fullmatch, (name, VAE + name.removeprefix(home))))


def describe_unet(shapes: Mapping[str, Shape], where: str, prefix: str = UNET) -> dict[str, Any]:
    """Arguments of `UNet`, from names and shapes. Where convolutions lead into the transformers (SD1) there are 8
    heads, else (SD2, SDXL) heads have 64 channels: shapes do not show it.
    """
    names = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    blocks = _count(names, r"input_blocks\.(\d+)\.")
    downs = [n for n in range(blocks) if f"input_blocks.{n}.0.op.weight" in names]
    layers = (downs[0] if downs else blocks) - 1

    def depth(place: str) -> int:
        return _count(names, re.escape(place) + r"\.1\.transformer_blocks\.(\d+)\.")

    try:
        first = [1 + i * (layers + 1) for i in range(len(downs) + 1)]
        transformer = next(name for name in names if name.endswith("attn2.to_k.weight"))
        linear = len(names[transformer.partition("transformer_blocks")[0] + "proj_in.weight"]) == 2
        out = names["out.2.weight"][0]
        return {
            "in_channels": out,
            "out_channels": out,
            "block_channels": [names[f"input_blocks.{n}.0.out_layers.3.weight"][0] for n in first],
            "layers_per_block": layers,
            "transformer_depth": [depth(f"input_blocks.{n}") for n in first],
            "mid_transformer_depth": depth("middle_block"),
            "context_size": names[transformer][1],
            "vector_size": names["label_emb.0.0.weight"][1] if "label_emb.0.0.weight" in names else None,
            "concat_channels": names["input_blocks.0.0.weight"][1] - out,
            "head_dim": 64 if linear else None,
            "num_heads": None if linear else 8,
            "linear_projection": linear,
        }
    except (KeyError, StopIteration, IndexError) as error:
        raise LdmError("FORMAT", "its UNet is not Stable Diffusion's", where=where, limit=f"no {error}") from error


def describe_vae(shapes: Mapping[str, Shape], where: str, prefix: str = VAE) -> dict[str, Any]:
    """Arguments of `AutoencoderKL`, from names and shapes."""
    names = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    levels = _count(names, r"encoder\.down\.(\d+)\.")
    try:
        return {
            "in_channels": names["encoder.conv_in.weight"][1],
            "latent_channels": names["decoder.conv_in.weight"][1],
            "block_channels": [names[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
            "layers_per_block": _count(names, r"encoder\.down\.0\.block\.(\d+)\."),
            "mid_attention": "encoder.mid.attn_1.q.weight" in names,
            "quant_conv": "quant_conv.weight" in names,
        }
    except (KeyError, IndexError) as error:
        raise LdmError(
            "FORMAT", "its autoencoder is not Stable Diffusion's", where=where, limit=f"no {error}"
        ) from error


_TOWERS = {TEXT_HF: "text", TEXT_OPEN_CLIP: "text", XL_HF: "clip", XL_OPEN_CLIP: "open_clip"}


def _describe_towers(
    tensors: Mapping[str, Tensor], kind: str, where: str
) -> tuple[dict[str, dict[str, Any]], dict[str, Part]]:
    """Arguments of `OpenClipText` and the tensors of each text tower that is there; XL's may be missing."""
    text: dict[str, dict[str, Any]] = clip.xl_towers() if kind == XL else {}
    parts = {}
    for home, name in _TOWERS.items():
        inner = {key.removeprefix(home): tensor for key, tensor in tensors.items() if key.startswith(home)}
        if not inner or (kind == XL) != (name != "text"):
            continue
        describe, rule = _TOWER_KINDS[home in (TEXT_HF, XL_HF)]
        try:
            args = describe(inner)
        except (KeyError, ValueError, IndexError) as error:
            raise LdmError("FORMAT", "its text encoder is not CLIP's", where=where, limit=f"no {error}") from error
        text[name] = clip.as_in_xl(args, pooled=name == "open_clip") if kind == XL else args
        parts[name] = Part({home + key: tensor for key, tensor in inner.items()}, partial(rule, home=home))
    lost = [key for key in tensors if not any(key in part.tensors for part in parts.values())]
    keymap.check_shapes({}, {key: tuple(tensors[key].shape) for key in lost}, where)  # another family's text encoder
    if not text:
        raise LdmError("FORMAT", "holds no text encoder", where=where, next=f"expected {TEXT_HF}* or {TEXT_OPEN_CLIP}*")
    return text, parts


def _describe_transformers(tower: Mapping[str, Tensor]) -> dict[str, Any]:
    length, width = tower["text_model.embeddings.position_embedding.weight"].shape
    hidden = tower["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0]
    layers = _count(tower, r"text_model\.encoder\.layers\.(\d+)\.")
    return _tower(width, layers, hidden, length, quick_gelu=True, projection=None, pad_id=49407)


def _describe_open_clip(tower: Mapping[str, Tensor]) -> dict[str, Any]:
    length, width = tower["positional_embedding"].shape
    hidden = tower["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    layers = _count(tower, r"transformer\.resblocks\.(\d+)\.")
    matrix = tower.get("text_projection")
    projection = None if matrix is None else matrix.shape[1]
    args = _tower(width, layers, hidden, length, quick_gelu=False, projection=projection, pad_id=0)
    # without a projection the last block, which SD2 does not use, went too
    return {**args, "layer": -1 if matrix is None else -2}


_TOWER_KINDS = {True: (_describe_transformers, map_text_transformers), False: (_describe_open_clip, map_text_open_clip)}


def _tower(
    width: int, layers: int, hidden: int, length: int, *, quick_gelu: bool, projection: int | None, pad_id: int
) -> dict[str, Any]:
    return clip.arguments(
        width,
        layers,
        heads=max(1, width // _HEAD_SIZE),
        mlp_ratio=hidden / width,
        length=length,
        quick_gelu=quick_gelu,
        projection=projection,
        pad_id=pad_id,
    )


def _choose_prediction(
    kind: str, metadata: Mapping[str, str], said: str | None, marked: bool, where: str
) -> tuple[str, list[str]]:
    """The file's metadata, else the user's word, else what is true of the whole family; SD2 comes in both."""
    named = metadata.get("modelspec.prediction_type")
    named = "v" if marked or named == "v_prediction" else named
    if named in PREDICTIONS:
        if said not in (None, named):
            raise LdmError(
                "FORMAT", f"the file says prediction {named}, not {said}", where=where, next="leave --prediction out"
            )
        return named, []
    if said is not None:
        return said, []
    if kind == "Stable Diffusion 2":
        raise LdmError(
            "FORMAT", "Stable Diffusion 2 comes with two predictions, and nothing in the file says which",
            where=where, next="give --prediction v (the 768 pixel models) or --prediction epsilon (those of 512)",
        )  # fmt: skip
    return "epsilon", [f"the file does not say what it predicts: epsilon, as {kind} does; --prediction v for others"]


# ---- writing


def constants(schedule: Mapping[str, Any], zero_snr: bool) -> dict[str, Tensor]:
    """The tables that the original programs expect beside the weights, or the mark that stands for a rescaled one."""
    if zero_snr:
        return {"ztsnr": torch.zeros(0)}
    betas = betas_of(schedule)
    return {"betas": betas.float(), "alphas_cumprod": torch.cumprod(1 - betas, 0).float()}


def describe_file(kind: str, prediction: str, image_size: int) -> dict[str, str]:
    """What shapes do not show, in the words of the ModelSpec (Stability AI), and "format" for the libraries."""
    name = kind.lower().replace(" ", "-")
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": name,
        "modelspec.prediction_type": prediction,
        "modelspec.resolution": f"{image_size}x{image_size}",
    }
