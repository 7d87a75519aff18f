"""Work in several processes with a bar, in order. Processes that outlive their parent leave by themselves."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from ldm.errors import TEMPORARY, LdmError

Task = TypeVar("Task")
Result = TypeVar("Result")

_PLAIN_INTERVAL_S = 15.0
_state: Any = None


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(
    function: Callable[[Any, Task], Result],
    state: Any,
    tasks: Sequence[Task],
    workers: int,
    done: Callable[[Task], None],
) -> Iterator[Result]:
    """`function(state, task)` for every task, in order; in this process with one worker. done: called after each.

    function: of a module, so that other processes find it.   state: sent once to every process.
    Raises LdmError, `WORKER`, if a process was killed, and whatever `function` raises.
    """
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield function(state, task)
            done(task)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _begin, (function, state))
    try:
        for task, result in zip(tasks, pool.map(_call, tasks), strict=True):
            yield result
            done(task)
    except BrokenProcessPool as error:
        what = "a worker process was killed, often for lack of memory"
        raise LdmError(
            "WORKER", what, next="run the same command again, with fewer workers=", exit_code=TEMPORARY
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(function: Callable[[Any, Any], Any], state: Any) -> None:
    global _state
    _state = function, state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _call(task: Any) -> Any:
    function, state = _state
    return function(state, task)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr if that is a terminal, else a line now and then; gives the function that counts on."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda count: bar.advance(task, count)
        return
    said, done = time.monotonic(), 0

    def advance(count: int) -> None:
        nonlocal said, done
        done += count
        if time.monotonic() - said > _PLAIN_INTERVAL_S:
            said = time.monotonic()
            print(f"{label} {done}/{total}", file=sys.stderr, flush=True)

    yield advance
