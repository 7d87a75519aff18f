"""Values and callables that several rooms share. Imports torch only.

Letters of shapes: B batch, C channels, H W pixels, h w latents, L text tokens, D width, E vector width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def _map(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Mapping):
        return {k: _map(v, fn) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_map(v, fn) for v in value)
    return value


class _Moves:
    """`to`, `pin_memory` and `slice` for a frozen dataclass whose tensors all lead with the batch."""

    def _replace(self: T, fn: Callable[[Any], Any]) -> T:
        return replace(self, **{f.name: fn(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type,type-var]

    def to(self: T, *args: Any, **kwargs: Any) -> T:
        """Floating tensors take device and dtype; integer and boolean tensors take the device only."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def move(x: Tensor) -> Tensor:
            return x.to(device=device, dtype=dtype if x.is_floating_point() else None, non_blocking=non_blocking)

        return self._replace(lambda v: _map(v, move))  # type: ignore[attr-defined]

    def pin_memory(self: T) -> T:
        return self._replace(lambda v: _map(v, lambda x: x.pin_memory()))  # type: ignore[attr-defined]

    def slice(self: T, rows: slice) -> T:
        """The rows of the batch that `rows` selects, for tensors and lists alike."""

        def cut(v: Any) -> Any:
            if isinstance(v, Mapping):
                return {k: cut(x) for k, x in v.items()}
            if isinstance(v, tuple):
                return tuple(cut(x) for x in v)
            return v[rows] if isinstance(v, Tensor | list) else v

        return self._replace(cut)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Batch(_Moves):
    """Captioned pictures on their way into a model.

    slots: [B] int64, global sample numbers since step 0; every per-sample draw is keyed by them. They stay on the host.
    keys: the samples' names.   images: [B, 3, H, W] in [-1, 1], or None when `moments` came from a cache.
    moments: [B, 2C, h, w], mean and log-variance of the encoder's posterior (the mean alone, [B, C, h, w], where the
        autoencoder draws nothing), or None.
    captions: B strings.   columns: further conditions by name.   valid: [B] bool, False for padding.
    """

    slots: Tensor
    keys: list[str]
    images: Tensor | None
    moments: Tensor | None
    captions: list[str]
    columns: Mapping[str, Any]
    valid: Tensor

    def __len__(self) -> int:
        return len(self.slots)

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        # by the slots the host decides which conditions are dropped: it must not wait for a device to know them
        return replace(super().to(*args, **kwargs), slots=self.slots)


@dataclass(frozen=True)
class Conditioning(_Moves):
    """What a network is conditioned on; None means absent.

    tokens: [B, L, D].   mask: [B, L] bool, True where a token counts.   vector: [B, E].
    concat: [B, C, h, w], joined to the input's channels.   residuals: tuple of feature maps (ControlNet).
    """

    tokens: Tensor | None = None
    mask: Tensor | None = None
    vector: Tensor | None = None
    concat: Tensor | None = None
    residuals: tuple[Tensor, ...] | None = None

    def cat(self, other: Conditioning) -> Conditioning:
        """Rows of `self`, then rows of `other`; both must have the same fields."""

        def join(name: str) -> Any:
            a, b = getattr(self, name), getattr(other, name)
            if (a is None) != (b is None):
                raise ValueError(f"conditionings differ: {name} is present in one of them only")
            if a is None:
                return None
            if isinstance(a, tuple):
                return tuple(torch.cat(pair) for pair in zip(a, b, strict=True))
            return torch.cat([a, b])

        return Conditioning(**{f.name: join(f.name) for f in fields(self)})

    def repeat(self, count: int) -> Conditioning:
        """`count` copies of a conditioning of one row."""
        return self._replace(lambda v: _map(v, lambda x: x.expand(count, *x.shape[1:])))

    def padded(self, length: int) -> Conditioning:
        """Tokens filled up to `length` with zeros that the mask hides. Needs a mask."""
        if self.tokens is None or self.tokens.shape[1] == length:
            return self
        if self.mask is None:
            raise ValueError("tokens without a mask cannot be padded")
        extra = length - self.tokens.shape[1]
        return replace(
            self,
            tokens=torch.nn.functional.pad(self.tokens, (0, 0, 0, extra)),
            mask=torch.nn.functional.pad(self.mask, (0, extra), value=False),
        )


@dataclass(frozen=True)
class Level:
    """One point of the forward process x_t = alpha * x0 + sigma * eps.

    t: what the network is told; None for a stop that a sampler makes between its levels, whose t the denoiser finds
        by alpha and sigma.   alpha, sigma: scalars or [B] tensors, float64 in sampling.
    """

    t: Tensor | None
    alpha: Tensor
    sigma: Tensor


for _cls in (Batch, Conditioning, Level):
    torch.export.register_dataclass(_cls)

Levels = Sequence[Level]
Denoise = Callable[[Tensor, Level], Tensor]
"""(x, level) -> estimate of x0, same shape as x."""
Noise = Callable[[int, Sequence[int]], Tensor]
"""(step, shape) -> standard normal noise, keyed by picture and step."""
OnStep = Callable[[int, Tensor, Tensor], None]
"""(step, x after the step, x0 estimate before it)."""


def ignore(step: int, x: Tensor, x0: Tensor) -> None:
    """The `on_step` that does nothing."""


class Network(Protocol):
    """What a `Denoiser` holds: (x [B, C, h, w], time [B], cond) -> [B, C, h, w]."""

    def __call__(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor: ...


Check = Callable[[Any], object]
"""Raises LdmError for a value that a column cannot have. A plain value itself: data workers get a copy."""


class Conditioner(Protocol):
    """What turns named columns of a batch into a `Conditioning`: text, class labels, numbers.

    reads: the columns that it is called with, in this order; "caption" is the text.
    checks: by column, what every value must pass; a text needs none.
    provides: the fields of its `Conditioning`.   width: D of its tokens.   vector_size: E of its vector; None = none.
    length: L of its tokens; None = it follows the batch, or there are no tokens.
    drop_prob: share of the samples whose condition gives way to its null in training.

    Each argument is a list of B values. The null is what it makes of an absent value: the empty prompt for text,
    None for anything else.
    """

    reads: tuple[str, ...]
    checks: Mapping[str, Sequence[Check]]
    provides: frozenset[str]
    width: int | None
    length: int | None
    vector_size: int | None
    drop_prob: float

    def __call__(self, *values: Any) -> Conditioning: ...
