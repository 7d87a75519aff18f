"""The quantised autoencoder: nearest codes, gradients, what the denoiser sees, and codes brought back to life."""

import pytest
import torch

from ldm.models.autoencoder import codebook
from ldm.models.autoencoder.codebook import Codebook
from ldm.models.autoencoder.vq import AutoencoderVQ


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
