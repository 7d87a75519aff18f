"""The sizes of the presets, and numbers of the UNet as it stood when it was equal to diffusers: they must not move."""

import pytest
import torch
import yaml

from ldm.build import build
from ldm.models.unet.unet import UNet
from ldm.types import Conditioning
from tests.conftest import CONFIGS


@pytest.mark.parametrize(
    "name,channels,context,count",
    [
        ("unet_toy", 8, 128, 6_641_160),
        ("unet_small", 8, 128, 65_378_696),
        ("unet_sd", 4, 768, 859_520_964),
        ("unet_sd2", 4, 1024, 865_910_724),
        ("unet_sdxl", 4, None, 2_567_463_684),
        ("ddpm_pixels_toy", 3, None, 3_348_067),
        ("ddpm_pixels", 3, None, 35_746_307),
    ],
)
def test_presets_have_their_size(name, channels, context, count):
    text = (CONFIGS / f"model/network/{name}.yaml").read_text()
    text = text.replace("${model.autoencoder.latent_channels}", str(channels))
    node = yaml.safe_load(text.replace("${model.conditioner.width}", str(context)))
    with torch.device("meta"):
        assert sum(p.numel() for p in build(node).parameters()) == count


SMALL = {"block_channels": [24, 48], "layers_per_block": 1, "context_size": 12, "head_dim": 8, "norm_groups": 8}
FROZEN = {
    "sd1": (
        {"num_heads": 4, "head_dim": None, "linear_projection": False, "transformer_depth": [1, 0]},
        [0.518433557136, 0.181278174471, 0.513935561419],
    ),
    "sd2": ({"transformer_depth": [1, 0]}, [0.518449705475, 0.181218385725, 0.513933104007]),
    "sdxl": (
        {"transformer_depth": [0, 2], "mid_transformer_depth": 2, "vector_size": 10},
        [0.280860015576, 0.671199852608, 0.584420787877],
    ),
    "ddpm": (
        {"transformer_depth": [0, 1], "context_size": None, "plain_attention": True},
        [0.932539154048, 0.74385429746, 0.601230011645],
    ),
}


def numbers(*shape, step):
    """No random numbers: these are the same for every version of torch."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * step + step).view(shape)


@pytest.mark.parametrize("name", FROZEN)
def test_numbers_do_not_move(name):
    options, expected = FROZEN[name]
    net = UNet(**{**SMALL, **options}).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.3
            p.copy_(scale * numbers(*p.shape, step=0.7 + 0.01 * i) + (p.ndim == 1) * 0.5)
        tokens = numbers(2, 5, 12, step=0.9) if net.context_size else None
        vector = numbers(2, 10, step=1.1) if net.vector_size else None
        x, time = numbers(2, 4, 8, 8, step=0.37), torch.tensor([3.0, 999.0])
        out = net(x, time, Conditioning(tokens=tokens, vector=vector))
    found = [float(out[0, 0, 0, 0]), float(out[1, 3, 7, 7]), float(out.square().mean().sqrt())]
    assert found == pytest.approx(expected, rel=1e-9)
