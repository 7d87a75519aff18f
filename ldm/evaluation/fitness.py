"""How well autoencoders keep a set of pictures: one pass that measures, one that collects pictures to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.evaluation.colour import colour_shift
from ldm.evaluation.latents import LatentReport, LatentTally
from ldm.evaluation.regions import KINDS, regions
from ldm.reconstruction.measures import FeatureMoments, codebook_use, frechet_distance, psnr, ssim
from ldm.types import Batch

Array = NDArray[np.float64]
Picture = NDArray[np.uint8]
SHRINKS = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
SATURATED, CONSTANT = 0.5, 1.0
"""A picture counts as saturated if more than this share of its values is 0 or 255, as constant if the deviation of its
values is below this many levels."""
WINDOW = 256
"""Pixels of the largest part of a picture that is shown."""


class Features(Protocol):
    """A frozen network: `ldm.reconstruction.perceptual.FeatureDistance`."""

    label: str

    def __call__(self, a: Tensor, b: Tensor) -> Tensor: ...

    def embed(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Candidate:
    """An autoencoder to judge.

    run: what commands call it; empty if they would begin from other weights.   about: facts in words, for the report.
    finished: whether its training is.   has_statistics: whether those of its latents are measured, or a known model's.
    """

    name: str
    autoencoder: nn.Module
    run: str = ""
    about: Mapping[str, str] = field(default_factory=dict)
    finished: bool = True
    has_statistics: bool = True

    @property
    def downsampling(self) -> int:
        return int(self.autoencoder.downsampling)  # type: ignore[arg-type]

    @property
    def latent_channels(self) -> int:
        return int(self.autoencoder.latent_channels)  # type: ignore[arg-type]

    @property
    def compression(self) -> float:
        """Values of a picture for each value of its latents."""
        return 3 * self.downsampling**2 / self.latent_channels


@dataclass(frozen=True)
class Originals:
    """The pictures themselves, N of them.

    slots: [N] their places in the batches.   keys: their names.   num_bad: those that could not be read.
    size: height and width.   deviation, saturated: [N] of the values in levels of 255; share of them at 0 or 255.
    area: [3] share of the pixels of each of `KINDS`.
    shrunk_psnr: {factor: [N] dB} after shrinking by the factor and enlarging again, bicubic with antialiasing: what
    is left when everything finer than so many pixels is lost.   shrunk_error: {factor: [3]} mean squared error by kind.
    """

    slots: NDArray[np.int64]
    keys: list[str]
    num_bad: int
    size: tuple[int, int]
    deviation: Array
    saturated: Array
    area: Array
    shrunk_psnr: Mapping[float, Array]
    shrunk_error: Mapping[float, Array]


@dataclass(frozen=True)
class Fitness:
    """One candidate on the originals.

    psnr, ssim, colour: [N]; colour is the mean dE*ab of blocks.   error: [3] mean squared error by kind, in squared
    levels of 255, mean over channels.   perceptual: {label: [N]}.   frechet: {label: distance}; empty without network.
    codes: of a codebook, {"codes_used": share, "perplexity"}; empty without one.
    beyond: share of the decoder's values outside of [-1, 1] by more than a level.   worst_beyond: by how many levels
    at most.
    """

    name: str
    psnr: Array
    ssim: Array
    colour: Array
    error: Array
    perceptual: Mapping[str, Array]
    frechet: Mapping[str, float]
    codes: Mapping[str, float]
    beyond: float
    worst_beyond: float
    latents: LatentReport

    def level_error(self, kind: str) -> float:
        """Root mean squared error of a kind of region, in levels of 255; NaN where the pictures have none."""
        return float(np.sqrt(self.error[KINDS.index(kind)]))


def finest(fitness: Fitness, originals: Originals, kind: str) -> float:
    """Size in pixels of the finest structure that is kept: the factor of shrinking that does as much harm.

    Between factors by the logarithms of error and factor. At most 8 and at least 1: not even 1.25; NaN without pixels.
    """
    k = KINDS.index(kind)
    error = fitness.error[k]
    curve = np.array([originals.shrunk_error[s][k] for s in SHRINKS])
    if not np.isfinite(error) or not np.isfinite(curve).all():
        return float("nan")
    curve = np.maximum.accumulate(np.maximum(curve, 1e-12))
    if error < curve[0]:
        return 1.0
    if error >= curve[-1]:
        return SHRINKS[-1]
    return float(np.exp(np.interp(np.log(error), np.log(curve), np.log(SHRINKS))))


@torch.no_grad()
def measure(
    candidates: Sequence[Candidate],
    batches: Iterable[Batch],
    num_images: int,
    *,
    features: Features | None = None,
    device: Any = "cpu",
    done: Callable[[int], None] = lambda count: None,
) -> tuple[Originals, list[Fitness]]:
    """Encode and decode every picture with every candidate: posterior means, in float32.

    batches: pictures [B, 3, H, W] of one size; what is not valid is counted and left out.   num_images: about how many
    will come.   Raises LdmError for pictures that do not fit a candidate, for latents or reconstructions that are not
    finite, and if no picture is valid.
    """
    tallies = [_Tally(candidate, num_images, features) for candidate in candidates]
    rows: dict[str, list[Any]] = {name: [] for name in ("slots", "keys", "deviation", "saturated")}
    shrunk_psnr: dict[float, list[Tensor]] = {s: [] for s in SHRINKS}
    shrunk_error = {s: torch.zeros(3, dtype=torch.float64) for s in SHRINKS}
    pixels, num_bad, size = torch.zeros(3, dtype=torch.float64), 0, (0, 0)
    reference = FeatureMoments()
    for batch in batches:
        assert batch.images is not None
        done(len(batch.slots))
        valid = batch.valid.cpu()
        num_bad += int((~valid).sum())
        if not valid.any():
            continue
        images = batch.images[valid].to(device)
        keys = [key for key, good in zip(batch.keys, valid.tolist(), strict=True) if good]
        size = (images.shape[2], images.shape[3])
        for candidate in candidates:
            check_size(candidate, size)
        rows["slots"] += batch.slots.cpu()[valid].tolist()
        rows["keys"] += keys
        rows["deviation"] += (127.5 * images.double().flatten(1).std(1, correction=0)).tolist()
        rows["saturated"] += (images.abs() >= 1 - 1 / 255).double().flatten(1).mean(1).tolist()
        kinds = regions(images)
        pixels += torch.bincount(kinds.flatten().long(), minlength=3).double().cpu()
        for s in SHRINKS:
            less = shrunk(images, s)
            shrunk_psnr[s].append(psnr(less, images).double().cpu())
            shrunk_error[s] += _error_by_kind(less, images, kinds)
        if features is not None:
            reference.add(features.embed(images).cpu())
        for tally in tallies:
            tally.add(images, kinds, keys)
    if not rows["slots"]:
        what = f"none of {num_bad} pictures can be read" if num_bad else "there are no pictures"
        raise LdmError("DATA", what, where="DATA", next="python -m ldm inspect DATA names the reasons")
    originals = Originals(
        slots=np.array(rows["slots"], dtype=np.int64),
        keys=rows["keys"],
        num_bad=num_bad,
        size=size,
        deviation=np.array(rows["deviation"]),
        saturated=np.array(rows["saturated"]),
        area=(pixels / pixels.sum()).numpy(),
        shrunk_psnr={s: torch.cat(found).numpy() for s, found in shrunk_psnr.items()},
        shrunk_error={s: (found / pixels).numpy() for s, found in shrunk_error.items()},
    )
    return originals, [tally.fitness(pixels, reference) for tally in tallies]


class _Tally:
    """What one candidate does to the pictures, batch by batch."""

    def __init__(self, candidate: Candidate, num_images: int, features: Features | None) -> None:
        self.candidate, self.features = candidate, features
        self.rows: dict[str, list[Tensor]] = {name: [] for name in ("psnr", "ssim", "colour", "perceptual")}
        self.error = torch.zeros(3, dtype=torch.float64)
        self.values, self.beyond, self.worst_beyond = 0, 0, 0.0
        self.latents = LatentTally(candidate.latent_channels, num_images)
        self.moments = FeatureMoments()
        self.codes = torch.zeros(int(getattr(candidate.autoencoder, "codebook_size", 0)), dtype=torch.int64)

    def add(self, images: Tensor, kinds: Tensor, keys: Sequence[str]) -> None:
        latents, noise, output = encoded_and_decoded(self.candidate, images, keys)
        self.latents.add(latents, noise)
        if len(self.codes):
            autoencoder: Any = self.candidate.autoencoder
            codes = autoencoder.quantize.nearest(autoencoder.statistics.restore(latents))
            self.codes += torch.bincount(codes.flatten(), minlength=len(self.codes)).cpu()
        over = (127.5 * (output.abs() - 1)).double()
        self.values += output.numel()
        self.beyond += int((over > 1).sum())
        self.worst_beyond = max(self.worst_beyond, float(over.max()))
        output = output.clamp(-1, 1)
        self.error += _error_by_kind(output, images, kinds)
        found = {
            "psnr": psnr(output, images),
            "ssim": ssim(output, images),
            "colour": colour_shift(output, images),
        }
        if self.features is not None:
            found["perceptual"] = self.features(output, images)
            self.moments.add(self.features.embed(output).cpu())
        for name, values in found.items():
            self.rows[name].append(values.double().cpu())

    def fitness(self, pixels: Tensor, reference: FeatureMoments) -> Fitness:
        statistics: Any = self.candidate.autoencoder.statistics
        arrays = {name: torch.cat(found).numpy() for name, found in self.rows.items() if found}
        perceptual, frechet = {}, {}
        if self.features is not None:
            perceptual[self.features.label] = arrays["perceptual"]
            if len(arrays["psnr"]) > 1:
                frechet[self.features.label] = frechet_distance(reference, self.moments)
        return Fitness(
            name=self.candidate.name,
            psnr=arrays["psnr"],
            ssim=arrays["ssim"],
            colour=arrays["colour"],
            error=(self.error / pixels).numpy(),
            perceptual=perceptual,
            frechet=frechet,
            codes=codebook_use(self.codes) if len(self.codes) else {},
            beyond=self.beyond / self.values,
            worst_beyond=max(0.0, self.worst_beyond),
            latents=self.latents.report(statistics.mean, statistics.std, int(statistics.count)),
        )


def encoded_and_decoded(
    candidate: Candidate, images: Tensor, keys: Sequence[str]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(standardised latents, variance of the posterior's noise in their units or None, pictures not clamped).

    Raises LdmError, `LATENTS`, naming the candidate and the picture, if any of it is not finite.
    """
    autoencoder: Any = candidate.autoencoder
    moments = autoencoder.moments(images)
    latents = autoencoder.latents(moments)
    noise = None
    if moments.shape[1] == 2 * candidate.latent_channels:  # mean and log-variance; a code book has no posterior
        noise = moments.chunk(2, dim=1)[1].exp() / autoencoder.statistics.std.view(1, -1, 1, 1) ** 2
    output = autoencoder.decode(latents).float()
    for what, values in (("latents", latents), ("pictures", output)):
        bad = ~torch.isfinite(values).flatten(1).all(1)
        if bad.any():
            raise LdmError(
                "LATENTS",
                f"the autoencoder gives {what} that are not finite",
                where=candidate.name,
                limit=f"of the picture {keys[int(bad.nonzero()[0])]!r}",
                next="train it anew with precision=32 or a lower learning rate",
            )
    return latents, noise, output


def check_size(candidate: Candidate, size: tuple[int, int]) -> None:
    """Raises LdmError, `SIZE`, for pictures whose sides (height, width) the autoencoder cannot divide."""
    f = candidate.downsampling
    if any(side % f or side < max(f, 16) for side in size):
        side = max(16, f, round(size[0] / f) * f)
        raise LdmError(
            "SIZE",
            f"pictures of {size[1]}x{size[0]} do not fit the autoencoder",
            where=candidate.name,
            limit=f"multiples of {f} of at least 16",
            next=f"image_size={-(-side // f) * f}",
        )


def shrunk(images: Tensor, factor: float) -> Tensor:
    """Pictures shrunk by the factor and enlarged again, both bicubic with antialiasing."""
    height, width = images.shape[-2:]
    small = [max(1, round(side / factor)) for side in (height, width)]
    less = F.interpolate(images.float(), small, mode="bicubic", antialias=True)
    return F.interpolate(less, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)


def _error_by_kind(output: Tensor, images: Tensor, kinds: Tensor) -> Tensor:
    """[3] float64 sums over the pixels of each kind of the squared error in levels, mean over channels."""
    error = (127.5 * (output.double() - images.double())).square().mean(1)
    found = torch.zeros(3, dtype=torch.float64, device=error.device)
    return found.scatter_add_(0, kinds.flatten().long(), error.flatten()).cpu()


# ---- pictures to look at


@dataclass(frozen=True)
class Shown:
    """A picture, or the part of it of at most 256 pixels where the errors are largest.

    original: [h, w, 3].   kinds: [h, w] index in `KINDS`.   made: of every candidate, [h, w, 3].   psnr: of every
    candidate, of the whole picture.   part: whether it is a part.
    """

    key: str
    original: Picture
    kinds: Picture
    made: list[Picture]
    psnr: list[float]
    part: bool


def choose(fitness: Sequence[Fitness], count: int) -> tuple[list[int], list[int]]:
    """Rows of the pictures to show: the `count` of lowest PSNR, mean over the candidates, the worst first; and as
    many around the median that are not among them, from worse to better.
    """
    order = np.argsort(np.mean([f.psnr for f in fitness], axis=0), kind="stable")
    worst, rest = order[:count], order[count:]
    middle = min(max(0, len(order) // 2 - count // 2 - len(worst)), max(0, len(rest) - count))
    return worst.tolist(), rest[middle : middle + count].tolist()


@torch.no_grad()
def show(candidates: Sequence[Candidate], batches: Iterable[Batch], device: Any = "cpu") -> list[Shown]:
    """What to show of every picture in `batches`, in their order."""
    found = []
    for batch in batches:
        assert batch.images is not None
        images = batch.images.to(device)
        made = [encoded_and_decoded(c, images, batch.keys)[2].clamp(-1, 1) for c in candidates]
        kinds = regions(images)
        for row, key in enumerate(batch.keys):
            pair = [(images[row], output[row]) for output in made]
            error = torch.stack([(a - b).square().mean(0) for a, b in pair]).mean(0)
            box, part = largest(error, WINDOW)
            original, made_of = _levels(images[row])[box], [_levels(b)[box] for _, b in pair]
            figures = [float(psnr(b[None], a[None])) for a, b in pair]
            found.append(Shown(key, original, kinds[row].cpu().numpy()[box], made_of, figures, part))
    return found


def largest(error: Tensor, side: int) -> tuple[tuple[slice, slice], bool]:
    """The part of at most side x side of an [H, W] map with the largest sum; and whether it is less than all."""
    height, width = error.shape
    tall, wide = min(side, height), min(side, width)
    sums = F.pad(error.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    sums = sums[tall:, wide:] - sums[:-tall, wide:] - sums[tall:, :-wide] + sums[:-tall, :-wide]
    top, left = divmod(int(sums.argmax()), sums.shape[1])
    return (slice(top, top + tall), slice(left, left + wide)), (tall, wide) != (height, width)


def _levels(image: Tensor) -> Picture:
    """[H, W, 3] of a picture [3, H, W] in [-1, 1]."""
    return ((image.float() + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
