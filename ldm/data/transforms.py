"""A picture of any size to the size that is trained at. Random choices are functions of the sample's slot alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.data.decode import BadSample
from ldm.errors import LdmError
from ldm.random import Purpose, fold, uniform

CROPS = ("center", "random", "pad")
PIXELS = 2
"""Raise it whenever decoding, cropping, padding or resampling give other pixels than before: caches of latents that
were made with another number are refused. 1: Pillow's bicubic.   2: torch's kernels for bytes."""

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Transform:
    """Resize until the wanted size is covered and crop, or until the picture fits into it and pad; bicubic with
    antialiasing. The wanted size is that of the sample's bucket, or the square of `image_size`.

    image_size: side of the square in pixels.   crop: "center", "random" (one axis moves) or "pad" (nothing is lost).
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

    @property
    def square(self) -> Size:
        return self.image_size, self.image_size

    def __call__(self, image: Image.Image, draw: NDArray[np.float32], size: Size | None = None) -> NDArray[np.uint8]:
        """[H, W, 3] pixels of an RGB picture. size: of the result; None = the square."""
        size = size or self.square
        smaller = [have < want for have, want in zip(image.size, size, strict=True)]
        if not self.upscale and (all if self.crop == "pad" else any)(smaller):
            wanted = f"{size[0]}x{size[1]}"
            raise BadSample("size_policy", f"{image.width}x{image.height} is smaller than {wanted} and upscale is off")
        return self._shaped(image, image.size, draw, size)

    def further(
        self, image: Image.Image, picture: Size, draw: NDArray[np.float32], size: Size | None = None
    ) -> NDArray[np.uint8]:
        """[H, W, 3] pixels of another RGB image of a sample, or [H, W] of a mask of mode L: the part that `__call__`
        takes of the picture, at the same size, mirrored with it.

        picture: width and height of the picture. The image may be smaller or larger, in the same aspect ratio.
        A mask is resized by the mean over areas, nearest where it is enlarged, and is 0 beside a padded picture.
        Raises BadSample, `size_policy`, if the aspect ratios differ by more than rounding both sides explains.
        """
        (width, height), (wide, high) = image.size, picture
        if abs(width * high - height * wide) >= max(width + height, wide + high):
            raise BadSample("size_policy", f"{width}x{height} is not of the shape of the picture, {wide}x{high}")
        return self._shaped(image, picture, draw, size or self.square)

    def _shaped(self, image: Image.Image, picture: Size, draw: NDArray[np.float32], size: Size) -> NDArray[np.uint8]:
        if self.crop == "pad":
            pixels = self._pad(image, picture, size)
        else:
            kept = covering(picture, size)
            ends = [(u * (have - keep), u * (have - keep) + keep) for u, have, keep in zip(draw, picture, kept)]
            scales = [have / of_picture for have, of_picture in zip(image.size, picture)]
            (left, right), (top, bottom) = (
                (round(float(first) * scale), round(float(last) * scale)) for (first, last), scale in zip(ends, scales)
            )
            box = (left, top, max(right, left + 1), max(bottom, top + 1))
            pixels = resized(image, size, box)
        return pixels[:, ::-1] if self.mirrors(draw) else pixels

    def sizes(
        self, width: int, height: int, draw: NDArray[np.float32], size: Size | None = None
    ) -> tuple[int, int, int, int, int, int]:
        """(original height and width, top and left of the crop in the resized picture, height and width) in pixels,
        of a picture of this size: what SDXL is conditioned on (Podell et al. 2023, arXiv:2307.01952, section 2.2).

        The crop lies in the picture as the network sees it: in the mirrored one, if it is mirrored, as in diffusers'
        train_text_to_image_sdxl.py, which mirrors before it crops.
        """
        size = size or self.square
        kept = covering((width, height), size)
        across = 1 - draw[0] if self.mirrors(draw) else draw[0]
        cut = (0.0, 0.0) if self.crop == "pad" else (across * (width - kept[0]), draw[1] * (height - kept[1]))
        left, top = (round(float(n) * want / keep) for n, want, keep in zip(cut, size, kept, strict=True))
        return height, width, top, left, size[1], size[0]

    def short_side(self, width: int, height: int, size: Size | None) -> int:
        """Pixels of the short side below which a picture of this size would be enlarged; None = to the square."""
        if size is None:
            return self.image_size
        return math.ceil(min(width, height) * max(size[0] / width, size[1] / height))

    def mirrors(self, draw: NDArray[np.float32]) -> bool:
        """Whether a sample with these draws is mirrored."""
        return bool(draw[2] < self.flip_prob)

    def _pad(self, image: Image.Image, picture: Size, size: Size) -> NDArray[np.uint8]:
        side = 0 if _is_wider(picture, size) else 1  # the side that fills the canvas
        width, height = (max(1, round(length * size[side] / picture[side])) for length in picture)
        inner = resized(image, (width, height))
        canvas = np.empty((size[1], size[0], *inner.shape[2:]), dtype=np.uint8)
        canvas[:] = 0 if image.mode == "L" else self.background
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        canvas[top : top + height, left : left + width] = inner
        return canvas


def resized(image: Image.Image, size: Size, box: tuple[int, int, int, int] | None = None) -> NDArray[np.uint8]:
    """[H, W, 3] pixels of an RGB picture, or of its part `box` (left, top, right, bottom), at another size: bicubic
    with antialiasing. torch's resampling of bytes: that of Pillow to within 2 of 255, at a quarter of the time
    (docs/experiments.md). [H, W] of a mask of mode L: the mean over areas, nearest where it is enlarged.
    """
    if box and box != (0, 0, *image.size):
        image = image.crop(box)
    if image.size == size:
        return np.asarray(image)
    if image.mode == "L":
        return np.asarray(image.resize(size, Image.Resampling.BOX))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    found = interpolate(pixels, (size[1], size[0]), mode="bicubic", antialias=True)
    return found[0].permute(1, 2, 0).numpy()


def covering(picture: Size, size: Size) -> tuple[float, float]:
    """Width and height of the largest part of a picture with the aspect ratio of `size`."""
    (width, height), (wide, high) = picture, size
    if _is_wider(picture, size):
        return height * wide / high, float(height)
    return float(width), width * high / wide


def _is_wider(picture: Size, size: Size) -> bool:
    return picture[0] * size[1] >= picture[1] * size[0]


def to_bytes(pixels: list[NDArray[np.uint8]]) -> Tensor:
    """[B, H, W, 3] uint8 from B pictures [H, W, 3] of one size."""
    return torch.from_numpy(np.stack(pixels))


def to_images(pixels: list[NDArray[np.uint8]] | Tensor) -> Tensor:
    """[B, 3, H, W] float32 in [-1, 1] from B pictures [H, W, 3] of one size, or from `to_bytes` of them."""
    stacked = (pixels if isinstance(pixels, Tensor) else to_bytes(pixels)).permute(0, 3, 1, 2)
    return stacked.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def to_masks(pixels: list[NDArray[np.uint8]]) -> Tensor:
    """[B, 1, H, W] float32 in [0, 1] from B masks [H, W] of one size."""
    return torch.from_numpy(np.stack(pixels)[:, None]).to(torch.float32).div_(255)
