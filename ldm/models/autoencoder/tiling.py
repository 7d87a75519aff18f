"""Encoding and decoding large pictures in tiles, so that memory is that of one tile whatever the picture.

Tiles overlap and are blended linearly. Convolutions near the inner border of a tile see its padding in place of the
picture, so of every overlap only the middle half is blended: the outer quarter of each tile is computed and not used.
What cannot be had in tiles is what the network computes over the whole picture, the statistics of its group norms and
the attention of its middle: docs/autoencoder.md says how far the result is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

LEAST = 4
"""Smallest tile, in latent pixels on a side: its overlap is one of them."""


class Tileable(Protocol):
    """What is needed of an autoencoder."""

    downsampling: int

    def moments(self, images: Tensor) -> Tensor: ...

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


def tiled_encode(
    autoencoder: Tileable, images: Tensor, tile: int, overlap: int | None = None, noise: Tensor | None = None
) -> Tensor:
    """Standardised latents [B, C, h, w] of pictures [B, 3, H, W], as `autoencoder.encode`.

    tile: side in pixels.   overlap: in pixels, at least; default: a quarter of the tile.
    Equal to `encode` where the picture is no larger than a tile. Raises ValueError; see `check_tile`.
    """
    f = autoencoder.downsampling
    size, lap = _in_latents(f, tile, overlap)
    return autoencoder.latents(_tiled(autoencoder.moments, images, size, lap, into=f, out=1), noise)


def tiled_decode(autoencoder: Tileable, latents: Tensor, tile: int, overlap: int | None = None) -> Tensor:
    """Pictures [B, 3, H, W] (not clamped) of standardised latents, as `autoencoder.decode`; see `tiled_encode`."""
    f = autoencoder.downsampling
    size, lap = _in_latents(f, tile, overlap)
    return _tiled(autoencoder.decode, latents, size, lap, into=1, out=f)


def check_tile(downsampling: int, tile: int, overlap: int | None = None) -> None:
    """Raises ValueError where tiles of that size cannot be cut from latents, or leave no room for their overlap."""
    _in_latents(downsampling, tile, overlap)


def _in_latents(f: int, tile: int, overlap: int | None) -> tuple[int, int]:
    if tile % f or tile < LEAST * f:
        raise ValueError(f"tile must be a multiple of {f} and at least {LEAST * f}, not {tile}")
    if overlap is None:
        return tile // f, tile // f // 4
    if overlap % f or not 0 < overlap <= tile // 2:
        raise ValueError(f"overlap must be a multiple of {f}, above 0 and at most half of the tile, not {overlap}")
    return tile // f, overlap // f


def _tiled(function: Callable[[Tensor], Tensor], x: Tensor, size: int, overlap: int, *, into: int, out: int) -> Tensor:
    """function over tiles of x [B, C, H, W], one picture and one tile at a time.

    size, overlap: in latent pixels.   into, out: pixels of a latent pixel's side in x, and in the result.
    """
    height, width = x.shape[-2] // into, x.shape[-1] // into
    if height <= size and width <= size:
        return function(x)
    pictures = []
    for picture in x.split(1):
        total = weights = torch.zeros(())
        for (top, down), (left, across) in product(*(list(_cuts(n, size, overlap, out)) for n in (height, width))):
            rows = slice(top * into, min(top + size, height) * into)
            columns = slice(left * into, min(left + size, width) * into)
            made = function(picture[..., rows, columns])
            if total.ndim == 0:
                total = made.new_zeros(*made.shape[:2], height * out, width * out)
                weights = made.new_zeros(height * out, width * out)
            weight = (down[:, None] * across).to(made)
            there = (..., slice(top * out, top * out + made.shape[-2]), slice(left * out, left * out + made.shape[-1]))
            total[there] += weight * made
            weights[there] += weight
        pictures.append(total / weights)
    return torch.cat(pictures)


def _cuts(length: int, size: int, overlap: int, out: int) -> Iterator[tuple[int, Tensor]]:
    """Where tiles begin along an axis, evenly apart, and their weights [size * out]: 1 inside, and towards an inner
    border a ramp over the middle half of the overlap, 0 beyond it.
    """
    count = max(1, -(-(length - overlap) // (size - overlap)))
    steps = torch.arange(min(size, length) * out) + 0.5
    edge, ramp = overlap * out / 4, overlap * out / 2
    for i in range(count):
        start = 0 if count == 1 else round(i * (length - size) / (count - 1))
        weight = torch.ones_like(steps)
        if i > 0:
            weight = weight * ((steps - edge) / ramp).clamp(0, 1)
        if i < count - 1:
            weight = weight * ((steps.flip(0) - edge) / ramp).clamp(0, 1)
        yield start, weight
