"""Shapes and sums of our autoencoders against diffusers' own."""

import pytest
import torch
from torch import nn

from ldm.build import build
from ldm.models.autoencoder.codebook import Codebook
from ldm.models.autoencoder.vq import AutoencoderVQ
from tests.models.test_autoencoder_presets import preset
from tests.models.test_autoencoder_vq import seeded

pytest.importorskip("diffusers")

KL = {"act_fn": "silu", "norm_num_groups": 32, "layers_per_block": 2, "in_channels": 3, "out_channels": 3}
# as the configurations of the published models say it
PUBLISHED = {
    "kl_sd": {"block_out_channels": (128, 256, 512, 512), "latent_channels": 4, "sample_size": 512},
    "kl_sdxl": {
        "block_out_channels": (128, 256, 512, 512), "latent_channels": 4, "sample_size": 1024,
        "scaling_factor": 0.13025, "force_upcast": True,
    },
    "kl_f4": {"block_out_channels": (128, 256, 512), "latent_channels": 3},
    "kl_f8": {"block_out_channels": (128, 256, 512, 512), "latent_channels": 4},
    "kl_f16": {"block_out_channels": (128, 128, 256, 256, 512), "latent_channels": 16},
    "vq_f4": {"block_out_channels": (128, 256, 512), "latent_channels": 3, "num_vq_embeddings": 8192},
    "vq_f8": {"block_out_channels": (128, 256, 256, 512), "latent_channels": 4, "num_vq_embeddings": 16384},
}  # fmt: skip
OURS_ALONE = {"statistics.mean", "statistics.std", "statistics.count", "quantize.uses"}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_diffusers(name):
    from diffusers import AutoencoderKL, VQModel

    given = PUBLISHED[name]
    levels = len(given["block_out_channels"])
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    with torch.device("meta"):
        theirs = (VQModel if name.startswith("vq") else AutoencoderKL)(**KL, **blocks, **given)
        ours = build(preset(name))
    found = shapes_of(ours)
    assert {key: shape for key, shape in found.items() if key not in OURS_ALONE} == shapes_of(theirs)
    assert set(found) - set(shapes_of(theirs)) <= OURS_ALONE


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


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_quantised_autoencoder_equals_diffusers(dtype, limit):
    from diffusers import VQModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (16, 32), "latent_channels": 3, "num_vq_embeddings": 40, "norm_num_groups": 8}
    theirs = VQModel(**blocks, **sizes).to(dtype).eval()
    nn.init.normal_(theirs.quantize.embedding.weight)
    ours = AutoencoderVQ(3, 3, 40, [16, 32], layers_per_block=1, norm_groups=8).to(dtype).eval()
    ours.load_state_dict({**ours.state_dict(), **theirs.state_dict()})
    images = seeded(1, 2, 3, 16, 24, dtype=dtype)
    with torch.no_grad():
        latents = theirs.encode(images).latents
        torch.testing.assert_close(ours.moments(images), latents, rtol=limit, atol=limit)
        torch.testing.assert_close(ours(images)[0], theirs(images).sample, rtol=limit, atol=limit)
        torch.testing.assert_close(ours.decode_raw(latents), theirs.decode(latents).sample, rtol=limit, atol=limit)
