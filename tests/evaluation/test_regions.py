"""Kinds of regions are found where they are, and colours move by what colour science says."""

import pytest
import torch

from ldm.evaluation.colour import colour_shift
from ldm.evaluation.regions import DETAIL, FLAT, KINDS, regions, structure
from tests.evaluation.making import images_of


def grey(levels):
    """[1, 3, H, W] of levels [H, W]."""
    return (levels.float() / 127.5 - 1).expand(1, 3, *levels.shape)


def step(height, size=32):
    return grey(torch.where(torch.arange(size) < size // 2, 100.0, 100.0 + height).expand(size, size))


def kinds_in(image):
    return {KINDS[k] for k in regions(image).unique().tolist()}


def test_a_plain_picture_is_flat_and_an_edge_is_an_edge_in_either_direction():
    assert kinds_in(grey(torch.full((16, 16), 77.0))) == {"flat"}
    edge = regions(step(100))
    assert edge[0, 5, 14:18].unique().tolist() == [1]
    assert edge[0, 5, :10].unique().tolist() == [0]
    assert torch.equal(regions(step(100).mT), edge.mT)


def test_the_limit_of_flat_is_the_step_that_the_comment_says():
    largest = float(structure(step(100))[0].max()) ** 0.5 / 100
    assert largest == pytest.approx(0.349, abs=5e-4)
    assert 11 * largest < FLAT < 12 * largest and 45 * largest < DETAIL < 46 * largest
    assert kinds_in(step(11)) == {"flat"} and kinds_in(step(12)) == {"flat", "edges"}


def test_detail_needs_strong_gradients_in_more_than_one_direction():
    lines = torch.arange(32) // 2 % 2 * 200.0
    stripes, squares = lines.expand(32, 32), (lines + lines[:, None]) % 400
    assert kinds_in(grey(stripes)) == {"edges"}
    assert "detail" in kinds_in(grey(squares))
    faint = squares * (DETAIL / 200)  # of the same form, far below the limit
    assert "detail" not in kinds_in(grey(faint))


def test_letters_are_detail_and_the_ground_around_them_is_flat():
    found = regions(images_of(6))
    letters = found[:, 36:44, 3:35]
    assert (letters == 2).float().mean() > 0.35
    assert (found[:, 46:, 46:] == 0).float().mean() == 1
    assert (found == 2).float().mean() < 0.35


@pytest.mark.parametrize(
    "colour, distance",
    # of CIE L*a*b*, D65, from black: white (100, 0, 0); sRGB red (53.24, 80.09, 67.20); middle grey (53.59, 0, 0)
    [((1, 1, 1), 100.0), ((1, -1, -1), 117.34), ((128 / 127.5 - 1,) * 3, 53.585)],
)
def test_colours_have_their_published_coordinates(colour, distance):
    image = torch.tensor(colour, dtype=torch.float64).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    assert colour_shift(image, -torch.ones(1, 3, 16, 16)).item() == pytest.approx(distance, abs=0.05)


def test_lost_detail_is_no_shift_of_colour():
    checks = (torch.arange(16) + torch.arange(16)[:, None]) % 2 * 1.0  # half of the light of white
    same = torch.full((16, 16), 187.516)  # sRGB of linear 0.5
    assert colour_shift(grey(same), grey(checks * 255)).item() < 0.05
    assert colour_shift(grey(same + 10), grey(checks * 255)).item() > 3
