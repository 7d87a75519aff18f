"""The UNet against diffusers: the same weights give the same numbers, at reduced width with the true architectures."""

import pytest
import torch

from ldm.models.unet.unet import UNet
from ldm.types import Conditioning

diffusers = pytest.importorskip("diffusers", reason='needs pip install "ldm[interop]"')

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # what the order of summation leaves

# name: (our arguments, diffusers' arguments that say the same), at the published size
SD15 = (
    {"num_heads": 8, "head_dim": None, "linear_projection": False},
    {"cross_attention_dim": 768, "attention_head_dim": 8},
)
SD21 = (
    {"context_size": 1024},
    {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
)
SDXL = (
    {
        "block_channels": [320, 640, 1280],
        "transformer_depth": [0, 2, 10],
        "mid_transformer_depth": 10,
        "context_size": 2048,
        "vector_size": 2816,
    },
    {
        "block_out_channels": [320, 640, 1280],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": [PLAIN[0], CROSS[0], CROSS[0]],
        "up_block_types": [CROSS[1], CROSS[1], PLAIN[1]],
    },
)


def narrowed(ours, theirs):
    """Narrow, a head of 8 channels where SD2 and SDXL have 64, everything else as published.

    48 is no power of two: there the sinusoids of time would differ if their formula were evaluated in another order.
    """
    widths = [n * 3 // 20 for n in theirs.get("block_out_channels", [320, 640, 1280, 1280])]
    small = {"block_channels": widths, "norm_groups": 16, "context_size": 24}
    their_small = {"block_out_channels": widths, "norm_num_groups": 16, "cross_attention_dim": 24}
    if ours.get("head_dim", 64) is not None:
        small["head_dim"], their_small["attention_head_dim"] = 8, [n // 8 for n in widths]
    if "vector_size" in ours:
        small["vector_size"] = their_small["projection_class_embeddings_input_dim"] = 20 + 6 * 256
    return {**ours, **small}, {**theirs, **their_small}


def random_weights(module):
    """Far from the initial ones: no layer is near zero or near the identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(noise * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.2) + (p.ndim == 1) * 0.5)


def relative(ours, theirs):
    return float((ours - theirs).double().norm() / theirs.double().norm())


def draw(*shape, seed, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pair", [SD15, SD21, SDXL], ids=["sd15", "sd21", "sdxl"])
def test_equal_numbers(pair, dtype):
    options, their_options = narrowed(*pair)
    theirs = diffusers.UNet2DConditionModel(**their_options).to(dtype).eval()
    random_weights(theirs)
    ours = UNet(**options).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    x, tokens = draw(2, 4, 16, 8, seed=1, dtype=dtype), draw(2, 7, 24, seed=2, dtype=dtype)
    time = torch.tensor([3.0, 999.0])
    vector, added = None, None
    if "vector_size" in options:
        from ldm.models.conditioner.size import Size

        pooled = draw(2, 20, seed=3, dtype=dtype)
        sizes = [[512.0, 768.0, 0.0, 64.0, 1024.0, 1024.0], [1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]]
        vector = torch.cat([pooled, Size()(sizes).vector.to(dtype)], dim=1)
        added = {"text_embeds": pooled, "time_ids": torch.tensor(sizes)}
    with torch.no_grad():
        expected = theirs(x, time, tokens, added_cond_kwargs=added).sample
        found = ours(x, time, Conditioning(tokens=tokens, vector=vector))
    assert relative(found, expected) < TOLERANCE[dtype]
    assert expected.std() > 0.1  # the comparison is of something


@pytest.mark.parametrize("pair", [SD15, SD21, SDXL], ids=["sd15", "sd21", "sdxl"])
def test_equal_names_and_shapes_at_full_size(pair):
    options, their_options = pair
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**their_options)
        ours = UNet(**options)
    shapes = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in ours.state_dict().items()} == shapes


@pytest.mark.slow
@pytest.mark.parametrize("pair", [SD15, SD21], ids=["sd15", "sd21"])
def test_one_forward_at_full_size(pair):
    """860 million weights, which both hold once: 3.5 GB."""
    options, their_options = pair
    with torch.device("meta"):
        theirs, ours = diffusers.UNet2DConditionModel(**their_options), UNet(**options)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in ours.state_dict().items():
        weights[name] = torch.randn(value.shape, generator=generator)
        weights[name].mul_(value[0].numel() ** -0.5 if value.ndim > 1 else 0.2).add_(0.5 * (value.ndim == 1))
    for model in (ours, theirs):
        model.eval().load_state_dict(weights, assign=True)
    x, tokens = (draw(*shape, seed=1, dtype=torch.float32) for shape in ((1, 4, 32, 32), (1, 77, ours.context_size)))
    time = torch.tensor([481.0])
    with torch.inference_mode():
        expected = theirs(x, time, tokens).sample
        assert relative(ours(x, time, Conditioning(tokens=tokens)), expected) < TOLERANCE[torch.float32]
    assert expected.std() > 0.1


@pytest.mark.slow
def test_one_graph_and_channels_last():
    options, _ = narrowed(*SDXL)
    ours = UNet(**options).eval()
    random_weights(ours)
    x, tokens, vector = (draw(*shape, seed=1, dtype=torch.float32) for shape in ((2, 4, 16, 8), (2, 7, 24), (2, 1556)))
    time, cond = torch.tensor([3.0, 999.0]), Conditioning(tokens=tokens, vector=vector)
    with torch.no_grad():
        plain = ours(x, time, cond)
        whole = torch.compile(ours, fullgraph=True, backend="eager")(x, time, cond)  # raises at a graph break
        last = ours.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), time, cond)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert max(relative(whole, plain), relative(last, plain)) < TOLERANCE[torch.float32]


DDPM = {"in_channels": 3, "out_channels": 3, "transformer_depth": [0, 1, 0, 0], "context_size": None}
DDPM |= {"block_channels": [128, 256, 256, 256], "plain_attention": True, "head_dim": None, "num_heads": 1}
ATTENDED = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]}
ATTENDED |= {"up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("head_dim", [None, 8])
def test_pixel_model_has_equal_numbers(dtype, head_dim):
    """The DDPM: one self-attention without feed-forward at 16x16 and in the middle."""
    widths = [16, 32, 32, 32]
    theirs = diffusers.UNet2DModel(
        block_out_channels=widths, norm_num_groups=8, attention_head_dim=head_dim, flip_sin_to_cos=True, **ATTENDED
    )
    theirs = theirs.to(dtype).eval()
    random_weights(theirs)
    heads = {"num_heads": 1} if head_dim is None else {"num_heads": None, "head_dim": head_dim}
    ours = UNet(**{**DDPM, "block_channels": widths, "norm_groups": 8, **heads}).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    x, time = draw(2, 3, 32, 32, seed=1, dtype=dtype), torch.tensor([3.0, 999.0])
    with torch.no_grad():
        expected = theirs(x, time).sample
        assert relative(ours(x, time, Conditioning()), expected) < TOLERANCE[dtype]
    assert expected.std() > 0.1


def test_the_published_ddpm_has_its_number_of_parameters():
    """35.7 M: Ho et al. 2020, appendix B."""
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(
            sample_size=32, block_out_channels=[128, 256, 256, 256], attention_head_dim=None, **ATTENDED
        )
        ours = UNet(**DDPM)
    counts = [sum(p.numel() for p in model.parameters()) for model in (theirs, ours)]
    assert counts == [35_746_307] * 2
