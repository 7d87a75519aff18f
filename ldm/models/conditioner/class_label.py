"""Classes by name or by number: one learned row each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ldm.errors import LdmError, nearest
from ldm.models.conditioner.transfer import to_device
from ldm.types import Check, Conditioning


class ClassLabel(nn.Module):
    """A class to one row of a table, as a single token [B, 1, width] and as a vector [B, width].

    column: the column of the data that holds the class (`data.columns`).
    classes: the names of the classes, or their number, where labels are 0, 1, ...   width: D and E.
    drop_prob: share of the labels that give way to the null, a further learned row.
    Raises LdmError for a label that is no class.
    """

    def __init__(
        self, column: str = "label", classes: Sequence[str] | int = 10, width: int = 128, drop_prob: float = 0.1
    ) -> None:
        super().__init__()
        labels: list[Any] = list(range(classes)) if isinstance(classes, int) else [str(name) for name in classes]
        rows: dict[str | int, int] = {label: i for i, label in enumerate(labels)}
        if not rows or len(rows) < len(labels):
            raise ValueError(f"classes must be different names, or a number of at least 1, not {classes!r}")
        self.row = partial(class_row, column=column, rows=rows)
        self.reads = (column,)
        self.checks: Mapping[str, Sequence[Check]] = {column: [self.row]}
        self.provides = frozenset(["tokens", "mask", "vector"])
        self.width, self.vector_size, self.length, self.drop_prob = width, width, 1, drop_prob
        self.embedding = nn.Embedding(len(rows) + 1, width)  # the last row is the null

    def forward(self, labels: Sequence[str | int | None]) -> Conditioning:
        """labels: B names or numbers; None = absent."""
        null = self.embedding.num_embeddings - 1
        rows = torch.tensor([null if label is None else self.row(label) for label in labels])
        vector = self.embedding(to_device(rows, self.embedding.weight.device))
        tokens = vector[:, None]
        return Conditioning(tokens=tokens, mask=torch.ones_like(tokens[..., 0], dtype=torch.bool), vector=vector)


def class_row(label: object, column: str, rows: Mapping[str | int, int]) -> int:
    """The row of a class. Raises LdmError for a label that is no class."""
    if isinstance(label, bool) or not isinstance(label, str | int | float) or label not in rows:
        hint = nearest(str(label), map(str, rows))
        raise LdmError("CONDITION", f"{label!r} is not a class of {column!r}", next=hint)
    return rows[label]  # type: ignore[index]  # 2.0 is class 2
