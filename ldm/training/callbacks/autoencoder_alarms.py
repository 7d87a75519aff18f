"""Alarms of the autoencoder's training: its pictures, its discriminator, its latents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.callbacks.alarms import LEAST, WINDOW, Alarms, Finding
from ldm.training.callbacks.validation import Validation
from ldm.training.ranks import gathered
from ldm.types import Batch

MIN_GAP = 0.01  # between the mean logits of pictures and reconstructions, and of the discriminator's loss from 0
MAX_KL = 1000.0  # nats per latent value: latents of a deviation near 45; Stable Diffusion's are near 5
KL_RISE, KL_FLOOR = 10.0, 100.0  # in the first steps the KL rises from nearly nothing to tens, as it should
SPREAD = (0.01, 1000.0)  # of the latents' deviation: below, they carry nothing; above, float16 is near its end
MIN_CODES_USED = 0.05
GATHER_EVERY = 100
OBJECTIVE = "stage.autoencoder.objective"


class AutoencoderAlarms(Alarms):
    """Watches the pictures too, and every validation.

    `constant_images` is of all ranks, which with several of them is asked every GATHER_EVERY steps.
    """

    watched = ("pixel", "pixel distance")  # the loss has terms that come and go

    def __init__(self, file: Path, validation: Validation, policy: str = "warn", metrics: Path | None = None) -> None:
        super().__init__(file, policy, metrics)
        self.validation = validation
        self._flags: list[Tensor] = []
        self._constant: list[str] = []

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, module: AutoencoderModule, outputs: object, batch: Batch, *_: object
    ) -> None:
        self._flags.append(constant_images(batch))
        if module.outcome is not None:
            keys, flags = [*self._keys, *batch.keys], torch.cat(self._flags).tolist()
            self._flags = []
            self._constant += [key for key, constant in zip(keys, flags, strict=True) if constant]
            self._tell_constant(trainer, module)
        super().on_train_batch_end(trainer, module, outputs, batch)
        if module.outcome is not None and self.validation.results is not None:
            step = module.step.train_step
            self.tell(trainer, step, "latent_spread", _of_latents(self.validation.results, module), quiet=1)
            self.tell(trainer, step, "dead_codes", _of_codes(self.validation.results, module), quiet=1)

    def _tell_constant(self, trainer: pl.Trainer, module: AutoencoderModule) -> None:
        step, several = module.step.train_step, trainer.world_size > 1
        if several and step % GATHER_EVERY and step < module.settings.max_steps:
            return
        constant = [key for own in gathered(self._constant) for key in own]
        self._constant = []
        quiet = WINDOW // GATHER_EVERY if several else WINDOW
        self.tell(trainer, step, "constant_images", _of_pictures(constant), constant, quiet=quiet)

    def of_logs(self, logs: Mapping[str, float]) -> Iterator[tuple[str, Finding | None, bool]]:
        yield "disc_collapse", self._of_discriminator(logs), False
        yield "kl_explosion", self._of_kl(logs), True
        yield from super().of_logs(logs)

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
        kl, recent = logs["kl"], self._recent["kl"]
        usual = median(recent) if len(recent) >= LEAST else math.inf
        recent.append(kl)
        if not (kl > MAX_KL or kl > max(KL_FLOOR, KL_RISE * usual)):
            return None
        limit = f"at most {MAX_KL:g}, and {KL_RISE:g} times the median of the last {WINDOW} steps from {KL_FLOOR:g} on"
        what = f"the KL is {kl:.4g} nats per latent value"
        return Finding("kl_explosion", kl, what, limit, f"a larger {OBJECTIVE}.kl_weight, or a lower learning rate")


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
