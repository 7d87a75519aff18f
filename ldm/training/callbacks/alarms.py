"""Named alarms of the autoencoder's training: what goes wrong while every number is still finite."""

from __future__ import annotations

import logging
import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.checkpoints.files import append_jsonl
from ldm.errors import NON_FINITE, LdmError
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.callbacks.validation import Validation
from ldm.training.stage_module import gathered
from ldm.types import Batch

log = logging.getLogger(__name__)

WINDOW = 200  # steps that a running median or mean is taken over
LEAST = 50  # steps before a median means anything
MIN_GAP = 0.01  # between the mean logits of pictures and reconstructions, and of the discriminator's loss from 0
MAX_KL = 1000.0  # nats per latent value: latents of a deviation near 45; Stable Diffusion's are near 5
KL_RISE, KL_FLOOR = 10.0, 100.0  # in the first steps the KL rises from nearly nothing to tens, as it should
SPIKE = 3.0  # times the median of the pixel distance; batches of 8 logos stay below 1.3
SPREAD = (0.01, 1000.0)  # of the latents' deviation: below, they carry nothing; above, float16 is near its end
MIN_CODES_USED = 0.05
GATHER_EVERY = 100
NAMED = 20  # pictures that a record names at most
OBJECTIVE = "stage.autoencoder.objective"


@dataclass(frozen=True)
class Finding:
    """value: the number that was compared.   limit, what, next: words, as in an `LdmError`."""

    alarm: str
    value: float
    what: str
    limit: str
    next: str


class Episode:
    """Says when something begins that may last or flicker: again only after `quiet` looks without it."""

    def __init__(self, quiet: int) -> None:
        self.quiet, self._looks, self._last = quiet, 0, -math.inf

    def begins(self, present: bool) -> bool:
        self._looks += 1
        lasting = self._looks - self._last <= self.quiet
        if present:
            self._last = self._looks
        return present and not lasting


class Alarms(pl.Callback):
    """Watches the pictures and the logs of every applied step, and every validation. Training goes on without it.

    A finding is one warning and one record in `file`, once an episode: `train/step`, the words, the number, and the
    names of pictures where it belongs to a batch. policy: "warn", or "raise" to end the training at the first finding,
    before a checkpoint of that state (exit code 4). Rank 0 speaks, of its own logs and batch; `constant_images` is of
    all ranks, which with several of them is asked every GATHER_EVERY steps.
    """

    def __init__(self, file: Path, validation: Validation, policy: str = "warn") -> None:
        self.file, self.validation, self.policy = file, validation, policy
        self._episodes: dict[str, Episode] = {}
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._keys: list[str] = []
        self._flags: list[Tensor] = []
        self._constant: list[str] = []

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, module: AutoencoderModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        self._keys += batch.keys
        self._flags.append(constant_images(batch))
        if module.outcome is None:
            return
        keys, flags = self._keys, torch.cat(self._flags).tolist()
        self._keys, self._flags = [], []
        self._constant += [key for key, constant in zip(keys, flags, strict=True) if constant]
        step = module.step.train_step
        several = trainer.world_size > 1
        if not several or step % GATHER_EVERY == 0 or step >= module.settings.max_steps:
            constant = [key for own in gathered(self._constant) for key in own]
            self._constant = []
            quiet = WINDOW // GATHER_EVERY if several else WINDOW
            self._tell(trainer, step, "constant_images", _of_pictures(constant), constant, quiet=quiet)
        if module.outcome.applied:  # else the numbers are not finite, which is the step's own affair
            self._tell(trainer, step, "disc_collapse", self._of_discriminator(module.logs))
            self._tell(trainer, step, "kl_explosion", self._of_kl(module.logs), keys)
            self._tell(trainer, step, "loss_spike", self._of_pixels(module.logs), keys)
        if self.validation.results is not None:
            self._tell(trainer, step, "latent_spread", _of_latents(self.validation.results, module), quiet=1)
            self._tell(trainer, step, "dead_codes", _of_codes(self.validation.results, module), quiet=1)

    # what is looked for

    def _of_discriminator(self, logs: Mapping[str, float]) -> Finding | None:
        if "logits_real" not in logs:
            return None
        gaps, losses = self._recent["gap"], self._recent["discriminator"]
        gaps.append(abs(logs["logits_real"] - logs["logits_fake"]))
        losses.append(logs["discriminator"])
        gap, loss = sum(gaps) / len(gaps), sum(losses) / len(losses)
        limit = f"at least {MIN_GAP} over {WINDOW} steps"
        advice = "another stage.autoencoder.discriminator_optimizer.lr, or a later start_step"
        if len(gaps) < WINDOW or min(gap, loss) >= MIN_GAP:
            return None
        if gap < MIN_GAP:
            what = f"the discriminator gives pictures and reconstructions the same logits, {gap:.2g} apart"
            return Finding("disc_collapse", gap, what, limit, advice)
        what = f"the discriminator is never in doubt, its loss is {loss:.2g}: it teaches nothing"
        return Finding("disc_collapse", loss, what, limit, advice)

    def _of_kl(self, logs: Mapping[str, float]) -> Finding | None:
        if "kl" not in logs:
            return None
        kl, usual = logs["kl"], self._usual("kl", logs["kl"])
        if not (kl > MAX_KL or kl > max(KL_FLOOR, KL_RISE * usual)):
            return None
        limit = f"at most {MAX_KL:g}, and {KL_RISE:g} times the median of the last {WINDOW} steps from {KL_FLOOR:g} on"
        what = f"the KL is {kl:.4g} nats per latent value"
        return Finding("kl_explosion", kl, what, limit, f"a larger {OBJECTIVE}.kl_weight, or a lower learning rate")

    def _of_pixels(self, logs: Mapping[str, float]) -> Finding | None:
        pixel, usual = logs["pixel"], self._usual("pixel", logs["pixel"])
        if not pixel > SPIKE * usual:
            return None
        what = f"the pixel distance is {pixel:.4g}, usually {usual:.4g}"
        limit = f"at most {SPIKE:g} times the median of the last {WINDOW} steps"
        return Finding("loss_spike", pixel, what, limit, "look at these pictures; a lower learning rate or grad_clip")

    def _usual(self, name: str, value: float) -> float:
        """Median before this step; infinite as long as there are too few."""
        recent = self._recent[name]
        usual = median(recent) if len(recent) >= LEAST else math.inf
        recent.append(value)
        return usual

    # what is said

    def _tell(
        self,
        trainer: pl.Trainer,
        step: int,
        alarm: str,
        found: Finding | None,
        pictures: Sequence[str] = (),
        quiet: int = WINDOW,
    ) -> None:
        episode = self._episodes.setdefault(alarm, Episode(quiet))
        if not episode.begins(found is not None) or found is None or not trainer.is_global_zero:
            return
        named = f"pictures {', '.join(pictures[:NAMED])}" if pictures else ""
        error = LdmError(
            "ALARM",
            f"{alarm}: {found.what}",
            where=f"step {step}" + (f", {named}" if named else ""),
            limit=found.limit,
            next=found.next,
            exit_code=NON_FINITE,
        )
        append_jsonl(self.file, {"train/step": step, **asdict(found), "pictures": list(pictures[:NAMED])})
        if self.policy == "raise":
            raise error
        log.warning("%s", error.line().replace("error[ALARM]", "alarm", 1))


def constant_images(batch: Batch) -> Tensor:
    """[B] bool: pictures of a single colour."""
    assert batch.images is not None
    pixels = batch.images.flatten(2)
    return (pixels.amax(2) == pixels.amin(2)).all(1)


def _of_pictures(keys: Sequence[str]) -> Finding | None:
    if not keys:
        return None
    what = f"pictures of a single colour ({len(keys)}), from which nothing can be learnt"
    return Finding("constant_images", len(keys), what, "none expected", "take them out of the data")


def _of_latents(results: Mapping[str, float], module: AutoencoderModule) -> Finding | None:
    spread = results.get("latent_std", 1.0)
    if SPREAD[0] <= spread <= SPREAD[1]:
        return None
    what = f"the latents have a standard deviation of {spread:.3g}"
    weight = "kl_weight" if module.measures.num_codes is None else "commitment_weight"
    advice = f"a {'smaller' if spread < SPREAD[0] else 'larger'} {OBJECTIVE}.{weight}"
    return Finding("latent_spread", spread, what, f"from {SPREAD[0]:g} to {SPREAD[1]:g}", advice)


def _of_codes(results: Mapping[str, float], module: AutoencoderModule) -> Finding | None:
    used = results.get("codes_used", 1.0)
    if used >= MIN_CODES_USED or module.measures.num_latents < (module.measures.num_codes or 0):
        return None
    what = f"{used:.1%} of the codes are used on the held-out set"
    advice = "a smaller codebook, or more pictures for each code"
    return Finding("dead_codes", used, what, f"at least {MIN_CODES_USED:.0%}", advice)
