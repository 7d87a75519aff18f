"""The words of `python -m ldm ema`. Never imports torch: help and wrong words do not wait for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ldm.config import key_of, trusted_targets
from ldm.errors import LdmError
from ldm.tools.words import Verb, option
from ldm.validate import STAGES

VERB = Verb(
    "ema",
    ("RUN",),
    "Another average of a run's weights becomes a run of its own, for sample.py and init_from: one of any length,\n"
    "made of the snapshots that a training with stage.<name>.ema.lengths has kept, or one of several half-lives.\n"
    "docs/training.md, averaged weights, says more.",
)


@dataclass(frozen=True)
class Options:
    length: float | None = option(None, "relative width of the average, 0.001 to 0.28", float)
    half_life_images: float | None = option(None, "instead: one of the half-lives that the stage keeps", float)
    stage: str = option("diffusion", "autoencoder, diffusion or features", choices=STAGES)
    step: int | None = option(None, "as of this step (the last that was kept)", int)
    max_error: float = option(0.1, "refuse an average that is further from the wanted one, in units of its norm")
    out: str | None = option(None, "the new run: a name beside RUN, or a path (RUN-ema-...)", str)

    def __post_init__(self) -> None:
        if (self.length is None) == (self.half_life_images is None):
            what = (
                "give the average that you want"
                if self.length is None
                else "length and half_life_images are both given"
            )
            raise LdmError("CONFIG", what, where="length", next="one of length=0.05 and half_life_images=20000")
        if self.length is not None and not 0.001 <= self.length <= 0.28:
            raise LdmError("CONFIG", f"length={self.length:g}", where="length", limit="0.001 to 0.28")
        if not 0 <= self.max_error <= 1:
            raise LdmError("CONFIG", f"max_error={self.max_error:g}", where="max_error", limit="0 to 1")


def parse(argv: Sequence[str]) -> tuple[str, Options, tuple[str, ...]] | None:
    """(RUN, options, packages of the user's own), or None after printing the help. Raises LdmError."""
    own = [word for word in argv if key_of(word) == "trusted_targets"]
    parsed = VERB.parse([word for word in argv if word not in own], Options)
    if parsed is None:
        return None
    (run,), options = parsed
    return run, options, trusted_targets(own)
