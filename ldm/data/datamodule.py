"""The LightningDataModule around the pipeline: settings of the `data` group in, streams of batches out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from PIL import ImageColor

from ldm.data.bad_samples import Bad, BadSamples
from ldm.data.buckets import Assignment, BucketOrder, in_words, read_settings, report
from ldm.data.captions import Captions
from ldm.data.columns import checked
from ldm.data.loader import FiniteStream, Stream, warn_of_shared_memory
from ldm.data.moments import Moments
from ldm.data.order import Ids, Order, check_cut
from ldm.data.pipeline import BucketPass, ListPass, PassPlan, Plan, TrainPlan, stages
from ldm.data.remote import Remote
from ldm.data.shards import Dataset
from ldm.data.splits import open_splits, problems_of
from ldm.data.transforms import Transform
from ldm.errors import LdmError
from ldm.random import run_key
from ldm.types import Check


class DataModule(pl.LightningDataModule):
    """Captioned pictures from shards or a folder.

    path, val_path, repeats, weights: see `ldm.data.shards.open_dataset`. Without val_path, validation uses the
    `val-*.tar` of the folders, else the share `val_fraction` of the samples by the hash of their keys; at most
    `max_val_samples`.
    max_train_samples: train on so many samples only, chosen by the hash of their keys; None = all.
    image_size, crop, flip_prob, upscale, background: see `ldm.data.transforms.Transform`.
    bucket: aspect-ratio buckets, off without `enable_bucket: true`; see `ldm.data.buckets.Buckets`.
    lanes, window_mb, remainder: see `ldm.data.order.Order`.
    max_bad_fraction, max_consecutive_bad, strict: the budget, see `ldm.data.bad_samples.BadSamples`.
    on_missing_caption: "skip", "empty" or "error".   on_truncated: "refuse" or "use".
    caption, caption_lines, caption_choice, shuffle_caption, keep_tokens, caption_separator, caption_prefix,
        caption_suffix: see `ldm.data.captions.Captions`.   index_dir: where indexes are kept.
    cache: a folder that `python -m ldm cache` wrote, for the diffusion stage: see `ldm.data.cache`.
    remote: fetches shards at http(s) URLs, see `ldm.data.remote.Remote`; None = there are none.
    columns: further values of a sample by name: fields of its JSON, other pictures, masks or arrays, see
        `ldm.data.columns`. A sample without one is bad.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        val_path: str | Sequence[str] | None = None,
        repeats: float | Sequence[float] | None = None,
        weights: Sequence[float] | None = None,
        image_size: int = 64,
        crop: str = "center",
        flip_prob: float = 0.0,
        upscale: bool = True,
        background: str = "white",
        bucket: Mapping[str, Any] | None = None,
        lanes: int | None = None,
        window_mb: float = 256,
        remainder: str = "carry",
        max_bad_fraction: float = 0.01,
        max_consecutive_bad: int = 1000,
        strict: bool = False,
        caption: str = "auto",
        caption_lines: bool = False,
        caption_choice: str = "first",
        shuffle_caption: bool = False,
        keep_tokens: int = 0,
        caption_separator: str = ",",
        on_missing_caption: str = "skip",
        on_truncated: str = "refuse",
        caption_prefix: str = "",
        caption_suffix: str = "",
        val_fraction: float = 0.0,
        max_val_samples: int = 512,
        max_train_samples: int | None = None,
        index_dir: str | None = None,
        columns: Mapping[str, str] | None = None,
        remote: Remote | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        self.transform = Transform(image_size, crop, flip_prob, upscale, _colour(background))
        self.buckets = read_settings(bucket, image_size)
        self.lanes, self.window_mb, self.remainder = lanes, window_mb, remainder
        self.max_bad_fraction, self.max_consecutive_bad, self.strict = max_bad_fraction, max_consecutive_bad, strict
        self.captions = Captions(
            caption,
            caption_lines,
            caption_choice,
            shuffle_caption,
            keep_tokens,
            caption_separator,
            caption_prefix,
            caption_suffix,
            on_missing_caption,
        )
        self.columns = checked(columns or {})
        self.cache = cache
        self._opening: dict[str, Any] = {
            "path": path,
            "val_path": val_path,
            "val_fraction": val_fraction,
            "max_val_samples": max_val_samples,
            "max_train_samples": max_train_samples,
            "max_bad_fraction": max_bad_fraction,
            "strict": strict,
            "index_dir": index_dir,
            "remote": remote,
            "caption": caption,
            "repeats": repeats,
            "weights": weights,
            "on_missing_caption": on_missing_caption,
            "on_truncated": on_truncated,
            "columns": self.columns,
        }
        self._sets: dict[str, Dataset | None] = {}
        self._assigned: dict[str, Assignment] = {}
        self._moments: dict[str, Moments] = {}
        self._checks: Mapping[str, Sequence[Check]] = {}
        self._run: dict[str, Any] = {}

    # ---- what there is -----------------------------------------------------------------------------------------

    def open(self) -> DataModule:
        """Index both splits, once. Raises LdmError if shards cannot be used or too many samples are bad."""
        if not self._sets:
            self._sets = dict(zip(("train", "val"), open_splits(**self._opening), strict=True))
        return self

    def dataset(self, split: str) -> Dataset:
        """Split "train" or "val". Raises LdmError where there is no validation data."""
        found = self.open()._sets[split]
        if found is None:
            raise LdmError(
                "DATA", "there is no validation data", where="data", next="set data.val_path or val_fraction"
            )
        return found

    @property
    def num_train(self) -> int:
        return self.dataset("train").num_samples

    @property
    def num_val(self) -> int:
        val = self.open()._sets["val"]
        return val.num_samples if val is not None else 0

    def assigned(self, split: str) -> Assignment | None:
        """The split's samples by bucket, None without buckets."""
        if self.buckets is None:
            return None
        if split not in self._assigned:
            self._assigned[split] = self.buckets.assign(self.dataset(split).image_sizes)
        return self._assigned[split]

    def target_sizes(self, split: str) -> Ids:
        """[N, 2] width and height in pixels that the split's pictures are brought to."""
        assigned = self.assigned(split)
        if assigned is not None:
            return assigned.sizes[assigned.of]
        return np.broadcast_to(np.array(self.transform.square), (self.dataset(split).num_samples, 2))

    def bucket_report(self) -> str | None:
        """One line about the buckets of the training set, None without buckets."""
        order = self._configured()["order"]
        if not isinstance(order, BucketOrder):
            return None
        train = self.dataset("train")
        return in_words(report(order.assigned, train.image_sizes), order, self.transform.crop)

    @property
    def problems(self) -> Counter[str]:
        """What the index left out of both splits or remarked on, by kind."""
        return problems_of(found for found in self.open()._sets.values() if found is not None)

    @property
    def manifest(self) -> list[tuple[str, str]]:
        """(name, sha256) of every shard of both splits."""
        found = [dataset for dataset in self.open()._sets.values() if dataset is not None]
        return list(dict.fromkeys(row for dataset in found for row in dataset.manifest))

    @property
    def manifest_hash(self) -> str:
        return hashlib.sha256(repr(self.manifest).encode()).hexdigest()

    @property
    def order_fingerprint(self) -> dict[str, Any]:
        """All that the order of samples depends on, apart from seed and batch size."""
        lanes = self._run["order"].lanes if self._run else self.lanes
        repeats = self.dataset("train").repeats
        uses = {} if (repeats == 1).all() else {"uses": hashlib.sha256(repeats.tobytes()).hexdigest()}
        return {
            "lanes": lanes,
            "window_mb": self.window_mb,
            "remainder": self.remainder,
            "num_train": self.num_train,
            "manifest": self.manifest_hash,
            **uses,
        }

    # ---- streams -----------------------------------------------------------------------------------------------

    def configure(
        self,
        *,
        seed: int,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        ranks_here: int = 1,
        start_step: int = 0,
        num_workers: int = 0,
        timeout_s: float = 300,
        pin_memory: bool = False,
        bad_samples_file: str | Path | None = None,
    ) -> DataModule:
        """Fix this process's part of the run.

        batch_size: global, per optimizer step.   ranks_here: on this machine, whose memory they share.
        """
        check_cut(batch_size, world_size, accumulate)
        train = self.dataset("train")

        def order_of(part: Dataset, lanes: int | None, window_mb: float) -> Order:
            return Order(
                part.shard_lengths,
                part.sizes,
                seed=seed,
                batch_size=batch_size,
                lanes=lanes,
                window_mb=window_mb,
                remainder=self.remainder,
                repeats=part.repeats,
            )

        base, assigned = order_of(train, self.lanes, self.window_mb), self.assigned("train")
        order: Order | BucketOrder = base
        if assigned is not None:

            def part(rows: Ids, lanes: int, window_mb: float) -> Order:
                return order_of(train.take(rows), lanes, window_mb)

            order = BucketOrder(base, assigned, part, uses=train.repeats, sizes=train.sizes, window_mb=self.window_mb)
        self.ledger = BadSamples(
            max_fraction=self.max_bad_fraction,
            max_consecutive=self.max_consecutive_bad,
            num_samples=order.num_samples,
            rank=rank,
            world_size=world_size,
            file=bad_samples_file,
            strict=self.strict,
        )
        for found in self._sets.values():
            for problem in found.examples if found is not None and rank == 0 else ():
                self.ledger.write(Bad(-1, *problem))  # each once, of two parts of one set too
        self._run = {
            "order": order,
            "plan": TrainPlan(order, rank, world_size, accumulate),
            "start": start_step * accumulate,
            "key": run_key(seed),
            "ranks": {"rank": rank, "world_size": world_size},
            "ranks_here": ranks_here,
            "loading": {"num_workers": num_workers, "timeout_s": timeout_s, "pin_memory": pin_memory},
        }
        return self

    def use_moments(self, train: Moments, val: Moments | None = None) -> None:
        """Stream encoded pictures instead of pixels: the streams then read captions only."""
        self._moments = {"train": train} if val is None else {"train": train, "val": val}
        for split, moments in self._moments.items():
            found, expected = len(moments.usable), self.dataset(split).num_samples
            if found != expected:
                raise ValueError(f"{found} moments for {expected} samples of {split}")

    def check_columns(self, checks: Mapping[str, Sequence[Check]]) -> None:
        """What the model demands of each column's values. A sample that fails is bad, of the kind `column_value`."""
        self._checks = checks

    def train_dataloader(self) -> Stream:
        """Endless, from the configured step on, under the budget."""
        run = self._configured()
        transform = Transform(**{**vars(self.transform), "key": run["key"]})
        plan = run["plan"]
        if (workers := run["loading"]["num_workers"]) and "train" not in self._moments:
            pixels = int(self.target_sizes("train").prod(axis=1).max())
            warn_of_shared_memory(run["ranks_here"] * workers, len(plan.slots(0)) * 3 * pixels)
        if isinstance(plan.order, BucketOrder) and "train" in self._moments:
            plan = replace(plan, order=plan.order.of_encoded(self._moments["train"].usable))
        return self._stream("train", plan, transform, start=run["start"], ledger=self.ledger)

    def val_dataloader(self, batch_size: int = 16) -> Stream | list[Any]:
        """Every validation sample once, in order, `batch_size` per rank; equally many batches on every rank. With
        buckets one bucket after the other, and fewer in the last batch of each.

        Padding and bad samples are not valid. Without validation data: an empty list.
        """
        if not self.num_val:
            return []
        plan = self._pass("val", batch_size, **self._configured()["ranks"], pad=True)
        return self._stream("val", plan, self.transform.without_chance())

    def encode_dataloader(
        self, split: str, batch_size: int, *, sharded: bool = False, chosen: Ids | None = None
    ) -> Stream:
        """Every picture of a split once, without augmentation, in id order, with buckets one bucket after the other;
        what cannot be decoded is not valid.

        No text is read: one that is bad does not keep its picture from being encoded.
        sharded: rank r takes r, r + R, ...; the last batch may be short.
        chosen: these samples alone, with buckets of one of them, in their order; slots count them.
        """
        if chosen is not None:
            assigned = self.assigned(split)
            bucket = None if assigned is None else assigned.size(int(assigned.of[chosen[0]]))
            plan: Plan = ListPass(chosen, batch_size, bucket)
            return self._stream(split, plan, self.transform.without_chance(), use_moments=False)
        ranks = self._configured()["ranks"] if sharded else {}
        plan = self._pass(split, batch_size, **ranks)
        return self._stream(split, plan, self.transform.without_chance(), use_moments=False)

    def _pass(self, split: str, batch_size: int, **ranks: Any) -> Plan:
        assigned = self.assigned(split)
        if assigned is not None:
            return BucketPass(assigned, batch_size, **ranks)
        return PassPlan(self.dataset(split).num_samples, batch_size, **ranks)

    def _stream(
        self,
        split: str,
        plan: Plan,
        transform: Transform,
        *,
        start: int = 0,
        ledger: BadSamples | None = None,
        use_moments: bool = True,
    ) -> Stream:
        captions = self.captions if plan.num_batches is None else self.captions.without_chance()
        pipeline = stages(
            self.dataset(split),
            plan,
            transform,
            start=start,
            max_attempts=0 if self.strict else self.max_consecutive_bad,
            captions=captions if use_moments else None,
            moments=self._moments.get(split) if use_moments else None,
            columns=self.columns if use_moments else None,
            checks=self._checks,
            as_bytes=True,
        )
        kind = Stream if plan.num_batches is None else FiniteStream
        return kind(pipeline, ledger=ledger, **self._configured()["loading"])

    def _configured(self) -> dict[str, Any]:
        if not self._run:
            raise RuntimeError("call configure() before asking for a stream")
        return self._run


def _colour(name: str) -> tuple[int, int, int]:
    try:
        red, green, blue = ImageColor.getrgb(name)[:3]
    except ValueError as error:
        raise LdmError("CONFIG", f"unknown colour {name!r}", where="data.background", next="white, #rrggbb") from error
    return red, green, blue
