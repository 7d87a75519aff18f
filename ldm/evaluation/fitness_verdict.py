"""What the figures of a fitness report mean: all limits and their sources, and the verdict in words. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ldm.evaluation.fitness import Candidate, Fitness, Originals
    from ldm.evaluation.latents import LatentReport

LEVELS = ("good", "usable", "unfit")
HEADLINES = {
    "good": "Good for these pictures",
    "usable": "Usable for these pictures, with losses",
    "unfit": "Not for these pictures",
}


@dataclass(frozen=True)
class Published:
    """PSNR in dB of a known autoencoder on photographs of 256 pixels, and where it is stated."""

    name: str
    psnr: float
    data: str


KL_F8 = Published("KL-f8", 24.19, "OpenImages (CompVis/latent-diffusion)")
KL_F4 = Published("KL-f4", 27.53, "OpenImages (CompVis/latent-diffusion)")
SD = Published("SD 1", 23.4, "COCO 2017 (stabilityai/sd-vae-ft-mse)")
SDXL = Published("SDXL", 24.7, "COCO 2017 (stabilityai/sdxl-vae)")
PUBLISHED = (KL_F8, KL_F4, SD, SDXL)

_P5 = 1.645 * 3.8
"""dB from the middle to the worst twentieth: of a normal with the spread of SD 1 over COCO, which is stated as 3.8."""


@dataclass(frozen=True)
class Limit:
    """A figure is good up to `good`, usable up to `usable`; larger is better if `rising`.   why: source or reason."""

    key: str
    name: str
    good: float
    usable: float
    unit: str
    why: str
    rising: bool = False
    digits: int = 1

    def level(self, value: float) -> str:
        sign = -1 if self.rising else 1
        if sign * value <= sign * self.good:
            return "good"
        return "usable" if sign * value <= sign * self.usable else "unfit"


LIMITS = (
    Limit("psnr", "the typical picture", KL_F4.psnr, KL_F8.psnr, "dB PSNR", rising=True,
          why="what latent diffusion's KL-f4 (good) and KL-f8 (usable) reach on OpenImages"),
    Limit("worst", "the worst twentieth", KL_F4.psnr - _P5, KL_F8.psnr - _P5, "dB PSNR", rising=True,
          why="the same two, less 1.645 of the 3.8 dB by which Stable Diffusion's varies over COCO"),
    Limit("detail", "fine detail and small text", 2.0, 4.0, "px",
          why="strokes of the smallest legible letters, 5 to 7 pixels high, are one pixel wide: shrinking by 2 blurs "
              "them, shrinking by 4 destroys those of twice the size"),
    Limit("edges", "edges", 2.0, 4.0, "px", why="as for fine detail"),
    Limit("flat", "plain areas", 2.55, 5.1, "levels",
          why="one and two hundredths of the range: the contrast that the eye just sees on a plain ground (Weber)"),
    Limit("colour", "colours", 2.3, 4.6, "dE",
          why="a just noticeable difference, dE*ab 2.3 (Mahy et al. 1994), and two of them"),
)  # fmt: skip
BY_KEY = {limit.key: limit for limit in LIMITS}

DRIFT = 0.25
"""The stored statistics fit while every channel's mean is within this many deviations of 0 and its deviation within
a factor 1 + DRIFT of 1: beyond, the denoiser's signal-to-noise ratio is off by more than (1.25)^2 = 1.56. A known
model's one factor cannot fit each channel, and its denoisers live with that: there only the deviation of all counts."""
SIGNAL = 0.1
"""A channel of which less than this share is no noise of the posterior carries nothing."""


@dataclass(frozen=True)
class Finding:
    """key: of the limit.   level: one of LEVELS, or "note".   text: a sentence.   value: the figure, or None."""

    key: str
    level: str
    text: str
    value: float | None = None


@dataclass(frozen=True)
class Verdict:
    """level: the worst of the findings that judge.   findings: in the order of LIMITS.   notes: about the latents.
    steps: what to do next, (sentence, command or "")."""

    level: str
    findings: list[Finding]
    notes: list[Finding]
    steps: list[tuple[str, str]]

    @property
    def headline(self) -> str:
        return HEADLINES[self.level]

    @property
    def summary(self) -> str:
        """What keeps it from being better, in one sentence."""
        missed = [BY_KEY[f.key].name for f in self.findings if f.level == self.level != "good"]
        if not missed:
            return "Every figure is within the limits of a good autoencoder."
        words, several = listed(missed), len(missed) > 1 or missed[0].endswith(("s", "text"))
        verb = ("fall" if several else "falls") + " short"
        how = "of what is usable" if self.level == "unfit" else "of good"
        return f"{words[:1].upper()}{words[1:]} {verb} {how}."


def judge(candidate: Candidate, fitness: Fitness, originals: Originals, data: str) -> Verdict:
    """data: the words of the data, for commands."""
    figures = figures_of(fitness, originals)
    findings = []
    for limit in LIMITS:
        value = figures[limit.key]
        if math.isfinite(value):
            findings.append(Finding(limit.key, limit.level(value), _sentence(limit.key, value, fitness), value))
    level = max((f.level for f in findings), key=LEVELS.index)
    notes = _notes(candidate, fitness.latents)
    return Verdict(level, findings, notes, _steps(candidate, findings, notes, originals, data))


def figures_of(fitness: Fitness, originals: Originals) -> dict[str, float]:
    """The judged figures by the keys of LIMITS; NaN where the pictures have no such region."""
    from ldm.evaluation.fitness import finest

    return {
        "psnr": float(np.median(fitness.psnr)),
        "worst": float(np.percentile(fitness.psnr, 5)),
        "detail": finest(fitness, originals, "detail"),
        "edges": finest(fitness, originals, "edges"),
        "flat": fitness.level_error("flat"),
        "colour": float(np.median(fitness.colour)),
    }


def _sentence(key: str, value: float, fitness: Fitness) -> str:
    if key == "psnr":
        return f"Half of the pictures come back with {value:.1f} dB or more."
    if key == "worst":
        return f"One picture in twenty comes back with less than {value:.1f} dB."
    if key == "flat":
        return f"Plain areas are off by {value:.1f} of 255 levels."
    if key == "colour":
        return f"Colours of areas move by {value:.1f} dE in the typical picture; an eye notices 2.3."
    what = "Fine detail and small text come" if key == "detail" else "Edges come"
    off = f"off by {fitness.level_error(key):.0f} levels"
    if value <= 1:
        return f"{what} back sharper than after shrinking the picture by 1.25 ({off})."
    worse = "more than " if value >= 8 else ""
    return f"{what} back as if the picture had been shrunk by {worse}{value:.1f} and enlarged again ({off})."


def _notes(candidate: Candidate, latents: LatentReport) -> list[Finding]:
    notes, off = [], drifted(latents)
    if not candidate.has_statistics:
        text = "The checkpoint holds no latent statistics yet: finish its stage."
        notes.append(Finding("statistics", "usable", text))
    elif latents.one_factor:
        text = (
            f"One factor for all channels, as stored, cannot fit each of them; all together deviate by "
            f"{latents.overall:.2f} on these pictures, where 1 would fit"
        )
        text += ": a denoiser would meet other noise levels." if off else ", which is near enough."
        notes.append(Finding("statistics", "usable" if off else "good", text))
    elif off:
        words = f"channel{'s' * (len(off) > 1)} {listed([str(c + 1) for c in off])}"
        text = f"The stored statistics do not fit these pictures in {words}: a denoiser would meet other noise levels."
        notes.append(Finding("statistics", "usable", text))
    else:
        text = "The stored statistics fit these pictures."
        notes.append(Finding("statistics", "good", text))
    if dead := silent(latents):
        words = f"Channel{'s' * (len(dead) > 1)} {listed([str(c + 1) for c in dead])}"
        verb = "carry" if len(dead) > 1 else "carries"
        notes.append(Finding("channels", "usable", f"{words} {verb} nothing: fewer channels would do."))
    return notes


def drifted(latents: LatentReport) -> list[int]:
    """Channels whose stored statistics do not fit."""
    return np.flatnonzero(off_mean(latents) | off_std(latents)).tolist()


def off_mean(latents: LatentReport) -> NDArray[np.bool_]:
    return np.abs(latents.mean) > (math.inf if latents.one_factor else DRIFT)


def off_std(latents: LatentReport) -> NDArray[np.bool_]:
    std = np.full_like(latents.std, latents.overall) if latents.one_factor else latents.std
    return (std > 1 + DRIFT) | (std < 1 / (1 + DRIFT))


def silent(latents: LatentReport) -> list[int]:
    """Channels that carry nothing."""
    flat = latents.std == 0
    if latents.signal is not None:
        flat = flat | (latents.signal < SIGNAL)
    return np.flatnonzero(flat).tolist()


def _steps(
    candidate: Candidate, findings: list[Finding], notes: list[Finding], originals: Originals, data: str
) -> list[tuple[str, str]]:
    """What to do next, the cheapest first."""
    if not candidate.run:
        return [("This is not the newest step of its run, and training begins from the newest: look at that one.", "")]
    if not candidate.finished:
        return [("Finish its stage: the command that trains it goes on where it stopped. Then look again.", "")]
    levels = {finding.key: finding.level for finding in findings}
    unfit = {key for key, level in levels.items() if level == "unfit"}
    good = set(levels.values()) == {"good"}
    fits = all(note.level == "good" for note in notes if note.key == "statistics")
    steps: list[tuple[str, str]] = []
    if good and fits:
        steps.append(("Train a denoiser on its latents: nothing need be changed.", ""))
    if not good:
        text = (
            "Fine-tune the decoder on these pictures: the latents stay as they are, so denoisers and caches of this "
            "autoencoder remain valid."
        )
        steps.append((text, _tune(candidate, originals, data, "decoder")))
    if unfit:
        text = f"If that is not enough, fine-tune all of it{'' if fits else ', which measures the scale anew, too'}."
        steps.append((f"{text} A denoiser must then be trained anew.", _tune(candidate, originals, data, "all")))
    if unfit & {"detail", "edges", "worst", "psnr"}:
        f, channels = candidate.downsampling, candidate.latent_channels
        ways = [f"more latent channels (it has {channels}; {2 * channels} halve the compression of "
                f"{candidate.compression:.0f} to 1)"]  # fmt: skip
        if f > 4:
            ways.append(f"f{f // 2} instead of f{f}")
        ways.append(f"larger pictures, image_size={2 * originals.size[0]}, if the files have the pixels")
        steps.append((f"What fine-tuning does not bring back needs another autoencoder: {listed(ways, 'or')}.", ""))
    if not fits and not unfit:
        text = (
            "The stored scale does not fit: before a new denoiser is trained, fine-tune all of it, which measures the "
            "scale anew."
        )
        steps.append((text, _tune(candidate, originals, data, "all")))
    return steps


def _tune(candidate: Candidate, originals: Originals, data: str, part: str) -> str:
    words = ["python train.py experiment=finetune_autoencoder", candidate.run, f"stage.autoencoder.train={part}"]
    return " ".join([*words, data, f"data.image_size={originals.size[0]}"])


def listed(words: list[str], last: str = "and") -> str:
    """a, b and c"""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def best(verdicts: list[Verdict], fitness: list[Fitness]) -> int:
    """The candidate to prefer: of the best level, the one of highest median PSNR."""
    ranks = [(LEVELS.index(v.level), -float(np.median(f.psnr))) for v, f in zip(verdicts, fitness, strict=True)]
    return ranks.index(min(ranks))
