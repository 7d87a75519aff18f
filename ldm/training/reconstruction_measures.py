"""What a validation of the autoencoder says of the held-out set as a whole, beside the means of its pictures."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.precompute.statistics import ChannelMoments
from ldm.reconstruction.measures import SSIM_WINDOW, FeatureMoments, codebook_use, frechet_distance, psnr, ssim
from ldm.training.ranks import several

LEAST_STD = 1e-12  # keeps the logarithm of a dead channel's spread a number


def picture_measures(reconstruction: Tensor, images: Tensor) -> dict[str, Tensor]:
    """[B] each: "psnr", and "ssim" where the pictures are large enough for its window."""
    measures = {"psnr": psnr(reconstruction, images)}
    if min(images.shape[-2:]) >= SSIM_WINDOW:
        measures["ssim"] = ssim(reconstruction, images)
    return measures


class SetMeasures:
    """Collects batches of one validation after the other; `results` ends one, over the pictures of all ranks.

    channels: of the latents.   num_codes: of the codebook, None without one.   perceptual: a `FeatureDistance` or None.

    latent_std: root mean square over the channels of the standard deviation of the posteriors' means (of a quantised
        code: of the latents before the codebook), over all positions.
    latent_drift: the largest |ln(std / reference)| of a channel: 0.69 is twice or half the spread. The reference is
        the stored statistics where there are some, so in fine-tuning, else the validation before this one, `last_std`;
        the first has no drift.
    codes_used, perplexity: see `codebook_use`.
    fd_<label>: Frechet distance between the features of pictures and reconstructions, from two pictures on.
    """

    def __init__(self, channels: int, num_codes: int | None = None, perceptual: nn.Module | None = None) -> None:
        self.channels, self.num_codes, self.perceptual = channels, num_codes, perceptual
        self._pictures: FeatureMoments | None = None  # the same pictures every time: their features are taken once
        self.last_std: list[float] | None = None
        self.num_latents = 0  # positions that the last results are of
        self._begin()

    def _begin(self) -> None:
        self._latents = ChannelMoments(self.channels)
        self._seen, self._reconstructed = FeatureMoments(), FeatureMoments()
        self._counts: Tensor | None = None

    def add(self, reconstruction: Tensor, images: Tensor, code: Mapping[str, Tensor], valid: Tensor) -> None:
        """reconstruction, images: [B, 3, H, W].   code: as the autoencoder returns it.   valid: [B] bool."""
        latents = code["moments"] if "moments" in code else code["latents"]
        self._latents.add(latents[valid, : self.channels])
        if self.num_codes is not None:
            counts = torch.bincount(code["codes"][valid].flatten(), minlength=self.num_codes)
            self._counts = counts if self._counts is None else self._counts + counts
        if self.perceptual is not None:
            self._reconstructed.add(self.perceptual.embed(reconstruction.float().clamp(-1, 1))[valid])  # type: ignore[operator]
            if self._pictures is None:
                self._seen.add(self.perceptual.embed(images.float())[valid])  # type: ignore[operator]

    def results(self, stored_std: Tensor | None = None) -> dict[str, float]:
        """By name; every rank takes part and gets the same. stored_std: [C] of the autoencoder's statistics."""
        self._latents.all_ranks()
        self.num_latents = int(self._latents.n)
        if self.num_latents == 0:  # no picture could be read
            return {}
        std = self._latents.variance.sqrt()
        found = {"latent_std": float(std.square().mean().sqrt())}
        logarithm = std.clamp(min=LEAST_STD).log()
        reference = self.last_std if stored_std is None else stored_std.tolist()
        if reference is not None:
            drift = logarithm - torch.tensor(reference, dtype=torch.float64).log()
            found["latent_drift"] = float(drift.abs().max())
        if bool(torch.isfinite(std).all()):  # it goes into the checkpoint
            self.last_std = logarithm.exp().tolist()
        if self._counts is not None:
            if several():
                dist.all_reduce(self._counts)
            found |= codebook_use(self._counts)
        if self.perceptual is not None:
            self._reconstructed.all_reduce()
            if self._pictures is None:
                self._seen.all_reduce()
                self._pictures = self._seen
            if self._pictures.n > 1:
                found[f"fd_{self.perceptual.label}"] = frechet_distance(self._pictures, self._reconstructed)
        self._begin()
        return found
