"""Worker processes around a pipeline, and the stream that the training loop iterates over."""

from __future__ import annotations

import ctypes
import errno
import logging
import math
import os
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ldm.data.bad_samples import BadSamples
from ldm.data.pipeline import Plan, Source
from ldm.data.transforms import to_images
from ldm.errors import TEMPORARY, LdmError
from ldm.types import Batch

log = logging.getLogger(__name__)

# Forked workers share the index and the moments, and start at once. They are single-threaded and never touch CUDA.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
_PR_SET_PDEATHSIG = 1
LITTLE_MB = 8
MORE_SHARED = "lower loader.num_workers, or give the container more (docker run --shm-size)"
PREFETCH = 2
"""Batches that each worker keeps ready."""
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
        start_method: str = START_METHOD,
    ) -> None:
        self.source: Source = pipeline.stage(0)
        self.ledger, self.pin_memory = ledger, pin_memory
        self.loader = DataLoader(
            pipeline,
            batch_size=None,
            num_workers=num_workers,
            timeout=timeout_s if num_workers else 0,
            persistent_workers=num_workers > 0,
            prefetch_factor=PREFETCH if num_workers else None,
            multiprocessing_context=start_method if num_workers else None,
            worker_init_fn=_start_worker if num_workers else None,
        )
        self._end_workers = weakref.finalize(self, _end_workers, self.loader)

    def __iter__(self) -> Iterator[Batch]:
        plan, batches = self.source.plan, self._batches()
        for j, (batch, reports) in zip(count(self.source.start), batches, strict=False):
            if isinstance(batch, LdmError):  # of a worker: raised there, it would lose its words
                raise batch
            check_slots(batch, plan, j)
            if self.ledger is not None:
                self.ledger.update(batch.slots.tolist(), reports)
            if batch.images is not None and batch.images.dtype == torch.uint8:
                batch = replace(batch, images=to_images(batch.images))
            yield batch.pin_memory() if self.pin_memory else batch

    def close(self) -> None:
        """End the worker processes now. Otherwise they end with the stream, or before the interpreter exits."""
        self._end_workers()

    def _batches(self) -> Iterator[Any]:
        self._position = self.source.start
        try:
            items = iter(self.loader)
            if self.loader.num_workers:
                self._translate_child_signals()
            for item in items:
                yield item
                self._position += 1
        except (RuntimeError, OSError) as error:
            full = isinstance(error, OSError) and error.errno == errno.ENOSPC and self.loader.num_workers
            if not full and "exited unexpectedly" not in str(error) and "timed out" not in str(error):
                raise
            raise self._lost(error) from error

    def _translate_child_signals(self) -> None:
        """A killed worker ends the run with our words, once, wherever the main thread is.

        torch's handler of SIGCHLD notices the death at once, raises a bare RuntimeError in whatever code runs, and
        does so again at every later child's end.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        handler = signal.getsignal(signal.SIGCHLD)
        torchs: Any = getattr(handler, "torchs", handler)
        if not callable(torchs):
            return
        told, stream = False, weakref.ref(self)

        def on_child(number: int, frame: Any) -> None:
            nonlocal told
            try:
                torchs(number, frame)
            except RuntimeError as error:
                owner = stream()
                if owner is not None and not told:
                    told = True
                    raise owner._lost(error) from None

        on_child.torchs = torchs  # type: ignore[attr-defined]
        signal.signal(signal.SIGCHLD, on_child)

    def _lost(self, error: Exception) -> LdmError:
        dataset, ids = self.source.dataset, self.source.plan.ids(self._position).tolist()
        shards = ", ".join(sorted({dataset.shard_name(i) for i in ids})[:4])
        workers = [process.pid for process in getattr(self.loader._iterator, "_workers", [])]
        slow = "timed out" in str(error)
        cause = "slow disk, or loader.timeout_s too low" if slow else "likely out of memory: lower loader.num_workers"
        if _shared_mb() < LITTLE_MB:  # then a worker dies, or its batch is lost on the way
            cause = f"no shared memory is left: {MORE_SHARED}"
        return LdmError(
            "LOADER",
            str(error).splitlines()[0],
            where=f"micro-batch {self._position}, from {dataset.keys[ids[0]]!r} in {shards}",
            limit=_memory_in_words(workers),
            next=f"{cause}; rerun the same command to resume",
            exit_code=TEMPORARY,
        )


def _memory_in_words(workers: list[int]) -> str:
    """What a person needs to tell whether memory ran out: what is used here, and what is free."""
    said = [f"{_shared_mb()} MB of shared memory free"] if os.path.isdir("/dev/shm") else []
    with suppress(OSError, KeyError):  # Linux only
        table = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        said.append(f"{int(table['MemAvailable'].split()[0]) >> 10} MB of memory")
        said.append(f"{_resident_mb(os.getpid())} MB used by the trainer")
        said.append(f"up to {max(map(_resident_mb, workers), default=0)} MB by each worker that is left")
    return ", ".join(said)


def _shared_mb() -> float:
    """Free; without end where there is no such place."""
    return shutil.disk_usage("/dev/shm").free >> 20 if os.path.isdir("/dev/shm") else math.inf


def _resident_mb(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):  # it is gone
        return 0
    return pages * os.sysconf("SC_PAGESIZE") >> 20


def warn_of_shared_memory(num_workers: int, batch_bytes: int) -> None:
    """Says so where the batches that wait in shared memory may not fit: a worker would die of it, or lose one."""
    if not os.path.isdir("/dev/shm"):
        return
    needed, free = num_workers * PREFETCH * batch_bytes, shutil.disk_usage("/dev/shm").free
    if needed > free:
        log.warning(
            "%d workers keep up to %d MB of pictures in shared memory, and %d MB are free: %s",
            *(num_workers, needed >> 20, free >> 20, MORE_SHARED),
        )


class FiniteStream(Stream):
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


def _end_workers(loader: DataLoader) -> None:
    if loader._iterator is not None:  # exists for persistent workers only
        loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
        loader._iterator = None


def _start_worker(worker_id: int) -> None:
    """Outlive Ctrl-C and a group-wide SIGTERM until the trainer has saved; never outlive the trainer."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
