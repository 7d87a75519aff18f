"""One optimizer step: the only place where weights change, and the only clock.

The order is fixed: backward (without synchronisation but for the last micro-batch), unscale, gradient norm, control
all-reduce, clip, step or skip, learning rate, EMA, counters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.data.order import check_cut
from ldm.errors import NON_FINITE, LdmError
from ldm.training.ema import EMA

MAX_CONSECUTIVE_SKIPS = 5
MAX_SKIP_FRACTION, SKIP_WINDOW = 0.01, 1000
MIN_SCALE = 2.0**-10


@dataclass
class Scaler:
    """Loss scale for float16: halved after an overflow, doubled after `growth_interval` good steps.

    Micikevicius et al. 2017, arXiv:1710.03740, section 3.2. It is ours because the scale must be undone before the
    gradient norm, and because it is part of the checkpoint.
    """

    scale: float = 2.0**16
    good_steps: int = 0
    growth_interval: int = 2000
    overflows: int = 0
    overflows_in_a_row: int = 0

    def update(self, finite: bool) -> None:
        self.overflows_in_a_row = 0 if finite else self.overflows_in_a_row + 1
        if finite:
            self.good_steps += 1
            if self.good_steps % self.growth_interval == 0:
                self.scale *= 2.0
        else:
            self.overflows += 1
            self.good_steps = 0
            self.scale /= 2.0


@dataclass
class Counters:
    """train_step: optimizer steps attempted, the clock.   updates: steps applied.   skips: the steps not applied."""

    train_step: int = 0
    updates: int = 0
    consecutive_skips: int = 0
    recent_skips: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """What a finished step reports: everything is a plain number, read once a step."""

    loss: float
    grad_norm: float
    lr: float
    applied: bool
    save_due: bool
    stop: bool
    failed_saves: float = 0
    """Consecutive checkpoints that the disk refused, as the rank that writes them knows."""
    tallies: tuple[float, ...] = ()
    """What was counted in this step, summed over the ranks."""
    discriminator_grad_norm: float | None = None
    """None while the discriminator does not play."""
    failure: LdmError | None = None
    """Why training must end: too many steps were not finite."""


class Player:
    """Parameters with their optimizer. `synchronise`: their gradients are averaged over the ranks here, not by DDP.

    groups: settings of the optimizer for some of them, by pattern, see `grouped`.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: Callable[..., torch.optim.Optimizer],
        *,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        synchronise: bool = False,
    ) -> None:
        self.parameters, self.synchronise = parameters, synchronise
        self.optimizer = optimizer(grouped(parameters, groups or {}))
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]

    def state(self) -> dict[str, Any]:
        """The optimizer's, with its parameters numbered as in `parameters`, however they are grouped."""
        state = self.optimizer.state_dict()
        places = self._places()
        return {
            "state": {places[number]: value for number, value in state["state"].items()},
            "param_groups": [
                {**g, "params": [places[number] for number in g["params"]]} for g in state["param_groups"]
            ],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Of a player with the same parameters; groups, settings and memory layout remain those of this one.

        Raises LdmError if it had another number of them.
        """
        count = sum(len(group["params"]) for group in state["param_groups"])
        if count != len(self.parameters):
            raise LdmError(
                "CKPT-CONTENT",
                f"the optimizer was saved with {count} parameters, and {len(self.parameters)} are trained now",
                next="train the same ones, or begin a run of its own: name=NAME init_from=RUN",
            )
        own, places = self.optimizer.state_dict(), self._places()
        parameters = list(self.parameters.values())
        own["state"] = {
            number: {name: _laid_out_as(parameters[place], value) for name, value in state["state"][place].items()}
            for number, place in places.items()
            if place in state["state"]
        }
        self.optimizer.load_state_dict(own)

    def _places(self) -> dict[int, int]:
        """torch's number of a parameter, which counts through the groups, to its place in `parameters`."""
        place = {id(p): number for number, p in enumerate(self.parameters.values())}
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        return {number: place[id(p)] for number, p in enumerate(ordered)}

    def gradients(self) -> list[Tensor]:
        """Of this step, the same on every rank; empty where the player did not play."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if self.synchronise and gradients and _world_size() > 1:
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            pieces = (flat / _world_size()).split([g.numel() for g in gradients])
            for gradient, piece in zip(gradients, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))
        return gradients

    def set_lr(self, factor: float) -> float:
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        return self.base_lrs[0] * factor


def grouped(
    parameters: Mapping[str, nn.Parameter], groups: Mapping[str, Mapping[str, Any]], where: str = "param_groups"
) -> list[dict[str, Any]]:
    """What torch's optimizers take: all that no pattern chooses first, with the optimizer's own settings.

    A pattern is a name, which stands for all below it, or has wildcards (`*.bias`); the first that fits decides.
    Raises LdmError for a pattern that is left with nothing.
    """
    rest: list[nn.Parameter] = []
    chosen: dict[str, list[nn.Parameter]] = {pattern: [] for pattern in groups}
    for name, parameter in parameters.items():
        fits = (p for p in groups if name == p or name.startswith(f"{p}.") or fnmatchcase(name, p))
        chosen.get(next(fits, ""), rest).append(parameter)
    for pattern, members in chosen.items():
        if not members:
            raise LdmError(
                "CONFIG",
                f"nothing that is trained is left for {pattern!r}",
                where=where,
                limit=f"trained: {', '.join(dict.fromkeys(name.partition('.')[0] for name in parameters))}",
                next="name one of these or a part of it, or use wildcards: '*.bias'",
            )
    own = [{"params": members, **groups[pattern]} for pattern, members in chosen.items()]
    return [{"params": rest}, *own] if rest else own


class OptimizerStep:
    """Owns optimizer, learning rate, gradient clipping, fp16 scaling, EMA and counters of one stage.

    parameters: the trained ones by name.   optimizer: callable from parameters to optimizer.   param_groups: its
    settings for some of them, see `grouped`.   lr_schedule: updates to factor.   accumulate: micro-batches a step.
    grad_clip: largest gradient norm, None = no clipping.   batch_size: global, images a step.
    discriminator: a second player whose gradients come with the same backward. It is stepped in the same step if it got
    any, with the same factor of its own learning rate and the same clipping, and skipped with the first.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        optimizer: Callable[..., torch.optim.Optimizer],
        lr_schedule: Callable[[int], float],
        ema: EMA | None,
        batch_size: int,
        param_groups: Mapping[str, Mapping[str, Any]] | None = None,
        accumulate: int = 1,
        grad_clip: float | None = 1.0,
        scaler: Scaler | None = None,
        discriminator: Player | None = None,
    ) -> None:
        self.player, self.discriminator = Player(parameters, optimizer, groups=param_groups), discriminator
        self.lr_schedule, self.ema, self.scaler = lr_schedule, ema, scaler
        self.batch_size, self.accumulate, self.grad_clip = batch_size, accumulate, grad_clip
        self.counters = Counters()
        self.micro = 0
        self._loss = torch.zeros(())

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.player.optimizer

    @property
    def train_step(self) -> int:
        return self.counters.train_step

    @property
    def samples_seen(self) -> int:
        return self.counters.train_step * self.batch_size

    @property
    def synchronises(self) -> bool:
        """True when the micro-batch that comes next is the last of its step."""
        return self.micro == self.accumulate - 1

    def __call__(
        self,
        loss: Tensor,
        backward: Callable[[Tensor], Any],
        *,
        save_due: bool = False,
        stop: bool = False,
        failed_saves: float = 0,
        tallies: Sequence[float] = (),
    ) -> Outcome | None:
        """Feed one micro-batch's mean loss; an `Outcome` when that completed a step, else None.

        save_due, stop, failed_saves: what this rank wishes and knows; the largest of all ranks becomes everybody's.
        tallies: numbers of this rank's step, for the monitor; those given with the last micro-batch are summed.
        """
        scaled = loss / self.accumulate
        backward(scaled * self.scaler.scale if self.scaler else scaled)
        self._loss = self._loss.to(loss.device) + scaled.detach()
        self.micro += 1
        if self.micro < self.accumulate:
            return None
        self.micro = 0
        return self._finish((save_due, stop, failed_saves), tallies)

    def _finish(self, wishes: tuple[bool, bool, float], tallies: Sequence[float]) -> Outcome:
        players = [self.player] if self.discriminator is None else [self.player, self.discriminator]
        grads = [player.gradients() for player in players]
        norms = torch.stack([torch.nn.utils.get_total_norm(g).to(self._loss.device) for g in grads])
        if self.scaler:
            norms = norms / self.scaler.scale
        (loss, *sums), norm_values, finite, (save_due, stop, failed) = self._agree(norms, wishes, tallies)
        factor = self.lr_schedule(self.counters.updates)
        lr, *_ = [player.set_lr(factor) for player in players]
        if finite:
            for player, own, norm in zip(players, grads, norm_values, strict=True):
                if own:
                    self._apply(player, own, norm)
            if self.ema is not None:
                self.ema.update(self.counters.updates)
            self.counters.updates += 1
        for player in players:
            player.optimizer.zero_grad(set_to_none=True)
        self._loss = torch.zeros(())
        self.counters.train_step += 1
        failure = self._account(finite)
        second = norm_values[1] if len(players) > 1 and grads[1] else None
        return Outcome(loss, norm_values[0], lr, finite, save_due > 0, stop > 0, failed, tuple(sums), second, failure)

    def _apply(self, player: Player, grads: list[Tensor], norm: float) -> None:
        """One factor undoes the loss scale and clips; then the weights change."""
        factor = 1.0 / self.scaler.scale if self.scaler else 1.0
        if self.grad_clip is not None and norm > self.grad_clip:
            factor *= self.grad_clip / (norm + 1e-6)
        if factor != 1.0:
            torch._foreach_mul_(grads, factor)
        player.optimizer.step()

    def _agree(
        self, norms: Tensor, wishes: tuple[float, ...], tallies: Sequence[float]
    ) -> tuple[list[float], list[float], bool, list[float]]:
        """The control all-reduce: one small tensor, so that every rank takes the same decisions."""
        finite = torch.isfinite(norms).all() & torch.isfinite(self._loss)
        control = torch.cat([(~finite).float().view(1), norms.new_tensor(wishes).float(), norms.float()])
        sums = torch.stack([self._loss, *self._loss.new_tensor(tallies)])
        if _world_size() > 1:
            dist.all_reduce(control, op=dist.ReduceOp.MAX)
            dist.all_reduce(sums)
        bad, *values = control.tolist()
        loss, *totals = sums.tolist()
        return [loss / _world_size(), *totals], values[len(wishes) :], bad == 0.0, values[: len(wishes)]

    def _account(self, finite: bool) -> LdmError | None:
        """Skipped steps are counted; too many of them end the run."""
        if finite:
            self.counters.consecutive_skips = 0
        if not self.scaler:
            return None if finite else self.count_skip()
        self.scaler.update(finite)
        if self.scaler.scale >= MIN_SCALE:
            return None
        return LdmError(
            "LOSS-SCALE",
            "the float16 loss scale collapsed",
            limit=f"scale {self.scaler.scale:g}, at least {MIN_SCALE:g}",
            next="train with precision bf16-mixed or 32, or lower the learning rate",
            exit_code=NON_FINITE,
        )

    def count_skip(self) -> LdmError | None:
        """For the step that just ended: it was skipped, and not because float16 is short of range."""
        counters, step = self.counters, self.counters.train_step
        counters.consecutive_skips += 1
        counters.recent_skips = [s for s in counters.recent_skips if s > step - SKIP_WINDOW] + [step]
        row, recent = counters.consecutive_skips, len(counters.recent_skips)
        allowed = max(MAX_CONSECUTIVE_SKIPS, int(MAX_SKIP_FRACTION * SKIP_WINDOW))
        if row < MAX_CONSECUTIVE_SKIPS and recent <= allowed:
            return None
        return LdmError(
            "NON-FINITE",
            f"loss or gradients are not finite at step {step}",
            limit=f"{row} in a row, {recent} of the last {SKIP_WINDOW}; the last good step is {step - row}",
            next="see nonfinite.jsonl for the samples; lower the learning rate or train with precision 32",
            exit_code=NON_FINITE,
        )

    def state(self) -> dict[str, Any]:
        """Everything but weights, averages and optimizer tensors, as JSON."""
        return {
            "train_step": self.counters.train_step,
            "updates": self.counters.updates,
            "samples_seen": self.samples_seen,
            "consecutive_skips": self.counters.consecutive_skips,
            "recent_skips": list(self.counters.recent_skips),
            "scaler": None if self.scaler is None else vars(self.scaler).copy(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.counters = Counters(
            state["train_step"], state["updates"], state["consecutive_skips"], list(state["recent_skips"])
        )
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler = Scaler(**state["scaler"])


def _laid_out_as(parameter: Tensor, value: Any) -> Any:
    """Fused optimizers refuse a moment whose strides differ from its parameter's."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def per_device(batch_size: int, world_size: int, accumulate: int) -> int:
    """Images of one micro-batch on one device."""
    check_cut(batch_size, world_size, accumulate)
    return batch_size // (world_size * accumulate)
