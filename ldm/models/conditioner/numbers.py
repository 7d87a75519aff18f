"""Numbers that describe a picture: scores, sizes, dates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.models.conditioner.transfer import to_device
from ldm.models.layers.embeddings import TimestepEmbedding, sinusoidal_embedding
from ldm.types import Check, Conditioning

LARGEST = 1e30  # float32 ends at 3.4e38, and a scale may still multiply


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
        self.checks: Mapping[str, Sequence[Check]] = {name: [partial(check_number, column=name)] for name in columns}
        self.provides = frozenset(["tokens", "mask", "vector"])
        self.width, self.vector_size, self.length, self.drop_prob = width, width, 1, drop_prob
        self.num_sinusoids, self.scale = num_sinusoids, scale
        self.null = nn.Parameter(torch.zeros(len(self.reads), num_sinusoids))
        self.embedding = TimestepEmbedding(len(self.reads) * num_sinusoids, width)

    def forward(self, *values: Sequence[float | None]) -> Conditioning:
        """values: B for each column; None = absent."""
        for name, column in zip(self.reads, values, strict=True):
            for value in column:
                if value is not None:
                    check_number(value, name)
        given = to_device(torch.tensor([[v is not None for v in column] for column in values]), self.null.device).T
        numbers = torch.tensor([[float(v or 0) for v in column] for column in values])
        sinusoids = each_sinusoidal(to_device(numbers, self.null.device).T * self.scale, self.num_sinusoids)
        # [B, n, size]; both sides in the graph: a parameter must have a gradient whatever was dropped
        chosen = torch.where(given[..., None], sinusoids.to(self.null.dtype), self.null)
        vector = self.embedding(chosen.flatten(1))
        tokens = vector[:, None]
        return Conditioning(tokens=tokens, mask=torch.ones_like(tokens[..., 0], dtype=torch.bool), vector=vector)


def each_sinusoidal(numbers: Tensor, size: int) -> Tensor:
    """[B, n] numbers to [B, n, size] float32."""
    return sinusoidal_embedding(numbers.flatten(), size).unflatten(0, numbers.shape)


def check_number(value: object, column: str) -> None:
    """Raise LdmError unless the value is a finite number; a truth value is none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -LARGEST <= value <= LARGEST:  # type: ignore[operator]
        raise LdmError("CONDITION", f"{value!r} is not a finite number up to {LARGEST:g}", where=column)
