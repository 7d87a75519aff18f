"""The processes of a job together: how they meet, what they must agree on, how long they wait, and how they part."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import ClusterEnvironment
from torch.distributed import distributed_c10d

from ldm.errors import TEMPORARY, LdmError
from ldm.training.place import Config, Place
from ldm.training.ranks import gathered
from ldm.training.signals import STOPS

START_TIMEOUT = timedelta(minutes=30)
"""Until the first step: one rank may index, copy or measure while the others wait."""
STEP_TIMEOUT = timedelta(minutes=10)
"""From the first step on, in which all ranks have the same work; the longest wait is for a checkpoint of rank 0."""


class Joined(ClusterEnvironment):
    """Tells Lightning where this process stands, so that it starts, guesses and requeues nothing of its own."""

    def __init__(self, place: Place, nodes: int) -> None:
        super().__init__()
        self.place, self.nodes = place, nodes

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ["MASTER_ADDR"]

    @property
    def main_port(self) -> int:
        return int(os.environ["MASTER_PORT"])

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.place.world_size

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self.place.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self.place.local_rank

    def node_rank(self) -> int:
        return self.place.rank * self.nodes // self.place.world_size


def join_group(node: Config, place: Place) -> None:
    """Under torchrun or SLURM: all processes meet before rank 0 looks at the run folder, so that all begin at one step.

    Raises LdmError: the port is in use, or not all came (exit code 75).
    """
    os.environ.update(place.environment())
    with losses_named():
        dist.init_process_group("nccl" if node["accelerator"] in ("gpu", "cuda") else "gloo", timeout=START_TIMEOUT)
    if dist.get_backend() == "nccl":
        torch.cuda.set_device(place.local_rank)


def tell_decision(decision: str) -> None:
    """From rank 0 to the others under torchrun, and nobody goes on before all know; nothing to tell elsewhere."""
    if _is_joined():
        dist.broadcast_object_list([decision])
        dist.barrier()


def hear_decision() -> str:
    heard: list[Any] = [None]
    dist.broadcast_object_list(heard)
    dist.barrier()
    return heard[0]


def check_agreement(**facts: Mapping[str, Any]) -> None:
    """Refuses to train where the ranks were given different things; every rank takes part.

    facts: by name, what must be the same everywhere, as JSON.
    """
    mine = {
        f"{kind}.{key}": json.dumps(value, sort_keys=True) for kind, of in facts.items() for key, value in of.items()
    }
    everybody = gathered(mine)
    for rank, theirs in enumerate(everybody):
        first = everybody[0]
        if differing := [key for key in sorted(first | theirs) if first.get(key) != theirs.get(key)]:
            key = differing[0]
            raise LdmError(
                "RANKS",
                f"the ranks were started with different settings, data or versions: {', '.join(differing[:8])}",
                where=key,
                limit=f"rank 0: {_short(first.get(key))}, rank {rank}: {_short(theirs.get(key))}",
                next="give every node the same command, code and data",
            )


def _short(text: str | None) -> str:
    return "absent" if text is None else text if len(text) <= 80 else f"{text[:80]}..."


class Timeouts(pl.Callback):
    """Waits long for what comes before the first step and after the last, and less from step to step: at least four
    times as long as the longest pause between two steps, which a checkpoint or a validation makes.
    """

    def __init__(self) -> None:
        self._longest = timedelta(0)
        self._since: float | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        if self._since is None:
            return
        pause = timedelta(seconds=time.monotonic() - self._since)
        if 4 * pause > max(STEP_TIMEOUT, self._longest):
            self._longest = 4 * pause
            set_timeout(self._longest)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        if self._since is None:
            set_timeout(STEP_TIMEOUT)
        self._since = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        set_timeout(START_TIMEOUT)


def set_timeout(timeout: timedelta) -> None:
    """Of all operations that follow in the default group, if there is one."""
    if _is_joined():
        public = getattr(dist, "set_timeout", None)  # torch 2.15; before, it had an underscore
        (public or distributed_c10d._set_pg_timeout)(timeout, None)


@contextmanager
def losses_named() -> Iterator[None]:
    """Words for what torch raises when the group cannot be made, or when another process of it is gone or silent."""
    try:
        yield
    except RuntimeError as error:
        if (found := loss_of(error)) is not None:
            raise found from error
        raise


def loss_of(error: RuntimeError) -> LdmError | None:
    """The words for a failure of the group, None for any other."""
    text = str(error)
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        port = match[1] if (match := re.search(r"port: (\d+)", text)) else os.environ.get("MASTER_PORT", "?")
        return LdmError(
            "LAUNCH",
            f"port {port} of this machine is in use",
            where=f"MASTER_PORT={port}",
            next="end what listens there, or set MASTER_PORT to another one for all ranks",
        )
    if isinstance(error, dist.DistStoreError) or "waiting for clients" in text:
        return LdmError(
            "LAUNCH",
            "not all processes of the job arrived",
            where=f"MASTER_ADDR={os.environ.get('MASTER_ADDR')}, MASTER_PORT={os.environ.get('MASTER_PORT')}",
            limit=text.splitlines()[0][:200],
            next="see that every node runs and reaches that address, and run the same command again",
            exit_code=TEMPORARY,
        )
    if isinstance(error, dist.DistBackendError) or re.search(r"gloo|Connection (closed|reset) by peer|NCCL", text):
        silent = "imed out" in text or "timeout" in text.lower()
        return LdmError(
            "PEER",
            "another process of the job did not answer" if silent else "another process of the job ended",
            limit=re.sub(r"^\[.*?\]\s*", "", text.splitlines()[0])[:200],
            next="read errors/first.txt; run the same command again to continue from the last checkpoint",
            exit_code=TEMPORARY,
        )
    return None


def leave_together(received: int | None) -> int | None:
    """All ranks meet after the last commit, end the group, and leave for the same reason: the signal that any received.

    From here to the end of the process a stop signal changes nothing: a launcher sends one to those who leave last.
    """
    if not _is_joined():
        return received
    number = max(each or 0 for each in gathered(received))
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)
    dist.barrier()  # who leaves first must not close the connection on who still hears
    dist.destroy_process_group()
    return number or None


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()
