"""Alarms: each is heard when it should be, once, with step and pictures; and never in a healthy training."""

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch

from ldm.errors import NON_FINITE, LdmError
from ldm.training.callbacks.alarms import LEAST, WINDOW, Alarms, Episode
from ldm.training.callbacks.autoencoder_alarms import GATHER_EVERY, AutoencoderAlarms, constant_images

HEALTHY = {"loss": 0.1, "pixel": 0.1, "kl": 12.0, "discriminator": 0.9, "logits_real": 0.2, "logits_fake": 0.1}


def pictures(*keys, constant=()):
    images = torch.rand(len(keys), 3, 4, 4, generator=torch.manual_seed(0))
    for key in constant:
        images[keys.index(key)] = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1)
    return SimpleNamespace(keys=list(keys), images=images)


class Training:
    """What the callback sees of one, step by step."""

    def __init__(self, folder, policy="warn", world_size=1, rank=0):
        self.file = folder / "alarms.jsonl"
        self.validation = SimpleNamespace(results=None)
        self.alarms = AutoencoderAlarms(self.file, self.validation, policy)
        self.trainer = SimpleNamespace(world_size=world_size, is_global_zero=rank == 0)
        self.module = SimpleNamespace(
            step=SimpleNamespace(train_step=0),
            outcome=None,
            logs={},
            measures=SimpleNamespace(num_codes=100, num_latents=1000),
            settings=SimpleNamespace(max_steps=10**6),
        )

    def step(self, batch=None, *, applied=True, results=None, logs=HEALTHY, **changes):
        self.module.step.train_step += 1
        self.module.outcome = SimpleNamespace(applied=applied)
        self.module.logs = {**logs, **changes}
        self.validation.results = results
        self.alarms.on_train_batch_end(self.trainer, self.module, None, batch or pictures("a", "b"), 0)

    def micro(self, batch):
        self.module.outcome = None
        self.alarms.on_train_batch_end(self.trainer, self.module, None, batch, 0)

    def heard(self):
        rows = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        return [(row["alarm"], row["train/step"]) for row in rows]


def test_a_healthy_training_is_silent(tmp_path, caplog):
    training = Training(tmp_path)
    for i in range(2 * WINDOW):
        wave = 1 + 0.5 * math.sin(i)  # batches differ
        logs = HEALTHY if i > WINDOW else {"loss": 0.1, "pixel": 0.5, "kl": 12.0}  # no discriminator before its start
        results = {"latent_std": 1.3, "codes_used": 0.4} if i % 50 == 0 else None
        training.step(logs=logs, pixel=wave / (1 + i), kl=20 * i / WINDOW, results=results)
    assert training.heard() == [] and not caplog.records


def test_an_alarm_is_one_line_and_one_record(tmp_path, caplog):
    training = Training(tmp_path)
    for _ in range(LEAST):
        training.step()
    with caplog.at_level(logging.WARNING):
        training.step(pictures("x", "y"), pixel=0.31)
    (record,) = caplog.records
    assert record.getMessage() == (
        "alarm: loss_spike: the pixel distance is 0.31, usually 0.1; step 51, pictures x, y; at most 3 times the "
        "median of the last 200 steps, here 0.3; look at these pictures; a lower learning rate or grad_clip"
    )
    (row,) = (json.loads(line) for line in training.file.read_text().splitlines())
    assert row["train/step"] == 51 and row["alarm"] == "loss_spike" and row["value"] == 0.31
    assert row["pictures"] == ["x", "y"] and row["limit"] in record.getMessage()


def test_spikes_are_against_the_median_and_only_once_there_is_one(tmp_path):
    training = Training(tmp_path)
    training.step(pixel=0.001)
    training.step(pixel=1.0)  # the first steps say nothing
    for _ in range(LEAST):
        training.step()
    training.step(pixel=0.29)
    assert training.heard() == []
    training.step(pixel=math.nan, applied=False)  # the optimizer step's own affair
    assert training.heard() == []
    training.step(pixel=0.31)
    assert training.heard() == [("loss_spike", training.module.step.train_step)]


def test_kl_explodes_by_size_or_by_growth(tmp_path):
    training = Training(tmp_path)
    training.step(kl=1001.0)
    assert training.heard() == [("kl_explosion", 1)]
    growing = Training(tmp_path / "b")
    growing.file.parent.mkdir()
    for _ in range(LEAST):
        growing.step(kl=0.5)
    growing.step(kl=99.0)  # below the floor, growth is what the beginning looks like
    assert growing.heard() == []
    growing.step(kl=101.0)
    assert growing.heard() == [("kl_explosion", LEAST + 2)]


def test_a_discriminator_that_tells_nothing_apart(tmp_path):
    training = Training(tmp_path)
    for i in range(WINDOW - 1):
        training.step(logits_real=0.3 + 0.01 * i, logits_fake=0.295 + 0.01 * i)
    assert training.heard() == []
    training.step(logits_real=0.0, logits_fake=0.0)
    assert training.heard() == [("disc_collapse", WINDOW)]
    for _ in range(3 * WINDOW):  # it lasts: once
        training.step(logits_real=0.0, logits_fake=0.0)
    assert len(training.heard()) == 1
    for _ in range(2 * WINDOW):  # it ends, and begins again
        training.step()
    for _ in range(2 * WINDOW):
        training.step(logits_real=0.0, logits_fake=0.0)
    assert [name for name, _ in training.heard()] == ["disc_collapse"] * 2


def test_a_discriminator_that_is_never_in_doubt(tmp_path):
    training = Training(tmp_path)
    for _ in range(WINDOW):
        training.step(logits_real=3.0, logits_fake=-3.0, discriminator=0.02)
    assert training.heard() == []
    for _ in range(WINDOW):
        training.step(logits_real=5.0, logits_fake=-5.0, discriminator=0.0)
    ((name, step),) = training.heard()
    assert name == "disc_collapse" and WINDOW < step < 2 * WINDOW
    assert "never in doubt" in training.file.read_text()


def test_pictures_of_a_single_colour_are_named(tmp_path):
    flags = constant_images(pictures("a", "b", "c", constant=["b"]))
    assert flags.tolist() == [False, True, False]
    nearly = pictures("a", constant=["a"])
    nearly.images[0, 2, 3, 3] += 1 / 127.5
    assert constant_images(nearly).tolist() == [False]
    training = Training(tmp_path)
    training.micro(pictures("a", "b", constant=["a"]))
    training.step(pictures("c", "d", constant=["d"]), applied=False)
    (row,) = (json.loads(line) for line in training.file.read_text().splitlines())
    assert (row["alarm"], row["value"], row["pictures"]) == ("constant_images", 2, ["a", "d"])


def test_ranks_are_asked_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.training.callbacks.autoencoder_alarms.gathered", lambda mine: [mine, ["of another rank"]])
    training = Training(tmp_path, world_size=2)
    other = Training(tmp_path / "other", world_size=2, rank=1)
    training.step(pictures("a", "b", constant=["a"]))
    for _ in range(GATHER_EVERY - 2):
        training.step()
        other.step()
    assert training.heard() == []
    training.step()
    other.step()
    assert training.heard() == [("constant_images", GATHER_EVERY)] and other.heard() == []  # rank 0 writes
    assert json.loads(training.file.read_text())["pictures"] == ["a", "of another rank"]


def test_ranks_are_asked_at_the_last_step_and_again_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.training.callbacks.autoencoder_alarms.gathered", lambda mine: [mine])
    training = Training(tmp_path, world_size=2)
    training.module.settings.max_steps = 4 * GATHER_EVERY + 1
    for _ in range(4 * GATHER_EVERY + 1):
        step = training.module.step.train_step + 1
        training.step(pictures("a", constant=["a"] if step in (1, 4 * GATHER_EVERY + 1) else []))
    assert training.heard() == [("constant_images", GATHER_EVERY), ("constant_images", 4 * GATHER_EVERY + 1)]


@pytest.mark.parametrize(
    "name,bad,good",
    [
        ("latent_spread", {"latent_std": 0.009}, {"latent_std": 0.011}),
        ("latent_spread", {"latent_std": 1001.0}, {"latent_std": 999.0}),
        ("dead_codes", {"codes_used": 0.04}, {"codes_used": 0.06}),
    ],
)
def test_validations_are_watched(tmp_path, name, bad, good):
    training = Training(tmp_path)
    for results in (good, None, bad, None, bad, good, None, good, bad):
        training.step(results=results)
    assert training.heard() == [(name, 3), (name, 9)]


def test_a_small_held_out_set_cannot_use_every_code(tmp_path):
    training = Training(tmp_path)
    training.module.measures.num_latents = 99
    training.step(results={"codes_used": 0.04})
    assert training.heard() == []


def test_raise_ends_the_training(tmp_path):
    training = Training(tmp_path, policy="raise")
    with pytest.raises(LdmError, match=r"error\[ALARM\]: kl_explosion: .*; step 1, pictures a, b; ") as raised:
        training.step(kl=1e5)
    assert raised.value.exit_code == NON_FINITE and training.heard() == [("kl_explosion", 1)]


class Diffusion(Training):
    """Of any stage; its metrics are written as a run's are."""

    def __init__(self, folder, policy="warn"):
        super().__init__(folder)
        self.metrics = folder / "metrics.jsonl"
        self.alarms = Alarms(self.file, policy, self.metrics)

    def train(self, losses):
        for loss in losses:
            self.step(logs={"loss": loss})
            row = {"train/step": self.module.step.train_step, "train/loss": loss, "train/applied": 1}
            with open(self.metrics, "a") as file:
                file.write(json.dumps(row) + "\n")


def test_losses_of_random_noise_levels_are_no_spikes(tmp_path):
    """A noise prediction with a batch of one: its loss is exp(-5.8 t), for any t from 0 to 1."""
    times = torch.rand(3 * WINDOW, generator=torch.manual_seed(0)).tolist()
    losses = [math.exp(-5.8 * t) for t in times]
    assert sum(loss > 3 * 0.055 for loss in losses) > WINDOW / 2  # the control: three times the median is usual
    training = Diffusion(tmp_path)
    training.train(losses)
    assert training.heard() == []
    steady = Diffusion(tmp_path / "b")
    steady.file.parent.mkdir()
    steady.train([0.1 + 0.01 * t for t in times] + [0.4])
    assert steady.heard() == [("loss_spike", 3 * WINDOW + 1)]
    assert json.loads(steady.file.read_text())["pictures"] == ["a", "b"]


def test_a_resumed_training_hears_what_an_unbroken_one_does(tmp_path):
    """Cut in the middle of an episode, and again where a window is needed that reaches back over the cut."""
    losses = ([0.1] * 299 + [1.0]) * 2 + [0.1] * 150 + [1.0] * 3 + [0.1] * 260 + [1.0]

    def run(folder, *cuts, recall=True):
        (tmp_path / folder).mkdir()
        training = Diffusion(tmp_path / folder)
        for begin, end in zip((0, *cuts), (*cuts, len(losses)), strict=True):
            training.alarms = Alarms(training.file, metrics=training.metrics if recall else None)
            training.alarms.on_train_start(training.trainer, training.module)
            training.train(losses[begin:end])
        return training.heard()

    whole = run("whole")
    assert [step for _, step in whole] == [300, 600, len(losses)]
    assert run("cut", 299, 601, 752, 1000) == whole
    assert run("forgetful", 299, 601, 752, 1000, recall=False) != whole  # the control


def test_an_episode_begins_once():
    episode = Episode(quiet=2)
    seen = [episode.begins(x) for x in (True, True, False, True, False, False, True, False, False, False, True)]
    assert seen == [True] + [False] * 5 + [True] + [False] * 3 + [True]
