"""Dataset + autoencoder -> the moments of every picture, in memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ldm.data.moments import MomentTables
from ldm.data.order import Ids
from ldm.errors import LdmError
from ldm.model import Autoencoder
from ldm.types import Batch


@torch.no_grad()
def encode_dataset(autoencoder: Autoencoder, batches: Iterable[Batch], latent_sizes: Ids) -> MomentTables:
    """The moments of every picture, float32 on the CPU; an unreadable picture is not usable.

    batches: every sample once, its id in `slots`; with several ranks each brings its share.
    latent_sizes: [N, 2] height and width of each sample's latents.
    """
    device = autoencoder.statistics.mean.device
    sizes, table_of = np.unique(latent_sizes, axis=0, return_inverse=True)
    place = np.stack([table_of.reshape(-1), np.zeros(len(latent_sizes), dtype=np.int64)], axis=1)
    tables = []
    for number, size in enumerate(sizes.tolist()):
        mine = np.flatnonzero(place[:, 0] == number)
        place[mine, 1] = np.arange(len(mine))
        tables.append(torch.zeros(len(mine), autoencoder.moment_channels, *size))
    usable = torch.zeros(len(place), dtype=torch.bool)
    for batch in batches:
        moments = autoencoder.moments(batch.images.to(device)).float().cpu()  # type: ignore[union-attr]
        good = batch.valid.cpu()
        slots = batch.slots.cpu()[good]
        usable[slots] = True
        for number in np.unique(place[slots, 0]):  # a batch has one size
            tables[number][place[slots, 1]] = moments[good]
    if _world_size() > 1:
        tables, as_int = [_sum(table, device) for table in tables], _sum(usable.int(), device)
        usable = as_int > 0
    if not all(bool(torch.isfinite(table).all()) for table in tables):
        raise LdmError(
            "LATENTS",
            "the autoencoder gives latents that are not finite",
            next="train the autoencoder anew with precision 32 or a lower learning rate",
        )
    return MomentTables(tables, place, usable.numpy())


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sum(value: Tensor, device: torch.device) -> Tensor:
    moved = value.to(device)
    dist.all_reduce(moved)
    return moved.cpu()
