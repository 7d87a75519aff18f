"""Numbers that describe a picture: scores, sizes, dates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.models.layers.embeddings import TimestepEmbedding, sinusoidal_embedding
from ldm.types import Conditioning


class Numbers(nn.Module):
    """Some numbers to one token [B, 1, width] and a vector [B, width]: sinusoids of each, then a small network.

    columns: the columns of the data that hold the numbers (`data.columns`).   width: D and E.
    num_sinusoids: of each number, even; the fastest turns once in 2 pi.
    scale: factor before the sinusoids; choose it so that a difference that matters becomes about 1.
    drop_prob: share of the samples whose numbers give way to their null, learned sinusoids for each.
    Raises LdmError for a value that is no finite number.
    """

    def __init__(
        self,
        columns: Sequence[str] = ("score",),
        width: int = 128,
        num_sinusoids: int = 64,
        scale: float = 1.0,
        drop_prob: float = 0.1,
    ) -> None:
        super().__init__()
        if not columns or num_sinusoids < 2 or num_sinusoids % 2:
            raise ValueError(f"need columns and an even num_sinusoids, not {list(columns)} and {num_sinusoids}")
        self.reads = tuple(columns)
        self.provides = frozenset(["tokens", "mask", "vector"])
        self.width, self.vector_size, self.drop_prob = width, width, drop_prob
        self.num_sinusoids, self.scale = num_sinusoids, scale
        self.null = nn.Parameter(torch.zeros(len(self.reads), num_sinusoids))
        self.embedding = TimestepEmbedding(len(self.reads) * num_sinusoids, width)

    def forward(self, *values: Sequence[float | None]) -> Conditioning:
        """values: B for each column; None = absent."""
        for name, column in zip(self.reads, values, strict=True):
            check_numbers(name, column)
        given = torch.tensor([[v is not None for v in column] for column in values]).T.to(self.null.device)
        numbers = torch.tensor([[v or 0.0 for v in column] for column in values]).T.to(self.null.device)
        sinusoids = each_sinusoidal(numbers * self.scale, self.num_sinusoids)  # [B, n, size]
        # both sides in the graph: a parameter must have a gradient whatever was dropped
        chosen = torch.where(given[..., None], sinusoids.to(self.null.dtype), self.null)
        vector = self.embedding(chosen.flatten(1))
        tokens = vector[:, None]
        return Conditioning(tokens=tokens, mask=torch.ones_like(tokens[..., 0], dtype=torch.bool), vector=vector)


def each_sinusoidal(numbers: Tensor, size: int) -> Tensor:
    """[B, n] numbers to [B, n, size] float32."""
    return sinusoidal_embedding(numbers.flatten(), size).unflatten(0, numbers.shape)


def check_numbers(name: str, values: Sequence[object]) -> None:
    """Raise LdmError unless every value is a finite number or None."""
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not number:
            raise LdmError("CONDITION", f"{value!r} is not a finite number", where=name)
