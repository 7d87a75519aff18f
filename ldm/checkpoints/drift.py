"""Settings of a checkpoint against those of now: a difference that would change the result is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ldm.errors import LdmError

# What may differ, and what then still holds.
_SAME_DRAWS = "data and draws stay the same, losses agree within tolerance"
_SAME_ORDER = "data and draws stay the same, weights agree up to rounding"
_NOTED = {
    "precision": _SAME_DRAWS,
    "device": _SAME_DRAWS,
    "world_size": _SAME_ORDER,
    "micro_batch": _SAME_ORDER,
    "threads": _SAME_ORDER,
    "latents": _SAME_DRAWS,
    "compile": _SAME_DRAWS,
    "channels_last": _SAME_DRAWS,
}


class Drift(LdmError):
    """Differences nobody accepted; prints one line per key."""

    def __init__(self, lines: Sequence[str], keys: Sequence[str]) -> None:
        self.lines, self.keys = list(lines), list(keys)
        super().__init__(
            "DRIFT",
            self.lines[-1],
            next=f"restore it, choose another name=, or add resume.allow=[{','.join(self.keys)}]",
        )

    def __reduce__(self):
        return Drift, (self.lines, self.keys)

    def line(self) -> str:
        others = [LdmError("DRIFT", text).line() for text in self.lines[:-1]]
        return "\n".join([*others, super().line()])


def compare(saved: Mapping[str, Any], now: Mapping[str, Any], allow: Sequence[str] = ()) -> list[str]:
    """Compare two fingerprints with flat dotted keys; returns a line for each accepted difference, for the log.

    Raises Drift (exit code 2) unless every key that differs stands in `allow`.
    """
    differences = dict(_differences(saved, now))
    refused = [key for key in differences if key not in allow]
    if refused:
        raise Drift([differences[key] for key in refused], refused)
    return list(differences.values())


def notes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each difference in the keys of `_NOTED`: allowed, but said."""
    differences = dict(_differences(saved, now))
    return [f"{differences[key]}: {meaning}" for key, meaning in _NOTED.items() if key in differences]


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in sorted(saved.keys() | now.keys()):
        before, after = (_plain(values.get(key, "absent")) for values in (saved, now))
        if before != after:
            yield key, f"{key}; checkpoint {_shown(before)}, now {_shown(after)}"


def _plain(value: Any) -> Any:
    """As JSON would give it back: a tuple of the config equals the list of the checkpoint."""
    return json.loads(json.dumps(value))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
