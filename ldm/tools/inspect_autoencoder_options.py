"""The words of `python -m ldm inspect-autoencoder`. Never imports torch: help and wrong words do not wait for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ldm.config import key_of, trusted_targets
from ldm.errors import LdmError
from ldm.tools.words import Verb, option

PAGE = "inspect-autoencoder.html"
VERB = Verb(
    "inspect-autoencoder",
    ("CHECKPOINT", "DATA", "[CHECKPOINT ...]"),
    "Is this autoencoder good enough for my images? A table, a verdict, and a page with pictures.\n"
    "CHECKPOINT: a run with a stage autoencoder, or a step of it, RUN/autoencoder/ckpt/step-N; several are compared.\n"
    "Autoencoders of other projects become runs by `python -m ldm import PATH OUT`.\n"
    "DATA: what data.path takes: a folder, shards or a pattern. docs/autoencoder.md explains the figures.",
)


@dataclass(frozen=True)
class Options:
    out: str | None = option(None, f"the page (RUN/{PAGE} of the first checkpoint)", str)
    image_size: int | None = option(None, "side of the pictures (that of the runs)", int)
    crop: str = option("center", "center, or pad", choices=("center", "pad"))
    split: str | None = option(None, "train or val (val where DATA has val-*.tar)", str, choices=("train", "val"))
    val_fraction: float = option(0.0, "the share that a run held out of DATA without val-*.tar, for split=val")
    max_samples: int = option(1000, "pictures that are measured, evenly over DATA")
    pictures: int = option(8, "pictures that are shown, the worst and as many typical ones")
    features: str | None = option(None, "a run of experiment=features_toy, for perceptual and Fréchet distances", str)
    lpips: str | None = option(None, "a file of torchvision's VGG16, or `cache`, for the same by LPIPS", str)
    batch_size: int = option(8, "pictures at once")
    device: str | None = option(None, "cpu or cuda (cuda where there is one)", str, choices=("cpu", "cuda"))
    workers: int = option(0, "processes that read and decode")
    index_dir: str | None = option(None, "where the index is kept (beside the data, or the user's cache)", str)

    def __post_init__(self) -> None:
        bounds = {"image_size": (16, 4096), "max_samples": (1, 10**7), "pictures": (0, 64), "batch_size": (1, 4096),
                  "workers": (0, 1024), "val_fraction": (0, 0.99)}  # fmt: skip
        for key, (low, high) in bounds.items():
            value = getattr(self, key)
            if value is not None and not low <= value <= high:
                raise LdmError("CONFIG", f"{key}={value}", where=key, limit=f"{low} to {high}")
        if self.features and self.lpips:
            raise LdmError("CONFIG", "features and lpips are both given", where="lpips", next="give one of them")


@dataclass(frozen=True)
class Words:
    """checkpoints: one or more.   trusted: packages of the user's own."""

    checkpoints: list[str]
    data: str
    options: Options
    trusted: tuple[str, ...]


def parse(argv: Sequence[str]) -> Words | None:
    """None after printing the help. Raises LdmError."""
    own = [word for word in argv if key_of(word) == "trusted_targets"]
    parsed = VERB.parse([word for word in argv if word not in own], Options)
    if parsed is None:
        return None
    (first, data, *more), options = parsed
    return Words([first, *more], data, options, trusted_targets(own))
