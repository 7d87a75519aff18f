"""How far colours moved, in units of what an eye can tell."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

JUST_NOTICEABLE = 2.3
"""Difference dE*ab that an observer just notices: Mahy, Van Eycken and Oosterlinck 1994."""
BLOCK = 8
_TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))  # IEC 61966-2-1
_WHITE = (0.9505, 1.0, 1.089)  # D65


def colour_shift(reconstruction: Tensor, images: Tensor) -> Tensor:
    """[B] mean CIE 1976 colour difference dE*ab of blocks of 8 x 8 pixels: of colours, not of noise or lost detail.

    Pictures [B, 3, H, W] in [-1, 1] are sRGB; blocks are averaged in linear light; smaller pictures are one block.
    """
    return (_blocks(reconstruction) - _blocks(images)).square().sum(1).sqrt().flatten(1).mean(1)


def _blocks(images: Tensor) -> Tensor:
    """[B, 3, H/8, W/8] CIE L*a*b* of the blocks."""
    srgb = (images.double().clamp(-1, 1) + 1) / 2
    linear = torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear = F.avg_pool2d(linear, [min(BLOCK, side) for side in linear.shape[-2:]])
    xyz = torch.einsum("ij,bjhw->bihw", linear.new_tensor(_TO_XYZ), linear)
    t = xyz / xyz.new_tensor(_WHITE).view(1, 3, 1, 1)
    f = torch.where(t > (6 / 29) ** 3, t.clamp(min=0) ** (1 / 3), t * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)
