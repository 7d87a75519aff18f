"""Encoding and decoding large pictures in tiles, so that memory is that of one tile whatever the picture.

Tiles overlap and are blended linearly. Convolutions near the inner border of a tile see its padding in place of the
picture, so of every overlap only the middle half is blended: the outer quarter of each tile is computed and not used.
Group norms see the whole picture in a first round over all tiles (`SharedNorms`), which doubles the work; by their own
statistics tiles differ in tone. Attention stays within a tile. docs/autoencoder.md says how far the result is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Protocol

import torch
from torch import Tensor, nn

from ldm.models.autoencoder.shared_norms import SharedNorms

LEAST = 4
"""Smallest tile, in latent pixels on a side: its overlap is one of them."""


class Tileable(Protocol):
    """What is needed of an autoencoder."""

    downsampling: int

    def modules(self) -> Iterator[nn.Module]: ...

    def moments(self, images: Tensor) -> Tensor: ...

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


def tiled_encode(
    autoencoder: Tileable, images: Tensor, tile: int, overlap: int | None = None, noise: Tensor | None = None
) -> Tensor:
    """Standardised latents [B, C, h, w] of pictures [B, 3, H, W], as `autoencoder.encode`.

    tile: side in pixels.   overlap: in pixels, at least; default: a quarter of the tile.
    A picture that is no larger than a tile goes through `encode` itself, one at a time as all. Raises ValueError; see
    `check_tile`.
    """
    f = autoencoder.downsampling
    size, lap = _in_latents(f, tile, overlap)
    moments = _tiled(autoencoder.moments, images, size, lap, into=f, out=1, norms=SharedNorms(autoencoder.modules()))
    return autoencoder.latents(moments, noise)


def tiled_decode(autoencoder: Tileable, latents: Tensor, tile: int, overlap: int | None = None) -> Tensor:
    """Pictures [B, 3, H, W] (not clamped) of standardised latents, as `autoencoder.decode`; see `tiled_encode`."""
    f = autoencoder.downsampling
    size, lap = _in_latents(f, tile, overlap)
    return _tiled(autoencoder.decode, latents, size, lap, into=1, out=f, norms=SharedNorms(autoencoder.modules()))


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


def _tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, size: int, overlap: int, *, into: int, out: int, norms: SharedNorms
) -> Tensor:
    """function over tiles of x [B, C, H, W], one picture and one tile at a time.

    size, overlap: in latent pixels.   into, out: pixels of a latent pixel's side in x, and in the result.
    norms: those that function goes through.
    """
    height, width = x.shape[-2] // into, x.shape[-1] // into
    if height <= size and width <= size:
        return torch.cat([function(picture) for picture in x.split(1)])
    tiles = list(product(_cuts(height, size, overlap, out), _cuts(width, size, overlap, out)))

    def passed(picture: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        for (top, down), (left, across) in tiles:
            weight = norms.weight = down[:, None] * across
            rows, columns = (slice(start * into, (start + size) * into) for start in (top, left))
            made = function(picture[..., rows, columns]) * weight.to(x)
            yield slice(top * out, top * out + len(down)), slice(left * out, left * out + len(across)), made

    pictures = []
    for picture in x.split(1):
        with norms.attached():
            if norms.any:
                for _ in passed(picture):
                    pass
            norms.settle()
            whole = x.new_zeros(())
            for rows, columns, made in passed(picture):
                if whole.ndim == 0:
                    whole = made.new_zeros(1, made.shape[1], height * out, width * out)
                whole[..., rows, columns] += made
        pictures.append(whole)
    return torch.cat(pictures)


def _cuts(length: int, size: int, overlap: int, out: int) -> list[tuple[int, Tensor]]:
    """Where tiles begin along an axis, evenly apart, and their weights [size * out], which sum to 1 everywhere: they
    fall towards an inner border, on a ramp over the middle half of the overlap, and are 0 beyond it.
    """
    count = max(1, -(-(length - overlap) // (size - overlap)))
    starts = [0] if count == 1 else [round(i * (length - size) / (count - 1)) for i in range(count)]
    steps = torch.arange(min(size, length) * out, dtype=torch.float64) + 0.5
    edge, ramp = overlap * out / 4, overlap * out / 2
    total = torch.zeros(length * out, dtype=torch.float64)
    weights = []
    for i, start in enumerate(starts):
        weight = torch.ones_like(steps)
        if i > 0:
            weight = weight * ((steps - edge) / ramp).clamp(0, 1)
        if i < count - 1:
            weight = weight * ((steps.flip(0) - edge) / ramp).clamp(0, 1)
        weights.append(weight)
        total[start * out : start * out + len(weight)] += weight
    shares = [w / total[s * out : s * out + len(w)] for s, w in zip(starts, weights, strict=True)]
    return list(zip(starts, shares, strict=True))
