"""Named alarms of training: what goes wrong while every number is still finite. Every stage watches its loss."""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import pytorch_lightning as pl

from ldm.checkpoints.files import append_jsonl
from ldm.errors import NON_FINITE, LdmError
from ldm.training.stage_module import StageModule
from ldm.types import Batch

log = logging.getLogger(__name__)

WINDOW = 200  # steps that a running median or mean is taken over
LEAST = 50  # steps before a median means anything
SPIKE = 3.0  # times the median of the loss
DEVIATIONS = 6.0  # of ln(loss) above its median: batches of few samples at random noise levels differ a hundredfold
NORMAL = 1.4826  # standard deviations of a normal distribution in its median absolute deviation
NAMED = 20  # pictures that a record names at most


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
    """Watches the logs of every applied step. Training goes on without it.

    A finding is one warning and one record in `file`, once an episode: `train/step`, the words, the number, and the
    names of pictures where it belongs to a batch. policy: "warn", or "raise" to end the training at the first finding,
    before a checkpoint of that state (exit code 4). Rank 0 speaks, of its own logs and batch.
    metrics: the stage's metrics.jsonl, from which a resumed training learns what came before.
    """

    watched = ("loss", "loss")
    """What must not jump: its name among the logs, and in words."""

    def __init__(self, file: Path, policy: str = "warn", metrics: Path | None = None) -> None:
        self.file, self.policy, self.metrics = file, policy, metrics
        self._episodes: dict[str, Episode] = {}
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._keys: list[str] = []

    def on_train_start(self, trainer: pl.Trainer, module: StageModule) -> None:  # type: ignore[override]
        """Sees again, in silence, what a window and an episode can hold."""
        if not trainer.is_global_zero or self.metrics is None or not self.metrics.exists():
            return
        with open(self.metrics) as file:
            lines = deque(file, maxlen=2 * WINDOW)
        for row in map(json.loads, lines):
            if row.get("train/applied"):
                logs = {k.removeprefix("train/"): v for k, v in row.items() if v is not None}
                for alarm, found, _ in self.of_logs(logs):
                    self._episode(alarm).begins(found is not None)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, module: StageModule, outputs: object, batch: Batch, *_: object
    ) -> None:
        self._keys += batch.keys
        if module.outcome is None:
            return
        keys, self._keys = self._keys, []
        if module.outcome.applied:  # else the numbers are not finite, which is the step's own affair
            for alarm, found, of_batch in self.of_logs(module.logs):
                self.tell(trainer, module.step.train_step, alarm, found, keys if of_batch else ())

    def of_logs(self, logs: Mapping[str, float]) -> Iterator[tuple[str, Finding | None, bool]]:
        """Alarm, what was found, and whether the pictures of the batch belong to it."""
        yield "loss_spike", self._of_loss(logs), True

    def _of_loss(self, logs: Mapping[str, float]) -> Finding | None:
        name, words = self.watched
        value, recent = logs[name], self._recent[name]
        level = math.log(max(value, 1e-30))
        usual = limit = math.inf
        if len(recent) >= LEAST:
            usual = median(recent)
            spread = NORMAL * median(abs(each - usual) for each in recent)
            limit = usual + max(math.log(SPIKE), DEVIATIONS * spread)
        recent.append(level)
        if not level > limit:
            return None
        what = f"the {words} is {value:.4g}, usually {math.exp(usual):.4g}"
        said = f"at most {SPIKE:g} times the median of the last {WINDOW} steps, here {math.exp(limit):.4g}"
        return Finding("loss_spike", value, what, said, "look at these pictures; a lower learning rate or grad_clip")

    def _episode(self, alarm: str, quiet: int = WINDOW) -> Episode:
        return self._episodes.setdefault(alarm, Episode(quiet))

    def tell(
        self,
        trainer: pl.Trainer,
        step: int,
        alarm: str,
        found: Finding | None,
        pictures: Sequence[str] = (),
        quiet: int = WINDOW,
    ) -> None:
        if not self._episode(alarm, quiet).begins(found is not None) or found is None or not trainer.is_global_zero:
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
