"""The UNet of latent diffusion: SD1, SD2, SDXL, the pixel models before them and anything smaller.

Module and parameter names follow diffusers' UNet2DConditionModel, with `plain_attention` its UNet2DModel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers.attention import SpatialAttention, SpatialTransformer
from ldm.models.layers.embeddings import TimestepEmbedding, sinusoidal_embedding
from ldm.models.layers.recompute import recomputed
from ldm.models.layers.resnet import Downsample, ResnetBlock, Upsample
from ldm.types import Conditioning


class UNet(nn.Module):
    """Predicts a picture-shaped tensor from a noisy one, its time and its conditioning.

    in_channels, out_channels: channels of x and of the prediction.
    block_channels: width of each level, fine to coarse.   layers_per_block: residual blocks a level on the way down
        (one more on the way up).
    transformer_depth: transformer blocks after each residual block, per level; 0 = none. The middle takes the last
        level's depth, or `mid_transformer_depth`.
    context_size: width D of `Conditioning.tokens` for cross-attention, None = self-attention only.
    vector_size: width E of `Conditioning.vector`, added to the time embedding, None = not used. SDXL's 2816 are the
        pooled text (1280), then six sizes of 256 sinusoids each.
    concat_channels: channels of `Conditioning.concat`, joined to x, 0 = not used.
    head_dim: channels per attention head; num_heads: a fixed number of heads instead (SD1: 8).
    linear_projection: see `SpatialTransformer`.   norm_groups: groups of every GroupNorm.
    dropout: inside the residual blocks.   qk_norm: see `Attention`; off in Stable Diffusion.
    plain_attention: one self-attention layer, without feed-forward and tokens, in the place of each transformer, as
        in pixel models: Ho et al. 2020, arXiv:2006.11239, appendix B. Depths must then be 0 or 1.
    gradient_checkpointing: residual and transformer blocks are computed again in backward instead of kept.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        block_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        transformer_depth: Sequence[int] = (1, 1, 1, 0),
        mid_transformer_depth: int | None = 1,
        context_size: int | None = 768,
        vector_size: int | None = None,
        concat_channels: int = 0,
        head_dim: int | None = 64,
        num_heads: int | None = None,
        linear_projection: bool = True,
        norm_groups: int = 32,
        dropout: float = 0.0,
        qk_norm: bool = False,
        plain_attention: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        block_channels, depths = list(block_channels), list(transformer_depth)
        if len(depths) != len(block_channels):
            raise ValueError(f"transformer_depth has {len(depths)} levels, block_channels has {len(block_channels)}")
        if (head_dim is None) == (num_heads is None):
            raise ValueError("give either head_dim or num_heads, and null for the other")
        for width in block_channels:
            if width % norm_groups:
                raise ValueError(f"block_channels {width} is not divisible by norm_groups {norm_groups}")
        mid_depth = depths[-1] if mid_transformer_depth is None else mid_transformer_depth
        for width, depth in [*zip(block_channels, depths, strict=True), (block_channels[-1], mid_depth)]:
            if depth and width % (head_dim or num_heads or 1):
                part = f"head_dim {head_dim}" if head_dim is not None else f"num_heads {num_heads}"
                raise ValueError(f"block_channels {width} is not divisible by {part}")
        if plain_attention and (context_size is not None or qk_norm or max(*depths, mid_depth) > 1):
            raise ValueError("plain_attention takes no context_size, no qk_norm and depths of 0 or 1")
        has_tokens = context_size is not None and (any(depths) or mid_depth)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.context_size, self.vector_size = context_size, vector_size
        self.consumes = frozenset(
            ["tokens", "mask"] * bool(has_tokens)
            + ["vector"] * (vector_size is not None)
            + ["concat"] * bool(concat_channels)
        )
        first, time_size = block_channels[0], 4 * block_channels[0]
        self.first = first

        def attention(channels: int, depth: int) -> SpatialTransformer | SpatialAttention:
            heads = num_heads if num_heads is not None else channels // head_dim  # type: ignore[operator]
            if plain_attention:
                return SpatialAttention(channels, norm_groups, num_heads=heads, eps=1e-5)
            options = (linear_projection, qk_norm, gradient_checkpointing)
            return SpatialTransformer(channels, heads, depth, context_size, norm_groups, *options)

        def resnet(c_in: int, c_out: int) -> ResnetBlock:
            return ResnetBlock(c_in, c_out, time_size=time_size, norm_groups=norm_groups, dropout=dropout)

        self.conv_in = nn.Conv2d(in_channels + concat_channels, first, 3, padding=1)
        self.time_embedding = TimestepEmbedding(first, time_size)
        self.add_embedding = TimestepEmbedding(vector_size, time_size) if vector_size is not None else None

        last = len(block_channels) - 1
        self.down_blocks = nn.ModuleList()
        skips, width = [first], first
        for i, channels in enumerate(block_channels):
            resnets = [resnet(width if j == 0 else channels, channels) for j in range(layers_per_block)]
            skips += [channels] * layers_per_block
            attentions = [attention(channels, depths[i]) for _ in resnets] if depths[i] else []
            if i < last:
                skips.append(channels)
            resample = Downsample(channels) if i < last else None
            self.down_blocks.append(_Block(resnets, attentions, resample, gradient_checkpointing))
            width = channels

        middle = [attention(width, mid_depth)] if mid_depth else []
        self.mid_block = _Middle([resnet(width, width), resnet(width, width)], middle, gradient_checkpointing)

        self.up_blocks = nn.ModuleList()
        for i, channels in reversed(list(enumerate(block_channels))):
            resnets = []
            for _ in range(layers_per_block + 1):
                resnets.append(resnet(width + skips.pop(), channels))
                width = channels
            attentions = [attention(channels, depths[i]) for _ in resnets] if depths[i] else []
            enlarge = Upsample(channels) if i > 0 else None
            self.up_blocks.append(_Block(resnets, attentions, enlarge, gradient_checkpointing, up=True))

        self.conv_norm_out = nn.GroupNorm(norm_groups, first, eps=1e-5)
        self.conv_out = nn.Conv2d(first, out_channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """x: [B, in, h, w]; time: [B]; cond: exactly the fields in `consumes`. Returns [B, out, h, w]."""
        check_conditioning(self.consumes, cond)
        if cond.concat is not None:
            x = torch.cat([x, cond.concat], dim=1)
        h = self.conv_in(x)
        t = self.time_embedding(sinusoidal_embedding(time, self.first).to(h.dtype))  # [B, 4 * first]
        if self.add_embedding is not None:
            t = t + self.add_embedding(cond.vector)
        t = F.silu(t)  # here, not in every block
        skips = [h]
        for block in self.down_blocks:
            h = block(h, t, cond, skips)
        h = self.mid_block(h, t, cond)
        for block in self.up_blocks:
            h = block(h, t, cond, skips)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def _attend(module: nn.Module, h: Tensor, cond: Conditioning) -> Tensor:
    if isinstance(module, SpatialTransformer):
        return module(h, cond.tokens, cond.mask)
    return module(h)


class _Block(nn.Module):
    """One level: residual blocks, each followed by its transformer, then the change of resolution.

    On the way down every result is pushed on `skips`; on the way up every residual block pops one.
    """

    upsamplers: nn.ModuleList
    downsamplers: nn.ModuleList

    def __init__(
        self,
        resnets: list[ResnetBlock],
        attentions: list[SpatialTransformer | SpatialAttention],
        resample: Downsample | Upsample | None,
        gradient_checkpointing: bool,
        up: bool = False,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        if resample is not None:
            setattr(self, "upsamplers" if up else "downsamplers", nn.ModuleList([resample]))
        self.up, self.attends, self.resamples = up, bool(attentions), resample is not None
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self, h: Tensor, time: Tensor, cond: Conditioning, skips: list[Tensor]) -> Tensor:
        for j, resnet in enumerate(self.resnets):
            h = torch.cat([h, skips.pop()], dim=1) if self.up else h
            h = recomputed(self.gradient_checkpointing, resnet, h, time)
            if self.attends:
                h = _attend(self.attentions[j], h, cond)
            if not self.up:
                skips.append(h)
        if self.resamples and self.up:
            height, width = skips[-1].shape[-2:]
            h = self.upsamplers[0](h, (height, width))
        elif self.resamples:
            h = self.downsamplers[0](h)
            skips.append(h)
        return h


class _Middle(nn.Module):
    def __init__(
        self,
        resnets: list[ResnetBlock],
        attentions: list[SpatialTransformer | SpatialAttention],
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self, h: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        h = recomputed(self.gradient_checkpointing, self.resnets[0], h, time)
        for module in self.attentions:
            h = _attend(module, h, cond)
        return recomputed(self.gradient_checkpointing, self.resnets[1], h, time)


def check_conditioning(consumes: frozenset[str], cond: Conditioning) -> None:
    """Refuse a field that is missing or that nothing would read. A mask may always be absent."""
    given = {name for name in ("tokens", "mask", "vector", "concat", "residuals") if getattr(cond, name) is not None}
    missing, unexpected = consumes - given - {"mask"}, given - consumes
    if missing or unexpected:
        raise ValueError(
            f"conditioning does not fit the network: missing {sorted(missing) or 'nothing'}, "
            f"unexpected {sorted(unexpected) or 'nothing'}"
        )
