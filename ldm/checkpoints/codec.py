"""Any state tree <-> named tensors and a JSON skeleton, restored equal type by type. No pickle.

JSON has no integer keys, tuples or non-finite floats; these, and the places of tensors, become objects with the
key "$". Tensors that are one object in memory (tied weights) are stored once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ldm.errors import LdmError

if TYPE_CHECKING:
    from torch import Tensor

_TAG = "$"


def split(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors of `tree`, named by their paths, and the JSON skeleton that `join` needs to put them back.

    tree: dicts with string or integer keys, lists, tuples, tensors, None, bool, int, float, str, nested.
    A parameter comes back as a plain tensor, every tensor in row-major order.
    Raises LdmError with the path of anything else.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[tuple, str] = {}

    def encode(node: Any, path: str) -> Any:
        import torch

        if node is None or type(node) in (bool, int, str):
            return node
        if type(node) is float:
            return node if math.isfinite(node) else {_TAG: "float", "value": str(node)}
        if type(node) in (torch.Tensor, torch.nn.Parameter):
            place = memory_of(node)
            if place not in names:
                names[place] = _unused(path or "tensor", tensors)
                tensors[names[place]] = node.detach()
            return {_TAG: "tensor", "name": names[place]}
        if type(node) in (list, tuple):
            items = [encode(child, _child(path, i)) for i, child in enumerate(node)]
            return items if type(node) is list else {_TAG: "tuple", "items": items}
        if type(node) is dict:
            for key in node:
                if type(key) not in (str, int):
                    raise _unsupported(key, _child(path, key), "key")
            pairs = [[key, encode(child, _child(path, key))] for key, child in node.items()]
            plain = _TAG not in node and all(type(key) is str for key in node)
            return dict(pairs) if plain else {_TAG: "dict", "items": pairs}
        raise _unsupported(node, path, "value")

    return tensors, encode(tree, "")


def join(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """The tree that `split` took apart. Raises LdmError when the skeleton names no tensor, or an unknown tag."""
    if isinstance(skeleton, list):
        return [join(tensors, child) for child in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    if _TAG not in skeleton:
        return {key: join(tensors, child) for key, child in skeleton.items()}
    match skeleton:
        case {"$": "tensor", "name": str(name)} if name in tensors:
            return tensors[name]
        case {"$": "tuple", "items": list(items)}:
            return tuple(join(tensors, child) for child in items)
        case {"$": "dict", "items": list(pairs)}:
            return {key: join(tensors, child) for key, child in pairs}
        case {"$": "float", "value": "nan" | "inf" | "-inf" as text}:
            return float(text)
    raise LdmError("CKPT-INVALID", f"a saved tree holds {str(skeleton)[:80]!r}, which is not of this format")


def unalias(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, under its first name, and the further names: {"head.weight": "embed.weight"}."""
    first: dict[tuple, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        original = first.setdefault(memory_of(tensor), name)
        if original != name:
            aliases[name] = original
    return {name: tensors[name] for name in first.values()}, aliases


def memory_of(tensor: Tensor) -> tuple:
    """Equal for two tensors that show the same memory in the same way. Views of a part are no aliases: copied."""
    import torch

    if tensor.numel() == 0 or tensor.layout != torch.strided or tensor.is_meta:
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    while name in taken or name == "__metadata__":  # {"a.b": x, "a": {"b": y}}; the second is safetensors' own key
        name += "~"
    return name


def _child(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _unsupported(value: Any, path: str, kind: str) -> LdmError:
    return LdmError(
        "CKPT-CODEC",
        f"a {kind} of type {type(value).__name__} cannot be saved",
        where=path or "(root)",
        next="use None, bool, int, float, str, list, tuple, dict with string or integer keys, or a tensor",
    )
