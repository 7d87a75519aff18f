"""Aspect-ratio buckets: the size that a picture is trained at, and steps of pictures of one size. Needs numpy only.

A step holds pictures of one bucket, whatever the ranks, workers and accumulation. Which bucket a step takes, and which
of its samples, is a pure function of (seed, step), so that a run resumes anywhere at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.data.order import ALL, Ids, Order, even_lanes, permutation, samples_per_epoch
from ldm.errors import LdmError, nearest

_MIXED_STEPS = 4  # of a rare bucket that are shuffled together, however small its share of a window is
_LISTED = 8


@dataclass(frozen=True)
class Assignment:
    """Samples by bucket. sizes: [K, 2] width and height of every bucket that has samples.   of: [N], below K."""

    sizes: Ids
    of: Ids

    def __len__(self) -> int:
        return len(self.sizes)

    def rows(self, bucket: int) -> Ids:
        """The bucket's samples, increasing."""
        return np.flatnonzero(self.of == bucket)

    def size(self, bucket: int) -> tuple[int, int]:
        width, height = self.sizes[bucket].tolist()
        return width, height


@dataclass(frozen=True)
class Buckets:
    """The table of sizes. The names of the settings are those of kohya's sd-scripts.

    image_size: no bucket has a larger area than its square.
    min_bucket_reso, max_bucket_reso: sides of the table, in pixels; None = half and twice image_size.
    bucket_reso_steps: every side is a multiple of it.
    bucket_no_upscale: a picture that does not fill its bucket of the table gets one of its own size, rounded down to
        multiples of bucket_reso_steps; only one that is smaller than a step is enlarged.
    Raises LdmError if the settings leave no choice of sizes.
    """

    image_size: int
    min_bucket_reso: int | None = None
    max_bucket_reso: int | None = None
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False

    def __post_init__(self) -> None:
        step = self.bucket_reso_steps
        for name, value in (("bucket_reso_steps", step), *zip(("min_bucket_reso", "max_bucket_reso"), self._range)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise _refused(name, f"{value!r} is no number of pixels", "a whole number from 1")
        low, high = self._range
        if not low <= self.image_size <= high:
            what = f"the sides {low} to {high} of buckets leave out image_size {self.image_size}"
            raise _refused("min_bucket_reso", what, "min_bucket_reso <= image_size <= max_bucket_reso")
        if len(self.table) < 2:
            what = f"sides {low} to {high} in steps of {step} leave no choice at image_size {self.image_size}"
            # an eighth and a half always leave one: a side of at most 5/8, and one above 7/8
            steps, lowest = max(1, self.image_size // 8), self.image_size // 2
            hints = {"bucket_reso_steps": steps} if step > steps else {}
            hints |= {"min_bucket_reso": lowest} if low > lowest else {}
            hint = "set " + " and ".join(f"data.bucket.{name}={value}" for name, value in hints.items())
            raise _refused(next(iter(hints)), what, "at least two sizes", hint)

    @property
    def _range(self) -> tuple[int, int]:
        low, high = self.min_bucket_reso, self.max_bucket_reso
        return self.image_size // 2 if low is None else low, 2 * self.image_size if high is None else high

    @property
    def table(self) -> Ids:
        """[K, 2] width and height by increasing aspect ratio: the square, and for every width between the bounds the
        largest height whose area fits, lying and standing (sd-scripts, make_bucket_resolutions).
        """
        step, area = self.bucket_reso_steps, self.image_size**2
        low, high = self._range
        square = self.image_size // step * step
        found = {(square, square)} if square else set()
        for width in range(-(-low // step) * step, high + 1, step):
            height = min(high, area // width) // step * step
            if height >= low:
                found |= {(width, height), (height, width)}
        return np.array(sorted(found, key=lambda size: (size[0] / size[1], size)), dtype=np.int64).reshape(-1, 2)

    def target(self, image_sizes: NDArray[Any]) -> Ids:
        """[N, 2] width and height that pictures of [N, 2] width and height are trained at: the nearest aspect ratio.

        Nearest by the logarithm, so that lying and standing pictures are treated alike.
        """
        table, images = self.table, np.asarray(image_sizes, dtype=np.float64).reshape(-1, 2)
        aspects = table[:, 0] / table[:, 1]
        # the geometric mean of two neighbours parts them; squares instead of roots and logarithms, which may round
        found = table[np.searchsorted(aspects[1:] * aspects[:-1], (images[:, 0] / images[:, 1]) ** 2)]
        if not self.bucket_no_upscale:
            return found
        shrunk = images * np.minimum(1, self.image_size / np.sqrt(images.prod(axis=1, keepdims=True)))
        step = self.bucket_reso_steps
        own = np.clip(shrunk // step, 1, self._range[1] // step).astype(np.int64) * step
        return np.where((images >= found).all(axis=1, keepdims=True), found, own)

    def assign(self, image_sizes: Ids) -> Assignment:
        """image_sizes: [N, 2] width and height of the upright pictures."""
        target = self.target(image_sizes)
        codes, of = np.unique(target[:, 0] << 32 | target[:, 1], return_inverse=True)
        return Assignment(np.stack([codes >> 32, codes & 0xFFFFFFFF], axis=1), of)


def read_settings(node: Mapping[str, Any] | None, image_size: int) -> Buckets | None:
    """The mapping `data.bucket`: `enable_bucket` and the settings of `Buckets`; None where buckets are off."""
    if not isinstance(node, Mapping | None):
        raise LdmError("CONFIG", f"{node!r} is no mapping", where="data.bucket", next="data.bucket.enable_bucket=true")
    known = [field.name for field in fields(Buckets)][1:]
    settings = dict(node or {})
    enabled = settings.pop("enable_bucket", False)
    for name in settings:
        if name not in known:
            hint = nearest(name, ["enable_bucket", *known])
            raise LdmError("CONFIG", f"unknown setting {name!r}", where="data.bucket", next=hint)
    for name, value in (("enable_bucket", enabled), ("bucket_no_upscale", settings.get("bucket_no_upscale", False))):
        if not isinstance(value, bool):
            raise _refused(name, f"{value!r}", "true or false")
    return Buckets(image_size, **settings) if enabled else None


def _refused(name: str, what: str, limit: str, hint: str = "") -> LdmError:
    return LdmError("CONFIG", what, where=f"data.bucket.{name}", limit=limit, next=hint)


class BucketOrder:
    """Sample ids by step, all of one bucket; the face of an `Order`.

    base: the order without buckets, whose seed, batch, lanes and remainder count.   assigned: its samples by bucket.
    uses: [N], how often an epoch uses each sample.   sizes: [N], bytes.   window_mb: see `Order`.
    part: the `Order` of the samples `rows` alone, from (rows, lanes, window_mb).

    Every bucket is an `Order` of its own, of which its step k takes step k: each sample is used once per epoch, what
    does not fill a step waits for the next epoch (`remainder="carry"`), and a bad sample is replaced within its lane
    of the bucket. An epoch is cut into V windows, of window_mb for every lane. After w windows a bucket of n samples
    has had floor(w n / (V B)) steps; those that fall into a window are taken in an order drawn for (seed, window). So
    all buckets go through the shards side by side, and any step is found by arithmetic alone.
    """

    def __init__(
        self,
        base: Order,
        assigned: Assignment,
        part: Callable[[Ids, int, float], Order],
        *,
        uses: NDArray[Any],
        sizes: Ids,
        window_mb: float,
    ) -> None:
        self.seed, self.batch_size, self.lanes = base.seed, base.batch_size, base.lanes
        self.remainder, self.assigned = base.remainder, assigned
        self._hosts: list[int] | None = None  # see `of_encoded`
        total = float((uses * sizes).sum())
        self._windows = max(1, int(total / (window_mb * 2**20 * self.lanes)))
        self._parts: list[tuple[int, Ids, Order]] = []  # bucket, its samples, their order
        self._rates: list[tuple[int, int]] = []  # steps of an epoch, as a fraction
        for bucket in range(len(assigned)):
            rows = assigned.rows(bucket)
            count, weight = float(uses[rows].sum()), float((uses * sizes)[rows].sum())
            num_samples = samples_per_epoch(uses[rows])
            if self.remainder == "drop" and num_samples < self.batch_size:
                continue
            lanes = even_lanes(self.lanes, num_samples)
            mixed = _MIXED_STEPS * self.batch_size / lanes * weight / count / 2**20
            order = part(rows, lanes, min(window_mb, max(window_mb * weight / max(1.0, total), mixed)))
            self._parts.append((bucket, rows, order))
            carries = self.remainder == "carry"
            self._rates.append((order.num_samples, self.batch_size) if carries else (order.steps_per_epoch, 1))
        if not self._parts:
            raise LdmError(
                "CONFIG",
                "with remainder=drop no bucket has a complete step",
                where="data.remainder",
                limit=f"{len(assigned)} buckets, batch {self.batch_size}",
                next="set data.remainder=carry, a smaller batch_size or larger data.bucket.bucket_reso_steps",
            )
        self.num_samples = sum(order.num_samples for _, _, order in self._parts)
        self._build_caches()

    def _build_caches(self) -> None:
        self._at = lru_cache(maxsize=64)(self._find)
        self._turn = lru_cache(maxsize=8)(self._build_turn)
        self._walk = lru_cache(maxsize=8)(self._build_walk)

    def __getstate__(self) -> dict:  # caches stay behind when a worker process receives the order
        return {k: v for k, v in self.__dict__.items() if k not in ("_at", "_turn", "_walk")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._build_caches()

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every bucket has completed its first epoch."""
        return 1 + max(self._step_of(i, order.steps_per_epoch - 1) for i, (_, _, order) in enumerate(self._parts))

    def size(self, step: int) -> tuple[int, int]:
        """Width and height of the step's bucket."""
        mine = self._at(step)[0]
        return self.assigned.size(self._parts[mine if self._hosts is None else self._hosts[mine]][0])

    def ids(self, step: int, part: slice = ALL) -> Ids:
        """[B] sample ids of the step, by slot.   part: those of the step's slots alone."""
        i, inner = self._at(step)
        _, rows, order = self._parts[i]
        return rows[order.ids(inner, part)]

    def turns(self, step: int, part: slice = ALL) -> Ids:
        """[B] by slot, how often the slot's sample was used before."""
        i, inner = self._at(step)
        return self._parts[i][2].turns(inner, part)

    def reserve(self, slot: int, attempt: int) -> int:
        """A candidate to replace a bad sample at `slot`: the others of its bucket one by one, those of its lane first;
        then all of the bucket of the next similar aspect ratio, and so on; and again from the start.
        """
        found, others = self._walk(int(slot))
        while attempt >= len(found) and (sample := next(others, None)) is not None:
            found.append(sample)
        return found[attempt % len(found)] if found else int(self.ids(slot // self.batch_size)[slot % self.batch_size])

    def _build_walk(self, slot: int) -> tuple[list[int], Iterator[int]]:
        """The candidates at a slot that were asked for, and those that follow."""
        return [], self._others(slot)

    def _others(self, slot: int) -> Iterator[int]:
        """Every sample that may stand in at a slot, once."""
        step, within = divmod(slot, self.batch_size)
        mine, inner = self._at(step)
        seen = {int(self.ids(step)[within])}
        for i in self._near(mine) if self._hosts is None else [self._hosts[mine]]:
            _, rows, order = self._parts[i]
            at = inner * self.batch_size + within
            of_epoch = (order.reserve(at, attempt) for attempt in range(order.num_samples - 1))
            for row in chain([order.ids(inner)[within]], of_epoch, range(len(rows))):
                sample = int(rows[row])
                if sample not in seen:
                    seen.add(sample)
                    yield sample

    def of_encoded(self, usable: NDArray[np.bool_]) -> BucketOrder:
        """The same for pictures that are encoded already, at the sizes of their own buckets.

        usable: [N], which could be encoded. A bad sample is replaced within its bucket alone. A bucket without a usable
        one has its steps as before, but of the size and with replacements of the most similar bucket that has some.
        """
        order, alive = copy(self), [bool(usable[rows].any()) for _, rows, _ in self._parts]
        order._hosts = [next((i for i in self._near(mine) if alive[i]), mine) for mine in range(len(alive))]
        return order

    def _near(self, i: int) -> list[int]:
        """All buckets that have steps, the most similar aspect ratio first: the bucket itself, then its neighbours."""
        sizes = self.assigned.sizes[[bucket for bucket, _, _ in self._parts]]
        aspects = np.log(sizes[:, 0] / sizes[:, 1])
        apart = np.abs(aspects - aspects[i])
        apart[i] = -1
        return np.argsort(apart, kind="stable").tolist()

    def _before(self, window: int) -> list[int]:
        """Steps of every bucket before a window, counted from the start of the run. Exact: Python's integers."""
        return [window * count // (self._windows * per) for count, per in self._rates]

    def _window_of(self, step: int, steps_before: Callable[[int], int]) -> int:
        """The window whose steps hold number `step` of those that `steps_before` counts."""
        last = 1
        while steps_before(last) <= step:
            last *= 2
        return bisect_right(range(last), step, key=steps_before) - 1

    def _build_turn(self, window: int) -> Ids:
        """The window's steps in order, each as the bucket that has its turn."""
        counts = np.subtract(self._before(window + 1), self._before(window))
        turns = np.repeat(np.arange(len(counts)), counts)
        return turns[permutation(len(turns), self.seed, "buckets", window)]

    def _find(self, step: int) -> tuple[int, int]:
        """Number in `_parts`, and the step within that bucket."""
        window = self._window_of(int(step), lambda w: sum(self._before(w)))
        before, turns = self._before(window), self._turn(window)
        at = int(step) - sum(before)
        mine = int(turns[at])
        return mine, before[mine] + int((turns[:at] == mine).sum())

    def _step_of(self, i: int, inner: int) -> int:
        """The inverse of `_find`."""
        window = self._window_of(inner, lambda w: self._before(w)[i])
        before = self._before(window)
        return sum(before) + int(np.flatnonzero(self._turn(window) == i)[inner - before[i]])


def cut_away(image_sizes: NDArray[Any], sizes: NDArray[Any]) -> NDArray[np.float64]:
    """[N], the share of each picture that a crop to the aspect ratio of `sizes` takes away, or that padding adds.

    image_sizes: [N, 2] width and height.   sizes: the same, or one (width, height) for all.
    """
    images, wanted = np.asarray(image_sizes, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    ratio = images[..., 0] * wanted[..., 1] / (images[..., 1] * wanted[..., 0])
    return 1 - np.minimum(ratio, 1 / ratio)


def loss_with_buckets(image_sizes: NDArray[Any]) -> float:
    """Mean share of pictures, [N, 2] width and height, that the default table cuts away, whatever its scale."""
    return float(cut_away(image_sizes, Buckets(512).target(image_sizes)).mean())


def report(assigned: Assignment, image_sizes: Ids) -> dict[str, Any]:
    """What buckets make of pictures, as plain values: mean shares cut away, overall, by a square, and per bucket."""
    loss = cut_away(image_sizes, assigned.sizes[assigned.of])
    counts = np.bincount(assigned.of, minlength=len(assigned))
    shares = np.bincount(assigned.of, weights=loss, minlength=len(assigned)) / counts
    rows = [
        {"width": width, "height": height, "pictures": int(count), "cut_away": float(share)}
        for (width, height), count, share in zip(assigned.sizes.tolist(), counts, shares, strict=True)
    ]
    square = float(cut_away(image_sizes, np.ones(2)).mean())
    return {"buckets": rows, "cut_away": float(loss.mean()), "square_cuts_away": square}


def in_words(found: Mapping[str, Any], order: BucketOrder, crop: str) -> str:
    """One line for a person at the start of a run: the buckets, what is lost, and what is rarer than a batch.

    found: of `report`.
    """
    rows = sorted(found["buckets"], key=lambda row: -row["pictures"])
    verb = "padding is" if crop == "pad" else "cropping takes"
    listed = [
        f"{row['width']}x{row['height']}: {row['pictures']} ({100 * row['cut_away']:.0f} %)" for row in rows[:_LISTED]
    ]
    more = [f"{len(rows) - _LISTED} more"] if len(rows) > _LISTED else []
    loss, square = (f"{100 * found[key]:.1f} %" for key in ("cut_away", "square_cuts_away"))
    line = f"{len(rows)} buckets ({', '.join(listed + more)}); {verb} {loss}, to a square it would be {square}"
    batch, used = order.batch_size, {bucket: part.num_samples for bucket, _, part in order._parts}
    left_out = [row for bucket, row in enumerate(found["buckets"]) if bucket not in used]
    if left_out:
        named = [f"{row['width']}x{row['height']} ({row['pictures']})" for row in left_out[:_LISTED]]
        named += [f"{len(left_out) - _LISTED} more"] if len(left_out) > _LISTED else []
        line += f"; rarer than a batch of {batch} and never used with data.remainder=drop: {', '.join(named)}"
    rare = [bucket for bucket, samples in used.items() if samples < batch]
    if rare:
        pictures = sum(found["buckets"][bucket]["pictures"] for bucket in rare)
        waits = f"wait up to {-(-batch // min(used.values()))} epochs for one"
        line += f"; {len(rare)} of them, with {pictures} pictures, are rarer than a batch of {batch} and {waits}"
    return line
