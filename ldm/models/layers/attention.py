"""Attention and the transformer blocks of the UNet and of the autoencoder. Names follow diffusers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers.recompute import recomputed


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention. q: [B, heads, N, d]; k, v: [B, heads, M, d]; mask: [B, 1, 1, M] bool, True = attend.

    On the CPU all but large problems are written out as matrix products: forward and backward of 1024 queries take,
    for 77 keys, 2.9 ms where the fused kernel takes 9.6 in bfloat16 (9.3 for 12.8 in float32), and for 1024 keys 47
    for 103 in bfloat16; there alone float32 is faster fused, 137 for 256 (docs/experiments.md).
    """
    small = q.shape[-2] * k.shape[-2] <= (1024 * 1024 if q.dtype == torch.bfloat16 else 1024 * 128)
    if q.device.type == "cpu" and small and not torch.compiler.is_compiling():
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Multi-head attention of `size` channels; with `context_size` the keys and values come from the context.

    qk_norm: each head's queries and keys are scaled to unit mean square, times a learned weight per channel, before
        they meet: attention grows sharp early, and cannot overflow (Henry et al. 2020, arXiv:2010.04245).
    """

    def __init__(
        self,
        size: int,
        num_heads: int,
        context_size: int | None = None,
        *,
        bias: bool = False,
        head_dim: int = 0,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        inner = num_heads * head_dim if head_dim else size
        if inner % num_heads:
            raise ValueError(f"{size} channels cannot be cut into {num_heads} heads")
        self.num_heads = num_heads
        self.to_q = nn.Linear(size, inner, bias=bias)
        self.to_k = nn.Linear(context_size or size, inner, bias=bias)
        self.to_v = nn.Linear(context_size or size, inner, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, size)])
        self.norm_q = nn.RMSNorm(inner // num_heads, eps=1e-6) if qk_norm else None
        self.norm_k = nn.RMSNorm(inner // num_heads, eps=1e-6) if qk_norm else None

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x: [B, N, size]; context: [B, M, context_size]; mask: [B, M] bool. Returns [B, N, size]."""
        source = x if context is None else context

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        attend = None if mask is None else mask[:, None, None, :]
        q, k, v = heads(self.to_q(x)), heads(self.to_k(source)), heads(self.to_v(source))
        if self.norm_q is not None and self.norm_k is not None:  # in the weights' precision: squares overflow in fp16
            q, k = (norm(y.to(norm.weight.dtype)).to(v.dtype) for norm, y in ((self.norm_q, q), (self.norm_k, k)))
        out = attention(q, k, v, attend)
        return self.to_out[0](out.transpose(1, 2).flatten(-2))


class GEGLU(nn.Module):
    """Gated GELU. Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(size, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, size: int, expansion: int = 4) -> None:
        super().__init__()
        # index 1 was dropout in the original: kept empty, so that the names match
        self.net = nn.ModuleList([GEGLU(size, expansion * size), nn.Identity(), nn.Linear(expansion * size, size)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention if there is a context, feed-forward; each behind a norm, each residual."""

    def __init__(self, size: int, num_heads: int, context_size: int | None, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size)
        self.attn1 = Attention(size, num_heads, qk_norm=qk_norm)
        if context_size is not None:
            self.norm2 = nn.LayerNorm(size)
            self.attn2 = Attention(size, num_heads, context_size, qk_norm=qk_norm)
        self.crosses = context_size is not None
        self.norm3 = nn.LayerNorm(size)
        self.ff = FeedForward(size)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        if self.crosses:
            x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, residual around the whole.

    linear_projection: linear layers into and out of the blocks (SD2, SDXL) instead of 1x1 convolutions (SD1).
    gradient_checkpointing: see `UNet`.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        depth: int,
        context_size: int | None,
        norm_groups: int,
        linear_projection: bool,
        qk_norm: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.linear_projection, self.gradient_checkpointing = linear_projection, gradient_checkpointing
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, num_heads, context_size, qk_norm) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        height, width = x.shape[-2:]
        h = self.norm(x)
        if not self.linear_projection:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # [B, C, h, w] -> [B, N, C]
        if self.linear_projection:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = recomputed(self.gradient_checkpointing, block, h, context, mask)
        if self.linear_projection:
            h = self.proj_out(h)
        h = h.transpose(1, 2).unflatten(2, (height, width))  # [B, N, C] -> [B, C, h, w]
        if not self.linear_projection:
            h = self.proj_out(h)
        return x + h


class SpatialAttention(nn.Module):
    """Self-attention over the pixels of a feature map, residual: the autoencoder's middle, and the DDPM's attention."""

    def __init__(self, channels: int, norm_groups: int, *, num_heads: int = 1, eps: float = 1e-6) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.group_norm = nn.GroupNorm(norm_groups, channels, eps=eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, C, H, W] -> [B, N, C]
        projected = (layer(h).unflatten(-1, (self.num_heads, -1)) for layer in (self.to_q, self.to_k, self.to_v))
        q, k, v = (y.transpose(1, 2) for y in projected)
        h = self.to_out[0](attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + h.transpose(1, 2).unflatten(2, x.shape[-2:])
