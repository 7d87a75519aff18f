"""Codes that are never chosen begin anew, in the optimizer and the average too, however a batch is cut."""

import subprocess
import sys
from functools import partial

import pytest
import torch

from ldm.random import run_key
from ldm.training.codebook import WEIGHT, tend_codebook
from ldm.training.ema import EMA, HalfLife, PowerFunction
from ldm.training.step import OptimizerStep
from tests.integration.tiny import ROOT
from tests.models.test_autoencoder_vq import seeded, toy


def step_of(model, batch_size=4):
    parameters = dict(model.named_parameters())
    return OptimizerStep(
        parameters,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        lr_schedule=lambda updates: 1.0,
        ema=EMA(parameters, HalfLife(20, batch_size), [PowerFunction(0.1)]),
        batch_size=batch_size,
    )


def train(model, step, first, last, cut=1):
    """Steps `first` to `last` on pictures that depend on the step alone, each batch cut in `cut` micro-batches."""
    revived, step.accumulate = [], cut
    model.train()
    for at in range(first, last + 1):
        said = []
        for images in seeded(100 + at, 4, 3, 8, 8).chunk(cut):
            reconstruction, code = model(images)
            said.append(code)
            loss = (reconstruction - images).square().mean() + (code["codebook"] + code["commitment"]).mean()
            step(loss, torch.Tensor.backward)
        revived.append(tend_codebook(model, step, said, run_key(0)))
    return revived


def test_revived_codes_begin_anew():
    """They have no moments in the optimizer and are their own average; the others go on as they were."""
    model = toy(revive_every=6, codebook_size=64)
    step = step_of(model)
    train(model, step, 1, 2)
    weight = model.quantize.embedding.weight
    moments, average = step.optimizer.state[weight], step.ema.averages[WEIGHT]
    learnt = moments["exp_avg"].any(1)
    model.quantize.uses.zero_()  # what was chosen until now may die too: it has moments
    (count,) = train(model, step, 3, 3)
    revived = (weight == average).all(1)
    assert (weight == step.ema.further["ema_length_0-1"][WEIGHT])[revived].all()
    assert count == revived.sum() > 0 and not model.quantize.uses.any()
    assert (learnt & revived).any() and not revived.all()
    for name in ("exp_avg", "exp_avg_sq"):
        assert not moments[name][revived].any() and moments[name][~revived].any(1).all()
    assert moments["step"] == 3


def test_a_codebook_that_is_not_trained_keeps_its_codes():
    for model in (toy(revive_every=None), toy(revive_every=1)):
        if model.revive_every == 1:
            model.requires_grad_(False)
        before = model.latent_id()
        _, code = model(seeded(9, 4, 3, 8, 8))
        step = type("Step", (), {"train_step": 1})()
        assert tend_codebook(model, step, [code], 0) == 0 and model.latent_id() == before
        assert not model.quantize.uses.any()


@pytest.mark.parametrize("cut", [2, 4])
def test_revival_does_not_depend_on_how_the_batch_is_cut(cut):
    models = [toy(revive_every=2, codebook_size=64) for _ in range(2)]
    counts = [train(model, step_of(model), 1, 4, n) for model, n in zip(models, (1, cut), strict=True)]
    assert counts[0] == counts[1] and min(counts[0][::2]) > 0 and not any(counts[0][1::2])
    books = [model.quantize.embedding.weight for model in models]
    torch.testing.assert_close(*books, rtol=1e-4, atol=1e-5)


def test_stopping_between_revivals_changes_nothing():
    whole = toy(revive_every=4, codebook_size=64)
    train(whole, step_of(whole), 1, 6)
    first = toy(revive_every=4, codebook_size=64)
    step = step_of(first)
    train(first, step, 1, 4)
    assert first.quantize.uses.any()
    second = toy(revive_every=4, codebook_size=64)
    again = step_of(second)
    second.load_state_dict(first.state_dict())  # the counts are in it
    again.optimizer.load_state_dict(step.optimizer.state_dict())
    for file, averages in step.ema.files().items():
        again.ema.load(file, averages)
    again.load_state(step.state())
    forgetful = toy(revive_every=4, codebook_size=64)
    without = step_of(forgetful)
    forgetful.load_state_dict(first.state_dict())
    forgetful.quantize.uses.zero_()
    without.load_state(step.state())
    assert train(second, again, 5, 6)[-1] > 0
    train(forgetful, without, 5, 6)
    assert torch.equal(second.quantize.embedding.weight, whole.quantize.embedding.weight)
    assert not torch.equal(forgetful.quantize.embedding.weight, whole.quantize.embedding.weight)


def test_a_collapsed_codebook_is_used_again():
    """Codes far from all latents are never chosen, and without revival never move."""
    used = {}
    for every in (None, 2):
        model = toy(revive_every=every, codebook_size=64)
        with torch.no_grad():
            model.quantize.embedding.weight[1:] += 100
        train(model, step_of(model), 1, 6)
        _, code = model.eval()(seeded(10, 16, 3, 8, 8))
        used[every] = len(code["codes"].unique())
    assert used[None] == 1 and used[2] > 20


_RANK = """
import sys, torch
import torch.distributed as dist
from tests.models.test_autoencoder_vq import seeded, toy
from tests.training.test_codebook import step_of, tended
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
model = toy(revive_every=2, codebook_size=64)
counts = tended(model, step_of(model), 4, share=rank)
torch.save((counts, model.state_dict()), f"{sys.argv[3]}/{rank}.pt")
dist.destroy_process_group()
"""


def tended(model, step, last, share=None):
    """Steps whose weights stay: the codebook alone changes, by what is chosen. share: this rank's half of the batch."""
    counts = []
    for at in range(1, last + 1):
        images = seeded(100 + at, 4, 3, 8, 8)
        with torch.no_grad():
            _, code = model(images if share is None else images.chunk(2)[share])
        step.counters.train_step = at
        counts.append(tend_codebook(model, step, [code], run_key(0)))
    return counts


@pytest.mark.slow
def test_two_ranks_do_what_one_does(tmp_path):
    words = [sys.executable, "-c", _RANK]
    place = f"file://{tmp_path}/meeting"
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*words, str(rank), place, str(tmp_path)], **options) for rank in range(2)]
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert not any(rank.returncode for rank in ranks), said
    one = toy(revive_every=2, codebook_size=64)
    counts = tended(one, step_of(one), 4)
    assert counts[0] > 0 and counts[2] > 0
    for rank in range(2):
        found, state = torch.load(tmp_path / f"{rank}.pt")
        assert found == counts
        for name, value in one.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5)
    half = toy(revive_every=2, codebook_size=64)
    tended(half, step_of(half), 4, share=0)
    assert not torch.allclose(half.quantize.embedding.weight, one.quantize.embedding.weight, rtol=1e-3, atol=1e-3)
