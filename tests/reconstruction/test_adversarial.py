"""Two players, one backward: the gradients against the usual formulation, and who gets which."""

import pytest
import torch
from torch import Tensor, nn

from ldm.models.autoencoder.kl import AutoencoderKL
from ldm.reconstruction.adversarial import KINDS, Adversarial, inputs_of
from ldm.reconstruction.discriminator import PatchDiscriminator
from ldm.reconstruction.objective import ReconstructionObjective, kl_divergence

SIZE = 16


class Smooth(nn.Module):
    """Stands in for a perceptual network: the distance of pictures seen through a fixed convolution."""

    label = "smooth"

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", torch.linspace(-1, 1, 3 * 3 * 9).view(3, 3, 3, 3))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(a - b, self.kernel.to(a.dtype)).square().flatten(1).mean(1)


def make(dtype=torch.float64, patch_size=1, kind="hinge", perceptual=True, learn_logvar=False, **options):
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(3, 2, [8, 8], 1, patch_size, mid_attention=False, norm_groups=4)
    discriminator = PatchDiscriminator(width=8, layers=1, norm_groups=4)
    with torch.no_grad():  # logits of both signs
        for p in discriminator.parameters():
            p.mul_(5)
    objective = ReconstructionObjective(
        kl_weight=0.01,
        perceptual=Smooth() if perceptual else None,
        adversarial=Adversarial(discriminator, kind, weight=0.8, **options),
        learn_logvar=learn_logvar,
    )
    images = torch.rand(4, 3, SIZE, SIZE, dtype=torch.float64) * 2 - 1
    f = 2 * patch_size
    noise = torch.randn(4, 2, SIZE // f, SIZE // f, dtype=torch.float64)
    return autoencoder.to(dtype), objective.to(dtype), images.to(dtype), noise.to(dtype)


def terms_of(autoencoder, objective, images, noise, step=0):
    conv = autoencoder.decoder.conv_out
    with inputs_of(conv) as inputs:
        reconstruction, code = autoencoder(images, noise)
    return objective.training_terms(
        reconstruction, images, code, step, layer=conv, inputs=inputs[0], patch_size=autoencoder.decoder.patch_size
    )


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def usual(autoencoder, objective, images, noise):
    """Esser et al. 2021, eq. 7, as everybody writes it: autograd twice through decoder and losses, then two backwards.

    Returns the autoencoder's gradients, the discriminator's, the weight and the log-variance's gradient.
    """
    adversarial = objective.adversarial
    reconstruction, code = autoencoder(images, noise)
    nll = objective.distance(reconstruction, images)["distance"].mean()
    g_loss = adversarial.generator_loss(adversarial.discriminator(reconstruction)).mean()
    last = autoencoder.decoder.conv_out.weight
    (a,) = torch.autograd.grad(nll, last, retain_graph=True)
    (b,) = torch.autograd.grad(g_loss, last, retain_graph=True)
    weight = adversarial.weight * (a.norm() / (b.norm() + 1e-4)).clamp(0, 1e4).detach()
    for p in adversarial.parameters():
        p.requires_grad_(False)
    (nll + weight * g_loss + objective.kl_weight * kl_divergence(code["moments"]).mean()).backward()
    ours = gradients(autoencoder), None if objective.logvar is None else objective.logvar.grad.clone()
    for p in adversarial.parameters():
        p.requires_grad_(True)
    d = adversarial.discriminator
    adversarial.discriminator_loss(d(images), d(reconstruction.detach())).mean().backward()
    return ours[0], gradients(adversarial), weight, ours[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_one_backward_equals_the_usual_two(kind, patch_size, dtype, tolerance):
    expected, of_discriminator, weight, _ = usual(*make(dtype, patch_size, kind))
    autoencoder, objective, images, noise = make(dtype, patch_size, kind)
    terms = terms_of(autoencoder, objective, images, noise)
    terms["loss"].mean().backward()
    torch.testing.assert_close(terms["adaptive_weight"][0], weight, rtol=tolerance, atol=0)
    for got, wanted in ((gradients(autoencoder), expected), (gradients(objective.adversarial), of_discriminator)):
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert (got[name] - value).norm() <= tolerance * value.norm() + 1e-12, name


def test_the_learnt_log_variance_gets_its_gradient():
    _, _, _, expected = usual(*make(learn_logvar=True))
    autoencoder, objective, images, noise = make(learn_logvar=True)
    terms_of(autoencoder, objective, images, noise)["loss"].mean().backward()
    torch.testing.assert_close(objective.logvar.grad, expected, rtol=1e-10, atol=0)


def test_the_value_of_the_loss_is_that_of_the_autoencoder():
    autoencoder, objective, images, noise = make()
    terms = terms_of(autoencoder, objective, images, noise)
    perceptual, weight = terms["perceptual_smooth"], terms["adaptive_weight"]
    expected = terms["pixel"] + perceptual + weight * terms["adversarial"] + objective.kl_weight * terms["kl"]
    torch.testing.assert_close(terms["loss"], expected)


def test_one_broken_picture_spoils_its_own_loss_alone():
    """Its gradient spoils the step, which is skipped; the losses say whose fault it was."""
    autoencoder, objective, images, noise = make()
    images[2, 0, 0, 0] = float("nan")
    terms = terms_of(autoencoder, objective, images, noise)
    terms["loss"].mean().backward()
    assert terms["loss"].isnan().tolist() == [False, False, True, False]
    assert autoencoder.decoder.conv_out.weight.grad.isnan().any()


def test_accumulated_gradients_add_up():
    autoencoder, objective, images, noise = make(adaptive=False)
    terms_of(autoencoder, objective, images, noise)["loss"].mean().backward()
    whole = {**gradients(autoencoder), **gradients(objective)}
    autoencoder, objective, images, noise = make(adaptive=False)
    for part in (slice(0, 2), slice(2, 4)):
        (terms_of(autoencoder, objective, images[part], noise[part])["loss"].mean() / 2).backward()
    for name, value in {**gradients(autoencoder), **gradients(objective)}.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-12, msg=name)


def test_before_its_start_there_is_no_discriminator(monkeypatch):
    autoencoder, objective, images, noise = make(start_step=3)

    def never(*_):
        raise AssertionError("called")

    monkeypatch.setattr(objective.adversarial.discriminator, "forward", never)
    terms = terms_of(autoencoder, objective, images, noise, step=2)
    terms["loss"].mean().backward()
    assert not gradients(objective.adversarial) and "logits_real" not in terms
    with pytest.raises(AssertionError, match="called"):
        terms_of(autoencoder, objective, images, noise, step=3)


def test_neither_players_loss_reaches_the_others_weights():
    """Scale one player's loss: only that player's gradients may change."""
    results = {}
    for name in ("plain", "autoencoder", "discriminator"):
        autoencoder, objective, images, noise = make(adaptive=False)
        adversarial = objective.adversarial
        if name == "autoencoder":
            before = adversarial.generator_loss
            adversarial.generator_loss = lambda fake, f=before: 3 * f(fake)
        elif name == "discriminator":
            judge = adversarial.discriminator_loss
            adversarial.discriminator_loss = lambda real, fake, f=judge: 3 * f(real, fake)
        terms_of(autoencoder, objective, images, noise)["loss"].mean().backward()
        results[name] = gradients(autoencoder), gradients(adversarial)
    plain, scaled_g, scaled_d = results.values()
    for name, value in plain[0].items():
        assert torch.equal(scaled_d[0][name], value), name
    for name, value in plain[1].items():
        assert torch.equal(scaled_g[1][name], value), name
    assert any(not torch.equal(scaled_g[0][n], v) for n, v in plain[0].items())
    assert any(not torch.equal(scaled_d[1][n], v) for n, v in plain[1].items())


def test_the_perceptual_distance_has_a_gradient():
    grads = []
    for perceptual in (True, False):
        autoencoder, objective, images, noise = make(perceptual=perceptual)
        terms_of(autoencoder, objective, images, noise)["loss"].mean().backward()
        grads.append(gradients(autoencoder)["encoder.conv_in.weight"])
    assert (grads[0] - grads[1]).norm() > 0.1 * grads[1].norm()


def test_ramp_and_clamp():
    adversarial = Adversarial(nn.Identity(), weight=0.5, start_step=10, ramp_steps=4)
    assert [adversarial.weight_at(s) for s in (10, 11, 13, 14, 99)] == [0.125, 0.25, 0.5, 0.5, 0.5]
    assert not adversarial.acts(9) and adversarial.acts(10)
    autoencoder, objective, images, noise = make(max_ratio=1e-3)
    assert torch.allclose(terms_of(autoencoder, objective, images, noise)["adaptive_weight"], images.new_tensor(8e-4))


def test_a_constant_discriminator_leaves_the_weights_finite():
    """Its gradient is zero: the ratio is bounded, not infinite."""
    autoencoder, objective, images, noise = make()
    with torch.no_grad():
        for p in objective.adversarial.parameters():
            p.zero_()
    terms = terms_of(autoencoder, objective, images, noise)
    terms["loss"].mean().backward()
    assert terms["adaptive_weight"].isfinite().all()
    assert all(g.isfinite().all() for g in gradients(autoencoder).values())


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_their_formulas(kind):
    real, fake = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, -3.0]])
    adversarial = Adversarial(nn.Identity(), kind)
    softplus = torch.nn.functional.softplus
    expected = {
        "hinge": (0.5 * (0 + 2 + 1.5 + 0) / 2, (-0.5 + 3) / 2),
        "vanilla": (0.5 * float((softplus(-real) + softplus(fake)).mean()), float(softplus(-fake).mean())),
        "lsgan": (0.5 * (1 + 4 + 0.25 + 9) / 2, 0.5 * (0.25 + 16) / 2),
    }[kind]
    assert adversarial.discriminator_loss(real, fake).item() == pytest.approx(expected[0])
    assert adversarial.generator_loss(fake).item() == pytest.approx(expected[1])


def test_no_discriminator_in_float16_autocast():
    """Gradients of a mean over many logits are below what float16 holds; bfloat16 is left as it surrounds."""
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        autoencoder, objective, images, noise = make(torch.float32)
        seen = []
        objective.adversarial.discriminator.register_forward_hook(lambda *a, seen=seen: seen.append(a[2].dtype))
        with torch.autocast("cpu", dtype=dtype):
            terms_of(autoencoder, objective, images, noise)["loss"].mean().backward()
        assert set(seen) == {expected}


def test_discriminator_is_the_patchgan_of_pix2pix():
    """Weights of the 70x70 PatchGAN with affine norms; its receptive field; what is too small."""
    discriminator = PatchDiscriminator()
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633
    for layers, field in ((1, 16), (2, 34), (3, 70)):
        small = PatchDiscriminator(width=4, layers=layers, norm_groups=4).double()
        for block in small.blocks:
            if isinstance(block, nn.GroupNorm):
                block.forward = lambda x: x  # it would see the whole picture
        x = torch.randn(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
        logits = small(x)
        middle = logits.shape[-1] // 2
        logits[0, 0, middle, middle].backward()
        touched = x.grad.abs().sum((0, 1))
        assert int((touched.sum(0) > 0).sum()) == field and int((touched.sum(1) > 0).sum()) == field
    assert discriminator(torch.zeros(1, 3, 24, 24)).shape[-2:] == (1, 1)
    with pytest.raises(ValueError, match="at least 24"):
        discriminator(torch.zeros(1, 3, 23, 40))


@pytest.mark.parametrize(
    "options,words",
    [({"kind": "wgan"}, "hinge"), ({"weight": -1.0}, "weight"), ({"max_ratio": 0.0}, "max_ratio")],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        Adversarial(nn.Identity(), **options)
