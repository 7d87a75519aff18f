"""Pictures that are the same, or nearly: fingerprints of decoded pixels, and groups found without comparing all pairs.

Exactly the same: equal pixels, whatever the file's format or name. Nearly the same: perceptual hashes that differ in
few bits (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1), and small
pictures that agree in colour too, because the hash sees brightness alone and a red star is not a green one.
Needs numpy and Pillow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DISTANCE = 6  # bits of 64: pictures that were re-encoded (JPEG 50 and better), halved or doubled differ in 0 to 4
MAX_DISTANCE = 10  # beyond it bands are too narrow to save work, and unrelated pictures meet
DIFFERENCE = 8.0  # of 255, root mean square over the small pictures
_SIDE = 32
# Of the sum over 32 * 32 brightnesses. Symmetric pictures (logos) have many coefficients at the median, and rounding
# would throw their bits: with 0, a tenth of the logos lost their re-encoded copies, with this none.
_DEAD_ZONE = 100.0
_AHEAD = 2**15  # pairs whose small pictures are compared at once
_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


class Fingerprint(NamedTuple):
    """pixels: digest of size and pixels.   phash: 64 bits.   small: 16 * 16 * 3 bytes, the picture shrunk."""

    pixels: bytes
    phash: int
    small: bytes


def fingerprint(image: Image.Image) -> Fingerprint:
    """Of an upright RGB picture, as `ldm.data.decode.decode_image` gives it."""
    digest = hashlib.sha256(b"%dx%d" % image.size + image.tobytes()).digest()[:16]
    shrunk = np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), dtype=np.float64)
    small = shrunk.reshape(_SIDE // 2, 2, _SIDE // 2, 2, 3).mean(axis=(1, 3))
    brightness = shrunk @ np.array([0.299, 0.587, 0.114])
    low = (_DCT @ brightness @ _DCT.T)[:8, :8].ravel()
    bits = low > np.median(low) + _DEAD_ZONE
    phash = int(np.packbits(bits).view(">u8")[0])
    return Fingerprint(digest, phash, np.rint(small).astype(np.uint8).tobytes())


def _dct(size: int) -> NDArray[np.float64]:
    """[size, size], the cosine transform (type II) of a column."""
    n = np.arange(size)
    return np.cos(np.pi / size * (n + 0.5) * n[:, None])


_DCT = _dct(_SIDE)


def exact_groups(digests: NDArray[np.uint8]) -> NDArray[np.int64]:
    """[N], for every picture the number of the first one with the same digest.   digests: [N, 16]."""
    words = np.ascontiguousarray(digests).view(np.uint64)
    _, first, place = np.unique(words, axis=0, return_index=True, return_inverse=True)
    return first[place.reshape(-1)]


def equal_groups(
    digests: NDArray[np.uint8], hashes: NDArray[np.uint64], smalls: NDArray[np.uint8], distance: int = DISTANCE
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(exactly, nearly) equal: labels [N] each; a group of nearly equal pictures holds the exactly equal ones too."""
    exact = exact_groups(digests)
    firsts, place = np.unique(exact, return_inverse=True)
    found = near_groups(hashes[firsts], smalls[firsts], distance)
    return exact, firsts[found][place.reshape(-1)]


def members_of(labels: NDArray[np.int64], unless: NDArray[np.int64] | None = None) -> list[NDArray[np.intp]]:
    """Numbers of every group of two or more. unless: other labels, by which a group that is one there is left out."""
    order = np.argsort(labels, kind="stable")
    cuts = np.flatnonzero(np.diff(labels[order])) + 1
    groups = [rows for rows in np.split(order, cuts) if len(rows) > 1]
    return [rows for rows in groups if unless is None or len(np.unique(unless[rows])) > 1]


def near_groups(
    hashes: NDArray[np.uint64],
    smalls: NDArray[np.uint8],
    distance: int = DISTANCE,
    difference: float = DIFFERENCE,
) -> NDArray[np.int64]:
    """[N], for every picture the smallest number in its group; A near B and B near C makes one group of three.

    hashes: [N].   smalls: [N, 768].   distance: bits, 0 to `MAX_DISTANCE`.   difference: of 255.
    Two hashes within `distance` bits agree wholly in one of distance + 1 bands, so only those that share a band are
    compared; among them only neighbours in mean brightness, which differs by at most what the pictures differ.
    """
    hashes, count = np.asarray(hashes, dtype=np.uint64), len(hashes)
    smalls = np.asarray(smalls, dtype=np.uint8)
    mean = smalls.mean(axis=1, dtype=np.float32) if count else np.empty(0, np.float32)
    group = np.arange(count)
    for band in _bands(hashes, distance + 1):
        order = np.lexsort((mean, band))
        band, bright = band[order], mean[order]
        left, step = np.arange(count), 0
        while len(left):
            step += 1
            left = left[left + step < count]
            left = left[(band[left] == band[left + step]) & (bright[left + step] - bright[left] <= difference)]
            a, b = order[left], order[left + step]
            apart = group[a] != group[b]
            near = are_near(hashes, smalls, a[apart], b[apart], distance, difference)
            _join(group, a[apart][near], b[apart][near])
    return group


def are_near(
    hashes: NDArray[np.uint64],
    smalls: NDArray[np.uint8],
    a: NDArray[np.int64],
    b: NDArray[np.int64],
    distance: int = DISTANCE,
    difference: float = DIFFERENCE,
) -> NDArray[np.bool_]:
    """[P] for the pairs (a[i], b[i])."""
    near = _hamming(hashes[a], hashes[b]) <= distance
    for start in range(0, len(a), _AHEAD):
        rows = start + np.flatnonzero(near[start : start + _AHEAD])
        gap = smalls[a[rows]].astype(np.float32) - smalls[b[rows]]
        near[rows] = np.einsum("ij,ij->i", gap, gap) <= difference**2 * gap.shape[1]
    return near


def _join(group: NDArray[np.int64], a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
    """The groups of a[i] and b[i] become the one with the smaller number; `group` names the smallest again after it."""
    for one, other in zip(a.tolist(), b.tolist(), strict=True):
        while group[one] != one:
            one = group[one]
        while group[other] != other:
            other = group[other]
        group[max(one, other)] = min(one, other)
    while len(a) and (group[group] != group).any():
        group[:] = group[group]


def _bands(hashes: NDArray[np.uint64], count: int) -> Iterator[NDArray[np.uint64]]:
    """The 64 bits cut into `count` runs of nearly equal length."""
    edges = [64 * i // count for i in range(count + 1)]
    for low, high in pairwise(edges):
        mask = np.uint64(2 ** (high - low) - 1)
        yield (hashes >> np.uint64(low)) & mask


def _hamming(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.int64]:
    return _ONES[(a ^ b).view(np.uint8).reshape(-1, 8)].sum(axis=1, dtype=np.int64)
