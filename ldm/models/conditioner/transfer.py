"""Values from the host to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values`, from the host, on `device`. The host does not wait for what the device still has to do."""
    # From pageable memory a copy waits, from 64 KB on even a non-blocking one. Pinned memory is torch's own, which
    # gives none away before the copies from it are over.
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
