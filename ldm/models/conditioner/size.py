"""The sizes that SDXL is told: of the original picture, of the crop's corner, of the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.models.conditioner.numbers import check_number, each_sinusoidal
from ldm.models.conditioner.transfer import to_device
from ldm.types import Check, Conditioning


class Size(nn.Module):
    """Six numbers to a vector [B, 6 * num_sinusoids] of sinusoids; nothing is learned here.

    A value is (original height, original width, crop top, crop left, height, width) in pixels, the crop as it lies in
    the resized and perhaps mirrored picture; `data.columns.size=@size` measures it, sampling says "nothing cut off"
    unless told otherwise.
    column: its column.   num_sinusoids: of each number; SDXL: 256.
    drop_prob: share of the samples whose sizes are absent, as six zeros. SDXL never drops them.
    Raises LdmError for a value that is not six finite numbers.
    Source: Podell et al. 2023, arXiv:2307.01952, section 2.2.
    """

    zero: Tensor

    def __init__(self, column: str = "size", num_sinusoids: int = 256, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.reads = (column,)
        self.checks: Mapping[str, Sequence[Check]] = {column: [partial(check_size, column=column)]}
        self.provides = frozenset(["vector"])
        self.width, self.vector_size, self.length, self.drop_prob = None, 6 * num_sinusoids, None, drop_prob
        self.num_sinusoids = num_sinusoids
        self.register_buffer("zero", torch.zeros(()), persistent=False)  # knows the device

    def forward(self, sizes: Sequence[Sequence[float] | None]) -> Conditioning:
        """sizes: B times six numbers; None = absent."""
        rows = [[0.0] * 6 if size is None else size for size in sizes]
        for row in rows:
            check_size(row, self.reads[0])
        numbers = to_device(torch.tensor([[float(n) for n in row] for row in rows]), self.zero.device)
        return Conditioning(vector=each_sinusoidal(numbers, self.num_sinusoids).flatten(1).to(self.zero.dtype))


def check_size(value: object, column: str) -> None:
    """Raise LdmError unless the value is six finite numbers."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 6:
        raise LdmError("CONDITION", f"{value!r} is not six numbers", where=column)
    for number in value:
        check_number(number, column)
