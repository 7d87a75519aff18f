"""Range checks over a composed configuration: all problems at once, before anything heavy is imported."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ldm.config import walk
from ldm.errors import LdmError, nearest, raise_all

Rule = tuple[str, Callable[[Any], bool]]
"""What a value must be, in words and as a test."""


def _whole(least: int) -> Rule:
    return f"a whole number of at least {least}", lambda v: type(v) is int and v >= least


def _real(low: float, high: float = math.inf, *, open_end: bool = False) -> Rule:
    def test(v: Any) -> bool:
        number = isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
        return number and (low < v if open_end else low <= v) and v <= high

    words = f"a number above {low:g}" if open_end else f"a number of at least {low:g}"
    return words + (f" and at most {high:g}" if high < math.inf else ""), test


def _one_of(*options: str) -> Rule:
    return "one of " + ", ".join(options), lambda v: str(v) in options


def _optional(rule: Rule) -> Rule:
    return f"null or {rule[0]}", lambda v: v is None or rule[1](v)


def _several(rule: Rule) -> Rule:
    words = f"a list without repetition, each {rule[0]}"
    return words, lambda v: isinstance(v, list) and all(map(rule[1], v)) and len({f"{n:f}" for n in v}) == len(v)


def _one_or_several(rule: Rule) -> Rule:
    several = _several(rule)
    return f"{rule[0]}, or {several[0]}", lambda v: bool(v) and several[1](v) if isinstance(v, list) else rule[1](v)


_RUN_NAME = re.compile(r"[a-z0-9_-]{1,64}")
STAGES = ("autoencoder", "diffusion", "features")  # their numbers stand for their initial weights: append
_RULES: dict[str, Rule] = {
    "name": ("1 to 64 of a-z 0-9 _ -", lambda v: isinstance(v, str) and bool(_RUN_NAME.fullmatch(v))),
    "seed": _whole(0),
    "stages": ("a list of " + ", ".join(STAGES), lambda v: isinstance(v, list) and bool(v) and set(v) <= set(STAGES)),
    "stage": ("a mapping", lambda v: isinstance(v, dict)),
    "stage.*.max_steps": _whole(1),
    "stage.*.batch_size": _whole(1),
    "stage.*.accumulate": _whole(1),
    "stage.*.grad_clip": _optional(_real(0, open_end=True)),
    "stage.*.precision": _one_of("auto", "32", "bf16-mixed", "16-mixed"),
    "stage.*.optimizer": ("a mapping", lambda v: isinstance(v, dict)),
    "stage.*.optimizer.lr": _real(0, open_end=True),
    "stage.*.param_groups": (
        "a mapping from parts to settings of the optimizer",
        lambda v: isinstance(v, dict) and all(isinstance(each, dict) and each for each in v.values()),
    ),
    "stage.*.param_groups.*.lr": _real(0),
    "stage.*.discriminator_optimizer.lr": _real(0, open_end=True),
    "stage.*.save_every": _whole(1),
    "stage.*.validate_every": _optional(_whole(1)),
    "stage.*.sample_every": _optional(_whole(1)),
    "data.columns": ("a mapping from names to fields of the samples' JSON", lambda v: isinstance(v, dict)),
    "columns": ("a mapping", lambda v: isinstance(v, dict)),
    "stage.*.cache_latents_mb": _real(0),
    "stage.features.batch_size": _whole(2),
    "stage.features.accumulate": ("1: a part of a batch has fewer wrong answers to choose from", lambda v: v == 1),
    "stage.*.alarms": _optional(_one_of("warn", "raise")),
    "stage.*.statistics_images": _optional(_whole(1)),
    "stage.*.ema": ("null or a mapping", lambda v: v is None or isinstance(v, dict)),
    "stage.*.ema.half_life_images": _one_or_several(_real(0, open_end=True)),
    "stage.*.ema.lengths": _several(_real(0.001, 0.28)),
    "stage.*.ema.warmup": ("true or false", lambda v: isinstance(v, bool)),
    "stage.*.ema.snapshot_every": _whole(1),
    "stage.*.ema.snapshot_dtype": _one_of("float32", "float16"),
    "count": _whole(1),
    "batch_size": _whole(1),
    "height": _optional(_whole(1)),
    "width": _optional(_whole(1)),
    "tile": _optional(_whole(1)),
    "strength": _real(0, 1, open_end=True),
    "data.lanes": _optional(_whole(1)),
    "data.window_mb": _real(0, open_end=True),
    "data.max_bad_fraction": _real(0, 1),
    "*image_size": _whole(1),
    "*_prob": _real(0, 1),
    "sampler.steps": _optional(_whole(1)),
    "sampler.guidance_scale": _optional(_real(0)),
    "trainer.accelerator": _one_of("cpu", "gpu", "cuda"),
    "trainer.compile": ("true or false", lambda v: isinstance(v, bool)),
    "trainer.channels_last": ("true or false", lambda v: isinstance(v, bool)),
    "checkpoint.keep_last": _whole(2),
    "checkpoint.keep_best": _whole(0),
    "checkpoint.every_minutes": _optional(_real(0)),
    "checkpoint.grace_s": _real(0),
    "checkpoint.max_failed_saves": _whole(0),
    "loader.num_workers": _whole(0),
    "loader.timeout_s": _real(0),
    "resume.mode": _one_of("auto", "must", "never"),
    "logger.mode": _one_of("auto", "online", "offline", "disabled"),
}
_OURS = {  # Lightning's names, which would act a second time or not at all
    "trainer.accumulate_grad_batches": "stage.<name>.accumulate",
    "trainer.gradient_clip_val": "stage.<name>.grad_clip",
    "trainer.gradient_clip_algorithm": "stage.<name>.grad_clip",
    "trainer.max_steps": "stage.<name>.max_steps",
    "trainer.precision": "stage.<name>.precision",
}


def validate(cfg: Mapping[str, Any]) -> None:
    """Raise LdmError with one line for every value that is out of its range."""
    problems = []
    for key, value in walk(cfg):
        for pattern, (words, holds) in _RULES.items():
            if fnmatchcase(key, pattern) and not holds(value):
                problems.append(LdmError("CONFIG", f"{key}={value} is refused", limit=f"it must be {words}"))
        if key in _OURS:
            problems.append(LdmError("CONFIG", f"{key} is not used here", next=f"set {_OURS[key]}"))
    raise_all([*problems, *_fine_tuning(cfg)] or [*_indivisible(cfg)])


def _fine_tuning(cfg: Mapping[str, Any]) -> Iterator[LdmError]:
    values = dict(walk(cfg))
    wanted, images = values.get("stage.autoencoder.train", "all"), values.get("stage.autoencoder.statistics_images")
    if wanted not in ("all", "decoder"):
        what = f"stage.autoencoder.train={wanted} is refused"
        yield LdmError("CONFIG", what, next=nearest(str(wanted), ("all", "decoder")))
    elif wanted == "decoder" and "autoencoder" in cfg["stages"] and not cfg["init_from"]:
        what = "stage.autoencoder.train=decoder needs an autoencoder whose latents it keeps"
        yield LdmError("CONFIG", what, next="add init_from=RUN, a run whose autoencoder is finished")
    elif wanted == "decoder" and "autoencoder" in cfg["stages"] and images is not None:
        what = f"stage.autoencoder.statistics_images={images} is refused: train=decoder keeps the statistics"
        yield LdmError("CONFIG", what, next="leave it out, or set stage.autoencoder.train=all")


def _indivisible(cfg: Mapping[str, Any]) -> Iterator[LdmError]:
    values = dict(walk(cfg))
    pairs = [(f"stage.{name}.batch_size", f"stage.{name}.accumulate") for name in cfg.get("stage") or {}]
    for key, divisor in pairs:
        if values.get(key) and values.get(divisor) and values[key] % values[divisor]:
            what = f"{key}={values[key]} is not a multiple of {divisor}={values[divisor]}"
            yield LdmError("CONFIG", what, next=f"choose {divisor} among the divisors of {values[key]}")
    widths = values.get("model.autoencoder.block_channels")
    if isinstance(widths, list) and values.get("data.image_size"):
        factor = (values.get("model.autoencoder.patch_size") or 1) * 2 ** (len(widths) - 1)
        size = values["data.image_size"]
        if size % factor:
            what = f"data.image_size={size} is not a multiple of the autoencoder's downsampling {factor}"
            near = max(factor, round(size / factor) * factor)
            yield LdmError("CONFIG", what, next=f"set data.image_size={near}")
