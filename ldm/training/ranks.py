"""Whether the other processes of a job take part in what is computed now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

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
