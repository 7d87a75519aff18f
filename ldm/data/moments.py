"""Encoded pictures by sample id, which streams read instead of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.order import Ids


class Moments(Protocol):
    """The moments (see `ldm.types.Batch`) of every sample of a dataset. Forked workers share it.

    usable: [N] bool, whether the sample's picture could be encoded.
    """

    @property
    def usable(self) -> NDArray[np.bool_]: ...

    def take(self, ids: Ids, mirrored: NDArray[np.bool_]) -> Tensor:
        """[B, 2C, h, w] of samples whose latents have one size; zeros for one that is not usable.

        mirrored: [B], whose picture is mirrored left to right.
        Raises LdmError if what is stored is damaged, ValueError for samples of several sizes.
        """
        ...


@dataclass(frozen=True)
class MomentTables:
    """Moments in memory, without mirror images: a table for each size of latents.

    tables: [n, 2C, h, w] each.   place: [N, 2] int64, table and row of each sample.   usable: as in `Moments`.
    """

    tables: Sequence[Tensor]
    place: NDArray[np.int64]
    usable: NDArray[np.bool_]

    @classmethod
    def of(cls, table: Tensor, usable: Tensor | None = None) -> MomentTables:
        """Samples of one size, table: [N, 2C, h, w] by sample id.   usable: None = all."""
        count = len(table)
        place = np.stack([np.zeros(count, dtype=np.int64), np.arange(count)], axis=1)
        good = np.ones(count, dtype=np.bool_) if usable is None else usable.numpy().astype(np.bool_)
        if len(good) != count:
            raise ValueError(f"{count} moments, but {len(good)} say whether they are usable")
        return cls([table], place, good)

    def take(self, ids: Ids, mirrored: NDArray[np.bool_]) -> Tensor:
        if mirrored.any():
            raise ValueError("moments in memory hold no mirror images")
        tables, rows = self.place[ids, 0], self.place[ids, 1]
        if (tables != tables[0]).any():
            raise ValueError("a batch holds samples of several sizes")
        return self.tables[tables[0]][torch.from_numpy(rows)]
