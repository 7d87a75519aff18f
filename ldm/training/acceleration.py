"""How the networks of a stage compute on this hardware: compiled, and with the channels last in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ldm.errors import LdmError

MAX_SHAPES = 256
"""How many shapes of batch may be compiled before the rest runs as it is; a plan of buckets has a few dozen."""


def check_compiler(node: Mapping[str, Any]) -> None:
    """node: `trainer`. Raises LdmError if it asks for compiled networks where nothing can compile them."""
    compiler = os.environ.get("CXX", "g++")
    if node["compile"] and shutil.which(compiler) is None:
        raise LdmError(
            "CONFIG",
            f"torch.compile needs a C++ compiler, and there is no {compiler}",
            where="trainer.compile",
            next="install one (Debian: apt install g++), name one with CXX=..., or set trainer.compile=false",
        )


def accelerate(networks: Iterable[nn.Module], node: Mapping[str, Any]) -> None:
    """Prepares `networks` in place as `trainer` says; names of parameters and results to rounding stay as they are.

    Each shape is compiled by itself. A kernel for all shapes would depend on which came first, and that is another one
    after a resume.
    """
    for network in networks:
        if node["channels_last"]:
            network.to(memory_format=torch.channels_last)
        if node["compile"]:
            torch._dynamo.config.recompile_limit = max(MAX_SHAPES, torch._dynamo.config.recompile_limit)
            network.compile(dynamic=False)
