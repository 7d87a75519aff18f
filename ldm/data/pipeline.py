"""The list of stages from shards to batches: the one file to read.

    Source   slots of a plan -> keys and raw bytes, read by offset; resumes at any micro-batch
    Decode   raw bytes -> pixels, caption and columns; a bad sample keeps its slot and is replaced from the same lane
    Batches  examples -> `Batch`, with the reports of what was bad

Every stage turns an iterator into an iterator, one sample in and one out, and webdataset's `DataPipeline` folds them.
Worker w of K takes the micro-batches start + w, start + w + K, ...; the loader collects its workers in turn, so the
order is the same for every K. The consumer compares the slots of each batch with the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from ldm.data.bad_samples import Bad
from ldm.data.buckets import Assignment, BucketOrder
from ldm.data.captions import Captions
from ldm.data.columns import kind_of
from ldm.data.decode import BadSample, decode_array, decode_columns, decode_image, decode_mask
from ldm.data.moments import Moments
from ldm.data.order import Ids, Order, piece
from ldm.data.shards import Dataset
from ldm.data.transforms import Size, Transform, to_bytes, to_images, to_masks
from ldm.errors import LdmError
from ldm.random import Purpose, fold
from ldm.types import Batch, Check

_TEXTS = Captions()
Raw = dict[str, Any]
"""A sample in webdataset's form: `__key__`, `__url__`, fields as bytes, and what the later stages need."""


class Plan(Protocol):
    """Which samples make up micro-batch j. `num_batches` is None for an endless plan."""

    @property
    def num_batches(self) -> int | None: ...

    def slots(self, j: int) -> Ids: ...

    def ids(self, j: int) -> Ids: ...

    def valid(self, j: int) -> NDArray[np.bool_]: ...

    def turns(self, j: int) -> Ids:
        """How often each slot's sample was used before."""
        ...

    def reserve(self, slot: int, attempt: int) -> int | None:
        """Another sample for the slot, or None where samples are not replaced."""
        ...

    def size(self, j: int) -> Size | None:
        """What the micro-batch's pictures are brought to: the size of its bucket, or None for the square."""
        ...


@dataclass(frozen=True)
class TrainPlan:
    """Endless: micro-batch j of a rank is micro-batch j mod A of step j div A."""

    order: Order | BucketOrder
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1
    num_batches: None = None

    def slots(self, j: int) -> Ids:
        step, micro = divmod(j, self.accumulate)
        part = self._piece(micro)
        return step * self.order.batch_size + np.arange(part.start, part.stop)

    def ids(self, j: int) -> Ids:
        step, micro = divmod(j, self.accumulate)
        return self.order.ids(step, self._piece(micro))

    def valid(self, j: int) -> NDArray[np.bool_]:
        return np.ones(len(self.slots(j)), dtype=bool)

    def turns(self, j: int) -> Ids:
        step, micro = divmod(j, self.accumulate)
        return self.order.turns(step, self._piece(micro))

    def _piece(self, micro: int) -> slice:
        return piece(self.order.batch_size, self.rank, self.world_size, self.accumulate, micro)

    def reserve(self, slot: int, attempt: int) -> int:
        return self.order.reserve(slot, attempt)

    def size(self, j: int) -> Size | None:
        return self.order.size(j // self.accumulate) if isinstance(self.order, BucketOrder) else None


@dataclass(frozen=True)
class PassPlan:
    """Every sample once in id order; the slot is the sample's id. Rank r takes r, r + R, r + 2R, ...

    pad: fill up to full batches, equally many on every rank, with samples that are not valid.
    """

    num_samples: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    pad: bool = False

    @property
    def num_batches(self) -> int:
        return -(-self._per_rank // self.batch_size)

    @property
    def _per_rank(self) -> int:
        first = 0 if self.pad else self.rank
        return max(0, -(-(self.num_samples - first) // self.world_size))

    def slots(self, j: int) -> Ids:
        end = (j + 1) * self.batch_size if self.pad else min((j + 1) * self.batch_size, self._per_rank)
        return np.arange(j * self.batch_size, end) * self.world_size + self.rank

    def ids(self, j: int) -> Ids:
        return np.minimum(self.slots(j), self.num_samples - 1)

    def valid(self, j: int) -> NDArray[np.bool_]:
        return self.slots(j) < self.num_samples

    def turns(self, j: int) -> Ids:
        return np.zeros(len(self.slots(j)), dtype=np.int64)

    def reserve(self, slot: int, attempt: int) -> None:
        return None

    def size(self, j: int) -> Size | None:
        return None


@dataclass(frozen=True)
class BucketPass:
    """`PassPlan` with buckets: one bucket after the other, a batch holds pictures of one; the last of each is short.

    pad: equally many batches of equal lengths on every rank, with samples that are not valid: fewer than there are
    ranks in every bucket.
    """

    assigned: Assignment
    batch_size: int
    rank: int = 0
    world_size: int = 1
    pad: bool = False

    @property
    def num_batches(self) -> int:
        return len(self._batches)

    @cached_property
    def _batches(self) -> list[tuple[int, Ids]]:
        """(bucket, slots) of every batch; a slot beyond the last sample is padding."""
        found = []
        for bucket in range(len(self.assigned)):
            slots = self.assigned.rows(bucket)
            if self.pad:
                padding = -len(slots) % self.world_size
                slots = np.concatenate([slots, len(self.assigned.of) + np.arange(padding)])
            mine = slots[self.rank :: self.world_size]
            found += [(bucket, mine[i : i + self.batch_size]) for i in range(0, len(mine), self.batch_size)]
        return found

    def slots(self, j: int) -> Ids:
        return self._batches[j][1]

    def ids(self, j: int) -> Ids:
        bucket, slots = self._batches[j]
        return np.where(self.valid(j), slots, self.assigned.rows(bucket)[0])

    def valid(self, j: int) -> NDArray[np.bool_]:
        return self.slots(j) < len(self.assigned.of)

    def turns(self, j: int) -> Ids:
        return np.zeros(len(self.slots(j)), dtype=np.int64)

    def reserve(self, slot: int, attempt: int) -> None:
        return None

    def size(self, j: int) -> Size:
        return self.assigned.size(self._batches[j][0])


@dataclass(frozen=True)
class ListPass:
    """The samples `chosen` once, in this order; the slot is the place in it.   bucket: their size, see `Plan.size`."""

    chosen: Ids
    batch_size: int
    bucket: Size | None = None

    @property
    def num_batches(self) -> int:
        return -(-len(self.chosen) // self.batch_size)

    def slots(self, j: int) -> Ids:
        return np.arange(j * self.batch_size, min((j + 1) * self.batch_size, len(self.chosen)))

    def ids(self, j: int) -> Ids:
        return self.chosen[self.slots(j)]

    def valid(self, j: int) -> NDArray[np.bool_]:
        return np.ones(len(self.slots(j)), dtype=bool)

    def turns(self, j: int) -> Ids:
        return np.zeros(len(self.slots(j)), dtype=np.int64)

    def reserve(self, slot: int, attempt: int) -> None:
        return None

    def size(self, j: int) -> Size | None:
        return self.bucket


@dataclass(frozen=True)
class Source:
    """First stage: raw samples of the plan's micro-batches, from `start` on, those of this worker.

    captions: which text a sample gets; None leaves texts out, so that none of them can be bad.
    """

    dataset: Dataset
    plan: Plan
    transform: Transform
    fields: tuple[str, ...] = ("image", "txt")
    start: int = 0
    captions: Captions | None = field(default_factory=Captions)

    def __call__(self) -> Iterator[Raw]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        end = self.plan.num_batches
        for j in count(self.start + first, stride) if end is None else range(self.start + first, end, stride):
            slots, ids, valid = self.plan.slots(j), self.plan.ids(j), self.plan.valid(j)
            size = self.plan.size(j)
            draws, texts = self.transform.draws(torch.from_numpy(slots)), self.text_draws(j, slots)
            for row in range(len(slots)):
                place = {"__slot__": int(slots[row]), "__draw__": draws[row], "__rows__": len(slots)}
                place |= {"__text__": texts[row].tolist(), "__size__": size}
                yield {**self.read(int(ids[row]), skip=not valid[row]), **place}

    def text_draws(self, j: int, slots: Ids) -> Ids:
        """[B, 2]: which caption, and a number that stands for the order of its tags."""
        found = np.zeros((len(slots), 2), dtype=np.int64)
        if self.captions is None:
            return found
        if self.captions.caption_choice == "random":
            found[:, 0] = fold(self.transform.key, Purpose.CAPTION_CHOICE, torch.from_numpy(slots)).numpy()
        elif self.captions.caption_choice == "cycle":
            found[:, 0] = self.plan.turns(j)
        if self.captions.shuffle_caption:
            found[:, 1] = fold(self.transform.key, Purpose.CAPTION_SHUFFLE, torch.from_numpy(slots)).numpy()
        return found

    def read(self, sample_id: int, *, skip: bool = False) -> Raw:
        """Key and bytes of a sample; a failure to read travels as `__bad__`, so that the slot is not lost."""
        raw: Raw = {
            "__key__": self.dataset.keys[sample_id],
            "__url__": self.dataset.shard_name(sample_id),
            "__id__": sample_id,
            "__valid__": not skip,
        }
        if skip:
            return raw
        try:
            return {**raw, **self.dataset.read(sample_id, self.fields)}
        except BadSample as bad:
            return {**raw, "__bad__": bad}


@dataclass(frozen=True)
class Example:
    """A slot filled. pixels: [H, W, 3] uint8, or None with moments.   bad: the attempts that failed before.

    columns: a value for each declared column; empty where not valid.   mirrored: left to right.
    """

    slot: int
    sample_id: int
    key: str
    pixels: NDArray[np.uint8] | None
    caption: str
    valid: bool
    rows: int
    bad: list[Bad] = field(default_factory=list)
    columns: Mapping[str, Any] = field(default_factory=dict)
    mirrored: bool = False


@dataclass(frozen=True)
class Decode:
    """Second stage: bytes to pixels and caption; what is bad is replaced, up to `max_attempts` times.

    moments: then no picture is read, and a sample is bad whose picture could not be encoded.
    columns: as `ldm.data.columns` has it.
    checks: by column, what a value must pass; a sample that fails one is bad, `column_value`.
    """

    source: Source
    max_attempts: int = 1000
    moments: Moments | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    checks: Mapping[str, Sequence[Check]] = field(default_factory=dict)

    def __call__(self, samples: Iterable[Raw]) -> Iterator[Example]:
        for raw in samples:
            yield self.fill(raw)

    def fill(self, raw: Raw) -> Example:
        """An example for the slot of `raw`: the sample itself, its first good replacement, or one that is not valid."""
        bad: list[Bad] = []
        slot, candidate = raw["__slot__"], raw
        while candidate["__valid__"]:
            try:
                return self.decode(candidate, raw, bad)
            except BadSample as error:
                bad.append(Bad(slot, error.kind, candidate["__url__"], candidate["__key__"], error.reason))
            spare = self.source.plan.reserve(slot, len(bad) - 1) if len(bad) <= self.max_attempts else None
            if spare is None:
                break
            candidate = self.source.read(spare)
        width, height = raw["__size__"] or self.source.transform.square
        blank = np.zeros((height, width, 3), dtype=np.uint8) if self.moments is None else None
        shapes = {"picture": (height, width, 3), "mask": (height, width)}
        kinds = {name: kind_of(name, path) for name, path in self.columns.items()}
        columns = {name: np.zeros(shapes[kind], dtype=np.uint8) for name, kind in kinds.items() if kind in shapes}
        return Example(slot, raw["__id__"], raw["__key__"], blank, "", False, raw["__rows__"], bad, columns)

    def decode(self, candidate: Raw, place: Raw, bad: list[Bad]) -> Example:
        if "__bad__" in candidate:
            raise candidate["__bad__"]
        transform = self.source.transform
        pixels = None
        if self.moments is None:
            width, height = self.source.dataset.image_sizes[candidate["__id__"]].tolist()
            at_least = transform.short_side(width, height, place["__size__"])
            image = decode_image(candidate["image"], background=transform.background, at_least=at_least)
            pixels = transform(image, place["__draw__"], place["__size__"])
        elif not self.moments.usable[candidate["__id__"]]:
            raise BadSample("decode", "the picture could not be encoded")
        texts, caption = self.source.captions, ""
        if texts is not None:
            caption = texts(candidate["__key__"], candidate.get("txt"), candidate.get("json"), *place["__text__"])
        columns = self.values(candidate, place)
        slot, rows, mirrored = place["__slot__"], place["__rows__"], transform.mirrors(place["__draw__"])
        return Example(
            slot, candidate["__id__"], candidate["__key__"], pixels, caption, True, rows, bad, columns, mirrored
        )

    def values(self, candidate: Raw, place: Raw) -> dict[str, Any]:
        """The sample's value of every column."""
        width, height = self.source.dataset.image_sizes[candidate["__id__"]].tolist()
        draw, size, transform = place["__draw__"], place["__size__"], self.source.transform
        kinds = {name: kind_of(name, path) for name, path in self.columns.items()}
        fields = {name: path for name, path in self.columns.items() if kinds[name] == "field"}
        found: dict[str, Any] = dict(decode_columns(candidate.get("json"), fields))
        for name, path in self.columns.items():
            if kinds[name] == "size":
                found[name] = transform.sizes(width, height, draw, size)
            elif kinds[name] != "field":
                try:
                    found[name] = self.member(kinds[name], candidate.get(path), (width, height), draw, size)
                except BadSample as bad:
                    raise BadSample(bad.kind, f"{candidate['__key__']}{path}: {bad.reason}"[:300]) from bad
        for name, value in found.items():
            for check in self.checks.get(name, ()):
                try:
                    check(value)
                except LdmError as error:
                    raise BadSample("column_value", f"the field {self.columns[name]!r}: {error.what}"[:200]) from error
        return found

    def member(
        self, kind: str, data: bytes | None, picture: Size, draw: NDArray[np.float32], size: Size | None
    ) -> NDArray[Any]:
        """A "picture" [H, W, 3] or "mask" [H, W] cut like the sample's own, or an "array"."""
        if data is None:
            raise BadSample("column_missing", "there is none that can be used")
        if kind == "array":
            return decode_array(data)
        transform = self.source.transform
        at_least = transform.short_side(*picture, size)
        if kind == "mask":
            image = decode_mask(data, at_least=at_least)
        else:
            image = decode_image(data, background=transform.background, at_least=at_least)
        return transform.further(image, picture, draw, size)


@dataclass(frozen=True)
class Batches:
    """Last stage: as many examples as the plan's micro-batch has, as one `Batch`, and the reports beside it.

    moments: instead of pictures.   columns: their names.
    as_bytes: leave the pictures as `to_bytes` has them, a quarter of the size, for a reader in another process.
    """

    moments: Moments | None = None
    columns: tuple[str, ...] = ()
    as_bytes: bool = False

    def __call__(self, examples: Iterable[Example]) -> Iterator[tuple[Batch | LdmError, list[Bad]]]:
        examples = iter(examples)
        for first in examples:
            rows = [first, *islice(examples, first.rows - 1)]
            try:
                yield self.collate(rows)
            except LdmError as error:  # of damaged moments; see `ldm.data.loader.Stream`
                yield error, []
                return

    def collate(self, rows: list[Example]) -> tuple[Batch, list[Bad]]:
        stand_in = next((row.sample_id for row in rows if row.valid), rows[0].sample_id)  # has the size of the others
        ids = np.array([row.sample_id if row.valid else stand_in for row in rows])
        mirrored = np.array([row.mirrored for row in rows])
        pixels = [row.pixels for row in rows if row.pixels is not None]
        batch = Batch(
            slots=torch.tensor([row.slot for row in rows]),
            keys=[row.key for row in rows],
            images=(to_bytes if self.as_bytes else to_images)(pixels) if self.moments is None else None,
            moments=None if self.moments is None else self.moments.take(ids, mirrored),
            captions=[row.caption for row in rows],
            columns={name: _joined([row.columns.get(name) for row in rows]) for name in self.columns},
            valid=torch.tensor([row.valid for row in rows]),
        )
        return batch, [report for row in rows for report in row.bad]


def _joined(values: list[Any]) -> torch.Tensor | list[Any]:
    """A column's values as one tensor where they are arrays of one shape, zeros for a sample that is not valid.

    Pictures [B, 3, H, W] in [-1, 1], masks [B, 1, H, W] in [0, 1], vectors [B, n] and other arrays of numbers.
    """
    arrays = [value for value in values if isinstance(value, np.ndarray)]
    if not arrays or len({array.shape for array in arrays}) > 1:
        return [torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in values]
    filled = [np.zeros_like(arrays[0]) if value is None else value for value in values]
    if arrays[0].dtype == np.uint8:
        return to_images(filled) if arrays[0].ndim == 3 else to_masks(filled)
    return torch.from_numpy(np.stack(filled))


def stages(
    dataset: Dataset,
    plan: Plan,
    transform: Transform,
    *,
    start: int = 0,
    max_attempts: int = 1000,
    captions: Captions | None = _TEXTS,
    moments: Moments | None = None,
    columns: Mapping[str, str] | None = None,
    checks: Mapping[str, Sequence[Check]] | None = None,
    as_bytes: bool = False,
) -> Any:
    """The pipeline: an iterable of (Batch, reports) for a loader with `batch_size=None`.

    start: first micro-batch.   captions: which text a sample gets; None leaves texts out.
    moments: encoded pictures; then no picture is read.
    columns, checks: see `Decode`.   as_bytes: see `Batches`; `ldm.data.loader.Stream` takes either.
    """
    import webdataset

    webdataset.utils.enforce_security = True
    columns = dict(columns or {})
    members = captions.members if captions else ()
    kinds = {path: kind_of(name, path) for name, path in columns.items()}
    of_json = "field" in kinds.values() or (captions is not None and dataset.json_for(captions))
    fields = ("image",) * (moments is None) + ("txt",) * ("txt" in members) + ("json",) * of_json
    fields += tuple(path for path, kind in kinds.items() if kind in ("picture", "mask", "array"))
    source = Source(dataset, plan, transform, fields, start, captions)
    decode = Decode(source, max_attempts, moments, columns, checks or {})
    return webdataset.DataPipeline(source, decode, Batches(moments, tuple(columns), as_bytes))
