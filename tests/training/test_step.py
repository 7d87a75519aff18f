"""The optimizer step, its averages and its rates, against their formulas."""

import math

import pytest
import torch
from torch import nn

from ldm.errors import LdmError
from ldm.training.ema import EMA, HalfLife
from ldm.training.lr_schedule import Constant, Cosine, WarmupStableDecay
from ldm.training.step import MAX_CONSECUTIVE_SKIPS, OptimizerStep, Scaler, per_device


def make(accumulate=1, grad_clip=None, scaler=None, lr=0.1, ema=False, schedule=None):
    torch.manual_seed(0)
    model = nn.Linear(3, 1, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    step = OptimizerStep(
        parameters,
        optimizer=lambda ps: torch.optim.SGD(ps, lr=lr),
        lr_schedule=schedule or Constant(),
        ema=EMA(parameters, HalfLife(100, batch_size=4, warmup=False)) if ema else None,
        batch_size=4,
        accumulate=accumulate,
        grad_clip=grad_clip,
        scaler=scaler,
    )
    return model, step


def data():
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.manual_seed(1))


def backward(loss):
    loss.backward()


def test_accumulation_equals_the_whole_batch():
    whole, step_whole = make()
    parts, step_parts = make(accumulate=2)
    x = data()
    assert step_whole(whole(x).square().mean(), backward).applied
    assert step_parts(parts(x[:2]).square().mean(), backward) is None
    assert step_parts.synchronises
    outcome = step_parts(parts(x[2:]).square().mean(), backward)
    assert outcome.applied and step_parts.train_step == 1
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-12, atol=0)


def test_tallies_are_those_of_the_last_micro_batch():
    model, step = make(accumulate=2)
    x = data()
    assert step(model(x[:2]).square().mean(), backward, tallies=[3, 0]) is None
    outcome = step(model(x[2:]).square().mean(), backward, tallies=[5, 2])
    assert outcome.tallies == (5.0, 2.0)
    reference, single = make()
    assert abs(outcome.loss - single(reference(x).square().mean(), backward).loss) < 1e-12  # not mixed with the loss


def test_clipping_scales_the_gradient_to_the_norm():
    model, step = make(grad_clip=0.01, lr=1.0)
    before = model.weight.detach().clone(), model.bias.detach().clone()
    outcome = step(1000 * model(data()).square().mean(), backward)
    moved = math.sqrt(float((model.weight - before[0]).square().sum() + (model.bias - before[1]).square().sum()))
    assert outcome.grad_norm > 1 and abs(moved - 0.01) < 1e-6


def test_a_nonfinite_step_changes_nothing_but_the_clock():
    model, step = make(ema=True)
    step(model(data()).square().mean(), backward)
    weights = model.weight.detach().clone()
    average = step.ema.averages["weight"].clone()
    outcome = step(model(data()).square().mean() * float("inf"), backward)
    assert not outcome.applied and outcome.failure is None
    assert torch.equal(model.weight, weights) and torch.equal(step.ema.averages["weight"], average)
    assert (step.train_step, step.counters.updates) == (2, 1)


def test_a_finite_loss_with_a_nan_gradient_is_noticed():
    model, step = make()
    outcome = step(torch.sqrt((model(data()) * 0).sum()), backward)  # d sqrt(x) at 0 times 0
    assert not outcome.applied and math.isfinite(outcome.loss)


def test_without_the_check_one_such_step_would_ruin_the_weights():
    model, _ = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.sqrt((model(data()) * 0).sum()).backward()
    optimizer.step()
    assert model.weight.isnan().any()


def test_five_in_a_row_end_the_run():
    model, step = make()
    outcomes = [step(model(data()).sum() * float("nan"), backward) for _ in range(MAX_CONSECUTIVE_SKIPS)]
    assert [o.failure is None for o in outcomes] == [True] * 4 + [False]
    assert outcomes[-1].failure.exit_code == 4 and "nonfinite.jsonl" in outcomes[-1].failure.line()


def test_loss_scale_is_undone_halved_and_stored():
    plain, step_plain = make()
    scaled, step_scaled = make(scaler=Scaler(scale=1024.0, growth_interval=2))
    for model, step in ((plain, step_plain), (scaled, step_scaled)):
        step(model(data()).square().mean(), backward)
    torch.testing.assert_close(plain.weight, scaled.weight, rtol=1e-12, atol=0)
    step_scaled(scaled(data()).square().mean() * float("inf"), backward)
    assert (step_scaled.scaler.scale, step_scaled.scaler.overflows) == (512.0, 1)
    for _ in range(2):
        step_scaled(scaled(data()).square().mean(), backward)
    assert step_scaled.scaler.scale == 1024.0
    _, other = make(scaler=Scaler())
    other.load_state(step_scaled.state())
    assert other.state() == step_scaled.state()


def test_a_collapsing_loss_scale_ends_the_run():
    model, step = make(scaler=Scaler(scale=2.0**-9))
    outcome = None
    for _ in range(2):
        outcome = step(model(data()).sum() * float("inf"), backward)
    assert outcome.failure is not None and outcome.failure.code == "LOSS-SCALE" and outcome.failure.exit_code == 4


def test_average_is_the_weighted_sum_of_all_weights():
    parameters = {"w": nn.Parameter(torch.zeros(2))}
    ema = EMA(parameters, HalfLife(30, batch_size=10, warmup=False))
    decay = ema.main.decay
    assert abs(decay**3 - 0.5) < 1e-12  # three steps of ten images: a half
    values = torch.randn(6, 2, generator=torch.manual_seed(0))
    expected = torch.zeros(2)
    for update, value in enumerate(values):
        parameters["w"].data.copy_(value)
        ema.update(update)
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(ema.averages["w"], expected)


def test_average_equals_lightnings():
    """The same recurrence as torch's AveragedModel, which Lightning's WeightAveraging wraps."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = nn.Linear(3, 2)
    ours = EMA(dict(model.named_parameters()), HalfLife(100, batch_size=10, warmup=False))
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ours.main.decay))
    theirs.update_parameters(model)  # its first call copies
    for update in range(5):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ours.update(update)
        theirs.update_parameters(model)
    torch.testing.assert_close(ours.averages["weight"], theirs.module.weight.detach(), rtol=1e-6, atol=1e-7)


def test_raw_weights_are_back_after_the_average_stood_in():
    model = nn.Linear(3, 2)
    raw = model.weight.detach().clone()
    ema = EMA(dict(model.named_parameters()), HalfLife(10, batch_size=10))
    ema.averages["weight"].fill_(7.0)
    with pytest.raises(RuntimeError, match="in the middle"), ema.applied():
        assert (model.weight == 7.0).all()
        raise RuntimeError("in the middle")
    assert torch.equal(model.weight, raw)


def test_rates():
    cosine = Cosine(max_steps=110, warmup_steps=10, final_factor=0.1)
    assert [round(cosine(u), 9) for u in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert abs(cosine(60) - 0.55) < 1e-9 and abs(cosine(110) - 0.1) < 1e-9 and abs(cosine(500) - 0.1) < 1e-9
    assert [Constant(4)(u) for u in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    stable = WarmupStableDecay(max_steps=100, warmup_steps=0, decay_steps=20)
    assert [stable(u) for u in (0, 79, 80, 90, 100)] == [1, 1, 1, 0.5, 0]
    with pytest.raises(ValueError, match="warmup_steps"):
        Cosine(max_steps=5, warmup_steps=6)


def test_images_of_a_micro_batch():
    assert per_device(32, 2, 4) == 4
    with pytest.raises(LdmError, match="1, 2, 3, 6, 9, 18"):
        per_device(18, 4, 1)
