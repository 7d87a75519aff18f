"""Kinds of regions of a picture: plain areas, edges, and fine detail such as small text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("flat", "edges", "detail")
FLAT, DETAIL = 4.0, 16.0
"""Grey levels of 255 per pixel, averaged over the window. A sharp step of c levels gives 0.349 c: so a plain area may
have steps of 11 levels, more than JPEG leaves there, and detail has steps of at least 46, a sixth of the range."""
WINDOW = 7
SIGMA = 1.5


def regions(images: Tensor) -> Tensor:
    """[B, H, W] uint8, the index in `KINDS` of every pixel of pictures [B, 3, H, W] in [-1, 1].

    From the eigenvalues l1 >= l2 of the structure tensor. flat: sqrt(l1) < FLAT, nothing changes.   detail:
    sqrt(l2) >= DETAIL, strong gradients in more than one direction within seven pixels, as in small text, corners and
    fine texture.   edges: all others.
    """
    larger, smaller = structure(images)
    kinds = torch.ones_like(larger, dtype=torch.uint8)
    kinds[larger < FLAT**2] = 0
    kinds[smaller >= DETAIL**2] = 2
    return kinds


def structure(images: Tensor) -> tuple[Tensor, Tensor]:
    """(l1, l2) [B, H, W], l1 >= l2, in squared grey levels per pixel: the eigenvalues of the structure tensor, the
    products of the luminance's gradient averaged with a Gaussian of 1.5 pixels.
    Source: Harris and Stephens 1988, "A combined corner and edge detector", section 2; luminance: ITU-R BT.601.
    """
    weights = images.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32).view(1, 3, 1, 1)
    grey = (images.float() * weights).sum(1, keepdim=True) * 127.5
    ramp, smooth = grey.new_tensor([-1.0, 0.0, 1.0]) / 2, grey.new_tensor([1.0, 2.0, 1.0]) / 4
    sobel = torch.stack([torch.outer(smooth, ramp), torch.outer(ramp, smooth)])[:, None]
    gx, gy = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), sobel).unbind(1)
    a, b, c = _averaged(torch.stack([gx * gx, gx * gy, gy * gy], dim=1)).unbind(1)
    mean, half = (a + c) / 2, (((a - c) / 2).square() + b.square()).sqrt()
    return mean + half, mean - half


def _averaged(x: Tensor) -> Tensor:
    """[B, C, H, W] after the Gaussian window, borders replicated."""
    offsets = torch.arange(WINDOW, device=x.device, dtype=x.dtype) - WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SIGMA**2))
    window = (window / window.sum()).expand(x.shape[1], 1, -1)
    half = WINDOW // 2
    x = F.conv2d(F.pad(x, (half, half, 0, 0), mode="replicate"), window[:, :, None], groups=x.shape[1])
    return F.conv2d(F.pad(x, (0, 0, half, half), mode="replicate"), window[..., None], groups=x.shape[1])
