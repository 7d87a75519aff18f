"""Classes by name or by number: one learned row each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ldm.errors import LdmError, nearest
from ldm.types import Conditioning


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
        self.numbers: dict[str | int, int] = {label: i for i, label in enumerate(labels)}
        if not self.numbers or len(self.numbers) < len(labels):
            raise ValueError(f"classes must be different names, or a number of at least 1, not {classes!r}")
        self.reads = (column,)
        self.provides = frozenset(["tokens", "mask", "vector"])
        self.width, self.vector_size, self.drop_prob = width, width, drop_prob
        self.embedding = nn.Embedding(len(self.numbers) + 1, width)  # the last row is the null

    def forward(self, labels: Sequence[str | int | None]) -> Conditioning:
        """labels: B names or numbers; None = absent."""
        rows = torch.tensor([self._row(label) for label in labels])
        vector = self.embedding(rows.to(self.embedding.weight.device, non_blocking=True))
        tokens = vector[:, None]
        return Conditioning(tokens=tokens, mask=torch.ones_like(tokens[..., 0], dtype=torch.bool), vector=vector)

    def _row(self, label: str | int | None) -> int:
        if label is None:
            return len(self.numbers)
        if isinstance(label, bool) or label not in self.numbers:
            raise LdmError(
                "CONDITION",
                f"{label!r} is not a class of {self.reads[0]!r}",
                next=nearest(str(label), map(str, self.numbers)),
            )
        return self.numbers[label]
