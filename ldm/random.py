"""Counter-based random draws: pure functions of a key, equal on every device.

Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in integer tensor
operations. A draw belongs to what it is drawn for, not to when: `keys = fold(run_key, purpose, index)` with
the global sample number in training and the picture's seed in sampling. No state is stored, none is needed.
32-bit words travel as int64 tensors, because torch has no full uint32 arithmetic.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # Weyl increments of the key


class Purpose(IntEnum):
    """What a draw is for. Numbers are part of the file format of a run: never change or reuse one."""

    TIMESTEP = 1
    NOISE = 2
    POSTERIOR = 3
    CONDITION_DROP = 4
    CAPTION_CHOICE = 5
    CROP = 6
    FLIP = 7
    MODULE = 8
    SAMPLE_INIT = 9
    SAMPLE_STEP = 10
    VALIDATION_NOISE = 11
    VALIDATION_POSTERIOR = 12
    INIT = 13
    SHUFFLE = 14
    RESERVE = 15
    NOISE_OFFSET = 16
    DATA = 17
    CAPTION_SHUFFLE = 18
    CODEBOOK = 19


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b. Halves of a keep every product below 2^49, clear of the sign bit."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    total = high + (low >> 16)
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: Sequence[Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10: four counter words and two key words (int64 in [0, 2^32)) to four random words.

    Matches the known answers published with Random123.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mulhilo(_M0, c0)
        hi1, lo1 = _mulhilo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & MASK, (k1 + _W1) & MASK
    return c0, c1, c2, c3


def run_key(seed: int) -> int:
    """63 bits that stand for a run: the same on every machine, whatever hash seed or clock."""
    digest = hashlib.sha256(f"ldm-rng-v1:{int(seed)}".encode()).digest()
    return int.from_bytes(digest[:8], "little") & (2**63 - 1)


def fold(key: int | Tensor, purpose: Purpose | int, index: Tensor | int) -> Tensor:
    """Keys for `index` under `purpose`.

    key: an int (from `run_key`) or int64 tensor that broadcasts with index.  index: int64, any shape.
    Returns int64 keys of index's shape, in [0, 2^63).
    """
    index = torch.as_tensor(index, dtype=torch.int64)
    if not isinstance(key, Tensor):  # filled in on the device: a copy would make the host wait for it
        key = torch.full((), key, dtype=torch.int64, device=index.device)
    key = key.to(index.device)
    words = _split(key.expand(torch.broadcast_shapes(key.shape, index.shape)))
    lo, hi = _split(index.expand(words[0].shape))
    a, b, _, _ = philox((lo, hi, torch.full_like(lo, int(purpose)), torch.zeros_like(lo)), words)
    return a | ((b & 0x7FFFFFFF) << 32)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    return x & MASK, (x >> 32) & MASK


def bits(keys: Tensor, count: int) -> Tensor:
    """`count` random words in [0, 2^32) for each key. keys: [B] int64. Returns [B, count] int64."""
    blocks = (count + 3) // 4
    k0, k1 = (w[:, None] for w in _split(keys))
    c0 = torch.arange(blocks, dtype=torch.int64, device=keys.device)[None].expand(len(keys), blocks)
    zero = torch.zeros_like(c0)
    words = philox((c0, zero, zero, zero), (k0.expand_as(c0), k1.expand_as(c0)))
    return torch.stack(words, dim=-1).reshape(len(keys), blocks * 4)[:, :count]


def uniform(keys: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform draws in [0, 1). keys: [B] int64. Returns [B, *shape]; 24 random bits each, so exact in float32."""
    words = bits(keys, math.prod(shape))
    return ((words >> 8).to(dtype) * 2.0**-24).reshape(len(keys), *shape)


def normal(keys: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal draws by Box and Muller's transform, computed in float32.

    keys: [B] int64. Returns [B, *shape]. Equal integers on every device; the floats agree to rounding.
    """
    count = math.prod(shape)
    half = (count + 1) // 2
    words = bits(keys, 2 * half)
    u = ((words[:, :half] >> 8).to(torch.float32) + 1.0) * 2.0**-24  # (0, 1]: the logarithm stays finite
    angle = (words[:, half:] >> 8).to(torch.float32) * (2.0**-24 * 2.0 * math.pi)
    radius = torch.sqrt(-2.0 * torch.log(u))
    draws = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :count]
    return draws.reshape(len(keys), *shape).to(dtype)


def seed_modules(key: int, train_step: int, micro_batch: int, rank: int) -> None:
    """Re-seed the global generators, which module dropout draws from, as a function of the position alone."""
    of_step = fold(key, Purpose.MODULE, train_step)
    torch.manual_seed(int(fold(of_step, Purpose.MODULE, (micro_batch << 32) | rank)))


@dataclass(frozen=True)
class Draws:
    """The draws of some samples: `key` stands for the run, `index` [B] int64 says which samples.

    Training hands its slots (global sample numbers), validation the position in the set, sampling the seeds.
    The draws are made on index's device.  host: the index on the host, where it is known there too.
    """

    key: int
    index: Tensor
    host: Tensor | None = None

    def on_host(self) -> Draws:
        """The same draws made on the host, which waits for the device only if `host` is None."""
        return Draws(self.key, self.index.cpu() if self.host is None else self.host)

    def keys(self, purpose: Purpose) -> Tensor:
        return fold(self.key, purpose, self.index)

    def uniform(self, purpose: Purpose, shape: Sequence[int] = ()) -> Tensor:
        """[B, *shape] in [0, 1), float32."""
        return uniform(self.keys(purpose), shape)

    def normal(self, purpose: Purpose, shape: Sequence[int] = ()) -> Tensor:
        """[B, *shape] standard normal, float32."""
        return normal(self.keys(purpose), shape)

    def low_discrepancy(self, purpose: Purpose) -> Tensor:
        """[B] in [0, 1), uniform over the run and evenly spread over any run of consecutive indices.

        The golden-ratio Weyl sequence in 32-bit integers, shifted by one draw of the run: it depends on the
        sample's own index alone, so any cut of the batch gives the same values.
        """
        shift = bits(fold(self.key, purpose, torch.zeros(1, dtype=torch.int64, device=self.index.device)), 1)[0, 0]
        low, high = self.index & 0xFFFF, (self.index >> 16) & 0xFFFF
        word = (low * _W0 + ((high * _W0) << 16) + shift) & MASK
        return (word >> 8).to(torch.float32) * 2.0**-24
