"""The figures of latents are those of distributions whose figures are known."""

import numpy as np
import pytest
import torch

from ldm.evaluation.latents import LatentTally, distances_from_normal
from ldm.random import Draws, Purpose, run_key

ZERO, ONE = torch.zeros(3), torch.ones(3)


def normal(count=64, side=16, channels=3):
    return Draws(run_key(1), torch.arange(count)).normal(Purpose.POSTERIOR, (channels, side, side)).double()


def tallied(latents, noise=None, mean=ZERO, std=ONE, count=1000, pieces=4):
    tally = LatentTally(latents.shape[1], len(latents))
    for part in range(pieces):
        rows = slice(part * len(latents) // pieces, (part + 1) * len(latents) // pieces)
        tally.add(latents[rows], None if noise is None else noise[rows])
    return tally.report(mean, std, count)


def test_normal_latents_are_at_no_distance():
    found = tallied(normal())
    n = 64 * 16 * 16
    assert np.abs(found.mean).max() < 5 / n**0.5
    assert np.abs(found.std - 1).max() < 5 / n**0.5
    assert np.abs(found.skewness).max() < 5 * (6 / n) ** 0.5
    assert np.abs(found.kurtosis).max() < 5 * (24 / n) ** 0.5
    assert found.wasserstein.max() < 0.02
    assert found.kolmogorov.max() < 2 / n**0.5
    assert found.drift.max() < 1e-3
    assert found.effective_channels == pytest.approx(3, abs=0.01)


def test_scaled_latents_drift_by_the_formula_and_keep_their_shape():
    found = tallied(2 * normal() + 0.5)
    expected = 0.5 * (0.25 + 4 - 1 - np.log(4))
    assert found.drift == pytest.approx(np.full(3, expected), rel=0.03)
    assert found.wasserstein.max() < 0.02
    assert found.raw_scale == pytest.approx(2, rel=0.02)


def test_raw_figures_undo_the_stored_statistics():
    mean, std = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.1, 3.0, 7.0])
    found = tallied(normal(), mean=mean, std=std, count=7)
    shape = (1, 3, 1, 1)
    raw = normal() * std.view(shape).double() + mean.view(shape).double()
    assert found.raw_mean == pytest.approx(raw.mean((0, 2, 3)).numpy(), abs=1e-9)
    assert found.raw_std == pytest.approx(raw.std((0, 2, 3), correction=0).numpy(), rel=1e-9)
    assert found.raw_scale == pytest.approx(float(raw.std(correction=0)), rel=1e-9)
    assert (found.stored_count, found.stored_std.tolist()) == (7, pytest.approx(std.tolist()))


def test_moments_of_a_uniform_and_of_an_exponential():
    u = torch.special.ndtr(normal())
    found = tallied(torch.cat([u[:, :1], -torch.log(u[:, 1:])], dim=1))
    assert found.kurtosis[0] == pytest.approx(-1.2, abs=0.05)
    assert found.skewness[1:] == pytest.approx([2, 2], abs=0.2)
    p = (np.arange(10**5) + 0.5) / 10**5
    quantiles = torch.special.ndtri(torch.from_numpy(p)).numpy()
    area = np.abs(3**0.5 * (2 * p - 1) - quantiles).mean()  # between the quantile functions
    assert found.wasserstein[0] == pytest.approx(area, rel=0.05)


def test_distances_from_a_normal_by_hand():
    wasserstein, kolmogorov = distances_from_normal(torch.tensor([[0.0, 0.0], [3.0, -3.0]]))
    third = float(torch.special.ndtri(torch.tensor(0.75, dtype=torch.float64)))
    assert wasserstein == pytest.approx([third, 3 - third])
    assert kolmogorov == pytest.approx([0.5, 0.5 - float(torch.special.ndtr(torch.tensor(-3.0)))], abs=1e-6)


def test_equal_channels_count_once_and_batches_do_not_matter():
    z = normal()[:, :1].expand(-1, 3, -1, -1) * torch.tensor([1.0, -1.0, 2.0]).view(1, 3, 1, 1)
    found = tallied(z)
    assert found.correlation == pytest.approx(np.array([[1, -1, 1], [-1, 1, -1], [1, -1, 1]]), abs=1e-9)
    assert found.effective_channels == pytest.approx(1, abs=1e-6)
    one, many = tallied(normal(), pieces=1), tallied(normal(), pieces=16)
    assert one.kurtosis == pytest.approx(many.kurtosis, rel=1e-9)
    assert one.wasserstein == pytest.approx(many.wasserstein, rel=1e-9)


def test_a_channel_without_spread_has_no_shape_and_stops_nothing():
    z = normal()
    z[:, 1] = 3.5
    found = tallied(z, std=torch.tensor([1.0, 1.0, 1.0]))
    assert found.std[1] == 0
    assert np.isnan(found.wasserstein[1]) and np.isnan(found.kurtosis[1]) and np.isnan(found.correlation[1]).all()
    assert np.isfinite(found.wasserstein[[0, 2]]).all()
    assert found.effective_channels == pytest.approx(2, abs=0.01)


def test_signal_is_what_is_not_noise():
    noise = torch.full((64, 3, 16, 16), 0.25, dtype=torch.float64)
    noise[:, 2] = 99.0
    assert tallied(normal(), noise).signal == pytest.approx([0.8, 0.8, 0.01], abs=0.005)
    assert tallied(normal()).signal is None


def test_a_share_of_the_values_is_enough_to_see_their_shape():
    tally = LatentTally(3, 2**14)  # eight positions of each picture
    tally.add(normal(side=32))
    assert [len(row) for row in tally.kept[0]] == [64 * 8] * 3
    assert tally.report(ZERO, ONE, 1).wasserstein.max() < 0.15
