"""Every preset is what its name says: builds on no memory, divides by what it says, and has its size."""

import re

import pytest
import torch
import yaml

from ldm.build import build
from ldm.cli import compose
from tests.conftest import CONFIGS

SIZES = {
    "identity": (1, 3, 0),
    "kl_f16": (16, 16, 64_352_723),
    "kl_f4": (4, 3, 55_312_063),
    "kl_f8": (8, 4, 83_653_863),
    "kl_sd": (8, 4, 83_653_863),
    "kl_sdxl": (8, 4, 83_653_863),
    "kl_small": (8, 8, 13_897_436),
    "kl_toy": (8, 8, 2_539_904),
    "vq_f4": (4, 3, 55_322_782),
    "vq_f8": (8, 4, 62_459_055),
    "vq_toy": (8, 4, 2_523_508),
}


def preset(name):
    """As Hydra composes it, which takes half a second: a file of its own, or the name of another."""
    node = yaml.safe_load((CONFIGS / f"model/autoencoder/{name}.yaml").read_text())
    return preset(*node["defaults"]) if list(node) == ["defaults"] else node


def test_every_preset_is_listed():
    assert sorted(path.stem for path in (CONFIGS / "model/autoencoder").glob("*.yaml")) == sorted(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_is_what_its_name_says(name):
    f, channels, count = SIZES[name]
    with torch.device("meta"):
        model = build(preset(name))
        latents = model.encode(torch.zeros(1, 3, 2 * f, f))
        pictures = model.decoder(latents) if count else model.decode(latents)
    assert latents.shape == (1, channels, 2, 1) and pictures.shape == (1, 3, 2 * f, f)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.downsampling == f and (model.in_channels, model.latent_channels) == (3, channels)
    if said := re.search(r"_f(\d+)$", name):
        assert f == int(said[1])
    text = (CONFIGS / f"model/autoencoder/{name}.yaml").read_text()
    words = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    for said, unit in re.findall(r"([\d.]+) (M) parameters", words):
        assert float(said) == pytest.approx(count / 1e6, abs=0.5 if "." not in said else 0.05), unit
    assert all(int(number) == f for number in re.findall(r"f = (\d+)", words))


def test_any_channel_count_of_a_preset():
    with torch.device("meta"):
        model = build({**preset("kl_f16"), "latent_channels": 32})
        assert model.encode(torch.zeros(1, 3, 16, 32)).shape == (1, 32, 1, 2)


def test_composed_a_preset_is_the_same():
    assert compose("train", ["model/autoencoder=kl_sdxl"])["model"]["autoencoder"] == preset("kl_sdxl")
