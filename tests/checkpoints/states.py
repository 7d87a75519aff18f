"""Small states, and the one equality of these tests: type by type, bit by bit."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch

FILES = ["config.json", "ema.safetensors", "manifest.json", "model.safetensors", "optim.json", "optim.safetensors"]
FILES += ["state.json"]


def state(step: int, numel: int = 1000) -> dict[str, Any]:
    """Arguments of `Store.save` whose every value tells the step."""
    weights = {"weight": torch.full((numel,), float(step)), "bias": torch.arange(5.0) + step}
    optim = {"state": {0: {"step": step, "exp_avg": torch.full((numel,), step / 2)}}, "betas": (0.9, 0.999)}
    return {
        "tensors": {"model": weights, "ema": {k: v + 0.5 for k, v in weights.items()}},
        "trees": {"optim": optim},
        "documents": {"state": {"train_step": step}, "config": {"class": "ldm.models.unet.UNet", "args": {}}},
    }


def difference(a: Any, b: Any, path: str = "") -> str | None:
    """The first path where two trees differ in type or value, or None."""
    if type(a) is not type(b):
        return f"{path}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
    elif isinstance(a, dict):
        same = list(a) == list(b) and [type(k) for k in a] == [type(k) for k in b]
        if same:
            return next(filter(None, (difference(a[k], b[k], f"{path}.{k}") for k in a)), None)
    elif isinstance(a, list | tuple):
        same = len(a) == len(b)
        if same:
            return next(filter(None, (difference(x, y, f"{path}[{i}]") for i, (x, y) in enumerate(zip(a, b)))), None)
    elif isinstance(a, float) and math.isnan(a):
        same = math.isnan(b)
    else:
        same = a == b and repr(a) == repr(b)  # repr: 0.0 and -0.0 differ
    return None if same else f"{path}: {a!r} and {b!r}"


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def loads_as(checkpoint: Any, step: int, numel: int = 1000) -> None:
    """Assert that the checkpoint is the whole state of this step."""
    saved = state(step, numel)
    for name, tensors in saved["tensors"].items():
        found = checkpoint.tensors(name)
        assert difference({k: found[k] for k in tensors}, tensors) is None
    for name, tree in saved["trees"].items():
        assert difference(checkpoint.tree(name), tree) is None
    for name, document in saved["documents"].items():
        assert checkpoint.document(name) == document


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file below `folder` with its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".tmp-")]
