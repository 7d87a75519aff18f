"""Several devices on one machine: one process each, started, watched and stopped by the command itself."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ldm.checkpoints.run import write_error
from ldm.errors import TEMPORARY, UNCLASSIFIED, LdmError
from ldm.training.signals import STOPS, Stopped, not_saved


def local_devices(node: Mapping[str, Any]) -> int:
    """How many devices of this machine the trainer config asks for."""
    devices = node["devices"]
    if devices == "auto":
        return max(1, torch.cuda.device_count()) if node["accelerator"] in ("gpu", "cuda") else 1
    if node["accelerator"] in ("gpu", "cuda") and int(devices) > torch.cuda.device_count():
        raise LdmError(
            "DEVICE",
            "there are fewer GPUs than asked for",
            where="trainer.devices",
            limit=f"{torch.cuda.device_count()} found, {devices} asked for",
            next="trainer=cpu, or fewer trainer.devices",
        )
    return int(devices)


def launch(cfg: Mapping[str, Any], trusted: tuple[str, ...], stage: str, folder: Path) -> None:
    """Trains `stage` in one process a device and waits.

    A signal to this process is passed on; the workers finish their step, save, and report how they ended. A worker
    that dies takes the others with it, and the first error is raised here.
    """
    count = local_devices(cfg["trainer"])
    if int(cfg["trainer"]["nodes"]) != 1:
        raise LdmError("LAUNCH", "several nodes need torchrun", where="trainer.nodes", next="see docs/training.md")
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
    context = mp.get_context("spawn")
    endings = context.SimpleQueue()
    workers = mp.start_processes(
        _worker,
        args=(dict(cfg), trusted, stage, str(folder), count, environment, endings),
        nprocs=count,
        join=False,
        start_method="spawn",
    )
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        for process in workers.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    old = {number: signal.signal(number, forward) for number in STOPS}
    try:
        _wait(workers, endings, received, folder, grace_s=float(cfg["checkpoint"]["grace_s"]))
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _wait(workers: Any, endings: Any, received: list[int], folder: Path, grace_s: float) -> None:
    deadline: float | None = None
    try:
        while not workers.join(timeout=0.2):
            if received and deadline is None:
                deadline = time.monotonic() + grace_s
            if deadline is not None and time.monotonic() > deadline and endings.empty():
                for process in workers.processes:
                    process.kill()
                raise LdmError(
                    "GRACE",
                    "the workers did not save in time and were ended",
                    where="checkpoint.grace_s",
                    limit=f"{grace_s:g} s",
                    next="run the same command again: it continues from the last checkpoint",
                    exit_code=TEMPORARY,
                )
    except mp.ProcessRaisedException as error:
        write_error(folder, error.error_index, error.msg)
        raise _first_error(endings) or LdmError(
            "UNCLASSIFIED",
            error.msg.strip().splitlines()[-1][:500],
            where=f"rank {error.error_index}",
            next=f"read {folder / 'errors'}",
            exit_code=UNCLASSIFIED,
        ) from error
    except mp.ProcessExitedException as error:
        if received:
            raise _first_error(endings) or not_saved(received[0]) from error
        raise _first_error(endings) or LdmError(
            "WORKER",
            f"worker {error.error_index} died: {error.signal_name or f'exit code {error.exit_code}'}",
            next="often memory ran out; run the same command again to continue from the last checkpoint",
            exit_code=TEMPORARY,
        ) from error
    stopped = _first_error(endings)
    if stopped is not None:
        raise stopped


def _worker(
    local_rank: int,
    cfg: dict[str, Any],
    trusted: tuple[str, ...],
    stage: str,
    folder: str,
    world_size: int,
    environment: dict[str, str],
    endings: Any,
) -> None:
    from ldm.training.place import Place
    from ldm.training.run_stage import run_stage

    die_with_parent()
    os.setpgid(0, 0)  # a Ctrl-C in the terminal reaches the parent alone, which passes it on once
    os.environ.update(environment, LOCAL_RANK=str(local_rank), NODE_RANK="0")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    for number in STOPS:  # until training has begun, a stop waits for nothing
        signal.signal(number, signal.SIG_DFL)
    try:
        run_stage(cfg, trusted, stage, Path(folder), Place(local_rank, local_rank, world_size))
    except Stopped as stopped:  # saved: a normal end, which must not make anyone kill the others
        endings.put(stopped)
        _leave_group()
    except LdmError as error:
        endings.put(error)
        raise
    else:
        _leave_group()


def _leave_group() -> None:
    """An interpreter that exits under the group's running threads may abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _first_error(endings: Any) -> LdmError | None:
    return None if endings.empty() else endings.get()


def die_with_parent() -> None:
    """On Linux the kernel ends a worker whose parent was killed."""
    try:
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        pass


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
