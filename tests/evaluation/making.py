"""Pictures with plain areas, edges and small text, and autoencoders that do one known harm."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from ldm.evaluation.fitness import shrunk
from ldm.models.autoencoder.statistics import LatentStatistics
from ldm.types import Batch


def drawn(seed: int, size: int = 48) -> Image.Image:
    """A plain ground, a large disc, and a line of small letters."""
    random = np.random.default_rng(seed)
    ground, disc = (tuple(int(v) for v in random.integers(0, 256, 3)) for _ in range(2))
    ink = (0, 0, 0) if sum(ground) > 380 else (255, 255, 255)
    image = Image.new("RGB", (size, size), ground)
    pen = ImageDraw.Draw(image)
    left = int(random.integers(2, size // 3))
    pen.ellipse((left, 2, left + size // 2, 2 + size // 2), fill=disc)
    pen.text((2, size - 14), f"Aq{seed:02d}WE", fill=ink, font=ImageFont.load_default(10))
    return image


def images_of(count: int, size: int = 48) -> Tensor:
    """[N, 3, size, size] in [-1, 1]."""
    pixels = np.stack([np.asarray(drawn(n, size)) for n in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def batches(images: Tensor, at_once: int = 4, bad: tuple[int, ...] = ()) -> Iterator[Batch]:
    """Batches of `images`; those numbered in `bad` are not valid."""
    for start in range(0, len(images), at_once):
        slots = torch.arange(start, min(start + at_once, len(images)))
        keys = [f"p{n:03d}" for n in slots.tolist()]
        valid = torch.tensor([n not in bad for n in slots.tolist()])
        yield Batch(slots, keys, images[slots], None, [""] * len(slots), {}, valid)


class Fake(nn.Module):
    """An autoencoder whose latents are the pictures, pooled by `downsampling`; `harm` turns pictures into others."""

    def __init__(self, downsampling: int = 2) -> None:
        super().__init__()
        self.downsampling, self.latent_channels, self.in_channels = downsampling, 3, 3
        self.statistics = LatentStatistics(3)
        self.seen = torch.zeros(0)

    def moments(self, images: Tensor) -> Tensor:
        self.seen = images
        return F.avg_pool2d(images, self.downsampling)

    def latents(self, moments: Tensor) -> Tensor:
        return self.statistics.standardise(moments)

    def decode(self, latents: Tensor) -> Tensor:
        return self.harm(self.seen)

    def harm(self, images: Tensor) -> Tensor:
        return images


class Shrinks(Fake):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def harm(self, images: Tensor) -> Tensor:
        return shrunk(images, self.factor)


class Brightens(Fake):
    def __init__(self, levels: float) -> None:
        super().__init__()
        self.levels = levels

    def harm(self, images: Tensor) -> Tensor:
        return images + self.levels / 127.5


class Breaks(Fake):
    """The picture `at` of every batch has latents, or an output, that are not finite."""

    def __init__(self, at: int, where: str) -> None:
        super().__init__()
        self.at, self.where = at, where

    def moments(self, images: Tensor) -> Tensor:
        moments = super().moments(images)
        return self._broken(moments) if self.where == "latents" else moments

    def harm(self, images: Tensor) -> Tensor:
        return self._broken(images) if self.where == "pictures" else images

    def _broken(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[self.at, 0, 0, 0] = torch.nan
        return x
