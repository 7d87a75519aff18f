"""The words of `python -m ldm cache`. Never imports torch: help and wrong words do not wait for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ldm.config import key_of
from ldm.errors import LdmError
from ldm.tools.words import Verb, option

DTYPES = ("float32", "float16", "bfloat16")
VERB = Verb(
    "cache",
    ("OUT",),
    "OUT: a folder for the cache; training takes it by data.cache=OUT. docs/cache.md says more.\n"
    "Other data than the run's: data=NAME and data.KEY=VALUE, as for train.py.",
)


@dataclass(frozen=True)
class Options:
    run: str | None = option(None, "the run whose autoencoder and data are used (the run last trained)", str)
    text: bool = option(False, "embeddings of the captions, too, by text encoders that are not trained")
    flipped: bool = option(False, "every picture mirrored, too, for data.flip_prob")
    dtype: str = option("float32", "float32, float16 or bfloat16", choices=DTYPES)
    batch_size: int = option(32, "pictures, or texts, at once")
    piece_mb: float = option(256.0, "size of a file, about; a stopped command loses one of them at most")
    device: str | None = option(None, "cpu or cuda (cuda where there is one)", str, choices=("cpu", "cuda"))
    devices: int = option(1, "processes, one for each device of this machine; under torchrun its own number counts")
    workers: int = option(0, "processes that read and decode, for each device")

    def __post_init__(self) -> None:
        for key, low in (("batch_size", 1), ("piece_mb", 0.001), ("devices", 1), ("workers", 0)):
            if getattr(self, key) < low:
                raise LdmError("CONFIG", f"{key}={getattr(self, key)}", where=key, limit=f"at least {low}")


def parse(argv: Sequence[str]) -> tuple[str, Options, list[str]] | None:
    """(OUT, options, the words of the data), or None after printing the help. Raises LdmError."""
    of_data = [word for word in argv if re.match(r"data[.=]", word) or key_of(word) == "trusted_targets"]
    parsed = VERB.parse([word for word in argv if word not in of_data], Options)
    if parsed is None:
        return None
    (out,), options = parsed
    return out, options, of_data
