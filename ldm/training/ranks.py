"""Whether the other processes of a job take part in what is computed now, and what they have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_alone = False


def several() -> bool:
    """True where there are other ranks, and all of them compute this now: a collective will not wait in vain."""
    return not _alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block this rank computes by itself what all of them compute in training."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def gathered(value: Any) -> list[Any]:
    """What every rank has, in the order of the ranks; every rank takes part."""
    if not several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def of_all_ranks(x: Tensor) -> Tensor:
    """[B, ...] of this rank to [ranks * B, ...], in the order of the ranks, with a gradient to everybody's rows.

    Every rank takes part, forward and backward.
    """
    if not several():
        return x
    return _Gathered.apply(x)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)  # what the losses of all ranks say about all rows, of which this rank has its own
        return total.chunk(dist.get_world_size())[dist.get_rank()]
