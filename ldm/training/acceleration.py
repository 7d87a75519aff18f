"""How the networks of a stage compute on this hardware: compiled, and with the channels last in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ldm.errors import LdmError

ENTRIES = 100_000
"""How often torch may compile the code of one class, for each shape and each network of it. Beyond its own limit of 8
the rest would run as it is, and what that is depends on what came first.
"""


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
    """Prepares `networks` in place as `trainer` says; names of parameters and results to rounding stay as they are, but
    dropout inside a network takes other draws, which are as repeatable.

    Each shape is compiled by itself. A kernel for all shapes would depend on which came first, and that is another one
    after a resume.
    """
    for network in networks:
        if node["channels_last"]:
            for parameter in (p for p in network.parameters() if p.ndim == 4):
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        if node["compile"]:
            network.compile(dynamic=False)
    if node["compile"]:
        from torch._dynamo import config as dynamo  # seconds, which a refused command need not wait for

        dynamo.recompile_limit = dynamo.accumulated_recompile_limit = ENTRIES
