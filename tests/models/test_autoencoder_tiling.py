"""Tiles: equal to the whole where the network is local, and no larger than a tile in memory."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from ldm.models.autoencoder.identity import Identity
from ldm.models.autoencoder.kl import AutoencoderKL
from ldm.models.autoencoder.shared_norms import SharedNorms
from ldm.models.autoencoder.tiling import _cuts, check_tile, tiled_decode, tiled_encode
from ldm.models.autoencoder.vq import AutoencoderVQ
from tests.models.test_autoencoder_vq import seeded

SIZES = {"block_channels": [8, 8], "layers_per_block": 1, "mid_attention": False, "norm_groups": 4}
# a chain of 3x3 convolutions reaches one pixel further with each: in latent pixels, encoder and decoder are below 13
REACH = 13


class Fixed(nn.Module):
    """A norm that looks at one pixel: GroupNorm with the statistics of another picture."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x):
        return (x - 0.1) / 0.7 * self.weight[:, None, None] + self.bias[:, None, None]


def local(kind=AutoencoderKL, **options):
    """Without attention, and with norms that are frozen."""
    torch.manual_seed(0)
    model = kind(**SIZES, **options).eval().requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, Fixed(child))
    model.statistics.set(seeded(1, 4).double(), seeded(2, 4).double().exp(), 1)
    return model


def codebook_model():
    model = local(AutoencoderVQ, codebook_size=64)
    nn.init.normal_(model.quantize.embedding.weight, std=0.2)
    return model


@pytest.mark.parametrize("kind", [local, codebook_model])
def test_a_local_network_in_tiles_is_the_whole(kind):
    """Equal where the part of the overlap that is not used covers the network's reach; else not."""
    model, f = kind().double(), 2
    images = seeded(3, 1, 3, 300, 130, dtype=torch.float64)
    latents = model.encode(images)
    wide = 4 * REACH * f
    found = tiled_encode(model, images, 2 * wide, wide)
    torch.testing.assert_close(found, latents, rtol=1e-12, atol=1e-12)
    pictures = model.decode(latents)
    torch.testing.assert_close(tiled_decode(model, latents, 2 * wide, wide), pictures, rtol=1e-12, atol=1e-12)
    narrow = 4 * f  # one latent pixel is not used: padding shows
    assert tiled_encode(model, images, 2 * wide, narrow).sub(latents).abs().max() > 1e-3
    assert tiled_decode(model, latents, 2 * wide, narrow).sub(pictures).abs().max() > 1e-3


def test_noise_and_defaults():
    model = local()
    images, noise = seeded(4, 1, 3, 40, 56), seeded(5, 1, 4, 20, 28)
    assert tiled_encode(model, images, 32).shape == (1, 4, 20, 28)
    drawn = tiled_encode(model, images, 32, noise=noise)
    assert drawn.sub(tiled_encode(model, images, 32)).abs().mean() > 0.1
    assert torch.equal(tiled_encode(model, images, 32), tiled_encode(model, images, 32, 8))  # a quarter


@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderVQ])
def test_one_tile_is_the_network_itself(kind):
    torch.manual_seed(0)
    model = kind(**SIZES | {"mid_attention": True}).eval().requires_grad_(False)
    images = seeded(6, 2, 3, 32, 24)
    latents = torch.cat([model.encode(image) for image in images.split(1)])  # one at a time, as tiles are
    assert torch.equal(tiled_encode(model, images, 32), latents)
    pictures = torch.cat([model.decode(latent) for latent in latents.split(1)])
    assert torch.equal(tiled_decode(model, latents, 32), pictures)
    assert not torch.equal(tiled_encode(model, images, 24), latents)  # two tiles


def test_pixels_in_tiles_are_pixels():
    pixels, images = Identity(3, 0.2, 0.5), seeded(7, 2, 3, 37, 50)
    torch.testing.assert_close(tiled_encode(pixels, images, 16), pixels.encode(images), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tiled_decode(pixels, images, 16), pixels.decode(images), rtol=1e-6, atol=1e-6)


def test_no_tile_is_larger_than_asked_for():
    model, seen = local(), []
    model.decoder.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    tiled_decode(model, seeded(8, 2, 4, 40, 9), 32)
    assert set(seen) == {(1, 4, 16, 9)} and len(seen) == 2 * 3  # 0-16, 12-28, 24-40, of two pictures, without norms


@pytest.mark.parametrize("length, size, overlap", [(40, 16, 4), (41, 16, 4), (29, 16, 4), (17, 16, 4), (99, 8, 4)])
@pytest.mark.parametrize("out", [1, 8])
def test_tiles_cover_and_their_weights_are_smooth(length, size, overlap, out):
    cuts = _cuts(length, size, overlap, out)
    starts = [start for start, _ in cuts]
    assert starts[0] == 0 and starts[-1] == length - size
    assert all(0 < then - now <= size - overlap for now, then in pairwise(starts))
    total = torch.zeros(length * out, dtype=torch.float64)
    for start, weight in cuts:
        total[start * out : (start + size) * out] += weight
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-12, atol=0)
    weight = cuts[0][1]
    assert weight[0] == 1 and weight.diff().max() <= 1e-6  # falls, and no faster than over half of the overlap
    assert weight.diff().min() >= -1 / (overlap * out / 2) - 1e-6
    assert not weight[size * out - overlap * out // 4 :].any()


class OneNorm(nn.Module):
    """Convolution, group norm, convolution: f = 2 by pixel shuffling."""

    downsampling = 2

    def __init__(self):
        super().__init__()
        self.into, self.norm, self.out = (
            nn.Conv2d(4, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.Conv2d(8, 12, 3, padding=1),
        )
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def decode(self, latents):
        return torch.pixel_shuffle(self.out(self.norm(self.into(latents))), 2)


def test_a_group_norm_sees_the_whole_picture(monkeypatch):
    """Exact where the norm's input is; pictures of other spread left and right tell it from a tile's own statistics."""
    torch.manual_seed(0)
    model = OneNorm().double().requires_grad_(False)
    latents = seeded(9, 2, 4, 60, 40, dtype=torch.float64) * torch.linspace(0.1, 3, 40, dtype=torch.float64)
    whole = model.decode(latents)
    torch.testing.assert_close(tiled_decode(model, latents, 64, 24), whole, rtol=1e-10, atol=1e-10)
    assert not model.norm._forward_hooks
    monkeypatch.setattr(SharedNorms, "settle", lambda self: None)
    assert tiled_decode(model, latents, 64, 24).sub(whole).abs().max() > 0.3


@pytest.mark.parametrize(
    "tile, overlap, words",
    [(60, None, "multiple of 8"), (24, None, "at least 32"), (64, 40, "half"), (64, 0, "overlap")],
)
def test_tiles_that_cannot_be_cut_are_refused(tile, overlap, words):
    with pytest.raises(ValueError, match=words):
        check_tile(8, tile, overlap)
    check_tile(8, 64, 32)
