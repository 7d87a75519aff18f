"""The quantised autoencoder of latent diffusion. Module and parameter names follow diffusers' VQModel."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ldm.models.autoencoder.codebook import Codebook
from ldm.models.autoencoder.convolutional import ConvolutionalAutoencoder


class AutoencoderVQ(ConvolutionalAutoencoder):
    """Pictures [B, in, H, W] in [-1, 1] to latents [B, latent_channels, H/f, W/f] and back, over a codebook.

    The latents that a denoiser sees are those before the codebook: decoding quantises, and so takes away what the
    denoiser left of noise (Rombach et al. 2022, arXiv:2112.10752, appendix G). There is nothing to draw: the moments
    are the latents.
    codebook_size: number of codes, each of latent_channels values.
    revive_every: optimizer steps between two replacements, where codes that none of them chose begin anew at a latent
        of the batch; None leaves them dead. Source: van den Oord et al. 2017, arXiv:1711.00937; see `Codebook`.
    The rest as in `AutoencoderKL`.
    """

    determines_latents = (*ConvolutionalAutoencoder.determines_latents, "quantize.embedding.")

    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 4,
        codebook_size: int = 16384,
        block_channels: Sequence[int] = (128, 256, 256, 512),
        layers_per_block: int = 2,
        patch_size: int = 1,
        mid_attention: bool = True,
        quant_conv: bool = True,
        norm_groups: int = 32,
        revive_every: int | None = 100,
    ) -> None:
        super().__init__(
            in_channels,
            latent_channels,
            latent_channels,
            block_channels,
            layers_per_block,
            patch_size,
            mid_attention,
            quant_conv,
            norm_groups,
        )
        if codebook_size < 2:
            raise ValueError(f"codebook_size must be at least 2, not {codebook_size}")
        if revive_every is not None and revive_every < 1:
            raise ValueError(f"revive_every must be at least 1, or null for never, not {revive_every}")
        self.quantize = Codebook(codebook_size, latent_channels)
        self.codebook_size, self.revive_every = codebook_size, revive_every

    def moments(self, images: Tensor) -> Tensor:
        """The raw latents, not quantised: [B, C, h, w]."""
        return self.quant_conv(self.encoder(images))

    def raw(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """The moments; there is no posterior to draw from."""
        return moments

    def decode_raw(self, z: Tensor) -> Tensor:
        """Raw latents, quantised, to pictures (not clamped)."""
        return super().decode_raw(self.quantize.look_up(self.quantize.nearest(z)))

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Training's way: the reconstruction, with the gradient of the codes handed to the latents, and
        {"latents": before the codebook [B, C, h, w], "codes": [B, h, w] int64, "codebook": [B], "commitment": [B]}.
        """
        z = self.moments(images)
        values, codes, codebook, commitment = self.quantize(z)
        code = {"latents": z, "codes": codes, "codebook": codebook, "commitment": commitment}
        return super().decode_raw(values), code
