"""Where a process stands among those that train together, and what rank 0 tells the others before training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a process stands among those that train together."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def outer(cls) -> Place | None:
        """From torchrun, when it started this process; under SLURM too, see docs/training.md."""
        env = os.environ
        if "RANK" in env and "WORLD_SIZE" in env:
            return cls(int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"]))
        return None


def join_group(node: Config) -> None:
    """Under torchrun: all processes meet before rank 0 looks at the run folder, so that all begin at one step."""
    dist.init_process_group("nccl" if node["accelerator"] in ("gpu", "cuda") else "gloo")
    if dist.get_backend() == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


def tell_decision(decision: str) -> None:
    """From rank 0 to the others under torchrun; nothing to tell elsewhere."""
    if dist.is_available() and dist.is_initialized() and dist.get_rank() == 0:
        dist.broadcast_object_list([decision])


def hear_decision() -> str:
    heard: list[Any] = [None]
    dist.broadcast_object_list(heard)
    return heard[0]
