"""Whether training changes what is trained, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytorch_lightning as pl
from torch import Tensor, nn

from ldm.errors import UNCLASSIFIED, LdmError
from ldm.training.agreement import check_ranks, hashes
from ldm.training.callbacks.alarms import Alarms, Finding
from ldm.training.stage_module import StageModule
from ldm.training.step import Player

LATER = 100  # updates after which every tensor should have moved: behind a zero-initialised layer the first do nothing
NAMED = 5


@dataclass
class Watched:
    """parameters: of one player, by name.   before: their hashes, when training began.   updates: since then."""

    parameters: dict[str, nn.Parameter]
    before: Tensor
    updates: int = 0


class Movement(pl.Callback):
    """Looks after the first update and after LATER of them since the command began, and never again.

    Raises LdmError, `FROZEN`, if a parameter that is not trained has changed: before a checkpoint of it (exit code 1).
    The alarm `no_movement` names what is trained and has not changed: all of it after the first update, or single
    tensors after LATER. Updates with a learning rate of 0 do not count, nor do tensors whose group has one of 0.
    At the start the ranks compare their weights.
    """

    def __init__(self, alarms: Alarms | None) -> None:
        self.alarms = alarms
        self._watched: dict[str, Watched] = {}
        self._frozen: dict[str, nn.Parameter] = {}

    def on_train_start(self, trainer: pl.Trainer, module: StageModule) -> None:  # type: ignore[override]
        check_ranks(module)
        for name, player in module.players().items():
            parameters = {n: p for n, p in player.parameters.items() if p.numel()}
            self._watched[name] = Watched(parameters, hashes(parameters, module.device))
        trained = {id(p) for player in module.players().values() for p in player.parameters.values()}
        self._frozen = {n: p for n, p in module.observed().named_parameters() if p.numel() and id(p) not in trained}
        self._frozen_before = hashes(self._frozen, module.device) if self._frozen else None

    def on_train_batch_end(self, trainer: pl.Trainer, module: StageModule, *_: object) -> None:  # type: ignore[override]
        outcome = module.outcome
        if not self._watched or outcome is None or not outcome.applied:
            return
        for name, player in module.players().items():
            watched = self._watched.get(name)
            plays = name == "optim" or outcome.discriminator_grad_norm is not None
            if watched is None or not plays or not _moving(player):
                continue
            watched.updates += 1
            if watched.updates in (1, LATER):
                self._check_frozen(module)
                found = self._still(watched, player)
                if self.alarms is not None:
                    self.alarms.tell(trainer, module.step.train_step, "no_movement", found, quiet=0)
            if watched.updates == LATER:
                del self._watched[name]

    def _check_frozen(self, module: StageModule) -> None:
        if self._frozen_before is None:
            return
        moved = _where(self._frozen, hashes(self._frozen, module.device) != self._frozen_before)
        if moved:
            raise LdmError(
                "FROZEN",
                "parameters that are not trained have changed",
                where=_in_words(moved, len(self._frozen)),
                limit=f"step {module.step.train_step}",
                next="code writes to them; the last checkpoint is from before",
                exit_code=UNCLASSIFIED,
            )

    def _still(self, watched: Watched, player: Player) -> Finding | None:
        still = _where(watched.parameters, hashes(watched.parameters, watched.before.device) == watched.before)
        resting = {id(p) for g in player.optimizer.param_groups if not g["lr"] for p in g["params"]}
        still = [name for name in still if id(watched.parameters[name]) not in resting]
        if not still or (watched.updates == 1 and len(still) < len(watched.parameters)):
            return None
        what = f"not changed by training: {_in_words(still, len(watched.parameters))}"
        limit = f"all of them after {LATER} updates, some after the first"
        advice = "a larger learning rate, or see whether the loss depends on them"
        return Finding("no_movement", len(still), what, limit, advice)


def _moving(player: Player) -> bool:
    return any(group["lr"] for group in player.optimizer.param_groups)


def _where(names: dict[str, nn.Parameter], flags: Tensor) -> list[str]:
    return [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]


def _in_words(names: Sequence[str], count: int) -> str:
    return f"{', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''} ({len(names)} of {count} tensors)"
