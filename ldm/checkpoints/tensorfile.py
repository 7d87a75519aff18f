"""safetensors, written tensor by tensor: one tensor is copied at a time, and the bytes are hashed on their way.

The library's own writer first copies the whole state into memory. Format: eight bytes of header length, a JSON
header, then the tensors without gaps; https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoints.files import Digesting
from ldm.errors import LdmError

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64", "bool": "BOOL",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
}  # fmt: skip


def write_tensors(file: Digesting, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write the whole safetensors file. Raises LdmError for a type or a name that the format does not have."""
    names, header = _header(tensors, metadata)
    file.write(header)
    for name in names:
        file.write(_bytes(tensors[name]))


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that `write_tensors` will write."""
    return len(_header(tensors)[1]) + sum(tensor.nbytes for tensor in tensors.values())


def read_tensors(path: Path, device: Any = "cpu") -> dict[str, Tensor]:
    """All tensors of the file on `device`, owned by the caller: nothing refers to the file afterwards."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            # clone: the library hands out a memory map, which breaks when the file is pruned on a network mount
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise LdmError(
            "CKPT-INVALID", f"{path.name} is not a safetensors file", where=str(path), limit=str(error)
        ) from error


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with a NaN or an infinity. Extra memory: none, but for 8-bit floats."""
    return next((name for name, tensor in tensors.items() if not _is_finite(tensor)), None)


def _is_finite(tensor: Tensor) -> bool:
    import torch

    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.itemsize == 1:
        tensor = tensor.float()
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # NaN passes through min and max


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> tuple[list[str], bytes]:
    """Order of the tensors, wide types first so that each is aligned, and the header with its length."""
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in names:
        code, shape = _dtype(name, tensors[name]), list(tensors[name].shape)
        end = start + tensors[name].nbytes
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return names, len(text).to_bytes(8, "little") + text


def _dtype(name: str, tensor: Tensor) -> str:
    import torch

    code = _DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if code is None or tensor.layout != torch.strided or tensor.is_meta or name == "__metadata__":
        kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise LdmError("CKPT-CODEC", f"safetensors cannot hold this tensor ({kind})", where=name)
    return code


def _bytes(tensor: Tensor) -> Any:
    """The tensor's bytes in row-major order, without a copy where it is contiguous on the CPU."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
