"""The quantised autoencoder: nearest codes, gradients, what the denoiser sees, and codes brought back to life."""

from functools import partial

import pytest
import torch

from ldm.models.autoencoder import codebook
from ldm.models.autoencoder.codebook import Codebook
from ldm.models.autoencoder.vq import AutoencoderVQ
from ldm.random import run_key
from ldm.training.codebook import WEIGHT, tend_codebook
from ldm.training.ema import EMA
from ldm.training.step import OptimizerStep


def seeded(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def toy(revive_every=100, **options):
    torch.manual_seed(0)
    sizes = {"codebook_size": 32, "block_channels": [8], "layers_per_block": 1, "patch_size": 2, "norm_groups": 4}
    model = AutoencoderVQ(revive_every=revive_every, **sizes | options)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


def test_the_nearest_code_is_that_of_the_formula(monkeypatch):
    book = Codebook(50, 5)
    torch.nn.init.normal_(book.embedding.weight)
    z = seeded(1, 3, 5, 4, 6)
    squares = (z.movedim(1, -1)[..., None, :].double() - book.embedding.weight.double()).square().sum(-1)
    assert torch.equal(book.nearest(z), squares.argmin(-1))
    monkeypatch.setattr(codebook, "TABLE", 350)  # seven positions at a time
    assert torch.equal(book.nearest(z), squares.argmin(-1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(book.nearest(z), squares.argmin(-1))
    rounded = torch.addmm(
        book.embedding.weight.square().sum(1), z.movedim(1, -1).flatten(0, -2), book.embedding.weight.T
    )
    assert not torch.equal(rounded.argmin(1).view(3, 4, 6), squares.argmin(-1))  # another formula would be noticed


def test_gradients_go_around_the_choice():
    book = Codebook(20, 3).double()
    torch.nn.init.normal_(book.embedding.weight)
    z = seeded(2, 2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    values, codes, codebook_penalty, commitment = book(z)
    chosen = book.embedding.weight[codes].movedim(-1, 1)
    assert torch.equal(values, chosen)  # to the bit, though z is added and subtracted
    assert codes.shape == (2, 4, 4) and codebook_penalty.shape == commitment.shape == (2,)
    expected = (z - chosen).square().mean((1, 2, 3))
    for penalty in (codebook_penalty, commitment):
        torch.testing.assert_close(penalty, expected, rtol=1e-12, atol=0)
    weight, size = book.embedding.weight, z[0].numel()

    def gradients(value):
        return torch.autograd.grad(value, [z, weight], retain_graph=True, materialize_grads=True)

    to_z, to_codes = gradients((values * 3).sum())
    assert torch.equal(to_z, torch.full_like(z, 3)) and not to_codes.any()
    to_z, to_codes = gradients(commitment.sum())
    torch.testing.assert_close(to_z, 2 * (z - chosen) / size, rtol=1e-12, atol=1e-15)
    assert not to_codes.any()
    to_z, to_codes = gradients(codebook_penalty.sum())
    moved = torch.zeros_like(weight).index_add_(
        0, codes.flatten(), (2 * (chosen - z) / size).movedim(1, -1).flatten(0, 2)
    )
    torch.testing.assert_close(to_codes, moved, rtol=1e-12, atol=1e-15)
    assert not to_z.any()


def test_penalties_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers.models.autoencoders.vae")
    book = Codebook(20, 3)
    torch.nn.init.normal_(book.embedding.weight)
    theirs = diffusers.VectorQuantizer(20, 3, beta=0.25, legacy=False)
    theirs.embedding.load_state_dict(book.embedding.state_dict())
    z = seeded(3, 2, 3, 8, 8)
    values, codes, codebook_penalty, commitment = book(z)
    quantised, loss, (_, _, indices) = theirs(z)
    torch.testing.assert_close(values, quantised, rtol=1e-6, atol=1e-6)
    assert torch.equal(codes.flatten(), indices.flatten())
    torch.testing.assert_close((codebook_penalty + 0.25 * commitment).mean(), loss, rtol=1e-6, atol=0)


def test_the_way_through_it():
    model = toy().eval()
    images = seeded(4, 2, 3, 16, 8)
    model.statistics.set(seeded(5, 4).double(), seeded(6, 4).double().exp(), 10)
    reconstruction, code = model(images)
    assert {name: tuple(value.shape) for name, value in code.items()} == {
        "latents": (2, 4, 8, 4), "codes": (2, 8, 4), "codebook": (2,), "commitment": (2,)
    }  # fmt: skip
    assert model.moment_channels == model.latent_channels == 4 and model.downsampling == 2
    latents = model.encode(images)
    assert torch.equal(latents, model.statistics.standardise(code["latents"]))  # not quantised
    assert torch.equal(latents, model.latents(model.moments(images), noise=None))
    torch.testing.assert_close(model.decode(latents), reconstruction, rtol=1e-5, atol=1e-5)
    nudged = model.decode(latents + 1e-3 * seeded(7, *latents.shape))
    same = model.quantize.nearest(model.statistics.restore(latents + 1e-3)).eq(code["codes"]).float().mean()
    assert same > 0.95 and nudged.sub(reconstruction).abs().median() < 1e-6  # decoding quantises small errors away
    plain = model.decoder(model.post_quant_conv(model.statistics.restore(latents)))
    assert plain.sub(reconstruction).abs().mean() > 1e-2  # which decoding without the codebook does not


def test_every_parameter_learns():
    model = toy()
    reconstruction, code = model(seeded(8, 2, 3, 16, 16))
    (reconstruction.square().mean() + (code["codebook"] + 0.25 * code["commitment"]).mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_latent_id_covers_the_codebook():
    model = toy()
    before = model.latent_id()
    with torch.no_grad():
        model.decoder.conv_out.weight.add_(1.0)
        model.quantize.uses.add_(1)
        model.statistics.count.add_(1)
    assert model.latent_id() == before  # what latents do not depend on
    changing = (
        model.encoder.conv_in.weight,
        model.quant_conv.weight,
        model.statistics.std,
        model.quantize.embedding.weight,
    )
    for change in changing:
        with torch.no_grad():
            change.add_(1e-3)
        assert model.latent_id() != before
        before = model.latent_id()


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="revive_every"):
        toy(revive_every=0)
    with pytest.raises(ValueError, match="codebook_size"):
        toy(codebook_size=1)
    with pytest.raises(ValueError, match="norm_groups"):
        toy(norm_groups=5)
    assert toy(revive_every=None).revive_every is None


def test_unused_codes_take_the_place_of_latents():
    book = Codebook(10, 2)
    old = book.embedding.weight.detach().clone()
    book.count(torch.tensor([[3, 3], [7, 0]]))
    assert book.uses.tolist() == [1, 0, 0, 2, 0, 0, 0, 1, 0, 0]
    candidates = torch.arange(40.0).view(20, 2)
    revived = book.revive(candidates, torch.tensor([5]))
    assert revived.tolist() == [1, 2, 4, 5, 6, 8, 9] and not book.uses.any()
    taken = book.embedding.weight[revived]
    assert all(bool((candidates == row).all(1).any()) for row in taken) and len(taken.unique(dim=0)) == 7
    assert torch.equal(book.embedding.weight[[0, 3, 7]], old[[0, 3, 7]])
    again = Codebook(10, 2)
    again.count(torch.tensor([3, 7, 0]))
    again.revive(candidates, torch.tensor([5]))
    assert torch.equal(again.embedding.weight[revived], taken)  # no hidden randomness
    again.count(torch.tensor([3, 7, 0]))
    again.revive(candidates, torch.tensor([6]))
    assert not torch.equal(again.embedding.weight[revived], taken)


def test_fewer_latents_than_dead_codes():
    book = Codebook(10, 2)
    assert book.revive(torch.ones(3, 2), torch.tensor([0])).tolist() == [0, 1, 2]
    book.count(torch.arange(10))
    assert book.revive(torch.ones(3, 2), torch.tensor([0])).tolist() == []


def step_of(model, batch_size=4):
    parameters = dict(model.named_parameters())
    return OptimizerStep(
        parameters,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        lr_schedule=lambda updates: 1.0,
        ema=EMA(parameters, half_life_images=20, batch_size=batch_size),
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
    """They have no moments in the optimizer and are their own average; the others are as if nothing had happened."""
    model = toy(revive_every=3, codebook_size=64)
    step = step_of(model)
    train(model, step, 1, 2)
    used = model.quantize.uses > 0
    assert 0 < used.sum() < 64
    before = {name: moment.clone() for name, moment in step.optimizer.state[model.quantize.embedding.weight].items()}
    (revived,) = train(model, step, 3, 3)
    assert revived > 0 and not model.quantize.uses.any()
    weight, average = model.quantize.embedding.weight.detach(), step.ema.averages[WEIGHT]
    same = (weight == average).all(1)
    assert same.sum() == revived and not (same & used).any()
    moments = step.optimizer.state[model.quantize.embedding.weight]
    for name in ("exp_avg", "exp_avg_sq"):
        assert not moments[name][same].any() and moments[name][used].any()
        assert not torch.equal(moments[name], before[name])
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
    assert counts[0] == counts[1] and counts[0][1] > 0 and counts[0][0] == 0
    books = [model.quantize.embedding.weight for model in models]
    torch.testing.assert_close(*books, rtol=1e-4, atol=1e-5)


def test_stopping_between_revivals_changes_nothing():
    whole = toy(revive_every=4, codebook_size=64)
    train(whole, step_of(whole), 1, 4)
    first = toy(revive_every=4, codebook_size=64)
    step = step_of(first)
    train(first, step, 1, 2)
    assert first.quantize.uses.any()
    second = toy(revive_every=4, codebook_size=64)
    again = step_of(second)
    second.load_state_dict(first.state_dict())  # the counts are in it
    again.optimizer.load_state_dict(step.optimizer.state_dict())
    again.ema.load(step.ema.averages)
    again.load_state(step.state())
    forgetful = toy(revive_every=4, codebook_size=64)
    without = step_of(forgetful)
    forgetful.load_state_dict(first.state_dict())
    forgetful.quantize.uses.zero_()
    without.load_state(step.state())
    assert train(second, again, 3, 4)[-1] > 0
    train(forgetful, without, 3, 4)
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
