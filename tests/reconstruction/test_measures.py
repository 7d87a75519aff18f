"""Measures against their formulas and against torchmetrics."""

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import _compute_fid

from ldm.reconstruction.measures import (
    SSIM_WINDOW,
    FeatureMoments,
    codebook_use,
    frechet_distance,
    psnr,
    ssim,
)


def pictures(*shape, seed=0):
    return torch.rand(shape, generator=torch.manual_seed(seed)) * 2 - 1


def test_psnr_is_its_formula():
    images = pictures(3, 3, 8, 8)
    errors = torch.tensor([0.02, 0.2, 0.5]).view(3, 1, 1, 1)
    images = images.clamp(-0.4, 0.4)
    expected = 20 * torch.log10(2 / errors.flatten())
    torch.testing.assert_close(psnr(images + errors, images), expected, rtol=1e-5, atol=0)
    ones = torch.ones(1, 3, 4, 4)
    assert psnr(3 * ones, ones) == psnr(ones, ones) > 120  # clamped, and equal pictures are no division by zero


def plain_ssim(a, b):
    """Equation 13 of Wang et al. 2004, one window after the other."""
    offsets = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(line, line).flatten() / line.sum() ** 2
    a, b = (F.unfold(F.pad(x.double(), (5, 5, 5, 5), mode="reflect").flatten(0, 1)[:, None], 11) for x in (a, b))
    mean_a, mean_b = (torch.einsum("bwn,w->bn", x, window) for x in (a, b))
    da, db = a - mean_a[:, None], b - mean_b[:, None]
    var_a, var_b, cov = (torch.einsum("bwn,w->bn", x, window) for x in (da * da, db * db, da * db))
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    values = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return values.mean(1).view(-1, 3).mean(1)


def test_ssim_is_its_formula():
    images = pictures(2, 3, 16, 13)
    images[1] = 0.9  # no variance at all
    noisy = (images + 0.05 * pictures(2, 3, 16, 13, seed=1)).clamp(-1, 1)
    torch.testing.assert_close(ssim(noisy, images).double(), plain_ssim(noisy, images), rtol=1e-6, atol=0)
    assert torch.equal(ssim(images, images), torch.ones(2))
    assert torch.equal(ssim(images * 9, images), ssim((images * 9).clamp(-1, 1), images))


def test_autocast_does_not_round_ssim():
    images = 0.9 + 0.002 * pictures(1, 3, 16, 16)  # variances far below those of bfloat16's steps
    noisy = images + 0.002 * pictures(1, 3, 16, 16, seed=1)
    exact = ssim(noisy, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ssim(noisy, images), exact)
        # negative control: what the same call gives in float32
        rounded = structural_similarity_index_measure(noisy, images, data_range=2.0, reduction="none")
    assert (rounded - exact).abs() > 1e-4


def test_pictures_smaller_than_the_window_are_refused():
    assert ssim(pictures(1, 3, 11, 11), pictures(1, 3, 11, 11)).shape == (1,)
    with pytest.raises(ValueError, match=f"at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, not 10 x 32"):
        ssim(pictures(1, 3, 10, 32), pictures(1, 3, 10, 32))


def features(n, d, seed, shift=0.0):
    x = torch.randn(n, d, generator=torch.manual_seed(seed))
    return x @ torch.randn(d, d, generator=torch.manual_seed(seed + 100)) + shift


def moments(*batches):
    found = FeatureMoments()
    for batch in batches:
        found.add(batch)
    return found


def test_feature_moments_are_mean_and_covariance():
    x = features(50, 6, seed=0, shift=3.0)
    found = moments(x[:20], x[20:20], x[20:])
    torch.testing.assert_close(found.mean, x.double().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.covariance, torch.cov(x.double().T), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="at least 2 rows"):
        _ = moments(x[:1]).covariance


def test_frechet_distance_equals_torchmetrics():
    a, b = features(60, 8, seed=0), features(40, 8, seed=1, shift=0.5)
    (mean_a, cov_a), (mean_b, cov_b) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (a, b))
    expected = float(_compute_fid(mean_a, cov_a, mean_b, cov_b))
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(moments(b), moments(a)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(moments(a), moments(a)) < 1e-6 * float(cov_a.trace())


def test_frechet_distance_of_independent_features_is_known():
    """Diagonal covariances: sum of (mean difference)^2 + (std difference)^2."""
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # uncorrelated
    a, b = signs * torch.tensor([1.0, 2.0]), signs * torch.tensor([4.0, 2.5]) + torch.tensor([3.0, 0.0])
    unbiased = 4 / 3
    expected = 3.0**2 + unbiased * (3.0**2 + 0.5**2)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-12)


def test_fewer_rows_than_features():
    """Singular covariances: tr (A^1/2 B A^1/2)^1/2 is the nuclear norm of the products of centred rows."""
    a, b = features(5, 32, seed=0).double(), features(7, 32, seed=1).double()
    centred_a, centred_b = (a - a.mean(0)) / 4**0.5, (b - b.mean(0)) / 6**0.5
    cross = torch.linalg.matrix_norm(centred_a @ centred_b.T, ord="nuc")
    expected = (a.mean(0) - b.mean(0)).square().sum() + centred_a.square().sum() + centred_b.square().sum() - 2 * cross
    # the square root turns rounding of 1e-16 of the largest eigenvalue into 1e-8 of its root
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(float(expected), rel=1e-6)


def test_codebook_use():
    assert codebook_use(torch.tensor([5, 5, 5, 5])) == {"codes_used": 1.0, "perplexity": pytest.approx(4.0)}
    assert codebook_use(torch.tensor([0, 7, 0, 0])) == {"codes_used": 0.25, "perplexity": pytest.approx(1.0)}
    use = codebook_use(torch.tensor([3, 1, 0]))
    assert use["perplexity"] == pytest.approx(4 / 3**0.75)
    with pytest.raises(ValueError, match="no codes"):
        codebook_use(torch.zeros(3))
