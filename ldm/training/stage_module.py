"""What all LightningModules share: manual optimisation through one `OptimizerStep`, the draws, resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldm.checkpoints.store import Checkpoint
from ldm.errors import LdmError
from ldm.model import load_weights
from ldm.random import Draws, run_key, seed_modules
from ldm.training.ema import EMA, Profile
from ldm.training.nonfinite import NOT_FOUND, in_words, origin_of_step
from ldm.training.ranks import gathered
from ldm.training.step import MAX_CONSECUTIVE_SKIPS, OptimizerStep, Outcome, Player, Scaler, per_device
from ldm.types import Batch


@dataclass(frozen=True)
class StageSettings:
    """The part of `stage.<name>` that the optimizer step needs; see configs/stage."""

    max_steps: int
    batch_size: int
    optimizer: Callable[..., torch.optim.Optimizer]
    lr_schedule: Callable[[int], float]
    ema: tuple[Profile, ...] = ()
    accumulate: int = 1
    grad_clip: float | None = 1.0
    precision: str = "32"
    seed: int = 0
    param_groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class StageModule(pl.LightningModule):
    """Batch -> loss -> one optimizer step. A subclass names what is trained and computes the loss.

    Callbacks read `outcome` (None unless a step was just finished), `logs`, `not_finite` (of a skipped step: `_blame`)
    and `step`.
    """

    stage: str

    def __init__(self, settings: StageSettings) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.settings = settings
        self.key = run_key(settings.seed)
        self.step: OptimizerStep
        self.outcome: Outcome | None = None
        self.logs: dict[str, float] = {}
        self.save_due = self.stop_due = False
        self.failed_saves = 0.0
        self.not_finite: dict[str, Any] = {}
        self._tallies = [0, 0]
        self._micro_logs: list[Mapping[str, Tensor]] = []
        self._suspects: list[tuple[Batch, Tensor]] = []
        self._resume: Checkpoint | None = None

    # what a subclass says

    def trained(self) -> nn.Module:
        """The module whose parameters are trained, averaged and saved."""
        raise NotImplementedError

    def loss(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """[B] each; "loss" is minimised, the rest is logged."""
        raise NotImplementedError

    def networks(self) -> list[nn.Module]:
        """The parts of it that nearly all time goes into: what `trainer.compile` compiles."""
        raise NotImplementedError

    def observed(self) -> nn.Module:
        """All that computes the loss, with what is frozen."""
        return self

    def further_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained along but is no part of the model: neither averaged nor saved with it."""
        return {}

    def discriminator(self) -> Player | None:
        """A second player with an optimizer of its own."""
        return None

    def step_ended(self) -> None:
        """After each optimizer step that was applied, before its checkpoint."""

    def validation_terms(self, batch: Batch) -> dict[str, Tensor]:
        """[B] each; "loss" decides which checkpoint is best."""
        raise NotImplementedError

    def validation_summary(self) -> dict[str, float]:
        """Of all that `validation_terms` has seen since the last call, of all ranks; every rank takes part."""
        return {}

    def document(self) -> dict[str, Any]:
        """What config.json of a checkpoint holds: everything needed to rebuild the model."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What state.json holds beside the counters."""
        return {}

    def captions_cut(self) -> int:
        """How many captions were longer than the model reads, so far in this process."""
        return 0

    def finish(self) -> None:
        """The work between the last step and the final checkpoint."""

    # what callbacks ask

    def due(self, every: int | None) -> bool:
        """True at the end of every `every`-th step and of the last one; never for None."""
        if self.outcome is None or every is None:
            return False
        return self.step.train_step % every == 0 or self.step.train_step >= self.settings.max_steps

    @property
    def evaluation_batch(self) -> int:
        """Pictures that are looked at together outside training: as many as training fits in memory, at most 64."""
        s = self.settings
        return min(64, per_device(s.batch_size, self.trainer.world_size, s.accumulate))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Evaluation mode, no gradients, and the averaged weights where the stage keeps an average. Nothing is compiled
        for it: its shapes are many and not worth a minute each.
        """
        was_training = self.training
        self.eval()
        average = self.step.ema.applied() if self.step.ema else nullcontext()
        try:
            with torch.compiler.set_stance("force_eager"), torch.no_grad(), average:
                yield
        finally:
            self.train(was_training)

    # the step

    def configure_optimizers(self) -> None:
        """Called by Lightning once the module is on its device. The optimizer is ours alone."""
        s = self.settings
        averaged = {n: p for n, p in self.trained().named_parameters() if p.requires_grad}
        if not averaged:
            what = "nothing is trained: every parameter of the model is frozen"
            raise LdmError("CONFIG", what, where=f"stage {self.stage}", next="leave requires_grad of some of them on")
        ema = EMA(averaged, s.ema[0], s.ema[1:]) if s.ema else None
        self.step = OptimizerStep(
            {**averaged, **self.further_parameters()},
            optimizer=s.optimizer,
            param_groups=s.param_groups,
            lr_schedule=s.lr_schedule,
            ema=ema,
            batch_size=s.batch_size,
            accumulate=s.accumulate,
            grad_clip=s.grad_clip,
            scaler=Scaler() if s.precision == "16-mixed" else None,
            discriminator=self.discriminator(),
        )
        if self._resume is not None:
            self._restore(self._resume)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        wrapped = self.trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.require_backward_grad_sync = self.step.synchronises
        seed_modules(self.key, self.step.train_step, self.step.micro, self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        slots = batch.slots.to(self.device, non_blocking=True)
        cut = self.captions_cut()
        terms = self.loss(batch, Draws(self.key, slots, host=batch.slots))
        self._tallies[0] += self.trainer.datamodule.ledger.taken(batch.slots.tolist())  # type: ignore[attr-defined]
        self._tallies[1] += self.captions_cut() - cut
        self._micro_logs.append({k: v.detach().float().mean() for k, v in terms.items()})
        self._suspects.append((batch, terms["loss"].detach()))
        self.outcome = self.step(
            terms["loss"].mean(),
            self.manual_backward,
            save_due=self.save_due,
            stop=self.stop_due,
            failed_saves=self.failed_saves,
            tallies=self._tallies,
        )
        if self.outcome is not None:
            self._tallies = [0, 0]
            rows = torch.stack([torch.stack(list(micro.values())) for micro in self._micro_logs])
            self.logs = dict(zip(self._micro_logs[0], rows.mean(0).tolist(), strict=True))
            self.logs["loss"] = self.outcome.loss  # of all ranks
            if self.outcome.discriminator_grad_norm is not None:
                self.logs["discriminator_grad_norm"] = self.outcome.discriminator_grad_norm
            self.not_finite = {} if self.outcome.applied else self._blame()
            self._micro_logs, self._suspects = [], []
            if self.outcome.applied:
                self.step_ended()
            if self.outcome.stop or self.step.train_step >= self.settings.max_steps:
                self.trainer.should_stop = True

    def _blame(self) -> dict[str, Any]:
        """Where a skipped step ceased to be finite, and its samples, of all ranks; every rank takes part, for all have
        skipped. Empty if only float16 cannot hold it, which is the loss scale's affair.
        """
        assert self.outcome is not None
        scaler = self.step.scaler
        if scaler is not None and scaler.overflows_in_a_row > MAX_CONSECUTIVE_SKIPS:
            return {}
        origin = origin_of_step(self, [batch for batch, _ in self._suspects])
        mine = [
            {"key": key, "slot": slot, "loss": value}
            for batch, losses in self._suspects
            for key, slot, value in zip(batch.keys, batch.slots.tolist(), losses.tolist(), strict=True)
        ]
        origins, samples = zip(*gathered((origin, mine)), strict=True)
        rank = next((rank for rank, each in enumerate(origins) if each.module is not None), None)
        if rank is None and scaler is not None:
            return {}
        found = origins[rank] if rank is not None else next((o for o in origins if o != NOT_FOUND), NOT_FOUND)
        row = {**asdict(found), "rank": rank, "samples": [each for rows in samples for each in rows]}
        failure = self.outcome.failure if scaler is None else self.step.count_skip()
        if failure is not None:
            words = {"where": in_words(row), "limit": failure.limit, "next": failure.next}
            failure = LdmError(failure.code, failure.what, **words, exit_code=failure.exit_code)
            self.outcome = replace(self.outcome, failure=failure)
        return row

    # the state

    def resume_from(self, checkpoint: Checkpoint) -> None:
        """Weights now, optimizer, averages and counters as soon as they exist."""
        load_weights(self.trained(), checkpoint.tensors("model"), checkpoint.path)
        self._resume = checkpoint

    def _restore(self, checkpoint: Checkpoint) -> None:
        for name, player in self.players().items():
            if f"{name}.json" not in checkpoint.manifest["files"]:
                print(f"{self.stage}: the checkpoint holds no {name}: it begins anew", flush=True)
                continue
            player.load_state(checkpoint.tree(name))  # its settings are those of the configuration, as drift allowed
        self.step.load_state(checkpoint.document("state"))
        if (ema := self.step.ema) is not None:
            for name in ema.files():
                if f"{name}.safetensors" not in checkpoint.manifest["files"]:
                    what = f"the checkpoint holds no average {name}: one that began now would weigh other steps"
                    hint = "leave it out of the settings, or begin a new run: name=NAME init_from=RUN"
                    raise LdmError("CKPT-CONTENT", what, where=str(checkpoint.path), next=hint)
                ema.load(name, checkpoint.tensors(name))
        self._resume = None

    def players(self) -> dict[str, Player]:
        """By the names that their optimizers have in a checkpoint."""
        discriminator = self.step.discriminator
        return {
            "optim": self.step.player,
            **({"optim_discriminator": discriminator} if discriminator is not None else {}),
        }

    def trees(self) -> dict[str, Any]:
        """What the checkpoint holds of the optimizers."""
        return {name: player.state() for name, player in self.players().items()}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What the checkpoint's safetensors files hold."""
        groups = {"model": self.trained().state_dict()}
        if self.step.ema is not None:
            groups |= self.step.ema.files()
        return groups
