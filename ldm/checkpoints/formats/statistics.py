"""Statistics of the latents <-> the one scaling factor that Stable Diffusion's pipelines know."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def factors(mean: Tensor, std: Tensor) -> tuple[float, float] | None:
    """Scaling and shift of all channels, latents = (raw - shift) * scaling; None where channels differ."""
    if not bool((mean == mean[0]).all()) or not bool((std == std[0]).all()):
        return None
    exact, shift = 1 / float(std[0]), float(mean[0])
    short = float(f"{exact:.6g}")  # 0.18215, not 0.18214999977
    same = torch.equal((1 / torch.tensor(short, dtype=torch.float64)).to(std.dtype), std[0])
    near = float(f"{shift:.6g}")
    return short if same else exact, near if torch.equal(torch.tensor(near, dtype=mean.dtype), mean[0]) else shift


def scaling_factor(mean: Tensor, std: Tensor) -> float | None:
    """1 / std as the one number that Stable Diffusion's pipelines know; None where channels differ or are shifted."""
    found = factors(mean, std)
    return found[0] if found is not None and found[1] == 0 else None


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
