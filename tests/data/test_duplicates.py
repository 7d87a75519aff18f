"""Equal and nearly equal pictures: the banded search is the search over all pairs, and re-encoded copies are found."""

import io

import numpy as np
import pytest
from PIL import Image

from ldm.data.duplicates import DISTANCE, are_near, equal_groups, exact_groups, fingerprint, members_of, near_groups


def smooth(seed, size=96):
    """A picture with structure: noise of 7 x 7, enlarged."""
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


def symbol(seed, size=128):
    """A symmetric one-colour mark on white, as logos are: half of its coefficients lie at the median."""
    half = np.random.default_rng(seed).random((8, 4)) < 0.5
    mask = np.kron(np.concatenate([half, half[:, ::-1]], axis=1), np.ones((8, 8)))
    canvas = np.full((128, 128, 3), 255, np.uint8)
    canvas[32:96, 32:96][mask > 0] = (20, 60, 160)
    return Image.fromarray(canvas).resize((size, size), Image.Resampling.LANCZOS)


def as_jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def arrays(prints):
    digests = np.array([np.frombuffer(p.pixels, np.uint8) for p in prints])
    smalls = np.array([np.frombuffer(p.small, np.uint8) for p in prints])
    return digests, np.array([p.phash for p in prints], np.uint64), smalls


def brute_force(hashes, smalls, distance, difference):
    count = len(hashes)
    labels = np.arange(count)
    for a in range(count):
        others = np.arange(a + 1, count)
        for b in others[are_near(hashes, smalls, np.full(len(others), a), others, distance, difference)]:
            labels[labels == max(labels[a], labels[b])] = min(labels[a], labels[b])
    return labels


def crowd(rng, count=300):
    """Hashes a few bits and small pictures a few levels around 40 centres: pairs on both sides of every limit."""
    centres = rng.integers(0, 2**63, 40, dtype=np.uint64)
    greys = rng.integers(60, 190, (40, 768))
    which = rng.integers(0, 40, count)
    hashes = centres[which].copy()
    for i in range(count):
        for bit in rng.choice(64, rng.integers(0, 9), replace=False):
            hashes[i] ^= np.uint64(1) << np.uint64(bit)
    shift = rng.integers(-6, 7, (count, 1))
    return hashes, (greys[which] + shift + rng.integers(-3, 4, (count, 768))).astype(np.uint8)


@pytest.mark.parametrize("distance, difference", [(0, 8), (3, 8), (6, 8), (6, 3), (10, 20)])
def test_bands_find_what_all_pairs_find(distance, difference):
    hashes, smalls = crowd(np.random.default_rng(distance))
    found = near_groups(hashes, smalls, distance, difference)
    np.testing.assert_array_equal(found, brute_force(hashes, smalls, distance, difference))
    if distance >= 3:
        assert 40 < len(np.unique(found)) < 300  # neither everything nor nothing is near


@pytest.mark.parametrize(
    "change",
    [
        lambda im: as_jpeg(im, 90),
        lambda im: as_jpeg(im, 50),
        lambda im: im.resize((im.width // 2, im.height // 2), Image.Resampling.BICUBIC),
        lambda im: im.resize((im.width * 2, im.height * 2), Image.Resampling.BICUBIC),
        lambda im: im.point(lambda v: min(255, v + 4)),
    ],
    ids=["jpeg 90", "jpeg 50", "half", "double", "brighter"],
)
@pytest.mark.parametrize("make", [smooth, symbol])
def test_a_changed_copy_is_near_and_another_picture_is_not(make, change):
    originals = [make(seed) for seed in range(12)]
    _, hashes, smalls = arrays([fingerprint(im) for im in originals + [change(im) for im in originals]])
    groups = near_groups(hashes, smalls)
    np.testing.assert_array_equal(groups, np.tile(np.arange(12), 2))


def test_colour_tells_pictures_of_one_shape_apart():
    red, green = (Image.new("RGB", (64, 64), "white") for _ in range(2))
    red.paste((200, 0, 0), (16, 16, 48, 48))
    green.paste((0, 102, 0), (16, 16, 48, 48))  # of the same brightness
    prints = [fingerprint(im) for im in (red, green)]
    assert bin(prints[0].phash ^ prints[1].phash).count("1") <= DISTANCE  # the hash alone would say near
    assert near_groups(*arrays(prints)[1:]).tolist() == [0, 1]


def test_flat_pictures_are_near_when_their_colours_are():
    prints = [fingerprint(Image.new("RGB", (n, n), (v, v, v))) for n, v in ((32, 250), (64, 252), (64, 120))]
    assert near_groups(*arrays(prints)[1:]).tolist() == [0, 0, 2]


def test_exact_is_by_pixels_and_size():
    image = smooth(0)
    png = io.BytesIO()
    image.save(png, "PNG", compress_level=1)
    again = Image.open(io.BytesIO(png.getvalue())).convert("RGB")
    other = image.copy()
    other.putpixel((0, 0), tuple(v ^ 1 for v in image.getpixel((0, 0))))
    digests, hashes, smalls = arrays([fingerprint(im) for im in (other, image, again, image.resize((48, 192)))])
    assert exact_groups(digests).tolist() == [0, 1, 1, 3]
    exact, near = equal_groups(digests, hashes, smalls)
    assert exact.tolist() == [0, 1, 1, 3]
    assert near.tolist()[:3] == [0, 0, 0]
    assert [g.tolist() for g in members_of(exact)] == [[1, 2]]
    assert [g.tolist() for g in members_of(exact, unless=exact)] == []


def test_nothing_and_one_picture():
    assert near_groups(np.empty(0, np.uint64), np.empty((0, 768), np.uint8)).tolist() == []
    assert equal_groups(*arrays([fingerprint(smooth(0))]))[1].tolist() == [0]
