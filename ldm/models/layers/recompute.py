"""Gradient checkpointing: less memory for one more forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(wanted: bool, layer: nn.Module, *inputs: Any) -> Tensor:
    """`layer(*inputs)`; if wanted, its intermediate results are computed again in backward instead of kept.

    Gradients and module dropout are the same either way. Source: Chen et al. 2016, arXiv:1604.06174.
    """
    if wanted and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)
