"""Worker processes around a pipeline, and the stream that the training loop iterates over."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from itertools import count
from multiprocessing.context import BaseContext
from typing import Any

import torch
from torch.utils.data import DataLoader

from ldm.data.bad_samples import BadSamples
from ldm.data.pipeline import Plan, Source
from ldm.errors import TEMPORARY, LdmError
from ldm.types import Batch

_PR_SET_PDEATHSIG = 1
_GRACE_S = 30  # for a worker after SIGTERM: the trainer finishes its step and saves, and needs batches until then


class Stream:
    """Batches in the plan's order. Checks their slots, feeds the ledger, and translates the loader's failures."""

    def __init__(
        self,
        pipeline: Any,
        *,
        ledger: BadSamples | None = None,
        num_workers: int = 0,
        timeout_s: float = 300,
        pin_memory: bool = False,
    ) -> None:
        self.source: Source = pipeline.stage(0)
        self.ledger = ledger
        self.loader = DataLoader(
            pipeline,
            batch_size=None,
            num_workers=num_workers,
            timeout=timeout_s if num_workers else 0,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            multiprocessing_context=_context() if num_workers else None,
            worker_init_fn=_start_worker if num_workers else None,
        )
        if self.source.plan.num_batches is not None:
            self.__class__ = _FiniteStream

    def __iter__(self) -> Iterator[Batch]:
        plan, batches = self.source.plan, self._batches()
        for j, (batch, reports) in zip(count(self.source.start), batches, strict=False):
            check_slots(batch, plan, j)
            if self.ledger is not None:
                self.ledger.update(batch.slots.tolist(), reports)
            yield batch

    def _batches(self) -> Iterator[Any]:
        j = self.source.start
        try:
            for item in self.loader:
                yield item
                j += 1
        except RuntimeError as error:
            lost = "exited unexpectedly" in str(error) or "is killed by signal" in str(error)
            if not lost and "timed out" not in str(error):
                raise
            raise self._lost(j, str(error).splitlines()[0], lost) from error

    def _lost(self, j: int, words: str, lost: bool) -> LdmError:
        dataset = self.source.dataset
        ids = self.source.plan.ids(j).tolist()
        shards = ", ".join(sorted({dataset.shard_name(i) for i in ids})[:4])
        free = shutil.disk_usage("/dev/shm").free >> 20 if os.path.isdir("/dev/shm") else 0
        advice = (
            "likely out of memory: set loader.num_workers lower" if lost else "slow disk, or loader.timeout_s too low"
        )
        return LdmError(
            "LOADER",
            words,
            where=f"micro-batch {j}, from {dataset.keys[ids[0]]!r} in {shards}",
            limit=f"{free} MB of shared memory free",
            next=f"{advice}; rerun the same command to resume",
            exit_code=TEMPORARY,
        )


class _FiniteStream(Stream):
    """A stream with a length; an endless one must not have `__len__`, or trainers take it for an epoch."""

    def __len__(self) -> int:
        batches = self.source.plan.num_batches
        assert batches is not None
        return max(0, batches - self.source.start)


def check_slots(batch: Batch, plan: Plan, j: int) -> None:
    """A stage that dropped or reordered samples is an error, never a reordering."""
    expected = plan.slots(j).tolist()
    if batch.slots.tolist() != expected:
        raise LdmError(
            "DATA-ORDER",
            f"micro-batch {j} holds other samples than planned",
            where=f"slots {batch.slots.tolist()[:4]}...",
            limit=f"expected {expected[:4]}...",
            next="a stage between source and batches must return exactly one sample for each it gets",
            exit_code=1,
        )


def _context() -> BaseContext:
    """Workers come from a server process, so that they never inherit the trainer's threads, locks or CUDA context."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ldm.data.loader", "webdataset"])
    return context


def _start_worker(worker_id: int) -> None:
    """Outlive Ctrl-C and a group-wide SIGTERM until the trainer has saved; never outlive the trainer."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
