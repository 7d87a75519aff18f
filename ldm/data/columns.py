"""What `data.columns` declares: further values of a sample, by name. Standard library only.

    score: score            a field of the sample's JSON, by its dotted path
    size: "@size"           measured: the picture's size and its crop, as SDXL is told of them
    edges: .edges.png       another picture of the sample: of KEY.jpg, the member or file KEY.edges.png
    mask: .mask.png         the same as a mask, because of the column's name: `mask`, or one that ends in `_mask`
    emb: .emb.npy           an array of numbers

A dot in front tells a member from a field: `mask.png` is the field `png` of the field `mask`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from ldm.errors import LdmError

SIZE = "@size"
Kind = Literal["field", "size", "picture", "mask", "array"]
MAX_NAME = 200  # characters of what follows a sample's key in the name of a further member
_MEMBER = re.compile(r"((?:\.[^./\\\x00-\x1f\x7f]+)*)\.(jpg|jpeg|png|webp|npy)", re.IGNORECASE)


def checked(columns: Mapping[str, str]) -> dict[str, str]:
    """The declarations, suffixes of members as the index has them. Raises LdmError for one that means nothing."""
    found = {}
    for name, path in columns.items():
        member = _MEMBER.fullmatch(path) if isinstance(path, str) and is_member(path) else None
        known = path == SIZE or (isinstance(path, str) and all(path.split(".")) and not path.startswith("@"))
        if name == "caption" or not (known or member):
            raise LdmError(
                "CONFIG",
                f"{path!r} is nothing that the column {name!r} can hold",
                where="data.columns",
                next=f"a dotted path in the samples' JSON, {SIZE}, or with a dot in front what follows the key in the "
                "name of another picture (jpg, png, webp) or array (npy): .mask.png; the caption is no column",
            )
        suffix = member[2].lower().replace("jpeg", "jpg") if member else ""
        found[name] = f"{member[1]}.{suffix}" if member else path
    return found


def is_member(name: str) -> bool:
    """Whether a further member can be called so: `.mask.png`. What cannot is never written into a shard."""
    return len(name) <= MAX_NAME and _MEMBER.fullmatch(name) is not None


def kind_of(name: str, path: str) -> Kind:
    """What a checked declaration is."""
    if path == SIZE:
        return "size"
    if not path.startswith("."):
        return "field"
    if path.endswith(".npy"):
        return "array"
    return "mask" if name == "mask" or name.endswith("_mask") else "picture"
