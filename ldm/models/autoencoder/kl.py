"""The KL autoencoder of latent diffusion. Module and parameter names follow diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.models.autoencoder.convolutional import ConvolutionalAutoencoder

LOGVAR_RANGE = (-30.0, 20.0)


class AutoencoderKL(ConvolutionalAutoencoder):
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
        super().__init__(
            in_channels,
            latent_channels,
            2 * latent_channels,
            block_channels,
            layers_per_block,
            patch_size,
            mid_attention,
            quant_conv,
            norm_groups,
        )

    def moments(self, images: Tensor) -> Tensor:
        """Mean and log-variance of the posterior of the raw latents: [B, 2C, h, w]."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return torch.cat([mean, logvar.clamp(*LOGVAR_RANGE)], dim=1)

    def raw(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        return posterior(moments, noise)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Training's way: the reconstruction and {"moments": [B, 2C, h, w]}."""
        moments = self.moments(images)
        return self.decode_raw(self.raw(moments, noise)), {"moments": moments}


def posterior(moments: Tensor, noise: Tensor | None = None) -> Tensor:
    """mean + exp(logvar / 2) * noise, or the mean. moments: [B, 2C, h, w]; noise: [B, C, h, w]."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
