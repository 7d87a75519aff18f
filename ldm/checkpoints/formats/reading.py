"""Files that others wrote, opened without running anything in them and without copying them into memory.

Tensors come back as views of the file on disk: pages are read when a tensor is used and dropped when memory is short.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ldm.checkpoints import files
from ldm.errors import LdmError

MAX_JSON_BYTES = 10 * 2**20
_TORCH_FILES = (".ckpt", ".pt", ".pth", ".bin")
Setting = TypeVar("Setting", bool, int, float, str)
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a `.safetensors` or torch file, and the metadata of the former.

    A torch file is read with `weights_only=True`: a pickle that names code is refused with torch's reason, and nothing
    of it runs. Raises LdmError FORMAT.
    """
    if not path.is_file():
        raise LdmError("FORMAT", "there is no such file", where=str(path))
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _TORCH_FILES:
        return _read_torch(path), {}
    known = ", ".join((".safetensors", *_TORCH_FILES))
    raise LdmError("FORMAT", f"cannot tell what a {path.suffix or 'nameless'} file is", where=str(path), limit=known)


def read_part(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """The tensors of one model in a folder of the diffusers layout, and the file (or index) that they came from.

    Full precision before the fp16 variant, and then safetensors before torch files; one file, or shards behind an
    index.
    """
    for variant, suffix in (("", ".safetensors"), ("", ".bin"), (".fp16", ".safetensors"), (".fp16", ".bin")):
        for stem in _STEMS:
            single = folder / f"{stem}{variant}{suffix}"
            if single.is_file():
                return read_file(single)[0], single
            for name in (f"{stem}{suffix}.index{variant}.json", f"{stem}{variant}{suffix}.index.json"):
                if (folder / name).is_file():
                    return _read_shards(folder / name), folder / name
    names = ", ".join(f"{stem}.safetensors" for stem in _STEMS)
    raise LdmError("FORMAT", "the folder holds no weights", where=str(folder), limit=f"looked for {names}, .bin")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most 10 MB. Raises LdmError FORMAT."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise LdmError("FORMAT", "too large for a settings file", where=str(path), limit=f"{MAX_JSON_BYTES} bytes")
        value = files.read_json(path)
    except OSError as error:
        raise LdmError("FORMAT", f"cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise LdmError("FORMAT", "is not JSON", where=str(path)) from error
    if not isinstance(value, dict):
        raise LdmError("FORMAT", "is not a JSON object", where=str(path))
    return value


def setting(config: Mapping[str, Any], key: str, default: Setting, where: str) -> Setting:
    """`config[key]`, or `default` where it is left out. Raises LdmError FORMAT for a value of another type."""
    value = config.get(key, default)
    kinds = (int, float) if isinstance(default, float) else type(default)
    if isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool):
        return value  # type: ignore[return-value]
    raise LdmError("FORMAT", f"{key} is {value!r}", where=where, limit=f"expected {type(default).__name__}")


def count(config: Mapping[str, Any], key: str, default: int, where: str) -> int:
    """A `setting` of at least 1."""
    value = setting(config, key, default, where)
    if value < 1:
        raise LdmError("FORMAT", f"{key} is {value}", where=where, limit="at least 1")
    return value


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise LdmError("FORMAT", "is not a safetensors file", where=str(path), limit=str(error)) from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _refuse_bomb(path)
    try:
        # mmap needs the zip layout (torch 1.6 and newer); what is older is read into memory
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (RuntimeError, ValueError, EOFError, KeyError, OSError, _unpickling_error()) as error:
        raise LdmError(
            "FORMAT",
            "refused: only tensors are read from such a file, and none of its code runs",
            where=str(path),
            limit=_reason(error),
            next="take the .safetensors version of it",
        ) from error
    while isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    values = found if isinstance(found, Mapping) else {"(root)": found}
    strange = [str(name) for name, value in values.items() if not isinstance(value, Tensor)]
    if strange or not values:
        raise LdmError(
            "FORMAT", "is not a table of tensors", where=str(path), limit=f"not a tensor: {', '.join(strange[:10])}"
        )
    return {str(name): value for name, value in values.items()}


def _reason(error: Exception) -> str:
    """torch's reason without its advice on switching the safety off, which nobody should read here."""
    advice = ("weights_only", "Check the documentation")
    lines = [line for line in str(error).splitlines() if line.strip() and not any(word in line for word in advice)]
    text = " ".join(lines).rpartition("WeightsUnpickler error: ")[2].partition("Please use")[0]
    return " ".join(text.split())[:200] or "the file is empty"


def _unpickling_error() -> type[Exception]:
    return torch.serialization.pickle.UnpicklingError  # by torch's name for it: the package imports no pickle


def _refuse_bomb(path: Path) -> None:
    """torch stores members as they are; one that is compressed could unfold to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError) as error:
        raise LdmError("FORMAT", "is a damaged zip archive", where=str(path)) from error
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > (
        path.stat().st_size
    ):
        raise LdmError("FORMAT", "is not an archive that torch wrote: its members are compressed", where=str(path))


def _read_shards(index: Path) -> dict[str, Tensor]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise LdmError("FORMAT", "has no weight_map", where=str(index))
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name:  # an index may not point elsewhere
            raise LdmError("FORMAT", f"names {json.dumps(name)}, which is no file beside it", where=str(index))
        tensors |= read_file(index.parent / name)[0]
    lost = sorted(where.keys() - tensors.keys())
    if lost:
        raise LdmError("FORMAT", "names tensors that its files do not hold", where=str(index), limit=listed(lost))
    return tensors


def listed(names: list[str]) -> str:
    """Ten names at most, and how many more there are."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
