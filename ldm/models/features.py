"""Pictures and captions in one space: an image tower whose features tell pictures apart, and a text tower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers.resnet import Downsample, ResnetBlock

MAX_SCALE = 100.0


class ImageTower(nn.Module):
    """Pictures to feature maps at falling resolutions, without anything that depends on the rest of the batch.

    channels: of each map; the first has the pictures' resolution, each further one half of the one before.
    layers_per_block: residual blocks at each resolution.   norm_groups: of the group norms.
    """

    def __init__(
        self, channels: Sequence[int] = (16, 32, 64, 128), layers_per_block: int = 1, norm_groups: int = 8
    ) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.min_size = 2 ** (len(channels) - 1)
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        blocks = []
        for level, width in enumerate(channels):
            before = channels[max(0, level - 1)]
            layers: list[nn.Module] = [Downsample(before)] if level else []
            for layer in range(layers_per_block):
                layers.append(ResnetBlock(before if layer == 0 else width, width, norm_groups=norm_groups))
            blocks.append(nn.Sequential(*layers))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] in [-1, 1] to one map [B, C_l, ceil(H / 2^l), ceil(W / 2^l)] for each of `channels`."""
        h = self.conv_in(images)
        maps = []
        for block in self.blocks:
            h = block(h)
            maps.append(h)
        return maps


class Contrastive(nn.Module):
    """Image tower and text tower with unit embeddings whose cosine says whether a caption belongs to a picture.

    image: an `ImageTower`.   text: a conditioner that reads the caption and gives a vector.
    embedding_size: width of the common space.
    Raises ValueError for a text tower that reads something else, gives no vector, or drops captions.
    Source: Radford et al. 2021, arXiv:2103.00020, section 2.3.
    """

    def __init__(self, image: ImageTower, text: Any, embedding_size: int = 128) -> None:
        super().__init__()
        if tuple(text.reads) != ("caption",) or "vector" not in text.provides:
            raise ValueError("text must read the caption alone and give a vector of it")
        if text.drop_prob:
            raise ValueError(f"a dropped caption belongs to no picture: drop_prob must be 0, not {text.drop_prob}")
        self.image, self.text = image, text
        self.image_norm = nn.LayerNorm(image.channels[-1])
        self.image_proj = nn.Linear(image.channels[-1], embedding_size, bias=False)
        self.text_proj = nn.Linear(text.vector_size, embedding_size, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in [-1, 1] and B captions to two sets of unit vectors, [B, embedding_size] float32 each."""
        pooled = self.image(images)[-1].mean((2, 3))
        image = self.image_proj(self.image_norm(pooled))
        text = self.text_proj(self.text(captions).vector)
        return F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)

    def scale(self) -> Tensor:
        """What the cosines are multiplied with."""
        return self.log_scale.exp()

    @torch.no_grad()
    def limit_scale(self) -> None:
        """To 100 at most, after each optimizer step: beyond it training is unstable (section 2.5 of the paper)."""
        self.log_scale.clamp_(max=math.log(MAX_SCALE))
