"""Averages against the weighted sums that they stand for, and combinations of them against their profiles."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm.checkpoints.snapshots import Snapshot, Snapshots
from ldm.checkpoints.store import Store
from ldm.cli import compose
from ldm.errors import LdmError
from ldm.training.callbacks.average_snapshots import AverageSnapshots
from ldm.training.ema import EMA, LONGEST, HalfLife, PowerFunction, profiles_of
from ldm.training.fingerprint import settings_of
from ldm.training.posthoc import expressible, inner_products, solve
from ldm.validate import validate

STORED = [(1000 * i, length) for i in range(1, 9) for length in (0.05, 0.1)]


def counted(profile, updates):
    """How much each update counts after `updates` of them, from the definition of a recursive average, in float64."""
    weights = torch.zeros(updates, dtype=torch.float64)
    for update in range(updates):
        decay = profile.decay_at(update)
        weights *= decay
        weights[update] = 1 - decay
    return weights


def density(t, time, gamma):
    """The continuous profile."""
    return torch.where(t <= time, (gamma + 1) * t**gamma / time ** (gamma + 1), torch.zeros(()))


def test_gamma_is_that_of_the_paper():
    """Karras et al. 2024, section 3.1: gamma 6.94 has length 0.10, and 16.97 has 0.05."""
    assert abs(PowerFunction(0.10).gamma - 6.94) < 0.005 and abs(PowerFunction(0.05).gamma - 16.97) < 0.005
    for i in range(1, 289):
        gamma = PowerFunction(i / 1000).gamma
        assert math.isclose(math.sqrt(gamma + 1) / (gamma + 2) / math.sqrt(gamma + 3), i / 1000, rel_tol=1e-9)
    for length in (0.0, -0.1, LONGEST, 0.3):
        with pytest.raises(ValueError, match="a length must be above 0"):
            PowerFunction(length)


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.2])
def test_the_weight_of_an_update_is_the_integral_of_the_profile(length):
    profile, updates = PowerFunction(length), 800
    weights = counted(profile, updates)
    t = torch.arange(1, updates + 1, dtype=torch.float64)
    power = profile.gamma + 1
    torch.testing.assert_close(weights, (t / updates) ** power - ((t - 1) / updates) ** power, rtol=1e-9, atol=1e-12)
    assert abs(weights.sum() - 1) < 1e-9  # of the initial weights nothing is left
    mean = (weights * t).sum()
    assert abs(((weights * (t - mean) ** 2).sum()).sqrt() / updates - length) < 1e-4  # that is what it is called after


def test_all_averages_are_their_weighted_sums():
    """In one update each, float32, against the explicit sum over all weights in float64."""
    values = torch.randn(60, 5, generator=torch.manual_seed(0)).cumsum(0)
    parameter = nn.Parameter(torch.full((5,), 1e3))
    further = [HalfLife(400, 8), PowerFunction(0.05), PowerFunction(0.1)]
    ema = EMA({"w": parameter}, HalfLife(80, 8), further)
    assert list(ema.files()) == ["ema", "ema_half_life_400", "ema_length_0-05", "ema_length_0-1"]
    for update, value in enumerate(values):
        parameter.data.copy_(value)
        ema.update(update)
    for profile, averages in zip([ema.main, *further], ema.files().values(), strict=True):
        weights = counted(profile, len(values))
        expected = (weights[:, None] * values.double()).sum(0)
        if isinstance(profile, HalfLife):
            expected += (1 - weights.sum()) * 1e3  # of which the initial weights are a part
        torch.testing.assert_close(averages["w"].double(), expected, rtol=2e-6, atol=2e-6)  # 60 roundings of float32
        others = counted(PowerFunction(0.08), len(values))
        assert not torch.allclose(averages["w"].double(), (others[:, None] * values.double()).sum(0), rtol=1e-2)


def test_averages_go_on_as_if_nothing_had_happened():
    values = torch.randn(20, 3, generator=torch.manual_seed(0))

    def run(ema, parameter, first, last):
        for update in range(first, last):
            parameter.data.copy_(values[update])
            ema.update(update)

    def make():
        parameter = nn.Parameter(torch.zeros(3))
        return EMA({"w": parameter}, HalfLife(80, 8), [PowerFunction(0.05), PowerFunction(0.2)]), parameter

    whole, first, second = make(), make(), make()
    run(*whole, 0, 20)
    run(*first, 0, 9)
    for name, averages in first[0].files().items():
        second[0].load(name, averages)
    run(*second, 9, 20)
    for name, averages in whole[0].files().items():
        assert torch.equal(averages["w"], second[0].files()[name]["w"])


def test_only_what_the_configuration_names_is_averaged():
    node = {"half_life_images": 4000, "warmup": True, "lengths": []}
    assert profiles_of(None, 8) == () and profiles_of(node, 8) == (HalfLife(4000, 8),)
    several = {"half_life_images": [4000, 20000.0], "warmup": False, "lengths": [0.1]}
    assert profiles_of(several, 8) == (HalfLife(4000, 8, False), HalfLife(20000.0, 8, False), PowerFunction(0.1))


# ---- combinations


def test_inner_products_are_integrals():
    t = torch.linspace(0, 100, 40_001, dtype=torch.float64)
    for time_a, gamma_a, time_b, gamma_b in [(40, 3.0, 100, 7.0), (100, 3.0, 40, 7.0), (70, 0.5, 70, 17.0)]:
        args = [torch.tensor(float(v), dtype=torch.float64) for v in (time_a, gamma_a, time_b, gamma_b)]
        numeric = torch.trapezoid(density(t, *args[:2]) * density(t, *args[2:]), t)
        torch.testing.assert_close(inner_products(*args), numeric, rtol=1e-3, atol=0)  # the step at the end


def profile_of(stored, weights, updates):
    """What a combination counts of each update."""
    pieces = [
        weight * torch.nn.functional.pad(counted_fast(own, at), (0, updates - at))
        for (at, own), weight in zip(stored, weights, strict=True)
    ]
    return torch.stack(pieces).sum(0)


def counted_fast(length, updates):
    t = torch.arange(updates + 1, dtype=torch.float64) / updates
    return (t ** (PowerFunction(length).gamma + 1)).diff()


@pytest.mark.parametrize("length", [0.04, 0.07, 0.15, 0.2])
def test_the_predicted_error_is_that_of_the_profile(length):
    updates = STORED[-1][0]
    found = solve(STORED, updates, length)
    wanted = counted_fast(length, updates)
    off = profile_of(STORED, found.weights, updates) - wanted
    assert abs(float(off.norm() / wanted.norm()) - found.error) < 0.01 * found.error
    assert abs(sum(found.weights) - 1) < 1e-10
    nearest = min(float((profile_of([one], [1.0], updates) - wanted).norm() / wanted.norm()) for one in STORED)
    assert found.error < nearest / 5


def test_no_other_combination_is_closer():
    updates, length = STORED[-1][0], 0.12
    found = solve(STORED, updates, length)
    wanted = counted_fast(length, updates)
    best = float((profile_of(STORED, found.weights, updates) - wanted).norm())
    for seed in range(20):
        change = 1e-2 * torch.randn(len(STORED), generator=torch.manual_seed(seed), dtype=torch.float64)
        other = (torch.tensor(found.weights, dtype=torch.float64) + change - change.mean()).tolist()  # the sum stays
        assert float((profile_of(STORED, other, updates) - wanted).norm()) > best


def test_what_is_stored_is_taken_as_it_is():
    found = solve(STORED, 8000, 0.1)
    expected = [float(key == (8000, 0.1)) for key in STORED]
    assert found.error < 1e-6 and max(abs(a - b) for a, b in zip(found.weights, expected, strict=True)) < 1e-9


def test_some_lengths_are_out_of_reach():
    possible = expressible(STORED, 8000, 0.1)
    assert (possible[0], possible[-1]) == (0.035, 0.215) and 0.1 in possible  # of eight snapshots of two lengths
    assert solve(STORED, 8000, 0.01).error > 0.4 and solve(STORED[:1], 1000, 0.05).weights == pytest.approx([1.0])
    assert expressible(STORED[:1], 8000, 0.1) == []


def test_snapshots_between_which_nothing_moved_do_not_break_it():
    twice = [*STORED, STORED[-1]]
    assert abs(solve(twice, 8000, 0.07).error - solve(STORED, 8000, 0.07).error) < 1e-6


# ---- settings and snapshots


@pytest.fixture(scope="module")
def demo():
    return compose("train", ["experiment=demo"])


def with_ema(cfg, stage, ema):
    return {**cfg, "stage": {**cfg["stage"], stage: {**cfg["stage"][stage], "ema": ema}}}


def test_runs_of_before_these_settings_go_on(demo):
    """The default says nothing new, and how often something is stored changes no average."""

    def averages(stage="diffusion", **changes):
        ema = {**demo["stage"][stage]["ema"], **changes}
        flat = settings_of(with_ema(demo, stage, ema), stage)
        return {key.removeprefix(f"stage.{stage}."): value for key, value in flat.items() if ".ema" in key}

    for stage, images in (("autoencoder", 2000), ("diffusion", 4000), ("features", 4000)):
        assert averages(stage) == {"ema.half_life_images": images}
    assert settings_of(with_ema(demo, "diffusion", None), "diffusion")["stage.diffusion.ema"] is None
    assert averages(snapshot_every=7, snapshot_dtype="float16") == averages()
    assert averages(lengths=[0.1], warmup=False) == {**averages(), "ema.lengths": [0.1], "ema.warmup": False}


@pytest.mark.parametrize(
    "key, value",
    [
        *(("lengths", value) for value in ([0.3], 0.05, [0.05, 0.05], ["a"], [0.0], None)),
        *(("half_life_images", value) for value in ([], 0, [5, 5.0], None, "a")),
        ("snapshot_every", 0),
        ("snapshot_dtype", "bfloat16"),
        ("warmup", 3),
    ],
)
def test_settings_out_of_range_are_refused(demo, key, value):
    ema = {**demo["stage"]["diffusion"]["ema"], "half_life_images": [4000, 20000], "lengths": [0.05, 0.1]}
    validate(with_ema(demo, "diffusion", ema))
    with pytest.raises(LdmError, match=f"stage.diffusion.ema.{key}=.*is refused.*it must be"):
        validate(with_ema(demo, "diffusion", {**ema, key: value}))


def a_module(ema, every=2):
    counters = SimpleNamespace(updates=3)
    step = SimpleNamespace(ema=ema, train_step=4, counters=counters)
    return SimpleNamespace(step=step, due=lambda n: n == every)


def test_rank_0_writes_a_snapshot_when_it_is_due(tmp_path):
    ema = EMA({"w": nn.Parameter(torch.ones(3) / 3)}, HalfLife(5, 1), [HalfLife(9, 1), PowerFunction(0.1)])
    for first, every, written in ((False, 2, []), (True, 3, []), (True, 2, [4])):
        callback = AverageSnapshots(Snapshots(tmp_path / "ema"), every, torch.float16)
        callback.on_train_batch_end(SimpleNamespace(is_global_zero=first), a_module(ema))
        assert Store(tmp_path / "ema").steps() == written
    snapshots = Snapshots(tmp_path / "ema")
    assert snapshots.all() == [Snapshot(4, 3, {"ema_length_0-1": 0.1})]  # steps and updates differ by a skipped step
    assert snapshots.open(4).tensors("ema_length_0-1")["w"].tolist() == [torch.tensor(1 / 3).half().item()] * 3


def test_a_full_disk_costs_a_snapshot_and_not_the_training(tmp_path, monkeypatch, caplog):
    ema = EMA({"w": nn.Parameter(torch.ones(3))}, HalfLife(5, 1), [PowerFunction(0.1)])
    monkeypatch.setattr(Store, "_free", lambda self: 10)
    with caplog.at_level(logging.WARNING):
        callback = AverageSnapshots(Snapshots(tmp_path / "ema"), 2, torch.float32)
        callback.on_train_batch_end(SimpleNamespace(is_global_zero=True), a_module(ema))
    assert "error[DISK]" in caplog.text and "this snapshot of the averages is missing" in caplog.text
    assert Store(tmp_path / "ema").steps() == []
