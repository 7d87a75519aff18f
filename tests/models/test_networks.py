"""Networks: parameter counts of the published models, shapes, masks, identities."""

import pytest
import torch

from ldm.models.autoencoder.kl import AutoencoderKL, posterior
from ldm.models.conditioner.text_transformer import TextTransformer
from ldm.models.conditioner.tokenizer import END, START, Tokenizer
from ldm.models.layers.attention import Attention, attention
from ldm.models.unet.unet import UNet
from ldm.reconstruction.objective import kl_divergence
from ldm.types import Conditioning


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "name,options,expected",
    [
        ("sd15", {"context_size": 768, "num_heads": 8, "head_dim": None, "linear_projection": False}, 859_520_964),
        ("sd21", {"context_size": 1024}, 865_910_724),
        (
            "sdxl",
            {
                "block_channels": (320, 640, 1280),
                "transformer_depth": (0, 2, 10),
                "mid_transformer_depth": 10,
                "context_size": 2048,
                "vector_size": 2816,
            },
            2_567_463_684,
        ),
    ],
)
def test_unet_has_the_published_number_of_parameters(name, options, expected):
    with torch.device("meta"):
        assert count(UNet(**options)) == expected


def test_autoencoder_has_the_published_number_of_parameters():
    with torch.device("meta"):
        assert count(AutoencoderKL()) == 83_653_863


def toy_unet(**options):
    defaults = {
        "in_channels": 4,
        "out_channels": 4,
        "block_channels": [16, 32],
        "layers_per_block": 1,
        "transformer_depth": [0, 1],
        "context_size": 12,
        "head_dim": 8,
        "norm_groups": 8,
    }
    torch.manual_seed(0)
    return UNet(**{**defaults, **options})


def toy_conditioning(length=5, **fields):
    torch.manual_seed(1)
    mask = torch.ones(2, length, dtype=torch.bool)
    return Conditioning(tokens=torch.randn(2, length, 12), mask=mask, **fields)


def test_unet_forward_and_backward_reach_every_parameter():
    net = toy_unet(vector_size=6)
    cond = toy_conditioning(vector=torch.randn(2, 6))
    out = net(torch.randn(2, 4, 8, 8), torch.tensor([1.0, 900.0]), cond)
    assert out.shape == (2, 4, 8, 8)
    out.square().mean().backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_unet_takes_odd_sizes():
    assert toy_unet()(torch.randn(2, 4, 7, 5), torch.ones(2), toy_conditioning()).shape == (2, 4, 7, 5)


def test_masked_tokens_do_not_matter_and_others_do():
    net = toy_unet()
    x, time = torch.randn(2, 4, 8, 8), torch.ones(2)
    cond = toy_conditioning()
    padded = cond.padded(9)
    torch.testing.assert_close(net(x, time, cond), net(x, time, padded), rtol=1e-5, atol=1e-6)
    unmasked = Conditioning(tokens=padded.tokens, mask=torch.ones_like(padded.mask))
    assert (net(x, time, cond) - net(x, time, unmasked)).abs().max() > 1e-4


def test_missing_and_unexpected_conditions_are_named():
    with pytest.raises(ValueError, match="missing \\['tokens'\\]"):
        toy_unet()(torch.randn(2, 4, 8, 8), torch.ones(2), Conditioning())
    with pytest.raises(ValueError, match="unexpected \\['vector'\\]"):
        toy_unet()(torch.randn(2, 4, 8, 8), torch.ones(2), toy_conditioning(vector=torch.ones(2, 6)))


def test_unconditional_unet():
    net = toy_unet(context_size=None)
    assert net.consumes == frozenset()
    assert net(torch.randn(2, 4, 8, 8), torch.ones(2), Conditioning()).shape == (2, 4, 8, 8)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"transformer_depth": [1]}, "transformer_depth"),
        ({"norm_groups": 5}, "norm_groups"),
        ({"head_dim": 7}, "head_dim"),
        ({"num_heads": 2}, "either head_dim or num_heads"),
    ],
)
def test_bad_unet_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        toy_unet(**options)


def test_written_out_attention_equals_the_fused_kernel():
    q, k, v = torch.randn(3, 2, 4, 16, 8, dtype=torch.float64, generator=torch.manual_seed(0)).unbind()
    mask = torch.rand(2, 1, 1, 16, generator=torch.manual_seed(1)) > 0.3
    fused = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(attention(q, k, v, mask), fused(q, k, v, attn_mask=mask))
    torch.testing.assert_close(attention(q, k, v), fused(q, k, v))


def test_attention_refuses_a_width_that_cannot_be_cut():
    with pytest.raises(ValueError, match="heads"):
        Attention(10, 3)


@pytest.mark.parametrize("patch_size,blocks,f", [(1, [16, 32], 2), (4, [16, 32], 8), (2, [16, 16, 16], 8)])
def test_autoencoder_shapes_and_gradients(patch_size, blocks, f):
    model = AutoencoderKL(3, 5, blocks, 1, patch_size, norm_groups=8)
    assert model.downsampling == f
    images = torch.rand(2, 3, 32, 16) * 2 - 1
    reconstruction, code = model(images, torch.randn(2, 5, 32 // f, 16 // f))
    moments = code["moments"]
    assert reconstruction.shape == images.shape and moments.shape == (2, 10, 32 // f, 16 // f)
    (reconstruction.square().mean() + kl_divergence(moments).mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_kl_is_the_formula():
    mean, std = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    moments = torch.stack([mean, 2 * std.log()]).view(1, 2, 1, 1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(mean, std), normal(torch.zeros(()).double(), torch.ones(()).double())
    )
    torch.testing.assert_close(kl_divergence(moments).double(), expected.view(1), rtol=1e-6, atol=0)


def toy_autoencoder():
    torch.manual_seed(0)
    return AutoencoderKL(3, 4, [16, 16], 1, 1, norm_groups=8)


def test_statistics_standardise_and_restore():
    model = toy_autoencoder()
    z = torch.randn(500, 4, 3, 3, dtype=torch.float64, generator=torch.manual_seed(0)) * 3 + 5
    assert not model.statistics.known
    model.statistics.set(z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0), 500)
    assert model.statistics.known
    standard = model.statistics.standardise(z)
    assert standard.mean((0, 2, 3)).abs().max() < 1e-6
    torch.testing.assert_close(standard.var((0, 2, 3), correction=0), torch.ones(4).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(model.statistics.restore(standard), z, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="spread"):
        model.statistics.set(torch.zeros(4), torch.zeros(4), 10)


def test_latent_id_follows_what_determines_latents_alone():
    model = toy_autoencoder()
    before = model.latent_id()
    with torch.no_grad():
        model.decoder.conv_out.weight.add_(1.0)
    assert model.latent_id() == before  # a new decoder keeps the latents
    for change in (model.encoder.conv_in.weight, model.quant_conv.weight, model.statistics.std):
        with torch.no_grad():
            change.add_(1e-3)
        assert model.latent_id() != before
        before = model.latent_id()


def test_posterior_without_noise_is_its_mean():
    moments = torch.randn(2, 8, 3, 3)
    assert torch.equal(posterior(moments), moments[:, :4])
    assert not torch.equal(posterior(moments, torch.ones(2, 4, 3, 3)), moments[:, :4])


def test_tokenizer_contract():
    tokenizer = Tokenizer()
    rows = tokenizer.padded(["", "a red fox", "word " * 200])
    assert [len(r) for r in rows] == [77] * 3
    assert rows[0] == [START, END] + [END] * 75
    assert rows[1][:5] == [START, 320, 736, 3240, END]
    assert rows[2][-1] == END and END not in rows[2][:-1]
    assert tokenizer.truncated == 1
    assert Tokenizer(pad_id=0).padded([""])[0][2:] == [0] * 75


def test_text_transformer_trims_without_changing_the_result():
    torch.manual_seed(0)
    text = TextTransformer(width=16, depth=2, num_heads=2, embedding_size=8)
    captions = ["a red star", "a long caption about a green hexagon inside a white ring on blue, with a border"]
    short, whole = text(captions), None
    text.trim = False
    whole = text(captions)
    assert short.tokens.shape[1] == 24 and whole.tokens.shape[1] == 77
    torch.testing.assert_close(short.vector, whole.vector, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(short.tokens[0, :5], whole.tokens[0, :5], rtol=1e-5, atol=1e-6)
    assert torch.equal(short.mask.sum(1), whole.mask.sum(1))
    assert short.mask[0].sum() == 5  # start, three words, end


def test_other_captions_give_other_conditionings():
    torch.manual_seed(0)
    text = TextTransformer(width=16, depth=1, num_heads=2, embedding_size=8)
    a, b = text(["a star above a ring", "a ring above a star"]).vector
    assert (a - b).abs().max() > 1e-6  # word order matters
