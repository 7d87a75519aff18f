"""Where a number first ceased to be finite: the step is computed again in float32 and looked at module by module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.random import Draws, seed_modules
from ldm.training.ranks import alone
from ldm.types import Batch

if TYPE_CHECKING:
    from ldm.training.stage_module import StageModule

NAMED = 5
OUTSIDE = "loss"  # what is computed outside of every module


@dataclass(frozen=True)
class Origin:
    """module: its name, or "loss" for what is outside of all; "batch.images" and the like for what came from the data.

    where: "input", "weights", "forward", "backward"; or why nothing was found.
    """

    module: str | None
    where: str


NOT_FOUND = Origin(None, "none in float32")
NO_MEMORY = Origin(None, "unknown: float32 needs more memory than there is")


def origin_of_step(module: StageModule, batches: Sequence[Batch]) -> Origin:
    """Of the step that was just skipped, as far as this rank's micro-batches show it.

    It has the same weights, draws and module dropout as that step, but no autocast, no loss scale and no collective, so
    ranks need not take part together. Weights, gradients, buffers, random state and counters are left as they were. A
    few extra passes over the model: for a step that is an exception.
    """
    step, root = module.step, module.observed()
    now, position = step.counters, step.counters.train_step - 1
    device = module.device
    with ExitStack() as surroundings:
        surroundings.enter_context(alone())
        surroundings.enter_context(unchanged(root, device))
        surroundings.enter_context(torch.autocast(device.type, enabled=False))
        surroundings.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code would not call the hooks
        try:
            for micro, batch in enumerate(batches):
                step.counters, step.micro = replace(now, train_step=position), micro
                seed_modules(module.key, position, micro, module.global_rank)
                draws = Draws(module.key, batch.slots.to(device), host=batch.slots)
                found = find_origin(root, _inputs(batch), lambda b=batch, d=draws: module.loss(b, d)["loss"].mean())  # type: ignore[misc]
                if found is not None:
                    return found
        except torch.OutOfMemoryError:
            return NO_MEMORY
        except RuntimeError as error:  # what computes in half precision only, or has no memory on the CPU
            return Origin(None, f"unknown: in float32 it does not run ({type(error).__name__})")
        finally:
            step.counters, step.micro = now, 0
    return NOT_FOUND


def find_origin(root: nn.Module, inputs: Mapping[str, Tensor], loss: Callable[[], Tensor]) -> Origin | None:
    """The first thing that is not finite in `loss()` [()] and its gradients; None if they are finite.

    In the order of computation: weights, inputs, what each module gives out; then, from the loss back, the gradient
    that each module hands on, and those of its weights. A module stands for its own operations, not for its children's.
    Gradients are computed beside `.grad`, and without the hooks of accumulation, which those of DDP are.
    """
    trace = _Trace(root)
    parameters = dict(root.named_parameters())
    for name, parameter in parameters.items():
        trace.look(name, "weights", parameter)
    for name, value in inputs.items():
        trace.look(name, "input", value)
    with trace.hooks():
        value = loss()
    trace.look(OUTSIDE, "forward", value)
    if not torch.isfinite(value):
        return trace.first()
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    gradients = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
    present = {name: g for name, g in zip(trained, gradients, strict=True) if g is not None}
    if torch.isfinite(torch.nn.utils.get_total_norm(present.values())):
        return None
    for name, gradient in present.items():
        trace.look(_owner(name), "backward", gradient)
    # finite gradients whose squares are not
    largest = max(present, key=lambda name: float(present[name].abs().max()))
    return trace.first() or Origin(_owner(largest), "backward")


class _Trace:
    """What was looked at, in order; nothing is read from the device before `first`."""

    def __init__(self, root: nn.Module) -> None:
        self.names = {module: name for name, module in root.named_modules() if name}
        self.looks: list[tuple[Origin, Tensor]] = []
        self.running: list[str] = []

    def look(self, name: str, where: str, value: Tensor) -> None:
        if value.is_floating_point():
            self.looks.append((Origin(name, where), torch.isfinite(value.detach()).all()))

    def first(self) -> Origin | None:
        flags = torch.stack([flag.to(self.looks[-1][1].device) for _, flag in self.looks]).tolist()
        return next((origin for (origin, _), finite in zip(self.looks, flags, strict=True) if not finite), None)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        for module, name in self.names.items():
            handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._after(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            caller = self._caller()
            self.running.append(name)

            def use(x: Tensor) -> Tensor:  # what needs no gradient is data, or a mask, which may well be infinite
                return self._handed(x, caller, name) if x.requires_grad else x

            return _mapped(args, use), {key: _mapped(value, use) for key, value in kwargs.items()}

        return hook

    def _after(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            self.running.pop()
            caller = self._caller()
            return _mapped(output, lambda x: self._handed(x, name, caller))

        return hook

    def _handed(self, x: Tensor, maker: str, user: str) -> Tensor:
        """From `maker` to `user`: as a view of its own, whose gradient is from this user and no other."""
        self.look(maker, "forward", x)
        if not x.requires_grad:
            return x
        view = x.view_as(x)
        view.register_hook(lambda gradient: self.look(user, "backward", gradient))
        return view

    def _caller(self) -> str:
        return self.running[-1] if self.running else OUTSIDE


@contextmanager
def unchanged(root: nn.Module, device: torch.device) -> Iterator[None]:
    """After the block the buffers of `root` and the global random generators are what they were before it."""
    kept = [(m, key, b, b.clone()) for m in root.modules() for key, b in m._buffers.items() if b is not None]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for owner, key, buffer, value in kept:
                with torch.no_grad():
                    buffer.copy_(value)
                owner._buffers[key] = buffer


def in_words(row: Mapping[str, Any]) -> str:
    """Of a record of nonfinite.jsonl: where it began, and with which samples."""
    origin = row["where"] if row["module"] is None else f"first in {row['module']} ({row['where']})"
    keys = [sample["key"] for sample in row["samples"] if not math.isfinite(sample["loss"])]
    return origin + (f", pictures {', '.join(keys[:NAMED])}" if keys else "")


def _inputs(batch: Batch) -> dict[str, Tensor]:
    named = {"batch.images": batch.images, "batch.moments": batch.moments}
    named |= {f"batch.columns.{name}": value for name, value in batch.columns.items()}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter


def _mapped(value: Any, use: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `use` of each tensor in it. What its receiver may change in place stays as it is."""
    if isinstance(value, Tensor):
        return use(value)
    if type(value) is tuple:
        return tuple(_mapped(each, use) for each in value)
    if isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            _mapped(each, use)
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _mapped(getattr(value, f.name), use) for f in fields(value) if f.init})
    return value
