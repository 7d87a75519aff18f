"""The order of samples: a pure function of (seed, step) over lanes. Needs numpy only.

Each epoch permutes the shards, lays their samples on a line and cuts the line into L lanes; a lane is shuffled in
windows of bounded bytes; a step takes B / L consecutive samples from every lane, laid out lane by lane. Nothing here
knows about ranks or workers, so every world size that divides the batch sees the same batches.

A sample that an epoch uses r times is r entries of the line: pass k over a shard holds its samples of more than k uses
and is permuted like a shard of its own, so that the copies do not lie side by side. Where r is no whole number, a last
pass holds that share of such samples, in every epoch those whose turn it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import gcd

import numpy as np
from numpy.typing import NDArray

from ldm.errors import LdmError

Ids = NDArray[np.int64]
ALL = slice(None)
_LONG_LANE = 1024  # samples: one more is then 0.1 %


def raw_bits(count: int, *words: object) -> NDArray[np.uint64]:
    """`count` random 64-bit words for a name: sha256 of the words keys numpy's Philox, whose raw bits are stable."""
    digest = hashlib.sha256(("ldm-order-v1:" + ":".join(map(str, words))).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


def permutation(count: int, *words: object) -> Ids:
    return np.argsort(raw_bits(count, *words), kind="stable")


def lanes_default(batch_size: int, num_samples: int) -> int:
    """The largest divisor of the batch that is at most 8 and gives `even_lanes`."""
    return max(even_lanes(n, num_samples) for n in range(1, 9) if batch_size % n == 0)


def even_lanes(wanted: int, num_samples: int) -> int:
    """The largest divisor of `wanted` that cuts the samples into equal lanes, or into long ones: each lane counts
    epochs of its own, so that in a short lane a sample more or less would be used noticeably more or less often.
    """
    divisors = (n for n in range(1, wanted + 1) if wanted % n == 0)
    return max(n for n in divisors if n == 1 or num_samples % n == 0 < num_samples or num_samples // n >= _LONG_LANE)


def samples_per_epoch(repeats: NDArray[np.float64]) -> int:
    """`Order.num_samples` with these repeats: every share of equal samples is rounded by itself, see `Order`."""
    whole = repeats.astype(np.int64)
    shares, counts = np.unique(repeats - whole, return_counts=True)
    return int(whole.sum()) + sum(_chosen_of(share, n) for share, n in zip(shares, counts, strict=True) if share > 0)


def _chosen_of(share: float, count: int) -> int:
    """How many of `count` samples an epoch uses once more."""
    return max(1, round(float(share) * int(count)))


@dataclass(frozen=True)
class _Entries:
    """What one epoch uses, pass by pass, in each pass shard by shard.

    ids: [E].   starts: [S + 1], first entry of each shard of a pass.   first_of_pass: [P].   bytes_before: [E + 1].
    """

    ids: Ids
    starts: Ids
    first_of_pass: Ids
    bytes_before: Ids


@dataclass(frozen=True)
class _Share:
    """Samples of which an epoch uses the same share: those at the next `count` places of a fixed permutation."""

    ids: Ids  # [n], increasing
    order: Ids  # [n], a permutation of their positions
    count: int

    def chosen(self, epoch: int) -> Ids:
        """[count] positions."""
        return self.order[(epoch * self.count + np.arange(self.count)) % len(self.ids)]

    def uses_before(self, epoch: int) -> Ids:
        """[n], how often each sample was chosen in earlier epochs."""
        uses = np.empty_like(self.ids)
        uses[self.order] = -((np.arange(len(self.ids)) - epoch * self.count) // len(self.ids))
        return uses


@dataclass(frozen=True)
class _Line:
    """One epoch's shards in permuted order."""

    entries: _Entries
    shards: Ids
    samples_before: Ids  # [S + 1], samples of the line before each shard
    bytes_before: Ids  # [S + 1]


class Order:
    """Sample ids by step.

    shard_lengths: valid samples per shard, in id order.   sizes: bytes of each sample, which bound the windows.
    lanes: L, must divide batch_size; None takes `lanes_default`.   window_mb: bytes that are shuffled together.
    repeats: [N], how often an epoch uses each sample, more than 0; None = once. With 2.25 every epoch uses a sample
    twice, and a quarter of such samples, each in its turn, once more.
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
        repeats: Sequence[float] | NDArray[np.float64] | None = None,
    ) -> None:
        self.seed, self.batch_size, self.remainder = int(seed), batch_size, remainder
        self.window_bytes = max(1, int(window_mb * 2**20))
        self._lengths, self._sizes = (np.asarray(x, dtype=np.int64) for x in (shard_lengths, sizes))
        self._split_repeats(repeats)
        self._whole_passes = self._build_whole_passes()
        self.num_samples = len(self._whole_passes.ids) + sum(share.count for share in self._shares)
        self.lanes = lanes_default(batch_size, self.num_samples) if lanes is None else lanes
        self._check()
        self._cut = np.arange(self.lanes + 1, dtype=np.int64) * self.num_samples // self.lanes
        self.lane_lengths = np.diff(self._cut)
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
        self._entries = lru_cache(maxsize=4)(self._build_entries)
        self._line = lru_cache(maxsize=4)(self._build_line)
        self._edges = lru_cache(maxsize=4 * self.lanes)(self._build_edges)
        self._window = lru_cache(maxsize=4 * self.lanes)(self._build_window)

    def __getstate__(self) -> dict:  # caches stay behind when a worker process receives the order
        return {k: v for k, v in self.__dict__.items() if k not in ("_entries", "_line", "_edges", "_window")}

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

    def ids(self, step: int, part: slice = ALL) -> Ids:
        """[B] sample ids of the step, by slot: slot step * B + lane * (B / L) + i.

        part: those of the step's slots alone, for which no other lane is looked at.
        """
        return np.concatenate([self._entries(epoch).ids[entries] for epoch, entries in self._runs(step, part)])

    def turns(self, step: int, part: slice = ALL) -> Ids:
        """[B] by slot, how often the slot's sample was used before: uses of earlier epochs, and passes of this one."""
        return np.concatenate([self._turns_of(epoch, entries) for epoch, entries in self._runs(step, part)])

    def reserve(self, slot: int, attempt: int) -> int:
        """A candidate to replace a bad sample at `slot`: the others of its lane and epoch one by one in an order of the
        slot's own, then those of the epoch's other lanes, and again from the start. A copy counts as another sample.
        """
        step, within = divmod(int(slot), self.batch_size)
        per_lane = self.batch_size // self.lanes
        lane, i = divmod(within, per_lane)
        epochs, positions = self._positions(lane, step, per_lane)
        first, length, own = int(self._cut[lane]), int(self.lane_lengths[lane]), int(positions[i])
        attempt %= max(1, self.num_samples - 1)
        if attempt < length - 1 or length == self.num_samples:
            at = first + self._other(own, length, slot, attempt)
        else:
            rest = self.num_samples - length
            at = self._other(rest, rest + 1, slot, attempt - (length - 1))
            at += length if at >= first else 0
        lane = int(np.searchsorted(self._cut, at, side="right")) - 1
        epoch = int(epochs[i])
        return int(self._entries(epoch).ids[self._resolve(epoch, lane, np.array([at - self._cut[lane]]))][0])

    def _other(self, own: int, length: int, slot: int, attempt: int) -> int:
        """A number below `length` other than `own`, a different one for each of length - 1 attempts."""
        if length == 1:
            return own
        start, stride = (int(n) for n in raw_bits(2, self.seed, "reserve", slot) >> np.uint64(1))
        stride = 1 + stride % (length - 1)
        while gcd(stride, length - 1) > 1:
            stride += 1
        return (own + 1 + (start + attempt * stride) % (length - 1)) % length

    def _runs(self, step: int, part: slice) -> Iterator[tuple[int, Ids]]:
        """The step's entries by slot, in runs of one epoch."""
        per_lane = self.batch_size // self.lanes
        start, stop, _ = part.indices(self.batch_size)
        for lane in range(start // per_lane, -(-stop // per_lane)):
            mine = slice(max(0, start - lane * per_lane), stop - lane * per_lane)
            epochs, positions = (of_step[mine] for of_step in self._positions(lane, step, per_lane))
            for epoch in np.unique(epochs):
                yield int(epoch), self._resolve(int(epoch), lane, positions[epochs == epoch])

    def _turns_of(self, epoch: int, entries: Ids) -> Ids:
        table = self._entries(epoch)
        ids = table.ids[entries]
        whole = self._whole[ids]
        earlier = np.searchsorted(table.first_of_pass, entries, side="right") - 1
        turns = epoch * whole + np.minimum(earlier, whole)
        for share in self._shares:
            at = np.minimum(np.searchsorted(share.ids, ids), len(share.ids) - 1)
            mine = share.ids[at] == ids
            turns[mine] += share.uses_before(epoch)[at[mine]]
        return turns

    def _positions(self, lane: int, step: int, per_lane: int) -> tuple[Ids, Ids]:
        """Epoch and position within it, for the step's samples of a lane."""
        within = np.arange(per_lane, dtype=np.int64)
        if self.remainder == "drop":
            epoch, step = divmod(step, self.steps_per_epoch)
            return np.full(per_lane, epoch), step * per_lane + within
        epochs, positions = np.divmod(step * per_lane + within, self.lane_lengths[lane])
        return epochs, positions

    def _resolve(self, epoch: int, lane: int, positions: Ids) -> Ids:
        """Entries at positions of a lane: window by window through its permutation, then to shard and member."""
        edges = self._edges(epoch, lane)
        windows = np.searchsorted(edges, positions, side="right") - 1
        shuffled = np.empty_like(positions)
        for window in np.unique(windows):
            here = windows == window
            shuffled[here] = edges[window] + self._window(epoch, lane, int(window))[positions[here] - edges[window]]
        line = self._line(epoch)
        at = self._cut[lane] + shuffled
        shard = np.searchsorted(line.samples_before, at, side="right") - 1
        return line.entries.starts[line.shards[shard]] + at - line.samples_before[shard]

    def _split_repeats(self, repeats: Sequence[float] | NDArray[np.float64] | None) -> None:
        """Whole uses of each sample, and the shares of samples that are used once more."""
        count = len(self._sizes)
        times = np.ones(count) if repeats is None else np.asarray(repeats, dtype=np.float64)
        if not self._lengths.sum() == count == len(times) or not (times > 0).all():
            raise ValueError(f"{count} sizes, {len(times)} repeats for {self._lengths.sum()} samples")
        self._whole = times.astype(np.int64)
        rest = times - self._whole
        self._shares = []
        for share in np.unique(rest[rest > 0]):
            ids = np.flatnonzero(rest == share)
            order = permutation(len(ids), self.seed, "share", float(share))
            self._shares.append(_Share(ids, order, _chosen_of(share, len(ids))))

    def _build_whole_passes(self) -> _Entries:
        ids: list[Ids] = []
        while not ids or len(ids[-1]):
            before = np.arange(len(self._sizes), dtype=np.int64) if not ids else ids[-1]
            ids.append(before[self._whole[before] > len(ids)])
        return self._table(ids[:-1] if len(ids) > 1 else ids)

    def _build_entries(self, epoch: int) -> _Entries:
        if not self._shares:
            return self._whole_passes
        chosen = np.sort(np.concatenate([share.ids[share.chosen(epoch)] for share in self._shares]))
        whole = self._whole_passes
        bounds = [*whole.first_of_pass.tolist(), len(whole.ids)]
        return self._table([*(whole.ids[a:b] for a, b in pairwise(bounds)), chosen])

    def _table(self, passes: list[Ids]) -> _Entries:
        """Of passes, each with its ids in increasing order; what a later pass has nothing of is no shard of it."""
        ends = np.cumsum(self._lengths)
        lengths = []
        for ids in passes:
            counts = np.diff(np.searchsorted(ids, ends, side="left"), prepend=0)
            lengths.append(counts if ids is passes[0] else counts[counts > 0])
        ids = np.concatenate(passes)
        zero = np.zeros(1, dtype=np.int64)
        return _Entries(
            ids=ids,
            starts=np.concatenate([zero, np.cumsum(np.concatenate(lengths), dtype=np.int64)]),
            first_of_pass=np.cumsum([0, *(len(part) for part in passes[:-1])], dtype=np.int64),
            bytes_before=np.concatenate([zero, np.cumsum(self._sizes[ids])]),
        )

    def _build_line(self, epoch: int) -> _Line:
        entries = self._entries(epoch)
        shards = permutation(len(entries.starts) - 1, self.seed, epoch, "shards")
        samples = np.diff(entries.starts)[shards]
        weights = np.diff(entries.bytes_before[entries.starts])[shards]
        zero = np.zeros(1, dtype=np.int64)
        return _Line(
            entries=entries,
            shards=shards,
            samples_before=np.concatenate([zero, np.cumsum(samples)]),
            bytes_before=np.concatenate([zero, np.cumsum(weights)]),
        )

    def _build_edges(self, epoch: int, lane: int) -> Ids:
        """Bounds of the lane's windows, as positions in the lane: [W + 1], from 0 to the lane's length."""
        line = self._line(epoch)
        first, last = int(self._cut[lane]), int(self._cut[lane + 1])
        marks = range(self._byte_at(line, first), self._byte_at(line, last), self.window_bytes)
        edges = [0, *(self._first_from(line, mark) - first for mark in marks[1:]), last - first]
        return np.unique(np.clip(np.array(edges, dtype=np.int64), 0, last - first))

    def _build_window(self, epoch: int, lane: int, window: int) -> Ids:
        edges = self._edges(epoch, lane)
        return permutation(int(edges[window + 1] - edges[window]), self.seed, epoch, lane, window)

    def _byte_at(self, line: _Line, sample: int) -> int:
        """Bytes of the line before its sample number `sample`."""
        shard = min(int(np.searchsorted(line.samples_before, sample, side="right")) - 1, len(line.shards) - 1)
        start, before = line.entries.starts[line.shards[shard]], line.entries.bytes_before
        within = start + sample - line.samples_before[shard]
        return int(line.bytes_before[shard] + before[within] - before[start])

    def _first_from(self, line: _Line, byte: int) -> int:
        """The first sample of the line that begins at or after `byte`."""
        shard = min(int(np.searchsorted(line.bytes_before, byte, side="right")) - 1, len(line.shards) - 1)
        start, end = line.entries.starts[line.shards[shard]], line.entries.starts[line.shards[shard] + 1]
        offsets = line.entries.bytes_before[start : end + 1] - line.entries.bytes_before[start]
        return int(line.samples_before[shard] + np.searchsorted(offsets, byte - line.bytes_before[shard]))


def piece(batch_size: int, rank: int, world_size: int, accumulate: int, micro: int) -> slice:
    """The slots of a step that are micro-batch `micro` of `rank`: run rank * A + micro of R * A equal ones."""
    size = batch_size // (world_size * accumulate)
    first = (rank * accumulate + micro) * size
    return slice(first, first + size)


def efficient_sizes(batch_size: int, lanes: int, accumulate: int = 1) -> list[int]:
    """Numbers of processes of which none reads from a lane that it does not need: they divide the lanes, or are divided
    by them.
    """
    pieces = batch_size // accumulate
    return [n for n in range(1, pieces + 1) if pieces % n == 0 and (lanes % n == 0 or n % lanes == 0)]


def check_cut(batch_size: int, world_size: int, accumulate: int) -> None:
    """Refuse a world size and accumulation whose product does not divide the batch."""
    if accumulate < 1 or batch_size % (world_size * accumulate):
        valid = [r for r in range(1, batch_size + 1) if batch_size % (r * max(accumulate, 1)) == 0]
        raise LdmError(
            "BATCH",
            f"a global batch of {batch_size} cannot be cut for {world_size} devices x {accumulate} micro-batches",
            where="stage.*.batch_size, stage.*.accumulate, trainer.devices",
            limit="devices x accumulate must divide the batch",
            next=f"valid numbers of devices with accumulate={accumulate}: {', '.join(map(str, valid)) or 'none'}",
        )
