"""The order of samples: a pure function of (seed, step) over lanes. Needs numpy only.

Each epoch permutes the shards, lays their samples on a line and cuts the line into L lanes; a lane is shuffled in
windows of bounded bytes; a step takes B / L consecutive samples from every lane, laid out lane by lane. Nothing here
knows about ranks or workers, so every world size that divides the batch sees the same batches.

A sample that an epoch uses r times is r entries of the line: pass k over a shard holds its samples of more than k uses
and is permuted like a shard of its own, so that the copies do not lie side by side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ldm.errors import LdmError

Ids = NDArray[np.int64]


def raw_bits(count: int, *words: object) -> NDArray[np.uint64]:
    """`count` random 64-bit words for a name: sha256 of the words keys numpy's Philox, whose raw bits are stable."""
    digest = hashlib.sha256(("ldm-order-v1:" + ":".join(map(str, words))).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


def permutation(count: int, *words: object) -> Ids:
    return np.argsort(raw_bits(count, *words), kind="stable")


def lanes_default(batch_size: int, num_samples: int) -> int:
    """The largest divisor of the batch that is at most 8, and at most the number of samples."""
    return max(n for n in range(1, 9) if batch_size % n == 0 and (n <= num_samples or n == 1))


@dataclass(frozen=True)
class _Line:
    """One epoch's shards in permuted order. cut: [L + 1] bounds of the lanes on the line."""

    shards: Ids
    samples_before: Ids  # [S + 1], samples of the line before each shard
    bytes_before: Ids  # [S + 1]
    cut: Ids


class Order:
    """Sample ids by step.

    shard_lengths: valid samples per shard, in id order.   sizes: bytes of each sample, which bound the windows.
    repeats: [N], how often an epoch uses each sample, 1 or more; None = once.
    lanes: L, must divide batch_size; None takes `lanes_default`.   window_mb: bytes that are shuffled together.
    remainder: "carry" lets a step straddle two epochs, so that every sample is used once per epoch; "drop" starts
    every epoch at a step and leaves the last incomplete step unused.
    """

    def __init__(
        self,
        shard_lengths: Sequence[int] | Ids,
        sizes: Sequence[int] | Ids,
        *,
        seed: int,
        batch_size: int,
        lanes: int | None = None,
        window_mb: float = 256,
        remainder: str = "carry",
        repeats: Sequence[int] | Ids | None = None,
    ) -> None:
        self.seed, self.batch_size, self.remainder = int(seed), batch_size, remainder
        self.window_bytes = max(1, int(window_mb * 2**20))
        shards, weights = (np.asarray(x, dtype=np.int64) for x in (shard_lengths, sizes))
        self._repeats = np.ones_like(weights) if repeats is None else np.asarray(repeats, dtype=np.int64)
        self._ids, lengths, self._first_of_pass = _passes(shards, weights, self._repeats)
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._bytes = np.concatenate([[0], np.cumsum(weights[self._ids])])
        self.num_samples = len(self._ids)  # of an epoch, each as often as it is used
        self.lanes = lanes_default(batch_size, self.num_samples) if lanes is None else lanes
        self._check()
        self.lane_lengths = np.diff(self._cut())
        self._build_caches()

    def _check(self) -> None:
        if self.num_samples < 1:
            raise LdmError("DATA", "there is no sample to order", where="data.path")
        if self.lanes < 1 or self.batch_size % self.lanes or self.lanes > self.num_samples:
            upper = min(self.batch_size, self.num_samples)
            valid = [n for n in range(1, upper + 1) if self.batch_size % n == 0]
            raise LdmError(
                "CONFIG",
                f"{self.lanes} lanes do not divide a batch of {self.batch_size}",
                where="data.lanes",
                limit=f"at most {self.num_samples} samples",
                next="valid: " + ", ".join(map(str, valid)),
            )
        if self.remainder not in ("carry", "drop"):
            raise LdmError(
                "CONFIG", f"unknown remainder {self.remainder!r}", where="data.remainder", next="carry, drop"
            )
        if self.remainder == "drop" and self.num_samples // self.lanes < self.batch_size // self.lanes:
            raise LdmError(
                "CONFIG",
                "with remainder=drop an epoch has no complete step",
                where="data.remainder",
                limit=f"{self.num_samples} samples, batch {self.batch_size}",
                next="set data.remainder=carry or a smaller batch_size",
            )

    def _build_caches(self) -> None:
        self._line = lru_cache(maxsize=4)(self._build_line)
        self._edges = lru_cache(maxsize=4 * self.lanes)(self._build_edges)
        self._window = lru_cache(maxsize=4 * self.lanes)(self._build_window)

    def __getstate__(self) -> dict:  # caches stay behind when a worker process receives the order
        return {k: v for k, v in self.__dict__.items() if k not in ("_line", "_edges", "_window")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._build_caches()

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which the first epoch is complete."""
        per_lane = self.batch_size // self.lanes
        if self.remainder == "drop":
            return int(self.lane_lengths.min()) // per_lane
        return -(-int(self.lane_lengths.max()) // per_lane)

    def ids(self, step: int) -> Ids:
        """[B] sample ids of the step, by slot: slot step * B + lane * (B / L) + i."""
        return self._ids[self._entries(step)[0]]

    def turns(self, step: int) -> Ids:
        """[B] by slot, how often the slot's sample was used before: uses of earlier epochs, and passes of this one."""
        entries, epochs = self._entries(step)
        ids = self._ids[entries]
        earlier = np.searchsorted(self._first_of_pass, entries, side="right") - 1
        return epochs * self._repeats[ids] + earlier

    def reserve(self, slot: int, attempt: int) -> int:
        """A candidate to replace a bad sample at `slot`, from the same lane and epoch."""
        step, within = divmod(int(slot), self.batch_size)
        lane, i = divmod(within, self.batch_size // self.lanes)
        epochs, _ = self._positions(lane, step, self.batch_size // self.lanes)
        draw = int(raw_bits(1, self.seed, "reserve", slot, attempt)[0])
        entry = self._resolve(int(epochs[i]), lane, np.array([draw % int(self.lane_lengths[lane])]))
        return int(self._ids[entry][0])

    def _entries(self, step: int) -> tuple[Ids, Ids]:
        """[B] entries and their epochs, by slot."""
        per_lane = self.batch_size // self.lanes
        found = [self._take(lane, step, per_lane) for lane in range(self.lanes)]
        return np.concatenate([e for e, _ in found]), np.concatenate([e for _, e in found])

    def _positions(self, lane: int, step: int, per_lane: int) -> tuple[Ids, Ids]:
        """Epoch and position within it, for the step's samples of a lane."""
        within = np.arange(per_lane, dtype=np.int64)
        if self.remainder == "drop":
            epoch, step = divmod(step, self.steps_per_epoch)
            return np.full(per_lane, epoch), step * per_lane + within
        epochs, positions = np.divmod(step * per_lane + within, self.lane_lengths[lane])
        return epochs, positions

    def _take(self, lane: int, step: int, per_lane: int) -> tuple[Ids, Ids]:
        epochs, positions = self._positions(lane, step, per_lane)
        runs = [self._resolve(int(e), lane, positions[epochs == e]) for e in np.unique(epochs)]
        return np.concatenate(runs), epochs

    def _resolve(self, epoch: int, lane: int, positions: Ids) -> Ids:
        """Entries at positions of a lane: window by window through its permutation, then to shard and member."""
        edges = self._edges(epoch, lane)
        windows = np.searchsorted(edges, positions, side="right") - 1
        shuffled = np.empty_like(positions)
        for window in np.unique(windows):
            here = windows == window
            shuffled[here] = edges[window] + self._window(epoch, lane, int(window))[positions[here] - edges[window]]
        line = self._line(epoch)
        at = line.cut[lane] + shuffled
        shard = np.searchsorted(line.samples_before, at, side="right") - 1
        return self._starts[line.shards[shard]] + at - line.samples_before[shard]

    def _cut(self) -> Ids:
        return np.arange(self.lanes + 1, dtype=np.int64) * self.num_samples // self.lanes

    def _build_line(self, epoch: int) -> _Line:
        shards = permutation(len(self._starts) - 1, self.seed, epoch, "shards")
        samples = np.diff(self._starts)[shards]
        weights = np.diff(self._bytes[self._starts])[shards]
        zero = np.zeros(1, dtype=np.int64)
        return _Line(
            shards=shards,
            samples_before=np.concatenate([zero, np.cumsum(samples)]),
            bytes_before=np.concatenate([zero, np.cumsum(weights)]),
            cut=self._cut(),
        )

    def _build_edges(self, epoch: int, lane: int) -> Ids:
        """Bounds of the lane's windows, as positions in the lane: [W + 1], from 0 to the lane's length."""
        line = self._line(epoch)
        first, last = int(line.cut[lane]), int(line.cut[lane + 1])
        marks = range(self._byte_at(line, first), self._byte_at(line, last), self.window_bytes)
        edges = [0, *(self._first_from(line, mark) - first for mark in marks[1:]), last - first]
        return np.unique(np.clip(np.array(edges, dtype=np.int64), 0, last - first))

    def _build_window(self, epoch: int, lane: int, window: int) -> Ids:
        edges = self._edges(epoch, lane)
        return permutation(int(edges[window + 1] - edges[window]), self.seed, epoch, lane, window)

    def _byte_at(self, line: _Line, sample: int) -> int:
        """Bytes of the line before its sample number `sample`."""
        shard = min(int(np.searchsorted(line.samples_before, sample, side="right")) - 1, len(line.shards) - 1)
        start = self._starts[line.shards[shard]]
        within = start + sample - line.samples_before[shard]
        return int(line.bytes_before[shard] + self._bytes[within] - self._bytes[start])

    def _first_from(self, line: _Line, byte: int) -> int:
        """The first sample of the line that begins at or after `byte`."""
        shard = min(int(np.searchsorted(line.bytes_before, byte, side="right")) - 1, len(line.shards) - 1)
        start, end = self._starts[line.shards[shard]], self._starts[line.shards[shard] + 1]
        offsets = self._bytes[start : end + 1] - self._bytes[start]
        return int(line.samples_before[shard] + np.searchsorted(offsets, byte - line.bytes_before[shard]))


def _passes(shard_lengths: Ids, sizes: Ids, repeats: Ids) -> tuple[Ids, Ids, Ids]:
    """Sample ids pass by pass; how many of them each shard has in each pass, the later ones without empty shards; and
    the first entry of each pass.
    """
    if not shard_lengths.sum() == len(sizes) == len(repeats) or (repeats < 1).any():
        raise ValueError(f"{len(sizes)} sizes, {len(repeats)} repeats for {shard_lengths.sum()} samples")
    shard_of = np.repeat(np.arange(len(shard_lengths)), shard_lengths)
    ids = [np.arange(len(sizes), dtype=np.int64)]
    lengths = [shard_lengths]
    while len(left := ids[-1][repeats[ids[-1]] > len(ids)]):
        ids.append(left)
        lengths.append(np.unique(shard_of[left], return_counts=True)[1].astype(np.int64))
    counts = [0, *(len(part) for part in ids[:-1])]
    return np.concatenate(ids), np.concatenate(lengths), np.cumsum(counts, dtype=np.int64)


def cut(ids: Ids, rank: int, world_size: int, accumulate: int, micro: int) -> Ids:
    """Micro-batch `micro` of `rank`: piece rank * A + micro of the R * A equal runs of a step."""
    size = len(ids) // (world_size * accumulate)
    first = (rank * accumulate + micro) * size
    return ids[first : first + size]


def check_cut(batch_size: int, world_size: int, accumulate: int) -> None:
    """Refuse a world size and accumulation whose product does not divide the batch."""
    if accumulate < 1 or batch_size % (world_size * accumulate):
        valid = [r for r in range(1, batch_size + 1) if batch_size % (r * max(accumulate, 1)) == 0]
        raise LdmError(
            "CONFIG",
            f"a global batch of {batch_size} cannot be cut for {world_size} devices x {accumulate} micro-batches",
            where="stage.*.batch_size, stage.*.accumulate, trainer.devices",
            limit="devices x accumulate must divide the batch",
            next=f"valid numbers of devices with accumulate={accumulate}: {', '.join(map(str, valid)) or 'none'}",
        )
