"""Embeddings of scalars."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoidal_embedding(values: Tensor, size: int, max_period: float = 10_000.0) -> Tensor:
    """[B] values to [B, size] float32: cosines, then sines, of geometrically spaced frequencies.

    size: even.  Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5, in Stable Diffusion's order.
    """
    half = size // 2
    # fp32: half precision cannot tell neighbouring timesteps apart
    # and in the reference's order of operations: at t = 1000 another order moves the angles by 1e-4
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[:, None] * torch.exp(exponent)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between: [B, in_size] -> [B, out_size]."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_size, out_size)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(out_size, out_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))
