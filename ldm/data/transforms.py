"""A picture of any size to a square of pixels. Random choices are functions of the sample's slot alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ldm.data.decode import BadSample
from ldm.errors import LdmError
from ldm.random import Purpose, fold, uniform

CROPS = ("center", "random", "pad")


@dataclass(frozen=True)
class Transform:
    """Resize the short side to `image_size` and crop, or the long side and pad; bicubic with antialiasing.

    image_size: side of the result in pixels.   crop: "center", "random" (one axis moves) or "pad" (nothing is lost).
    flip_prob: probability of a left-right mirror; leave it at 0 where pictures hold text or logos.
    upscale: whether smaller pictures are enlarged; otherwise they are bad samples of the kind `size_policy`.
    background: colour of the padding.   key: stands for the run, from `ldm.random.run_key`.
    """

    image_size: int
    crop: str = "center"
    flip_prob: float = 0.0
    upscale: bool = True
    background: tuple[int, int, int] = (255, 255, 255)
    key: int = 0

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise LdmError("CONFIG", f"unknown crop {self.crop!r}", where="data.crop", next=", ".join(CROPS))
        if self.image_size < 1 or not 0 <= self.flip_prob <= 1:
            raise LdmError("CONFIG", "data.image_size must be positive and data.flip_prob in [0, 1]", where="data")

    def without_chance(self) -> Transform:
        """The same for validation and encoding: centre crops, no flips."""
        return replace(self, crop="center" if self.crop == "random" else self.crop, flip_prob=0.0)

    def draws(self, slots: Tensor) -> NDArray[np.float32]:
        """[B, 3] in [0, 1): horizontal and vertical place of the crop, and the flip's draw."""
        draws = np.full((len(slots), 3), 0.5, dtype=np.float32)
        if self.crop == "random":
            draws[:, :2] = uniform(fold(self.key, Purpose.CROP, slots), (2,)).numpy()
        if self.flip_prob:
            draws[:, 2] = uniform(fold(self.key, Purpose.FLIP, slots)).numpy()
        return draws

    def __call__(self, image: Image.Image, draw: NDArray[np.float32]) -> NDArray[np.uint8]:
        """[H, W, 3] pixels of an RGB picture."""
        size = self.image_size
        if not self.upscale and (max if self.crop == "pad" else min)(image.size) < size:
            raise BadSample("size_policy", f"{image.width}x{image.height} is smaller than {size} and upscale is off")
        if self.crop == "pad":
            image = self._pad(image)
        elif image.size != (size, size):
            side = min(image.size)
            left, top = (float(u) * (length - side) for u, length in zip(draw, image.size, strict=False))
            box = (left, top, left + side, top + side)
            image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        if self._mirrors(draw):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image)

    def sizes(self, width: int, height: int, draw: NDArray[np.float32]) -> tuple[int, int, int, int, int, int]:
        """(original height and width, top and left of the crop in the resized picture, height and width) in pixels,
        of a picture of this size: what SDXL is conditioned on (Podell et al. 2023, arXiv:2307.01952, section 2.2).

        The crop lies in the picture as the network sees it: in the mirrored one, if it is mirrored, as in diffusers'
        train_text_to_image_sdxl.py, which mirrors before it crops.
        """
        size, side = self.image_size, min(width, height)
        across = 1 - draw[0] if self._mirrors(draw) else draw[0]
        cut = (0.0, 0.0) if self.crop == "pad" else (draw[1] * (height - side), across * (width - side))
        top, left = (round(float(n) * size / side) for n in cut)
        return height, width, top, left, size, size

    def _mirrors(self, draw: NDArray[np.float32]) -> bool:
        return bool(draw[2] < self.flip_prob)

    def _pad(self, image: Image.Image) -> Image.Image:
        size, longest = self.image_size, max(image.size)
        width, height = (max(1, round(side * size / longest)) for side in image.size)
        canvas = Image.new("RGB", (size, size), self.background)
        canvas.paste(
            image.resize((width, height), Image.Resampling.BICUBIC), ((size - width) // 2, (size - height) // 2)
        )
        return canvas


def to_images(pixels: list[NDArray[np.uint8]]) -> Tensor:
    """[B, 3, H, W] float32 in [-1, 1] from B pictures [H, W, 3] of one size."""
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return stacked.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
