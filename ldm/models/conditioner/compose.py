"""Several conditioners as one, and the one way in which any conditioner is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.random import Draws, Purpose
from ldm.types import Check, Conditioner, Conditioning

Columns = Mapping[str, Sequence[Any]]
"""Values of B samples by name; "caption" is the text. None, or a name that is missing, means absent."""


class Compose(nn.Module):
    """Parts by name, their tokens and vectors joined; without parts, the conditioner of an unconditional model.

    parts: conditioners by name.
    tokens, vector: names of the parts whose tokens and whose vectors are used, in the order in which they are joined;
        None = all that provide them. Vectors are concatenated along their width.
    join: how tokens meet: "length" (one after the other, all of one width) or "channels" (token by token, all of one
        fixed length, as the two towers of SDXL that read the same text).
    width, vector_size: what the parts together must give, for networks to refer to; None = whatever they give.
    drop_prob: share of the samples that lose all parts at once, beside what each part drops by itself. Guidance
        compares with all of them absent, so where several parts drop, some samples must lose all.
    keep: names of the parts that are never dropped and stay in what guidance compares with: SDXL's sizes.
    Raises ValueError for parts that cannot be joined, or of which nothing is used.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        tokens: Sequence[str] | None = None,
        vector: Sequence[str] | None = None,
        join: str = "length",
        width: int | None = None,
        vector_size: int | None = None,
        drop_prob: float = 0.0,
        keep: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if join not in ("length", "channels"):
            raise ValueError(f"join must be 'length' or 'channels', not {join!r}")
        if any(isinstance(part, Compose) for part in parts.values()):
            raise ValueError("a part cannot be composed itself: name its parts here")
        self.parts = nn.ModuleDict(parts)
        self.join, self.drop_prob, self.keep = join, drop_prob, tuple(keep)
        self.tokens, self.vector = self._users("tokens", tokens), self._users("vector", vector)
        for name in self.parts:
            if name not in (*self.tokens, *self.vector):
                raise ValueError(f"nothing of the part {name!r} is used: name it in tokens or vector, or remove it")
        for name in self.keep:
            if name not in self.parts or self._part(name).drop_prob:
                raise ValueError(f"keep names {name!r}, which is no part or has a drop_prob above 0 of its own")
        lengths = [self._part(name).length for name in self.tokens]
        if join == "channels" and len(lengths) > 1 and (None in lengths or len(set(lengths)) > 1):
            words = ["as many as its longest text needs (set trim=false)" if n is None else str(n) for n in lengths]
            listed = ", ".join(f"{name} gives {count}" for name, count in zip(self.tokens, words, strict=True))
            raise ValueError(f"join=channels needs one fixed number of tokens from all parts, but {listed}")
        widths = [self._part(name).width or 0 for name in self.tokens]
        if join == "length" and len(set(widths)) > 1:
            listed = ", ".join(f"{name} {n}" for name, n in zip(self.tokens, widths, strict=True))
            raise ValueError(f"tokens of different widths cannot be joined along their length: {listed}")
        known = [n for n in lengths if n is not None]
        self.length = (sum(known) if join == "length" else known[0]) if known and known == lengths else None
        total = sum(widths) if join == "channels" else max(widths, default=0)
        self.width = _agreed("width", width, total)
        sizes = [self._part(name).vector_size or 0 for name in self.vector]
        self.vector_size = _agreed("vector_size", vector_size, sum(sizes))
        self.provides = frozenset(["tokens", "mask"] * bool(self.tokens) + ["vector"] * bool(self.vector))
        self.reads = tuple(name for part in parts_of(self) for name in part.reads)
        self.checks: dict[str, list[Check]] = {}
        for part in parts_of(self):
            for name, checks in part.checks.items():
                self.checks.setdefault(name, []).extend(checks)

    def _part(self, name: str) -> Conditioner:
        return cast(Conditioner, self.parts[name])

    def _users(self, field: str, names: Sequence[str] | None) -> tuple[str, ...]:
        """The parts whose `field` is used."""
        if names is None:
            return tuple(name for name in self.parts if field in self._part(name).provides)
        for name in names:
            if name not in self.parts:
                raise ValueError(f"{field} names {name!r}, which is no part; parts: {', '.join(self.parts) or 'none'}")
            if field not in self._part(name).provides:
                raise ValueError(f"the part {name!r} provides no {field}")
        return tuple(names)

    def forward(self, *values: Sequence[Any]) -> Conditioning:
        """values: B each, in the order of `reads`."""
        rest, given = list(values), []
        for part in parts_of(self):
            count = len(part.reads)
            given.append(part(*rest[:count]))
            rest = rest[count:]
        return self.joined(given)

    def joined(self, given: Sequence[Conditioning]) -> Conditioning:
        """One conditioning from those of the parts, in the order of `parts`."""
        by_name = dict(zip(self.parts, given, strict=True))
        vectors = [by_name[name].vector for name in self.vector]
        texts = [by_name[name] for name in self.tokens]
        return Conditioning(
            tokens=torch.cat([c.tokens for c in texts], dim=1 if self.join == "length" else 2) if texts else None,  # type: ignore[misc]
            mask=self._mask(texts),
            vector=torch.cat(vectors, dim=1) if vectors else None,  # type: ignore[arg-type]
        )

    def _mask(self, texts: list[Conditioning]) -> Tensor | None:
        masks = [c.mask for c in texts]
        if all(mask is None for mask in masks):
            return None
        whole = [torch.ones(c.tokens.shape[:2], dtype=torch.bool, device=c.tokens.device) for c in texts]  # type: ignore[union-attr]
        given = [ones if mask is None else mask for ones, mask in zip(whole, masks, strict=True)]
        if self.join == "channels":  # a token counts if any part of it does
            return torch.stack(given).any(0)
        return torch.cat(given, dim=1)


def _agreed(name: str, said: int | None, found: int) -> int | None:
    if said is not None and said != found:
        raise ValueError(f"{name} is {said}, but the parts together give {found}")
    return found or None


def parts_of(conditioner: Any) -> list[Conditioner]:
    """The conditioners that read something: the parts of a `Compose`, else the conditioner itself."""
    parts = conditioner.parts.values() if isinstance(conditioner, Compose) else [conditioner]
    return [cast(Conditioner, part) for part in parts]


def _kept(conditioner: Any) -> list[Any]:
    """The parts that are never dropped."""
    return [conditioner.parts[name] for name in conditioner.keep] if isinstance(conditioner, Compose) else []


def condition(
    conditioner: Any,
    columns: Columns,
    num_samples: int,
    draws: Draws | None = None,
    instead: Mapping[Any, Callable[..., Conditioning]] = MappingProxyType({}),
) -> Conditioning:
    """The conditioning of B = `num_samples` samples from their columns.

    draws: training's; each conditioner then drops its own share of the samples. Draw 0 of a sample belongs to the
    conditioner, draw i to the i-th part of a `Compose`: a further part changes nobody's draws.
    instead: what is called in the place of a conditioner, where its results are known already.
    """
    parts, kept = parts_of(conditioner), _kept(conditioner)
    u = None
    if draws is not None and any(part.drop_prob for part in (conditioner, *parts)):
        u = draws.on_host().uniform(Purpose.CONDITION_DROP, (1 + len(parts),))  # texts and labels lie on the host

    def dropped(draw: int, prob: float) -> list[bool]:
        return [False] * num_samples if u is None or not prob else (u[:, draw] < prob).tolist()

    everything = dropped(0, conditioner.drop_prob)
    given = []
    for i, part in enumerate(parts, start=1):
        own = dropped(i, part.drop_prob) if part is not conditioner else everything
        drop = own if part in kept else [a or b for a, b in zip(everything, own, strict=True)]
        call = instead.get(part, part)
        given.append(call(*(_values(columns, name, drop) for name in part.reads)))
    return conditioner.joined(given) if isinstance(conditioner, Compose) else given[0]


def _values(columns: Columns, name: str, drop: list[bool]) -> list[Any]:
    absent = "" if name == "caption" else None
    values = columns.get(name)
    if values is None or len(values) == 0:
        return [absent] * len(drop)
    return [absent if gone or value is None else value for gone, value in zip(drop, values, strict=True)]


def null_columns(conditioner: Any, columns: Columns) -> dict[str, Sequence[Any]]:
    """The columns that guidance compares with: what training dropped is absent, what it never dropped stays.

    A condition without dropout has no trained null; SDXL's sizes, for one, are the same on both sides.
    """
    whole, kept = conditioner.drop_prob > 0, _kept(conditioner)
    parts = [part for part in parts_of(conditioner) if part not in kept and (whole or part.drop_prob > 0)]
    dropped = {name for part in parts for name in part.reads}
    return {name: values for name, values in columns.items() if name not in dropped}
