"""Encoder and decoder of the convolutional autoencoders. Names of modules and parameters follow diffusers'."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers.attention import SpatialAttention
from ldm.models.layers.resnet import Downsample, ResnetBlock, Upsample


class _Middle(nn.Module):
    def __init__(self, channels: int, attention: bool, norm_groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_resnet(channels, channels, norm_groups) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialAttention(channels, norm_groups)] if attention else [])

    def forward(self, h: Tensor) -> Tensor:
        h = self.resnets[0](h)
        for attention in self.attentions:
            h = attention(h)
        return self.resnets[1](h)


class _Level(nn.Module):
    def __init__(self, resnets: list[ResnetBlock], resample: Downsample | Upsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.resamples = resample is not None
        if isinstance(resample, Downsample):
            self.downsamplers = nn.ModuleList([resample])
        elif resample is not None:
            self.upsamplers = nn.ModuleList([resample])

    def forward(self, h: Tensor) -> Tensor:
        for resnet in self.resnets:
            h = resnet(h)
        if self.resamples:
            h = self.downsamplers[0](h) if hasattr(self, "downsamplers") else self.upsamplers[0](h)
        return h


def _resnet(c_in: int, c_out: int, norm_groups: int) -> ResnetBlock:
    return ResnetBlock(c_in, c_out, norm_groups=norm_groups, eps=1e-6)


class Encoder(nn.Module):
    """[B, in, H, W] -> [B, out, h, w]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_channels: list[int],
        layers: int,
        patch_size: int,
        mid_attention: bool,
        norm_groups: int,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, block_channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        width, last = block_channels[0], len(block_channels) - 1
        for i, channels in enumerate(block_channels):
            resnets = [_resnet(width if j == 0 else channels, channels, norm_groups) for j in range(layers)]
            self.down_blocks.append(_Level(resnets, Downsample(channels, asymmetric=True) if i < last else None))
            width = channels
        self.mid_block = _Middle(width, mid_attention, norm_groups)
        self.conv_norm_out = nn.GroupNorm(norm_groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(F.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x)
        for block in self.down_blocks:
            h = block(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """[B, in, h, w] -> [B, out, H, W]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_channels: list[int],
        layers: int,
        patch_size: int,
        mid_attention: bool,
        norm_groups: int,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        width = block_channels[-1]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.mid_block = _Middle(width, mid_attention, norm_groups)
        self.up_blocks = nn.ModuleList()
        for i, channels in reversed(list(enumerate(block_channels))):
            resnets = [_resnet(width if j == 0 else channels, channels, norm_groups) for j in range(layers + 1)]
            self.up_blocks.append(_Level(resnets, Upsample(channels) if i > 0 else None))
            width = channels
        self.conv_norm_out = nn.GroupNorm(norm_groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out_channels * patch_size**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        h = self.conv_out(F.silu(self.conv_norm_out(h)))
        return F.pixel_shuffle(h, self.patch_size) if self.patch_size > 1 else h
