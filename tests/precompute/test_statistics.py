"""Statistics of the latents against two passes over all of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm.data.datamodule import DataModule
from ldm.errors import REFUSED, LdmError
from ldm.models.autoencoder.kl import AutoencoderKL
from ldm.precompute.statistics import MIN_IMAGES, ChannelMoments, batches_of, chosen_images, measure_statistics
from tests.data.making import sample, write_shards, write_tar


def latents(count=40, far=1e5):
    """Three channels; the mean of the first is `far`, that of its spread 1."""
    z = torch.randn(count, 3, 5, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    return z * torch.tensor([1.0, 0.01, 30.0]).view(3, 1, 1) + torch.tensor([far, 0.0, -2.0]).view(3, 1, 1)


def two_passes(z):
    values = z.transpose(0, 1).flatten(1)
    mean = values.mean(1)
    return mean, (values - mean[:, None]).square().mean(1)


def test_batches_give_what_two_passes_give():
    z = latents()
    mean, variance = two_passes(z)
    found = ChannelMoments(3)
    for batch in z.split([1, 7, 0, 15, 17]):
        found.add(batch)
    torch.testing.assert_close(found.mean, mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.variance, variance, rtol=1e-12, atol=0)
    # negative control: one pass over sums of squares loses the digits that the square of the mean takes
    values = z.transpose(0, 1).flatten(1)
    one_pass = values.square().mean(1) - mean**2
    assert ((one_pass - variance) / variance).abs().max() > 1e-8


def test_the_share_of_each_rank_is_joined(monkeypatch):
    z = latents()
    mean, variance = two_passes(z)
    shares = [ChannelMoments(3) for _ in range(3)]
    for rank, share in enumerate(shares[:2]):  # the third has nothing
        share.add(z[rank::2])
    everyones = [(share.n, share.mean, share._deviations) for share in shares]

    def gather(into, mine):
        into[:] = everyones

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    for share in shares:
        share.all_ranks()
        assert share.n == 40 * 20
        torch.testing.assert_close(share.mean, mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(share.variance, variance, rtol=1e-12, atol=0)


def toy_autoencoder():
    torch.manual_seed(0)
    return AutoencoderKL(3, 2, [8, 8], 1, norm_groups=4)


def batch(images, valid=None):
    valid = torch.ones(len(images), dtype=torch.bool) if valid is None else torch.tensor(valid)
    return SimpleNamespace(images=images, valid=valid)


def test_statistics_are_those_of_the_posteriors_means():
    autoencoder = toy_autoencoder()
    images = torch.rand(9, 3, 8, 8, generator=torch.manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, variance = two_passes(autoencoder.eval().moments(images)[:, :2].double())
    batches = [
        batch(images[:4]),
        batch(torch.cat([images[4:], torch.full((1, 3, 8, 8), torch.nan)]), [True] * 5 + [False]),
    ]
    autoencoder.train()
    assert measure_statistics(autoencoder, batches) == int(autoencoder.statistics.count) == 9
    assert autoencoder.training  # as before
    # the batches' sizes choose other float32 kernels
    torch.testing.assert_close(autoencoder.statistics.mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(autoencoder.statistics.std.double(), variance.sqrt(), rtol=1e-5, atol=0)


def test_latents_that_carry_nothing_are_refused():
    autoencoder = toy_autoencoder()
    with torch.no_grad():
        autoencoder.quant_conv.weight[1] = 0
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    with pytest.raises(LdmError, match=r"error\[LATENTS\].*without spread") as refused:
        measure_statistics(autoencoder, [batch(images)])
    assert refused.value.exit_code == REFUSED and not autoencoder.statistics.known
    with pytest.raises(LdmError, match=r"error\[LATENTS\].*no picture"):
        measure_statistics(autoencoder, [batch(images, [False] * 4)])
    with pytest.raises(LdmError, match=r"error\[LATENTS\].*nan"):
        measure_statistics(autoencoder, [batch(torch.full_like(images, torch.nan))])


def test_pictures_are_chosen_evenly():
    assert (
        chosen_images(7, None).tolist() == chosen_images(7, 7).tolist() == chosen_images(7, 99).tolist() == [*range(7)]
    )
    chosen = chosen_images(25_000, 10_000)
    assert len(np.unique(chosen)) == 10_000 and set(np.diff(chosen)) == {2, 3} and chosen[-1] >= 25_000 - 3
    with pytest.raises(LdmError, match=r"statistics_images.*at least 10000 of the 25000") as refused:
        chosen_images(25_000, MIN_IMAGES - 1)
    assert refused.value.exit_code == REFUSED
    with pytest.raises(LdmError, match="at least 40 of the 40"):
        chosen_images(40, 39)


@pytest.mark.parametrize("bucket", [None, {"enable_bucket": True, "min_bucket_reso": 8, "bucket_reso_steps": 8}])
def test_the_ranks_share_the_chosen_pictures(tmp_path, bucket):
    write_shards(tmp_path / "data", [5, 6])
    write_tar(tmp_path / "data" / "train-000002.tar", [m for n in range(11, 15) for m in sample(n, (32, 8))])
    data = DataModule(str(tmp_path / "data"), image_size=16, bucket=bucket, index_dir=str(tmp_path / "index"))
    data.open().configure(seed=0, batch_size=4)
    chosen, seen, sizes = np.array([0, 2, 3, 5, 8, 9, 12, 13]), [], set()
    for rank in range(3):
        own = list(batches_of(data, chosen, 2, rank=rank, world_size=3))
        seen += [key for b in own for key in b.keys]
        sizes |= {tuple(b.images.shape[-2:]) for b in own}
    assert sorted(seen) == [f"s{n:05d}" for n in chosen]
    assert len(sizes) == (1 if bucket is None else 2)
