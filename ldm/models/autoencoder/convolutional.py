"""What the trained autoencoders share: encoder, decoder and the way between raw and standardised latents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.models.autoencoder.blocks import Decoder, Encoder
from ldm.models.autoencoder.statistics import LatentStatistics


class ConvolutionalAutoencoder(nn.Module):
    """Pictures [B, in, H, W] in [-1, 1] to latents [B, latent_channels, H/f, W/f] and back.

    f = patch_size * 2 ** (len(block_channels) - 1).
    A subclass says what the encoder's output means (`moments`, `raw`) and what a training step needs (`forward`).
    moment_channels: of the encoder's output.   For the rest see `AutoencoderKL`.
    """

    determines_latents: tuple[str, ...] = ("encoder.", "quant_conv.", "statistics.mean", "statistics.std")
    """Where the names of those tensors begin."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        moment_channels: int,
        block_channels: Sequence[int],
        layers_per_block: int,
        patch_size: int,
        mid_attention: bool,
        quant_conv: bool,
        norm_groups: int,
    ) -> None:
        super().__init__()
        block_channels = list(block_channels)
        for width in block_channels:
            if width % norm_groups:
                raise ValueError(f"block_channels {width} is not divisible by norm_groups {norm_groups}")
        self.in_channels, self.latent_channels, self.moment_channels = in_channels, latent_channels, moment_channels
        self.downsampling = patch_size * 2 ** (len(block_channels) - 1)
        shape = (block_channels, layers_per_block, patch_size, mid_attention, norm_groups)
        self.encoder = Encoder(in_channels, moment_channels, *shape)
        self.decoder = Decoder(latent_channels, in_channels, *shape)
        self.quant_conv = nn.Conv2d(moment_channels, moment_channels, 1) if quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if quant_conv else nn.Identity()
        self.statistics = LatentStatistics(latent_channels)

    def moments(self, images: Tensor) -> Tensor:
        """All that is known of a picture's latents: [B, moment_channels, h, w]."""
        raise NotImplementedError

    def raw(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Raw latents [B, C, h, w] from moments."""
        raise NotImplementedError

    def decode_raw(self, z: Tensor) -> Tensor:
        """Raw latents to pictures (not clamped)."""
        return self.decoder(self.post_quant_conv(z))

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Standardised latents; the posterior's mean, or a draw with `noise` [B, C, h, w] where there is one."""
        return self.latents(self.moments(images), noise)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Standardised latents from stored moments [B, moment_channels, h, w]."""
        return self.statistics.standardise(self.raw(moments, noise))

    def decode(self, latents: Tensor) -> Tensor:
        """Standardised latents to pictures (not clamped)."""
        return self.decode_raw(self.statistics.restore(latents))

    @torch.no_grad()
    def latent_id(self) -> str:
        """sha256 over names, shapes and float32 bytes of the tensors that determine latents; not of the decoder.

        Settings count as far as they show in a tensor. `norm_groups` shows in none: `init_from` compares it, as all
        settings (`ldm.training.finetune.check_same`), and otherwise an autoencoder is loaded with its own.
        """
        digest = hashlib.sha256(f"latents:{self.downsampling}:{self.latent_channels}".encode())
        for name, value in sorted(self.state_dict().items()):
            if name.startswith(self.determines_latents):
                digest.update(f"{name}:{tuple(value.shape)}".encode())
                digest.update(value.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
