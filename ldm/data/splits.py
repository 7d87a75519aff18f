"""Training and validation set of a configuration. Never imports torch: what is wrong with the data is said at once."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ldm.data import paths
from ldm.data.bad_samples import budget_error
from ldm.data.captions import Captions
from ldm.data.index import BAD_KINDS
from ldm.data.shards import Dataset, open_dataset
from ldm.errors import LdmError


def check_data(node: Mapping[str, Any]) -> None:
    """Opens what a `data` node names, so that its errors come before anything heavy is imported.

    What was inferred is said on standard error.
    """
    if node.get("_target_") != "ldm.data.datamodule.DataModule":
        return

    def called(function: Callable[..., Any]) -> Any:
        return function(**{key: node[key] for key in inspect.signature(function).parameters if key in node})

    called(Captions)
    for remark in dict.fromkeys(remark for found in called(open_splits) if found for remark in found.remarks):
        print(f"data: {remark}", file=sys.stderr)


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
    repeats: int | Sequence[int] | None = None,
    on_missing_caption: str = "skip",
    on_truncated: str = "refuse",
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
            on_missing_caption=on_missing_caption,
            on_truncated=on_truncated,
            where=where,
        )

    train, val = opened(path, "train", "data.path"), None
    where, source = ("data.path", path) if val_path is None else ("data.val_path", val_path)
    if val_path is not None or paths.has_val_shards(source):
        val = opened(source, "val" if paths.has_val_shards(source) else None, where)
    elif val_fraction:
        chosen = _hash_of(train.keys) < val_fraction
        if chosen.any() and not chosen.all():
            train, val = train.take(np.flatnonzero(~chosen)), train.take(np.flatnonzero(chosen))
    _check_budget(train, 0.0 if strict else max_bad_fraction)
    if max_train_samples is not None and max_train_samples < train.num_samples:
        train = train.take(_fewest_hashes(train.keys, max_train_samples))
    return train, None if val is None else val.take(_fewest_hashes(val.keys, max_val_samples))


def _check_budget(dataset: Dataset, limit: float) -> None:
    """The index leaves bad samples out before training; they count all the same, but for missing captions."""
    bad = {k: n for k, n in dataset.problems.items() if k in BAD_KINDS and k != "caption_missing"}
    share = sum(bad.values()) / (dataset.num_samples + sum(bad.values()))
    if share > limit:
        reasons = Counter((p.kind, p.shard) for p in dataset.examples if p.kind in bad)
        first = next(p.key for p in dataset.examples if p.kind in bad)
        what = f"{100 * share:.1f} % bad samples, for example {first}"
        raise budget_error(what, f"limit {100 * limit:.1f} %", reasons, None, "data.max_bad_fraction")


def _fewest_hashes(keys: list[str], count: int) -> np.ndarray:
    """Ids of at most `count` samples, chosen by the hash of their keys, in order."""
    return np.sort(np.argsort(_hash_of(keys), kind="stable")[:count])


def _hash_of(keys: list[str]) -> np.ndarray:
    """[N] in [0, 1), a pure function of each key."""
    digests = (hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8] for key in keys)
    return np.array([int.from_bytes(digest, "big") / 2**64 for digest in digests])
