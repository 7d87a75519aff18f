"""Sizes, crops, flips, and that chance belongs to the slot."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.decode import BadSample
from ldm.data.transforms import Transform, resized, to_images
from ldm.errors import LdmError

HALVES = Image.fromarray(np.repeat(np.array([[0] * 20 + [255] * 20], np.uint8), 20, 0)).convert("RGB")  # 40 x 20


def once(transform, image=HALVES, slot=0):
    slots = torch.tensor([slot])
    return transform(image, transform.draws(slots)[0])


def test_center_crop_and_range():
    pixels = once(Transform(20))
    assert pixels[:, :10].max() == 0 and pixels[:, 10:].min() == 255
    images = to_images([pixels, pixels])
    assert images.shape == (2, 3, 20, 20) and images.dtype == torch.float32 and images.is_contiguous()
    assert images.min() == -1 and images.max() == 1


@pytest.mark.parametrize("crop", ["center", "random", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (7, 50), (50, 7), (64, 64), (63, 65)])
def test_every_shape_becomes_the_square(crop, size):
    assert once(Transform(16, crop=crop), Image.new("RGB", size)).shape == (16, 16, 3)


def test_pad_keeps_everything_on_the_background():
    pixels = once(Transform(40, crop="pad", background=(255, 0, 0)))
    assert (pixels[:10] == (255, 0, 0)).all() and (pixels[30:] == (255, 0, 0)).all()
    assert pixels[20, 5].tolist() == [0, 0, 0] and pixels[20, 35].tolist() == [255, 255, 255]


def test_chance_is_a_function_of_run_and_slot_alone():
    t = Transform(20, crop="random", flip_prob=0.5, key=1)
    together = t.draws(torch.arange(64))
    alone = np.concatenate([t.draws(torch.tensor([slot])) for slot in range(64)])
    assert (together == alone).all()
    assert (together != Transform(20, crop="random", flip_prob=0.5, key=2).draws(torch.arange(64))).any()
    flips = Transform(20, flip_prob=0.25, key=1).draws(torch.arange(4000))[:, 2] < 0.25
    assert abs(flips.mean() - 0.25) < 0.03  # 4 standard deviations
    lefts = {int(once(t, slot=slot).mean()) for slot in range(30)}
    assert len(lefts) > 8


def test_without_chance():
    t = Transform(20, crop="random", flip_prob=1.0).without_chance()
    assert (once(t, slot=5) == once(Transform(20))).all()


@pytest.mark.parametrize(
    "have, want",
    [((512, 384), (256, 256)), ((97, 61), (64, 40)), ((37, 37), (64, 64)), ((1, 9), (8, 8)), ((640, 480), (320, 192))],
)
def test_resampling_is_pillows_to_within_two_levels(have, want):
    pixels = np.random.default_rng(0).integers(0, 256, (have[1], have[0], 3), dtype=np.uint8)
    for image in (Image.fromarray(pixels), Image.fromarray(pixels // 16 * 16).resize(have, Image.Resampling.BOX)):
        theirs = np.asarray(image.resize(want, Image.Resampling.BICUBIC)).astype(int)
        difference = np.abs(resized(image, want).astype(int) - theirs)
        assert difference.max() <= 2 and difference.mean() < 0.02
        plain = np.abs(np.asarray(image.resize(want, Image.Resampling.BILINEAR)).astype(int) - theirs)
        assert have == (1, 9) or plain.mean() > 0.5  # the control: another filter would be noticed


def test_a_part_is_resized_as_if_it_were_cut_out():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    box = (7, 3, 31, 27)
    assert (resized(image, (16, 16), box) == resized(image.crop(box), (16, 16))).all()
    assert (resized(image, (24, 24), box) == np.asarray(image)[3:27, 7:31]).all()


def test_flip_mirrors():
    assert (once(Transform(20, flip_prob=1.0)) == once(Transform(20))[:, ::-1]).all()


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("flip_prob", [0.0, 1.0])
@pytest.mark.parametrize("width,height", [(120, 20), (20, 120), (61, 20)])
def test_the_corner_that_sdxl_is_told_is_where_the_crop_lies_in_the_picture_that_is_seen(
    crop, flip_prob, width, height
):
    """The picture's values are its coordinates: those of the mirrored whole begin at the corner."""
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([across, down, 0 * across], -1).astype(np.uint8)
    seen_whole = pixels[:, ::-1] if flip_prob else pixels
    transform = Transform(20, crop=crop, flip_prob=flip_prob, key=7)
    corners = set()
    for slot in range(8):
        draw = transform.draws(torch.tensor([slot]))[0]
        seen = transform(Image.fromarray(pixels), draw)
        top, left = transform.sizes(width, height, draw)[2:4]
        expected = seen_whole[top : top + 20, left : left + 20].astype(int)
        assert np.abs(seen.astype(int) - expected)[1:-1, 1:-1].max() <= 1  # a crop may begin between two pixels
        corners.add((top, left))
    assert len(corners) == (1 if crop == "center" else 8)


def test_upscale_off_refuses_small_pictures():
    with pytest.raises(BadSample) as caught:
        once(Transform(21, upscale=False))
    assert caught.value.kind == "size_policy"
    once(Transform(20, upscale=False))
    once(Transform(40, crop="pad", upscale=False))


def test_wrong_settings_are_refused():
    with pytest.raises(LdmError, match=r"data\.crop"):
        Transform(8, crop="middle")
    with pytest.raises(LdmError):
        Transform(8, flip_prob=1.5)
