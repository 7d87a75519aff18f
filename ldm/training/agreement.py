"""All ranks train the same weights: hashes of the tensors, and their comparison across ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UNCLASSIFIED, LdmError
from ldm.training.ranks import gathered, several
from ldm.training.stage_module import StageModule

_CHUNK = {"cpu": 2**16, "device": 2**22}  # words of 8 bytes: what fits the cache, or few launches and 32 MB
_PLACE, _FIRST, _SECOND = (
    constant - 2**64 for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def check_ranks(module: StageModule) -> None:
    """Raises LdmError, `DIVERGED`, naming ranks and tensor, where parameters or averages differ between the ranks.

    Every rank takes part, and every rank raises. Buffers may differ: batch statistics are each rank's own.
    """
    if not several():
        return
    tensors: dict[str, Tensor] = dict(module.observed().named_parameters())
    if module.step.ema is not None:
        tensors |= {f"{file}/{name}": t for file, of in module.step.ema.files().items() for name, t in of.items()}
    compare_ranks(tensors, module.device, module.step.train_step)


def compare_ranks(tensors: Mapping[str, Tensor], device: torch.device, step: int) -> None:
    """One all-reduce of 16 bytes a tensor; only where that shows a difference, one question more."""
    own = hashes(tensors, device)
    both = torch.cat([own, ~own])
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    largest, smallest = both[: len(own)], ~both[len(own) :]
    differing = (largest != smallest).nonzero().flatten().tolist()
    if not differing:
        return
    everybody = gathered(int(own[differing[0]]))
    (usual, count), *_ = Counter(everybody).most_common()
    others = ", ".join(str(rank) for rank, value in enumerate(everybody) if value != usual)
    if 2 * count > len(everybody):
        who = f"rank {others} from the other {count}"
    else:
        who = f"rank {everybody.index(usual)} from rank {others}"
    raise LdmError(
        "DIVERGED",
        f"the weights are not the same on all ranks at step {step}",
        where=f"{list(tensors)[differing[0]]}, {len(differing)} of {len(tensors)} tensors",
        limit=f"it differs: {who}",
        next="the last checkpoint was the same on all: run the same command again; if it comes back, that device is "
        "faulty, or code of yours does something else on each rank",
        exit_code=UNCLASSIFIED,
    )


def hashes(tensors: Mapping[str, Tensor], device: torch.device | None = None) -> Tensor:
    """[N] int64, one for each tensor, on `device`: of its bits and their places, the same on every kind of device."""
    return torch.stack([tensor_hash(t).to(device) for t in tensors.values()])


def tensor_hash(x: Tensor) -> Tensor:
    """[] int64, which one changed bit always changes, and two tensors that differ share with a chance near 2^-64.

    The sum over 8-byte words of a bijection of word and place, modulo 2^64: the mixing function of SplitMix (Steele,
    Lea and Flood 2014, "Fast splittable pseudorandom number generators"), without which two changes might cancel.
    """
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    size = _CHUNK["cpu" if x.device.type == "cpu" else "device"]
    for number, words in enumerate(_words(x).split(size)):
        mixed = torch.arange(number * size, number * size + len(words), device=x.device)
        mixed.mul_(_PLACE).bitwise_xor_(words)
        _shift(mixed, 30).mul_(_FIRST)
        _shift(mixed, 27).mul_(_SECOND)
        total += _shift(mixed, 31).sum()
    return total


def _shift(x: Tensor, bits: int) -> Tensor:
    return x.bitwise_xor_((x >> bits).bitwise_and_(2 ** (64 - bits) - 1))  # the shift of an int64 brings its sign along


def _words(x: Tensor) -> Tensor:
    """The bytes of x as [ceil(bytes / 8)] int64, zeros at the end."""
    data = x.detach().contiguous().flatten().view(torch.uint8)
    if missing := -len(data) % 8:
        data = F.pad(data, (0, missing))
    elif data.storage_offset() % 8:
        data = data.clone()
    return data.view(torch.int64)
