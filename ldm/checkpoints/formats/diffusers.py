"""The folder of diffusers: one model and one config.json for each part. Names of weights are ours already."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.formats import clip, keymap
from ldm.checkpoints.formats.description import Foreign, Part, kind_of
from ldm.checkpoints.formats.keymap import KeyMap, Place
from ldm.checkpoints.formats.reading import read_json, read_part
from ldm.errors import LdmError

VERSION = "0.38.0"  # the oldest that our tests compare with
_PIPELINES = {"StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionXLPipeline"}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
_SPACINGS = {"leading": "leading", "trailing": "trailing", "linspace": "uniform"}

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
            limit=", ".join(sorted(_PIPELINES)),
        )  # fmt: skip
    network = read_unet_config(read_json(folder / "unet" / "config.json"), f"{folder}/unet/config.json")
    settings = read_json(folder / "vae" / "config.json")
    autoencoder, mean, std = read_vae_config(settings, f"{folder}/vae/config.json")
    steps = read_scheduler_config(
        read_json(folder / "scheduler" / "scheduler_config.json"), f"{folder}/scheduler/scheduler_config.json"
    )
    if prediction not in (None, steps["prediction"]):
        raise LdmError(
            "FORMAT", f"the scheduler says prediction {steps['prediction']}, not {prediction}", where=str(folder),
            next="leave --prediction out, or correct scheduler_config.json",
        )  # fmt: skip
    unet, unet_file = read_part(folder / "unet")
    vae, _ = read_part(folder / "vae")
    parts = {"unet": Part(unet, map_unet), "vae": Part({_modern(k): v for k, v in vae.items()}, map_vae)}
    notes = (
        [f"the UNet is read from {unet_file.name}"] if unet_file.name != "diffusion_pytorch_model.safetensors" else []
    )
    kind = kind_of(network, f"{folder}/unet/config.json")
    text = None
    if kind == "Stable Diffusion XL":
        notes.append("its text encoders stay behind: of SDXL, the UNet and the autoencoder are imported")
    else:
        text, parts["text"] = _read_text(folder)
    downsampling = 2 ** (len(autoencoder["block_channels"]) - 1)
    sample = read_json(folder / "unet" / "config.json").get("sample_size") or 64
    return Foreign(
        kind=f"{kind}, folder of diffusers",
        network=network,
        autoencoder=autoencoder,
        text=text,
        schedule=steps["schedule"],
        zero_snr=steps["zero_snr"],
        prediction=steps["prediction"],
        image_size=(sample if isinstance(sample, int) else max(sample)) * downsampling,
        sampler=steps["sampler"],
        parts=parts,
        mean=mean,
        std=std,
        notes=tuple(notes),
    )


def _modern(name: str) -> str:
    match = re.fullmatch(r"(.*mid_block\.attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)", name)
    return f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}" if match else name


def _read_text(folder: Path) -> tuple[dict[str, Any], Part]:
    home = folder / "text_encoder"
    settings, where = read_json(home / "config.json"), f"{home}/config.json"
    pad_id = _read_pad_id(folder / "tokenizer")
    tensors = {k: v for k, v in read_part(home)[0].items() if not k.endswith("embeddings.position_ids")}
    projection = "text_projection.weight" in tensors
    args = clip.arguments_from_transformers(settings, where, projection=projection, pad_id=pad_id)
    bare = not any(name.startswith("text_model.") for name in tensors)  # as transformers 5.6 has them in memory

    def names(ours: Iterable[str]) -> KeyMap:
        return clip.map_transformers(ours, text_model="" if bare else "text_model.")

    return args, Part(tensors, names)


def _read_pad_id(folder: Path) -> int:
    """From the files that transformers writes: vocab.json until version 4, tokenizer.json since 5."""
    words, whole = folder / "vocab.json", folder / "tokenizer.json"
    tokens = (
        read_json(words) if words.is_file() or not whole.is_file() else read_json(whole).get("model", {}).get("vocab")
    )
    said: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            said |= read_json(folder / name)
    return clip.read_pad_id(said, tokens or {}, str(folder))


# ---- settings: theirs <-> ours
# Every setting that decides what a network computes is either translated or must have the value that ours has.

_UNET_FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}
_UNET_READ = {
    "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block",
    "norm_num_groups", "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim",
    "use_linear_projection", "addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim",
    "sample_size", "upcast_attention", "addition_embed_type_num_heads",
}  # fmt: skip
_VAE_FIXED: dict[str, Any] = {"act_fn": "silu"}
_VAE_READ = {
    "in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups",
    "down_block_types", "up_block_types", "scaling_factor", "shift_factor", "latents_mean", "latents_std",
    "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention", "force_upcast", "sample_size",
}  # fmt: skip


def _check_settings(config: Mapping[str, Any], fixed: Mapping[str, Any], read: set[str], where: str) -> None:
    for key, value in config.items():
        if key.startswith("_") or key in read:
            continue
        if key in fixed and value != fixed[key]:
            raise LdmError(
                "FORMAT",
                f"{key} is {value!r}, which our network does not have",
                where=where,
                limit=f"expected {fixed[key]!r}",
            )
        if key not in fixed and value not in (None, False):
            raise LdmError("FORMAT", f"the setting {key}={value!r} is not known here", where=where)


def read_unet_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json of a UNet2DConditionModel -> arguments of `UNet`. Raises LdmError naming what ours does not have."""
    _check_settings(config, _UNET_FIXED, _UNET_READ, where)

    def refuse(key: str, limit: str) -> LdmError:
        return LdmError(
            "FORMAT", f"{key} is {config.get(key)!r}, which our UNet does not have", where=where, limit=limit
        )

    channels = list(config.get("block_out_channels", (320, 640, 1280, 1280)))
    levels = len(channels)

    def each(key: str, default: Any) -> list[Any]:
        value = config.get(key, default)
        values = list(value) if isinstance(value, list | tuple) else [value] * levels
        if len(values) != levels:
            raise refuse(key, f"{levels} values, one for each level")
        return values

    layers = each("layers_per_block", 2)
    if len(set(layers)) > 1:
        raise refuse("layers_per_block", "one number for all levels")
    downs = config.get("down_block_types", ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"])
    ups = config.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1))
    if not set(downs) <= {"CrossAttnDownBlock2D", "DownBlock2D"} or len(downs) != levels:
        raise refuse("down_block_types", "CrossAttnDownBlock2D and DownBlock2D")
    if [name.replace("Up", "Down") for name in reversed(ups)] != list(downs):
        raise refuse("up_block_types", "down_block_types in reverse")
    depths = each("transformer_layers_per_block", 1)
    if not all(isinstance(depth, int) for depth in depths):
        raise refuse("transformer_layers_per_block", "one number for each level")
    # what diffusers calls attention_head_dim is the number of heads: huggingface/diffusers#2011
    heads = each("attention_head_dim", 8)
    attends = ["CrossAttn" in name for name in downs[:-1]] + [True]  # the middle attends with the last level's heads
    sizes = {width // count for width, count, used in zip(channels, heads, attends, strict=True) if used}
    counts = {count for count, used in zip(heads, attends, strict=True) if used}
    if len(counts) > 1 and len(sizes) > 1:
        raise refuse("attention_head_dim", "the same number of heads, or of channels a head, everywhere")
    if not isinstance(config.get("cross_attention_dim", 1280), int):
        raise refuse("cross_attention_dim", "one number")
    adds = config.get("addition_embed_type")
    if adds not in (None, "text_time"):
        raise refuse("addition_embed_type", "null or text_time")
    in_channels, out_channels = config.get("in_channels", 4), config.get("out_channels", 4)
    by_count = len(counts) == 1 and not config.get("use_linear_projection", False)
    return {
        "in_channels": out_channels,
        "out_channels": out_channels,
        "block_channels": channels,
        "layers_per_block": layers[0],
        "transformer_depth": [d if "CrossAttn" in name else 0 for d, name in zip(depths, downs, strict=True)],
        "mid_transformer_depth": depths[-1],
        "context_size": config.get("cross_attention_dim", 1280),
        "vector_size": config.get("projection_class_embeddings_input_dim") if adds else None,
        "concat_channels": in_channels - out_channels,
        "head_dim": None if by_count or len(sizes) > 1 else sizes.pop(),
        "num_heads": counts.pop() if by_count or len(sizes) > 1 else None,
        "linear_projection": config.get("use_linear_projection", False),
        "norm_groups": config.get("norm_num_groups", 32),
    }


def unet_config(args: Mapping[str, Any], sample_size: int) -> dict[str, Any]:
    """All arguments of `UNet` -> config.json of a UNet2DConditionModel. Raises LdmError naming what it cannot say."""

    def refuse(part: str, why: str) -> LdmError:
        return LdmError("EXPORT", f"diffusers' UNet cannot express {part}: {why}", where="model.network")

    if args["qk_norm"]:
        raise refuse("qk_norm=true", "it has no normalised queries and keys")
    if args["plain_attention"]:
        raise refuse("plain_attention=true", "its blocks attend to text too")
    if args["context_size"] is None:
        raise refuse("context_size=null", "its transformers always attend to text")
    channels, depths = list(args["block_channels"]), list(args["transformer_depth"])
    middle = depths[-1] if args["mid_transformer_depth"] is None else args["mid_transformer_depth"]
    if not middle or depths[-1] not in (0, middle):
        raise refuse(f"mid_transformer_depth={middle}", "its middle is as deep as the last level")
    heads: Any = args["num_heads"]
    if heads is None:
        heads = [width // args["head_dim"] for width in channels]
    names = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    config = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        "sample_size": sample_size,
        "in_channels": args["in_channels"] + args["concat_channels"],
        "out_channels": args["out_channels"],
        "down_block_types": names,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(names)],
        "block_out_channels": channels,
        "layers_per_block": args["layers_per_block"],
        "norm_num_groups": args["norm_groups"],
        "cross_attention_dim": args["context_size"],
        "transformer_layers_per_block": [depth or 1 for depth in depths[:-1]] + [middle],
        "attention_head_dim": heads,
        "use_linear_projection": args["linear_projection"],
    }
    if args["vector_size"] is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,  # SDXL's; nothing of the weights depends on it
            "projection_class_embeddings_input_dim": args["vector_size"],
        }
    return config


def read_vae_config(
    config: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], float | list[float], float | list[float]]:
    """config.json of an AutoencoderKL -> arguments of ours, and mean and deviation of its raw latents."""
    _check_settings(config, _VAE_FIXED, _VAE_READ, where)
    if config.get("in_channels", 3) != config.get("out_channels", 3):
        raise LdmError("FORMAT", "in_channels and out_channels differ", where=where)
    quant = config.get("use_quant_conv", True)
    if quant != config.get("use_post_quant_conv", True):
        raise LdmError("FORMAT", "use_quant_conv and use_post_quant_conv differ", where=where)
    types = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
    if not types <= {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise LdmError("FORMAT", f"has blocks {', '.join(sorted(types))}", where=where)
    scale = config.get("scaling_factor") or 0.18215
    mean, std = config.get("shift_factor") or 0.0, 1 / scale
    if config.get("latents_mean") and config.get("latents_std"):
        mean, std = list(config["latents_mean"]), [value / scale for value in config["latents_std"]]
    args = {
        "in_channels": config.get("in_channels", 3),
        "latent_channels": config.get("latent_channels", 4),
        "block_channels": list(config.get("block_out_channels", (64,))),
        "layers_per_block": config.get("layers_per_block", 1),
        "mid_attention": config.get("mid_block_add_attention", True),
        "quant_conv": quant,
        "norm_groups": config.get("norm_num_groups", 32),
    }
    return args, mean, std


def vae_config(args: Mapping[str, Any], scaling_factor: float, image_size: int) -> dict[str, Any]:
    """All arguments of our `AutoencoderKL` -> config.json of diffusers'."""
    if args["patch_size"] != 1:
        raise LdmError(
            "EXPORT",
            f"diffusers' autoencoder cannot express patch_size={args['patch_size']}",
            where="model.autoencoder",
        )
    levels = len(args["block_channels"])
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "in_channels": args["in_channels"],
        "out_channels": args["in_channels"],
        "latent_channels": args["latent_channels"],
        "block_out_channels": list(args["block_channels"]),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": args["layers_per_block"],
        "norm_num_groups": args["norm_groups"],
        "act_fn": "silu",
        "mid_block_add_attention": args["mid_attention"],
        "use_quant_conv": args["quant_conv"],
        "use_post_quant_conv": args["quant_conv"],
        "sample_size": image_size,
        "scaling_factor": scaling_factor,
    }


def read_scheduler_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """scheduler_config.json -> schedule, zero_snr, prediction and sampler in our words."""
    if config.get("trained_betas") is not None:
        raise LdmError("FORMAT", "trained_betas are given, a schedule of its own", where=where)
    betas = config.get("beta_schedule", "linear")
    if betas not in ("linear", "scaled_linear"):
        raise LdmError("FORMAT", f"beta_schedule is {betas!r}", where=where, limit="linear, scaled_linear")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise LdmError("FORMAT", f"prediction_type is {prediction!r}", where=where, limit=", ".join(_PREDICTIONS))
    # what a file leaves out is its scheduler's default
    name = config.get("_class_name", "DDIMScheduler")
    old = name in ("DDIMScheduler", "PNDMScheduler", "DDPMScheduler")
    spacing = config.get("timestep_spacing", "leading" if old else "linspace")
    if spacing not in _SPACINGS:
        raise LdmError("FORMAT", f"timestep_spacing is {spacing!r}", where=where, limit=", ".join(_SPACINGS))
    return {
        "schedule": {
            "betas": betas,
            "beta_start": config.get("beta_start", 1e-4),
            "beta_end": config.get("beta_end", 0.02),
            "num_timesteps": config.get("num_train_timesteps", 1000),
        },
        "zero_snr": bool(config.get("rescale_betas_zero_snr", False)),
        "prediction": _PREDICTIONS[prediction],
        "sampler": {
            "spacing": _SPACINGS[spacing],
            # whatever the file says, the pipelines of Stable Diffusion take 1; "leading" alone reads it
            "offset": 1 if spacing == "leading" else 0,
            "final": "clean" if config.get("set_alpha_to_one", name != "PNDMScheduler") else "first",
        },
    }


def scheduler_config(
    schedule: Mapping[str, Any], zero_snr: bool, prediction: str, sampler: Mapping[str, Any]
) -> dict[str, Any]:
    """Ours -> scheduler_config.json of a DDIMScheduler."""
    theirs = {ours: other for other, ours in _PREDICTIONS.items()}
    spacings = {ours: other for other, ours in _SPACINGS.items()}
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": schedule["num_timesteps"],
        "beta_start": schedule["beta_start"],
        "beta_end": schedule["beta_end"],
        "beta_schedule": schedule["betas"],
        "trained_betas": None,
        "clip_sample": False,
        "set_alpha_to_one": sampler.get("final", "clean") == "clean",
        "steps_offset": 1,
        "timestep_spacing": spacings.get(sampler.get("spacing", "trailing"), "trailing"),
        "rescale_betas_zero_snr": zero_snr,
        "prediction_type": theirs[prediction],
    }


def pipeline_index() -> dict[str, Any]:
    """model_index.json of a StableDiffusionPipeline."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": VERSION,
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


# ---- statistics of the latents


def fold_statistics(vae: Mapping[str, Tensor], mean: Tensor, std: Tensor, scale: float) -> dict[str, Tensor]:
    """The autoencoder with (z - mean) / std and its inverse worked into the 1x1 convolutions around the latents, so
    that the pipelines' one number `scale` is right: their latents, raw times scale, are then the standardised ones.

    vae: names of ours, without the statistics.   mean, std: [C].   Computed in float64, returned in the dtype given.
    Convolutions that are not there are made.
    """
    channels = len(mean)
    mean, std = mean.double(), std.double()
    like = vae["decoder.conv_in.weight"]
    eye = torch.eye(2 * channels, dtype=torch.float64)
    quant_w, quant_b = _conv(vae, "quant_conv", eye)
    post_w, post_b = _conv(vae, "post_quant_conv", eye[:channels, :channels])
    factor = 1 / (std * scale)  # raw z -> raw z of theirs: (z - mean) * factor; log-variance + 2 log(factor)
    rows = torch.cat([factor, torch.ones_like(factor)])
    shift = torch.cat([-mean * factor, 2 * factor.log()])
    folded = {
        "quant_conv.weight": (quant_w * rows[:, None])[..., None, None],
        "quant_conv.bias": quant_b * rows + shift,
        "post_quant_conv.weight": (post_w / factor)[..., None, None],
        "post_quant_conv.bias": post_b + post_w @ mean,
    }
    return {**vae, **{name: value.to(like.dtype) for name, value in folded.items()}}


def _conv(vae: Mapping[str, Tensor], name: str, identity: Tensor) -> tuple[Tensor, Tensor]:
    if f"{name}.weight" not in vae:
        return identity, torch.zeros(len(identity), dtype=torch.float64)
    return vae[f"{name}.weight"].flatten(1).double(), vae[f"{name}.bias"].double()
