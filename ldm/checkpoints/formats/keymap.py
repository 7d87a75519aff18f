"""A key map: where each tensor of ours lives in another layout. Data, applied in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.checkpoints.formats.reading import listed
from ldm.errors import LdmError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """names: where the other layout keeps it; several when it keeps our tensor in pieces, stacked along the rows.

    form: "same", "conv" (our matrix [out, in] is a 1x1 convolution [out, in, 1, 1] there) or "transposed".
    """

    names: tuple[str, ...]
    form: str = "same"


KeyMap = Mapping[str, Place]
"""Name of ours -> its place."""


def make(names: Iterable[str], rule: Callable[[str], Place]) -> dict[str, Place]:
    """The map of these names. Raises ValueError unless it is a bijection."""
    table = {name: rule(name) for name in names}
    taken = [theirs for place in table.values() for theirs in place.names]
    if len(set(taken)) != len(taken):
        twice = sorted({name for name in taken if taken.count(name) > 1})
        raise ValueError(f"two tensors would share a place: {listed(twice)}")
    return table


def their_shapes(table: KeyMap, ours: Mapping[str, Shape]) -> dict[str, Shape]:
    """Names and shapes that the other layout must have for our shapes."""
    shapes: dict[str, Shape] = {}
    for name, place in table.items():
        shape = ours[name]
        pieces = len(place.names)
        piece = (shape[0] // pieces, *shape[1:]) if pieces > 1 else shape
        if place.form == "conv":
            piece = (*piece, 1, 1)
        elif place.form == "transposed":
            piece = tuple(reversed(piece))
        shapes |= dict.fromkeys(place.names, piece)
    return shapes


def to_ours(table: KeyMap, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors, views of theirs but where pieces are joined."""

    def change(tensor: Tensor, form: str) -> Tensor:
        if form == "conv":
            return tensor.flatten(1)
        return tensor.T if form == "transposed" else tensor

    ours = {}
    for name, place in table.items():
        pieces = [change(theirs[piece], place.form) for piece in place.names]
        ours[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return ours


def to_theirs(table: KeyMap, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors, views of ours."""

    def change(tensor: Tensor, form: str) -> Tensor:
        if form == "conv":
            return tensor[..., None, None]
        return tensor.T if form == "transposed" else tensor

    theirs: dict[str, Tensor] = {}
    for name, place in table.items():
        pieces = ours[name].chunk(len(place.names)) if len(place.names) > 1 else [ours[name]]
        theirs |= {other: change(piece, place.form) for other, piece in zip(place.names, pieces, strict=True)}
    return theirs


def check_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape], where: str, *, next: str = "") -> None:
    """Raise LdmError SHAPE that lists what is missing, unexpected and of another shape, ten of each at most."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    reshaped = [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    words = [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names]
    if words:
        raise LdmError("SHAPE", "the weights do not fit the model", where=where, limit="; ".join(words), next=next)
