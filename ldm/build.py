"""The one guarded construction: a node of a config or of a checkpoint -> an object.

A config node is a mapping with `_target_` (a dotted name) and arguments; `_partial_: true` returns the callable
with its arguments bound. A checkpoint node is `{"class": name, "args": {...}}` and may name model classes of `ldm`
only. The whole tree is checked before anything is constructed. Imports neither hydra nor torch.

Who may extend the set: the command line alone (`trusted_targets=[my_pkg]`), see docs/architecture.md, section 4.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from ldm.errors import LdmError

# Names outside this package that a config may construct. Nothing here takes an arbitrary callable or opens a file.
_OPTIMIZERS = "Adadelta Adagrad Adam Adamax AdamW ASGD NAdam RAdam RMSprop Rprop SGD"
_LR_SCHEDULES = (
    "ConstantLR CosineAnnealingLR CosineAnnealingWarmRestarts ExponentialLR LinearLR MultiStepLR OneCycleLR "
    "PolynomialLR StepLR"
)
_LISTED = frozenset(
    [f"torch.optim.{name}" for name in _OPTIMIZERS.split()]
    + [f"torch.optim.lr_scheduler.{name}" for name in _LR_SCHEDULES.split()]
    + ["pytorch_lightning.callbacks.DeviceStatsMonitor", "pytorch_lightning.callbacks.LearningRateMonitor"]
)
# Rooms and files whose classes and functions a config may name; entry points, importers and this file are not there.
_ROOMS = (
    "ldm.data.",
    "ldm.diffusion.",
    "ldm.distances.",
    "ldm.models.",
    "ldm.reconstruction.",
    "ldm.sampling.tasks.",
    "ldm.training.lr_schedule.",
)
_SAVED_ROOMS = ("ldm.models.", "ldm.diffusion.")


def build(node: Any, *, where: str = "", trusted: tuple[str, ...] = (), **extra: Any) -> Any:
    """Check the whole tree of `node`, then construct it. `extra` are run-time arguments of the top node.

    where: path of the node, for messages.  trusted: further packages, from the command line only.
    Raises LdmError (exit code 2) naming the node and the nearest allowed name; then nothing was constructed.
    """
    check(node, where=where, trusted=trusted)
    return _construct(node, where, extra, trusted)


def check(node: Any, *, where: str = "", trusted: tuple[str, ...] = ()) -> None:
    """Refuse the tree if any `_target_` in it is not allowed. Constructs and imports nothing."""
    for path, child in _walk(node, where):
        if "_target_" in child:
            _check_name(child["_target_"], path, _ROOMS + tuple(f"{p}." for p in trusted), _LISTED)
        for key in child:
            if str(key).startswith("_") and key not in ("_target_", "_partial_"):
                raise LdmError("BUILD", f"{key!r} is not supported", where=path, next="use _target_ and _partial_ only")


def build_saved(
    node: Mapping[str, Any], *, where: str = "config.json", trusted: tuple[str, ...] = (), **extra: Any
) -> Any:
    """Construct a `{"class": ..., "args": {...}}` node of a checkpoint: model classes of `ldm` only.

    trusted: further packages, from the command line only.
    """
    for path, child in _walk(node, where):
        for key in child:
            if str(key).startswith("_"):
                raise LdmError("BUILD", f"{key!r} may not stand in a checkpoint", where=path)
        if "class" in child:
            _check_name(child["class"], path, _SAVED_ROOMS + tuple(f"{p}." for p in trusted), frozenset())
            if set(child) != {"class", "args"} or not isinstance(child["args"], Mapping):
                raise LdmError("BUILD", "a node of a checkpoint has exactly 'class' and 'args'", where=path)
    return _construct_saved(node, where, extra, trusted)


def to_saved(node: Any) -> Any:
    """A built config node in the form that checkpoints hold: `_target_` becomes `{"class", "args"}`, recursively."""
    if isinstance(node, Mapping):
        args = {k: to_saved(v) for k, v in node.items() if k != "_target_"}
        return {"class": node["_target_"], "args": args} if "_target_" in node else args
    if isinstance(node, list | tuple):
        return [to_saved(v) for v in node]
    return node


def with_defaults(node: Mapping[str, Any], trusted: tuple[str, ...] = ()) -> dict[str, Any]:
    """A node of a checkpoint with every argument of its constructor, and so the nodes within it."""

    def filled(value: Any) -> Any:
        if isinstance(value, Mapping):
            if "class" in value:
                return with_defaults(value, trusted)
            return {key: filled(child) for key, child in value.items()}
        return value

    parameters = inspect.signature(resolve(node["class"], trusted=trusted)).parameters.values()
    plain = (str, int, float, tuple, Mapping, type(None))  # not "no default", and no dataclass' factory
    defaults = {p.name: p.default for p in parameters if isinstance(p.default, plain)}
    return {"class": node["class"], "args": filled(json.loads(json.dumps({**defaults, **node["args"]})))}


def resolve(name: str, *, where: str = "", trusted: tuple[str, ...] = ()) -> Callable[..., Any]:
    """The object behind an allowed dotted name; what a module merely imports is not its own and is refused."""
    rooms = _ROOMS + tuple(f"{p}." for p in trusted)
    _check_name(name, where, rooms, _LISTED)
    module_name, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        # A missing third-party package is that package's story, not a wrong name.
        if isinstance(error, ModuleNotFoundError) and not module_name.startswith(str(error.name)):
            raise LdmError(
                "INSTALL", f"{name} needs the package {error.name!r}", where=where, next=f"pip install {error.name}"
            ) from error
        raise LdmError("BUILD", f"there is no {name}", where=where, next=_siblings(module_name, attribute)) from error
    if name in _LISTED:
        return found
    defined = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    if not (inspect.isclass(found) or inspect.isfunction(found)) or not defined.startswith(rooms):
        raise LdmError("BUILD", f"{name} is not a class or function that its module defines", where=where)
    return found


def _siblings(module_name: str, attribute: str) -> str:
    try:
        names = [n for n in dir(importlib.import_module(module_name)) if not n.startswith("_")]
    except ImportError:
        return f"there is no module {module_name}"
    close = get_close_matches(attribute, names, n=2)
    return "did you mean " + " or ".join(f"{module_name}.{c}" for c in close) + "?" if close else ""


def _walk(node: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(node, Mapping):
        yield where or "(root)", node
        for key, value in node.items():
            yield from _walk(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _walk(value, f"{where}[{index}]")


def _check_name(name: Any, where: str, rooms: tuple[str, ...], listed: frozenset[str]) -> None:
    parts = name.split(".") if isinstance(name, str) else []
    plain = len(parts) > 1 and all(p.isidentifier() and not p.startswith("_") for p in parts)
    if plain and (name in listed or name.startswith(rooms)):
        return
    close = get_close_matches(str(name), sorted(listed), n=1)
    allowed = f"nearest allowed name: {close[0]}" if close else "allowed: " + ", ".join(f"{r}*" for r in rooms)
    allowed += "; a package of your own needs trusted_targets=[PACKAGE]"
    raise LdmError("BUILD", f"{name!r} may not be constructed", where=where, next=allowed)


def _construct(node: Any, where: str, extra: Mapping[str, Any], trusted: tuple[str, ...]) -> Any:
    if isinstance(node, list | tuple):
        return [_construct(v, f"{where}[{i}]", {}, trusted) for i, v in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    children = {k: v for k, v in node.items() if k not in ("_target_", "_partial_")}
    values = {k: _construct(v, f"{where}.{k}" if where else str(k), {}, trusted) for k, v in children.items()}
    if "_target_" not in node:
        return values
    target = resolve(node["_target_"], where=where, trusted=trusted)
    return _call(target, {**values, **extra}, where, partial=bool(node.get("_partial_", False)))


def _construct_saved(node: Any, where: str, extra: Mapping[str, Any], trusted: tuple[str, ...]) -> Any:
    if isinstance(node, list | tuple):
        return [_construct_saved(v, f"{where}[{i}]", {}, trusted) for i, v in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    if "class" not in node:
        return {k: _construct_saved(v, f"{where}.{k}", {}, trusted) for k, v in node.items()}
    values = {k: _construct_saved(v, f"{where}.{k}", {}, trusted) for k, v in node["args"].items()}
    return _call(resolve(node["class"], where=where, trusted=trusted), {**values, **extra}, where, partial=False)


def _call(target: Callable[..., Any], arguments: dict[str, Any], where: str, *, partial: bool) -> Any:
    _check_arguments(target, arguments, where, partial)
    if partial:
        return functools.partial(target, **arguments)
    try:
        return target(**arguments)
    except (ValueError, TypeError) as error:  # a constructor's own words about its arguments
        raise LdmError("CONFIG", str(error), where=where or target.__name__) from error


def _check_arguments(target: Callable[..., Any], arguments: Mapping[str, Any], where: str, partial: bool) -> None:
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # built in C: no signature to compare with
        return
    name = getattr(target, "__name__", str(target))
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in arguments:
            if key not in parameters:
                close = get_close_matches(key, list(parameters), n=1)
                hint = f"did you mean {close[0]!r}?" if close else "it takes: " + ", ".join(parameters)
                raise LdmError("CONFIG", f"{name} takes no argument {key!r}", where=f"{where}.{key}", next=hint)
    if not partial:
        missing = [
            k
            for k, p in parameters.items()
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and k not in arguments
        ]
        if missing:
            raise LdmError("CONFIG", f"{name} needs {', '.join(missing)}", where=where)
