"""Training and validation set of a configuration. Never imports torch: what is wrong with the data is said at once."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ldm.build import build
from ldm.data import paths
from ldm.data.bad_samples import budget_error
from ldm.data.captions import Captions
from ldm.data.index import BAD_KINDS
from ldm.data.remote import Remote
from ldm.data.shards import Dataset, open_dataset
from ldm.errors import LdmError, one_line

_opened: list[Dataset] = []
"""What `check_data` opened last. While it lives its indexes are in use, and the data module takes these."""


def check_data(node: Mapping[str, Any]) -> list[Dataset]:
    """Opens what a `data` node names, so that its errors come before anything heavy is imported.

    Returns the training set and, if there is one, the validation set; nothing for a data module of the user's own.
    What was inferred is said on standard error.
    """
    if node.get("_target_") != "ldm.data.datamodule.DataModule":
        return []

    node = {**node, "remote": build(node.get("remote"), where="data.remote")}

    def called(function: Callable[..., Any]) -> Any:
        return function(**{key: node[key] for key in inspect.signature(function).parameters if key in node})

    called(Captions)
    _opened[:] = [found for found in called(open_splits) if found]
    for remark in dict.fromkeys(remark for found in _opened for remark in found.remarks):
        print(one_line(f"data: {remark}"), file=sys.stderr)
    return list(_opened)


def open_splits(
    path: str | Sequence[str],
    val_path: str | Sequence[str] | None = None,
    *,
    val_fraction: float = 0.0,
    max_val_samples: int = 512,
    max_train_samples: int | None = None,
    max_bad_fraction: float = 0.01,
    strict: bool = False,
    index_dir: str | None = None,
    caption: str = "auto",
    repeats: float | Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    on_missing_caption: str = "skip",
    on_truncated: str = "refuse",
    columns: Mapping[str, str] | None = None,
    remote: Remote | None = None,
) -> tuple[Dataset, Dataset | None]:
    """(training set, validation set or None); the arguments are those of `ldm.data.datamodule.DataModule`.

    Raises LdmError if shards cannot be used or too many samples are bad.
    """
    if not 0 <= val_fraction < 1:
        raise LdmError("CONFIG", f"val_fraction={val_fraction}", where="data.val_fraction", limit="0 <= it < 1")

    def opened(source: str | Sequence[str], split: str | None, where: str) -> Dataset:
        return open_dataset(
            source,
            split=split,
            index_dir=index_dir,
            caption=caption,
            repeats=repeats if split == "train" else 1,
            weights=weights if split == "train" else None,
            on_missing_caption=on_missing_caption,
            on_truncated=on_truncated,
            columns=columns,
            remote=remote,
            where=where,
        )

    train, val = opened(path, "train", "data.path"), None
    where, source = ("data.path", path) if val_path is None else ("data.val_path", val_path)
    has_val = paths.has_val_shards(source, where=where)
    if val_path is not None or has_val:
        val = opened(source, "val" if has_val else None, where)
    elif val_fraction:
        chosen = train.digests / 2.0**64 < val_fraction
        if chosen.any() and not chosen.all():
            train, val = train.take(np.flatnonzero(~chosen)), train.take(np.flatnonzero(chosen))
    limit = 0.0 if strict else max_bad_fraction
    _check_budget(train, limit)
    if val is not None and val.indexes is not train.indexes:
        _check_budget(val, limit, " in the validation set")
    if max_train_samples is not None and max_train_samples < train.num_samples:
        train = train.take(_fewest_hashes(train, max_train_samples))
    return train, None if val is None else val.take(_fewest_hashes(val, max_val_samples))


def problems_of(datasets: Iterable[Dataset]) -> Counter[str]:
    """What the index left out or remarked on, by kind; of two parts of one set once."""
    apart = {id(dataset.indexes): dataset.problems for dataset in datasets}
    return sum(apart.values(), Counter[str]())


def _check_budget(dataset: Dataset, limit: float, of: str = "") -> None:
    """The index leaves bad samples out before training; they count all the same, but for missing captions."""
    bad = {k: n for k, n in dataset.problems.items() if k in BAD_KINDS and k != "caption_missing"}
    share = sum(bad.values()) / (dataset.num_samples + sum(bad.values()))
    if share > limit:
        reasons = Counter((p.kind, p.shard) for p in dataset.examples if p.kind in bad)
        first = next(p.key for p in dataset.examples if p.kind in bad)
        what = f"{100 * share:.1f} % bad samples{of}, for example {first}"
        raise budget_error(what, f"limit {100 * limit:.1f} %", reasons, None, "data.max_bad_fraction")


def _fewest_hashes(dataset: Dataset, count: int) -> np.ndarray:
    """Ids of at most `count` samples, chosen by the hash of their keys, in order."""
    return np.sort(np.argsort(dataset.digests / 2.0**64, kind="stable")[:count])
