"""How near reconstructions are to their pictures: per picture, and of a whole set."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW = 11
"""Side in pixels of the window of `ssim`: a Gaussian of 1.5 pixels, as its authors chose."""


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """[B] peak signal-to-noise ratio in dB of pictures in [-1, 1], the reconstruction clamped to that range."""
    error = (reconstruction.float().clamp(-1, 1) - images.float()).flatten(1).square().mean(1)
    return 10.0 * (4.0 / error.clamp(min=1e-12)).log10()


def ssim(reconstruction: Tensor, images: Tensor) -> Tensor:
    """[B] float32 structural similarity of pictures in [-1, 1], the reconstruction clamped; 1 where they are equal.

    Mean over colour channels and over every pixel as the centre of a window; pictures are mirrored at their border.
    Raises ValueError for pictures of less than `SSIM_WINDOW` pixels in height or width.
    Source: Wang et al. 2004, "Image quality assessment", equation 13, with K1 = 0.01 and K2 = 0.03.
    """
    height, width = images.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, not {height} x {width}")
    # float64: variances are differences of large numbers, and neither autocast nor TF32 may round them
    x, y = reconstruction.double().clamp(-1, 1), images.double()
    window = torch.exp(-(torch.arange(SSIM_WINDOW, device=x.device) - SSIM_WINDOW // 2).double().square() / 4.5)
    window = window / window.sum()
    maps = torch.cat([x, y, x * x, y * y, x * y]).flatten(0, 1).unsqueeze(1)
    maps = F.pad(maps, [SSIM_WINDOW // 2] * 4, mode="reflect")
    maps = F.conv2d(F.conv2d(maps, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))  # rows, then columns
    mx, my, xx, yy, xy = maps.view(5, *x.shape).unbind()
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    structure = (2 * (xy - mx * my) + c2) / (xx - mx * mx + yy - my * my + c2)
    return (luminance * structure).mean((1, 2, 3)).float()


class FeatureMoments:
    """Mean and covariance of features, from float64 sums on the device of the features.

    n: [] rows seen.   sum: [D].   outer: [D, D], sum of the rows' outer products.
    """

    def __init__(self) -> None:
        self.n = self.sum = self.outer = torch.zeros((), dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """features: [B, D]; B may be 0."""
        rows = features.detach().double()
        self.n = self.n.to(rows.device) + len(rows)
        self.sum = self.sum.to(rows.device) + rows.sum(0)
        self.outer = self.outer.to(rows.device) + rows.T @ rows

    def all_reduce(self) -> None:
        """The rows of all ranks, in place; every rank takes part and has called `add`."""
        if dist.is_available() and dist.is_initialized():
            for total in (self.n, self.sum, self.outer):
                dist.all_reduce(total)

    @property
    def mean(self) -> Tensor:
        """[D]"""
        return self.sum / self.n

    @property
    def covariance(self) -> Tensor:
        """[D, D], unbiased. Raises ValueError for less than two rows."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 rows of features, not {int(self.n)}")
        return (self.outer - self.n * torch.outer(self.mean, self.mean)) / (self.n - 1)


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) of two normals with covariances A and B.

    It falls as the sets grow, so distances compare only for the same features and equally many rows. Not a number
    where a feature is not.
    Raises ValueError for less than two rows in either. Source: Dowson and Landau 1982; Heusel et al. 2017,
    arXiv:1706.08500, section 3.
    """
    cov_a, cov_b = a.covariance, b.covariance
    if not bool(torch.isfinite(cov_a).all() & torch.isfinite(cov_b).all()):
        return math.nan
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # symmetric, so its eigenvalues are real; those of A B, the usual way, come out complex when A is singular
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))


def codebook_use(counts: Tensor) -> dict[str, float]:
    """counts: [K], how often each code was chosen.

    codes_used: fraction of the codes chosen at least once.   perplexity: exp of the entropy of the choices, K when all
    are equally frequent. Raises ValueError when nothing was counted.
    """
    total = counts.sum()
    if not total > 0:
        raise ValueError("no codes were counted")
    p = counts.double() / total
    entropy = -torch.special.xlogy(p, p).sum()
    return {"codes_used": float((counts > 0).double().mean()), "perplexity": float(entropy.exp())}
