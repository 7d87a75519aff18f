"""Many strings in one buffer. A list of a million short ones takes 60 MB and a second to read; this takes a third."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

# File names that are no UTF-8 hold halves of surrogate pairs.
_ERRORS = "surrogatepass"


class _Names(Sequence[str]):
    """A sequence of strings that equals any other of the same strings."""

    def _at(self, number: int) -> str:
        raise NotImplementedError

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self._at(i) for i in range(*at.indices(len(self)))]
        number = int(at)
        if not -len(self) <= number < len(self):
            raise IndexError(f"{number} of {len(self)}")
        return self._at(number % len(self))

    def __iter__(self) -> Iterator[str]:
        return map(self._at, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        more = ", ..." if len(self) > 4 else ""
        return f"{type(self).__name__}([{', '.join(map(repr, self[:4]))}{more}])"


class Strings(_Names):
    """N strings. text: their UTF-8, uint8.   ends: [N] int64, where each ends in it.

    Raises ValueError if the ends do not rise from 0 to the length of the text.
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        last = int(ends[-1]) if len(ends) else 0
        rising = not len(ends) or (int(ends[0]) >= 0 and bool((ends[1:] >= ends[:-1]).all()))
        if text.dtype != np.uint8 or ends.dtype != np.int64 or last != len(text) or not rising:
            raise ValueError(f"the ends do not cut a text of {len(text)} bytes")
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        encoded = [string.encode("utf-8", _ERRORS) for string in strings]
        ends = np.cumsum([len(data) for data in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def _at(self, number: int) -> str:
        first = self.ends[number - 1] if number else 0
        return self.text[first : self.ends[number]].tobytes().decode("utf-8", _ERRORS)


class Picked(_Names):
    """Strings from several sequences. part: [N], which sequence.   row: [N], which of its strings."""

    def __init__(self, parts: Sequence[Sequence[str]], part: NDArray[np.int32], row: NDArray[np.int32]) -> None:
        self.parts, self.part, self.row = parts, part, row

    def __len__(self) -> int:
        return len(self.row)

    def _at(self, number: int) -> str:
        return self.parts[self.part[number]][self.row[number]]
