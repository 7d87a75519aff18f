"""The KL autoencoder of latent diffusion. Module and parameter names follow diffusers' AutoencoderKL."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.autoencoder.statistics import LatentStatistics
from ldm.models.layers.attention import SpatialAttention
from ldm.models.layers.resnet import Downsample, ResnetBlock, Upsample

LOGVAR_RANGE = (-30.0, 20.0)


class AutoencoderKL(nn.Module):
    """Pictures [B, in, H, W] in [-1, 1] to latents [B, latent_channels, H/f, W/f] and back.

    f = patch_size * 2 ** (len(block_channels) - 1).
    block_channels: width of each level, fine to coarse.   layers_per_block: residual blocks a level in the encoder
        (one more in the decoder).
    patch_size: pixels folded into channels before the first convolution (1 = none): the fast variant's stem.
    mid_attention: self-attention in the middle.   quant_conv: 1x1 convolutions around the latents, as in SD.
    Source: Rombach et al. 2022, arXiv:2112.10752, appendix G.
    """

    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 4,
        block_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        patch_size: int = 1,
        mid_attention: bool = True,
        quant_conv: bool = True,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        block_channels = list(block_channels)
        for width in block_channels:
            if width % norm_groups:
                raise ValueError(f"block_channels {width} is not divisible by norm_groups {norm_groups}")
        self.in_channels, self.latent_channels = in_channels, latent_channels
        self.moment_channels = 2 * latent_channels
        self.downsampling = patch_size * 2 ** (len(block_channels) - 1)
        shape = (in_channels, latent_channels, block_channels, layers_per_block, patch_size, mid_attention, norm_groups)
        self.encoder = Encoder(*shape)
        self.decoder = Decoder(*shape)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if quant_conv else nn.Identity()
        self.statistics = LatentStatistics(latent_channels)

    def moments(self, images: Tensor) -> Tensor:
        """Mean and log-variance of the posterior of the raw latents: [B, 2C, h, w]."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return torch.cat([mean, logvar.clamp(*LOGVAR_RANGE)], dim=1)

    def decode_raw(self, z: Tensor) -> Tensor:
        """Raw latents to pictures (not clamped)."""
        return self.decoder(self.post_quant_conv(z))

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Standardised latents; the posterior's mean, or a draw from it with `noise` [B, C, h, w]."""
        return self.latents(self.moments(images), noise)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Standardised latents from stored moments [B, 2C, h, w]."""
        return self.statistics.standardise(posterior(moments, noise))

    def decode(self, latents: Tensor) -> Tensor:
        """Standardised latents to pictures (not clamped)."""
        return self.decode_raw(self.statistics.restore(latents))

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Training's way: reconstruction and moments."""
        moments = self.moments(images)
        return self.decode_raw(posterior(moments, noise)), moments

    @torch.no_grad()
    def latent_id(self) -> str:
        """sha256 over names, shapes and float32 bytes of everything that determines latents; not of the decoder."""
        digest = hashlib.sha256(f"latents:{self.downsampling}:{self.latent_channels}".encode())
        for name, value in sorted(self.state_dict().items()):
            if name.startswith(("encoder.", "quant_conv.", "statistics.")) and name != "statistics.count":
                digest.update(f"{name}:{tuple(value.shape)}".encode())
                digest.update(value.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def posterior(moments: Tensor, noise: Tensor | None = None) -> Tensor:
    """mean + exp(logvar / 2) * noise, or the mean. moments: [B, 2C, h, w]; noise: [B, C, h, w]."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean if noise is None else mean + torch.exp(0.5 * logvar) * noise


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
    """[B, in, H, W] -> [B, 2 * latent_channels, h, w]."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
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
        self.conv_out = nn.Conv2d(width, 2 * latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(F.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x)
        for block in self.down_blocks:
            h = block(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """[B, latent_channels, h, w] -> [B, out, H, W]."""

    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        block_channels: list[int],
        layers: int,
        patch_size: int,
        mid_attention: bool,
        norm_groups: int,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        width = block_channels[-1]
        self.conv_in = nn.Conv2d(latent_channels, width, 3, padding=1)
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
