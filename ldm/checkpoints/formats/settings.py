"""config.json of diffusers' UNet and autoencoder <-> arguments of ours.

Every setting that decides what a network computes is either translated or must have the value that ours has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ldm.checkpoints.formats.description import DIFFUSERS_VERSION
from ldm.checkpoints.formats.reading import count, setting
from ldm.errors import LdmError

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

    channels = _each(config, "block_out_channels", [320, 640, 1280, 1280], where)
    levels = len(channels)
    layers = _each(config, "layers_per_block", 2, where, levels)
    if len(set(layers)) > 1:
        raise refuse("layers_per_block", "one number for all levels")
    downs = config.get("down_block_types", ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"])
    ups = config.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1))
    if not _are(str, downs) or not set(downs) <= {"CrossAttnDownBlock2D", "DownBlock2D"} or len(downs) != levels:
        raise refuse("down_block_types", "CrossAttnDownBlock2D and DownBlock2D, one for each level")
    if not _are(str, ups) or [name.replace("Up", "Down") for name in reversed(ups)] != list(downs):
        raise refuse("up_block_types", "down_block_types in reverse")
    depths = _each(config, "transformer_layers_per_block", 1, where, levels)
    # what diffusers calls attention_head_dim is the number of heads: huggingface/diffusers#2011
    heads = _each(config, "attention_head_dim", 8, where, levels)
    attends = ["CrossAttn" in name for name in downs[:-1]] + [True]  # the middle attends with the last level's heads
    sizes = {width // count for width, count, used in zip(channels, heads, attends, strict=True) if used}
    counts = {count for count, used in zip(heads, attends, strict=True) if used}
    if len(counts) > 1 and len(sizes) > 1:
        raise refuse("attention_head_dim", "the same number of heads, or of channels a head, everywhere")
    adds = config.get("addition_embed_type")
    if adds not in (None, "text_time"):
        raise refuse("addition_embed_type", "null or text_time")
    in_channels, out_channels = (count(config, key, 4, where) for key in ("in_channels", "out_channels"))
    linear = setting(config, "use_linear_projection", False, where)
    by_count = len(counts) == 1 and not linear
    return {
        "in_channels": out_channels,
        "out_channels": out_channels,
        "block_channels": channels,
        "layers_per_block": layers[0],
        "transformer_depth": [d if "CrossAttn" in name else 0 for d, name in zip(depths, downs, strict=True)],
        "mid_transformer_depth": depths[-1],
        "context_size": count(config, "cross_attention_dim", 1280, where),
        "vector_size": count(config, "projection_class_embeddings_input_dim", 0, where) if adds else None,
        "concat_channels": in_channels - out_channels,
        "head_dim": None if by_count or len(sizes) > 1 else sizes.pop(),
        "num_heads": counts.pop() if by_count or len(sizes) > 1 else None,
        "linear_projection": linear,
        "norm_groups": count(config, "norm_num_groups", 32, where),
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
        "_diffusers_version": DIFFUSERS_VERSION,
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
    channels, out_channels = (count(config, key, 3, where) for key in ("in_channels", "out_channels"))
    if channels != out_channels:
        raise LdmError("FORMAT", "in_channels and out_channels differ", where=where)
    quant, post = (setting(config, key, True, where) for key in ("use_quant_conv", "use_post_quant_conv"))
    if quant != post:
        raise LdmError("FORMAT", "use_quant_conv and use_post_quant_conv differ", where=where)
    for key, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        types = config.get(key, [block])
        if not _are(str, types) or set(types) != {block}:
            raise LdmError("FORMAT", f"{key} is {types!r}", where=where, limit=f"{block} only")
    latent_channels = count(config, "latent_channels", 4, where)
    args = {
        "in_channels": channels,
        "latent_channels": latent_channels,
        "block_channels": _each(config, "block_out_channels", [64], where),
        "layers_per_block": count(config, "layers_per_block", 1, where),
        "mid_attention": setting(config, "mid_block_add_attention", True, where),
        "quant_conv": quant,
        "norm_groups": count(config, "norm_num_groups", 32, where),
    }
    return args, *_statistics(config, latent_channels, where)


def _statistics(
    config: Mapping[str, Any], channels: int, where: str
) -> tuple[float | list[float], float | list[float]]:
    """Mean and deviation of the raw latents, from the factors that the pipelines apply."""
    scale = config.get("scaling_factor", 0.18215)
    shift = config.get("shift_factor") or 0.0
    means, stds = config.get("latents_mean"), config.get("latents_std")
    centres, widths = (means, stds) if means and stds else ([shift], [1.0])
    numbers = _are(float, [scale]) and _are(float, centres) and _are(float, widths)
    if not numbers or min(scale, *widths) <= 0:
        limit = "scaling_factor, shift_factor, latents_mean and latents_std are finite numbers"
        raise LdmError("FORMAT", "says nothing usable of its latents", where=where, limit=limit)
    if not (means and stds):
        return float(shift), 1 / scale
    if {len(means), len(stds)} != {channels}:
        raise LdmError("FORMAT", "latents_mean and latents_std", where=where, limit=f"{channels} numbers each")
    return [float(value) for value in means], [value / scale for value in stds]


def _each(config: Mapping[str, Any], key: str, default: Any, where: str, levels: int | None = None) -> list[int]:
    """A number of each level; one number goes for all `levels`. Raises LdmError FORMAT."""
    value = config.get(key, default)
    values = list(value) if isinstance(value, list | tuple) else [value] * (levels or 0)
    if not values or not _are(int, values) or min(values) < 1 or len(values) != (levels or len(values)):
        limit = f"{levels} positive numbers, one for each level" if levels else "a list of positive numbers"
        raise LdmError("FORMAT", f"{key} is {value!r}", where=where, limit=limit)
    return values


def _are(kind: type, values: Any) -> bool:
    """Whether it is a list of such values; a float may be any finite number, and a bool is none."""

    def fits(value: Any) -> bool:
        if isinstance(value, bool):
            return False
        return isinstance(value, int | float) and math.isfinite(value) if kind is float else isinstance(value, kind)

    return isinstance(values, list | tuple) and all(map(fits, values))


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
        "_diffusers_version": DIFFUSERS_VERSION,
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
