"""What is trained moves, what is frozen does not; seen after the first update and after a hundred, then never again."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm.errors import UNCLASSIFIED, LdmError
from ldm.training.callbacks.alarms import Alarms
from ldm.training.callbacks.movement import LATER, Movement
from ldm.training.stage_module import StageModule, StageSettings
from ldm.training.step import OptimizerStep


class Stage:
    """A zero-initialised layer behind another one, and something frozen."""

    device = torch.device("cpu")

    def __init__(self, folder, lr=0.1, rates=lambda update: 1.0, policy="warn"):
        torch.manual_seed(0)
        self.net = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("first", "zero", "unused", "frozen")})
        nn.init.zeros_(self.net["zero"].weight)
        self.net["frozen"].requires_grad_(False)
        parameters = {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        self.step = OptimizerStep(
            parameters,
            optimizer=lambda ps: torch.optim.SGD(ps, lr=lr),
            lr_schedule=rates,
            ema=None,
            batch_size=1,
            grad_clip=None,
        )
        self.file = folder / "alarms.jsonl"
        self.movement = Movement(Alarms(self.file, policy))
        self.trainer = SimpleNamespace(is_global_zero=True)
        self.movement.on_train_start(self.trainer, self)

    def observed(self):
        return self.net

    def players(self):
        return {"optim": self.step.player}

    def train(self, updates, factor=1.0):
        for _ in range(updates):
            x = torch.randn(3, 2, generator=torch.manual_seed(self.step.train_step))
            y = self.net["frozen"](self.net["zero"](self.net["first"](x)))
            self.outcome = self.step(factor * (y - 1).square().mean(), lambda loss: loss.backward())
            self.movement.on_train_batch_end(self.trainer, self)

    def heard(self):
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []


def test_only_what_never_moves_is_named(tmp_path):
    stage = Stage(tmp_path)
    stage.train(LATER - 1)
    assert stage.heard() == []  # the first update left "first.weight" as it was, and nobody minds
    stage.train(2 * LATER)
    (row,) = stage.heard()
    assert (row["alarm"], row["train/step"], row["value"]) == ("no_movement", LATER, 2)
    assert row["what"] == "not changed by training: unused.weight, unused.bias (2 of 6 tensors)"


def test_nothing_moves_at_all(tmp_path):
    stage = Stage(tmp_path, lr=1e-60)
    stage.train(1)
    (row,) = stage.heard()
    assert row["train/step"] == 1 and row["value"] == 6
    with pytest.raises(LdmError, match=r"ALARM\]: no_movement: .*; step 1; "):
        (tmp_path / "b").mkdir()
        Stage(tmp_path / "b", lr=1e-60, policy="raise").train(1)


def test_warm_up_from_zero_and_skipped_steps_do_not_count(tmp_path):
    stage = Stage(tmp_path, rates=lambda update: float(update >= 3))
    stage.train(2)
    stage.train(2, factor=float("nan"))
    stage.train(1)
    assert stage.movement._watched["optim"].updates == 0
    stage.train(1)
    assert stage.movement._watched["optim"].updates == 1 and stage.heard() == []


def test_a_group_whose_rate_is_zero_may_rest(tmp_path):
    stage = Stage(tmp_path)
    player = stage.step.player
    resting = [p for n, p in player.parameters.items() if n.startswith("unused")]
    player.optimizer.param_groups[0]["params"] = [p for n, p in player.parameters.items() if not n.startswith("unused")]
    player.optimizer.add_param_group({"params": resting, "lr": 0.0})
    player.base_lrs = [0.1, 0.0]
    stage.train(LATER)
    assert stage.heard() == []


@pytest.mark.parametrize("update", [0, LATER - 1])
def test_a_frozen_parameter_that_moves_ends_the_run(tmp_path, update):
    stage = Stage(tmp_path)
    stage.train(update)
    stage.net["frozen"].weight.data[0, 0] += 1e-6
    with pytest.raises(LdmError, match=r"FROZEN.*; frozen.weight \(1 of 2 tensors\); step ") as raised:
        stage.train(1)
    assert raised.value.exit_code == UNCLASSIFIED


def test_later_it_costs_nothing(tmp_path, monkeypatch):
    stage = Stage(tmp_path)
    stage.train(LATER)
    monkeypatch.setattr("ldm.training.callbacks.movement.hashes", lambda *_: pytest.fail("looked again"))
    stage.train(LATER)


def test_a_model_without_anything_to_train_is_refused():
    class Frozen(StageModule):
        stage = "features"

        def trained(self):
            return nn.Linear(2, 2).requires_grad_(False)

    settings = StageSettings(max_steps=1, batch_size=1, optimizer=torch.optim.SGD, lr_schedule=lambda update: 1.0)
    with pytest.raises(LdmError, match="nothing is trained: every parameter of the model is frozen; stage features"):
        Frozen(settings).configure_optimizers()
