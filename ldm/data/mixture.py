"""How often an epoch uses each sample: repeats that are set or that folders are named for, and shares of sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ldm.data.index import Index, classes_of
from ldm.errors import LdmError

MAX_REPEATS = 99_999
_MAX_USES = 50_000_000  # of pictures in an epoch: each has a row in its permutation

Uses = NDArray[np.float64]


def per_item(repeats: float | Sequence[float] | None, items: int) -> list[float] | None:
    """One number for each item of `data.path`. Raises LdmError for other numbers than `limit` says."""
    if repeats is None:
        return None
    numbers = [repeats] * items if isinstance(repeats, int | float) else list(repeats)
    if len(numbers) != items or not all(type(n) in (int, float) and 0 < n <= MAX_REPEATS for n in numbers):
        raise LdmError(
            "CONFIG",
            f"repeats={repeats!r} for {items} sets",
            where="data.repeats",
            limit=f"numbers above 0 up to {MAX_REPEATS}, one for all or one for each item of data.path",
        )
    return numbers


def check_weights(weights: Sequence[float] | None, repeats: object, items: int) -> None:
    """Refuses weights that are not one positive number for each of several sets."""
    if weights is None:
        return
    numbers = list(weights) if not isinstance(weights, int | float | str) else [weights]
    if items < 2 or len(numbers) != items or not all(type(n) in (int, float) and 0 < n < 1e6 for n in numbers):
        raise LdmError(
            "CONFIG",
            f"weights={weights!r} for {items} set{'s' * (items != 1)}",
            where="data.weights",
            limit="one number above 0 for each item of data.path, of which there are at least two",
        )
    if repeats is not None:
        raise LdmError("CONFIG", "data.weights and data.repeats say two things about one set", next="set one of them")


def repeats_of(index: Index, rows: NDArray[np.int64], number: float | None, remarks: list[str]) -> Uses:
    """[N], how often an epoch uses each of the rows of a shard. number: what was set, before what folders are named."""
    if number is not None or not index.files:
        return np.broadcast_to(np.float64(number or 1), len(rows))
    classes = classes_of(index)
    folders = [index.keys[int(row)].rpartition("/")[0] for row in rows]
    pictures = Counter(folders)
    times = {folder: classes[folder].repeats or 1 for folder in pictures}
    said = sorted(f"{f}: {times[f]} x {pictures[f]} pictures" for f in pictures if classes[f].repeats)
    if said:
        listed = ", ".join(said[:8]) + (", ..." if len(said) > 8 else "")
        remarks.append(f"repeats from the names of folders ({listed}); data.repeats=1 turns them off")
    numbered = sorted(folder for folder in pictures if classes[folder].numbered)
    if numbered:
        listed = ", ".join(numbered[:4]) + (", ..." if len(numbered) > 4 else "")
        remarks.append(f"numbers of folders are taken for names, not for repeats ({listed}); see docs/data.md")
    return np.array([times[folder] for folder in folders], dtype=np.float64)


def mixed(
    uses: list[Uses], item_of: Sequence[int], items: Sequence[str], weights: Sequence[float] | None, remarks: list[str]
) -> list[Uses]:
    """The uses of each shard's samples such that the items' shares of an epoch are as `weights`.

    item_of: for each shard the item of `data.path` that it belongs to.
    No sample is used less often than without weights: an epoch ends when every set was seen whole.
    """
    if weights is not None:
        totals = np.zeros(len(items))
        np.add.at(totals, np.asarray(item_of), [of_shard.sum() for of_shard in uses])
        if not totals.all():
            empty = items[int(np.flatnonzero(totals == 0)[0])]
            raise LdmError("DATA", f"{empty} has no sample that could have a weight", where="data.weights")
        wanted = np.asarray(weights, dtype=np.float64) / totals
        scale = wanted / wanted.min()
        uses = [of_shard * scale[item] for of_shard, item in zip(uses, item_of, strict=True)]
        parts = (f"{item} {w / sum(weights):.1%}, {s:.3g} x" for item, w, s in zip(items, weights, scale, strict=True))
        remarks.append(f"weights: an epoch uses {sum(map(np.sum, uses)):.0f} pictures: {'; '.join(parts)}")
    total = sum(float(of_shard.sum()) for of_shard in uses)
    if total > _MAX_USES:
        raise LdmError(
            "DATA",
            f"an epoch would use {total:.0f} pictures, repeats counted",
            where="data.repeats" if weights is None else "data.weights",
            limit=f"{_MAX_USES}",
            next="smaller repeats or weights that differ less, or fewer pictures",
        )
    return uses
