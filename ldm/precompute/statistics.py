"""Pictures + autoencoder -> the statistics of its latents: mean and standard deviation of each channel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ldm.data.datamodule import DataModule
from ldm.data.order import Ids
from ldm.errors import LdmError
from ldm.models.autoencoder.convolutional import ConvolutionalAutoencoder
from ldm.types import Batch

MIN_IMAGES = 10_000
"""Fewer than this, or than the whole set, are refused: a denoiser is bound to these numbers for good."""


class ChannelMoments:
    """Mean and variance of each channel over any number of latents, in float64 on the CPU.

    Each batch is taken in two passes and joined by the formula of Chan et al. 1979, "Updating formulae and a pairwise
    algorithm for computing sample variances", so that no digits are lost where the mean is far larger than the spread.

    n: values of each channel.   mean: [C].   variance: [C], biased.
    """

    def __init__(self, channels: int) -> None:
        self.n = 0.0
        self.mean, self._deviations = (torch.zeros(channels, dtype=torch.float64) for _ in range(2))

    @property
    def variance(self) -> Tensor:
        return self._deviations / self.n

    def add(self, z: Tensor) -> None:
        """z: [B, C, h, w]; B may be 0."""
        values = z.detach().cpu().double().transpose(0, 1).flatten(1)
        if values.numel():
            mean = values.mean(1)
            self._join(values.shape[1], mean, (values - mean[:, None]).square().sum(1))

    def all_ranks(self) -> None:
        """Joins what the ranks have, in their order; every rank takes part."""
        if dist.is_available() and dist.is_initialized():
            mine = (self.n, self.mean, self._deviations)
            everyones: list[tuple[float, Tensor, Tensor]] = [mine] * dist.get_world_size()
            dist.all_gather_object(everyones, mine)
            self.__init__(len(self.mean))  # type: ignore[misc]
            for share in everyones:
                self._join(*share)

    def _join(self, n: float, mean: Tensor, deviations: Tensor) -> None:
        if n > 0:
            total, apart = self.n + n, mean - self.mean
            self.mean = self.mean + apart * (n / total)
            self._deviations = self._deviations + deviations + apart.square() * (self.n * n / total)
            self.n = total


@torch.no_grad()
def measure_statistics(autoencoder: ConvolutionalAutoencoder, batches: Iterable[Batch]) -> int:
    """Sets mean and standard deviation per channel of the raw latents (of a KL autoencoder the posteriors' means, of a
    quantised one what stands before the codebook), over every position of all pictures of all ranks, in float64.

    Returns the number of pictures.

    batches: each picture once; with several ranks each brings its share. What is not valid does not count.
    Raises LdmError LATENTS where a channel has no spread or is not finite, or where there is no picture.
    """
    device = next(autoencoder.parameters()).device
    found, images = ChannelMoments(autoencoder.latent_channels), torch.zeros((), dtype=torch.int64)
    was_training = autoencoder.training
    autoencoder.eval()
    for batch in batches:
        if not batch.valid.any():  # a network need not take what is empty
            continue
        raw = autoencoder.raw(autoencoder.moments(batch.images[batch.valid].to(device)))  # type: ignore[index]
        found.add(raw)
        images += len(raw)
    autoencoder.train(was_training)
    found.all_ranks()
    if dist.is_available() and dist.is_initialized():
        total = images.to(device)
        dist.all_reduce(total)
        images = total.cpu()
    try:
        if not images:
            raise ValueError("there is no picture to measure the latents of")
        autoencoder.statistics.set(found.mean, found.variance, int(images))
    except ValueError as error:
        raise LdmError(
            "LATENTS",
            str(error),
            next="train the autoencoder for longer, or lower stage.autoencoder.objective.kl_weight",
        ) from error
    return int(images)


def chosen_images(num_images: int, limit: int | None) -> Ids:
    """The pictures that the statistics are measured on, increasing: all, or `limit` of them, evenly spaced.

    Raises LdmError CONFIG (exit code 2) for a limit below `MIN_IMAGES` that is not the whole set.
    """
    if limit is None or limit >= num_images:
        return np.arange(num_images)
    if limit < MIN_IMAGES:
        raise LdmError(
            "CONFIG",
            f"{limit} pictures are too few for the statistics of the latents",
            where="stage.autoencoder.statistics_images",
            limit=f"at least {min(MIN_IMAGES, num_images)} of the {num_images} of the training set",
            next="leave it at null for the whole set",
        )
    return np.arange(limit) * num_images // limit


def batches_of(data: DataModule, chosen: Ids, batch_size: int, *, rank: int, world_size: int) -> Iterator[Batch]:
    """This rank's share of the `chosen` training pictures, without augmentation; with buckets one after the other."""
    assigned = data.assigned("train")
    buckets = np.zeros(len(chosen), dtype=np.int64) if assigned is None else assigned.of[chosen]
    for bucket in np.unique(buckets):
        share = chosen[buckets == bucket][rank::world_size]
        if len(share):
            yield from data.encode_dataloader("train", batch_size, chosen=share)
