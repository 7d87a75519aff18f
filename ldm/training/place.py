"""Where a process stands among those that train together, as its launcher says."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm.errors import LdmError

Config = Mapping[str, Any]

_FIRST_SLURM_PORT, _SLURM_PORTS = 15000, 10000  # below the ports that the kernel hands out


@dataclass(frozen=True)
class Place:
    """Where a process stands among those that train together.

    nodes: how many machines there are, None where only `trainer.nodes` knows.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    nodes: int | None = None

    @classmethod
    def outer(cls) -> Place | None:
        """From torchrun or from a SLURM step of several tasks, when one of them started this process; else None.

        A batch script, or a step of one task, has SLURM's variables too: what counts is how many tasks the step has.
        """
        env = os.environ
        if "RANK" in env and "WORLD_SIZE" in env:
            world_size, local = int(env["WORLD_SIZE"]), int(env.get("LOCAL_WORLD_SIZE", 0))
            return cls(
                int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), world_size, world_size // local if local else None
            )
        if "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            return cls(
                int(env["SLURM_PROCID"]),
                int(env["SLURM_LOCALID"]),
                int(env["SLURM_STEP_NUM_TASKS"]),
                int(env["SLURM_STEP_NUM_NODES"]),
            )
        return None

    def environment(self) -> dict[str, str]:
        """What torch and Lightning read of it; address and port from SLURM where nobody gave them."""
        env = os.environ
        found = {"RANK": str(self.rank), "LOCAL_RANK": str(self.local_rank), "WORLD_SIZE": str(self.world_size)}
        if "MASTER_ADDR" not in env and "SLURM_JOB_ID" in env:
            found["MASTER_ADDR"] = first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1"))
        if "MASTER_PORT" not in env and "SLURM_JOB_ID" in env:  # one of its own for every job and step
            number = int(env["SLURM_JOB_ID"]) + 97 * int(env.get("SLURM_STEP_ID", 0))
            found["MASTER_PORT"] = str(_FIRST_SLURM_PORT + number % _SLURM_PORTS)
        return found

    def nodes_or(self, configured: int) -> int:
        """How many machines there are: the launcher knows it, or `trainer.nodes` says it."""
        if self.nodes is not None and configured not in (1, self.nodes):
            raise LdmError(
                "LAUNCH",
                "the launcher started another number of nodes than the configuration says",
                where="trainer.nodes",
                limit=f"{self.nodes} started, {configured} configured",
                next="leave trainer.nodes out: the launcher's number holds",
            )
        return self.nodes or configured


def first_host(nodes: str) -> str:
    """The first of a SLURM node list: "gpu[007-009,12],login" is gpu007."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0]
