"""Aspect-ratio buckets: sizes, an order that uses everything once, and batches of one size, each with its control."""

import math
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import pipeline
from ldm.data.buckets import Assignment, BucketOrder, Buckets, cut_away, in_words, read_settings, report
from ldm.data.datamodule import DataModule
from ldm.data.decode import BadSample
from ldm.data.moments import MomentTables
from ldm.data.order import Order
from ldm.data.pipeline import BucketPass, TrainPlan, stages
from ldm.data.transforms import Transform
from ldm.errors import LdmError
from ldm.random import run_key
from tests.data.making import picture, write_tar

# ---- the table


def test_the_table_at_512():
    """By the rule of sd-scripts' make_bucket_resolutions with its defaults: 256 to 1024 in steps of 64."""
    standing = {(256, 1024), (256, 960), (256, 896), (256, 832), (320, 768), (320, 704), (384, 640), (448, 576)}
    expected = standing | {(height, width) for width, height in standing} | {(512, 512)}
    table = {tuple(size) for size in Buckets(512).table.tolist()}
    assert table == expected
    aspects = Buckets(512).table[:, 0] / Buckets(512).table[:, 1]
    assert (np.diff(aspects) > 0).all()


@pytest.mark.parametrize("step", [8, 16, 32])
@pytest.mark.parametrize("image_size", [64, 100, 256])
def test_no_side_leaves_its_bounds_and_no_area_is_larger(step, image_size):
    table = Buckets(image_size, bucket_reso_steps=step).table
    assert (table % step == 0).all() and (table.prod(axis=1) <= image_size**2).all()
    assert table.max() <= 2 * image_size and table.min() >= (image_size // 2) // step * step
    assert {tuple(size) for size in table.tolist()} == {(h, w) for w, h in table.tolist()}


def test_the_nearest_aspect_ratio_is_taken():
    buckets = Buckets(64, bucket_reso_steps=8)
    rng = np.random.default_rng(0)
    images = np.stack([rng.integers(1, 3000, 500), rng.integers(1, 3000, 500)], axis=1)
    logs = np.log(buckets.table[:, 0] / buckets.table[:, 1])
    nearest = np.abs(np.log(images[:, 0] / images[:, 1])[:, None] - logs).argmin(axis=1)
    assert (buckets.target(images) == buckets.table[nearest]).all()
    turned = buckets.target(images[:, ::-1])
    assert (turned == buckets.target(images)[:, ::-1]).all()


def test_a_panorama_takes_the_widest_bucket():
    assert Buckets(512).target(np.array([[9000, 500], [500, 9000]])).tolist() == [[1024, 256], [256, 1024]]


def test_without_enlarging_every_picture_covers_its_bucket():
    buckets = Buckets(64, bucket_reso_steps=8, bucket_no_upscale=True)
    rng = np.random.default_rng(1)
    images = np.stack([rng.integers(8, 200, 2000), rng.integers(8, 200, 2000)], axis=1)
    targets = buckets.target(images)
    assert (targets <= images).all() and (targets % 8 == 0).all() and targets.min() >= 8
    assert (targets.prod(axis=1) <= 64**2).all() and targets.max() <= 128
    table = {tuple(size) for size in buckets.table.tolist()}
    large = images.min(axis=1) >= 128
    assert large.any() and all(tuple(size) in table for size in targets[large].tolist())
    assert (Buckets(64, bucket_reso_steps=8).target(images) > images).any()  # the control
    narrow = Buckets(64, min_bucket_reso=48, bucket_reso_steps=8, bucket_no_upscale=True).target(images)
    assert (narrow <= images).all() and (narrow.prod(axis=1) <= 64**2).all() and narrow.max() <= 128
    # a picture of 20x30 keeps its size, in steps; one of 3x50 is enlarged to one step
    assert buckets.target(np.array([[20, 30], [3, 50], [1, 1]])).tolist() == [[16, 24], [8, 48], [8, 8]]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({}, "bucket_reso_steps=8"),  # sides of 64 at image_size 64: one size only
        ({"bucket_reso_steps": 0}, "data.bucket.bucket_reso_steps"),
        ({"bucket_reso_steps": 8.5}, "data.bucket.bucket_reso_steps"),
        ({"bucket_reso_steps": 8, "min_bucket_reso": 80}, "min_bucket_reso <= image_size"),
        ({"bucket_reso_steps": 8, "max_bucket_reso": 56}, "min_bucket_reso <= image_size"),
        ({"bucket_reso_steps": 8, "max_bucket_reso": -1}, "data.bucket.max_bucket_reso"),
        ({"bucket_reso_step": 8}, "bucket_reso_steps"),
        ({"bucket_no_upscale": "yes"}, "true or false"),
    ],
)
def test_settings_that_leave_nothing_are_refused(settings, words):
    with pytest.raises(LdmError) as refused:
        read_settings({"enable_bucket": True, **settings}, 64)
    assert words in refused.value.line()
    assert read_settings(None, 64) is None and read_settings({"enable_bucket": False}, 64) is None


@pytest.mark.parametrize(
    "size, settings, where, hint",
    [
        (512, {"min_bucket_reso": 500}, "min_bucket_reso", {"min_bucket_reso": 256}),
        (512, {"bucket_reso_steps": 400}, "bucket_reso_steps", {"bucket_reso_steps": 64}),
        (
            512,
            {"min_bucket_reso": 500, "bucket_reso_steps": 100},
            "bucket_reso_steps",
            {"bucket_reso_steps": 64, "min_bucket_reso": 256},
        ),
    ],
)
def test_the_advice_names_the_setting_that_is_the_cause_and_helps(size, settings, where, hint):
    with pytest.raises(LdmError) as refused:
        Buckets(size, **settings)
    assert refused.value.where == f"data.bucket.{where}"
    assert refused.value.next == "set " + " and ".join(f"data.bucket.{name}={value}" for name, value in hint.items())
    assert len(Buckets(size, **{**settings, **hint}).table) > 1


# ---- the order

BATCH = 12


def assignment(counts):
    """Samples of as many buckets as there are counts, in an order drawn once."""
    of = np.repeat(np.arange(len(counts)), counts)
    sizes = [(8 + 8 * i, 64 - 8 * i) for i in range(len(counts))]
    return Assignment(np.array(sizes), np.random.default_rng(3).permutation(of))


def bucket_order(assigned, shards=(5, 9, 2), **options):
    """The shards have lengths in these proportions."""
    count = len(assigned.of)
    cuts = np.cumsum(shards) * count // sum(shards)
    shard_of = np.searchsorted(cuts, np.arange(count), side="right")
    sizes, uses = np.full(count, 1000), options.pop("uses", np.ones(count))
    options = {"seed": 0, "batch_size": BATCH, "window_mb": 256, **options}

    def part(rows, lanes, window_mb):
        lengths = np.bincount(shard_of[rows], minlength=len(shards))
        own = {**options, "lanes": lanes, "window_mb": window_mb, "repeats": uses[rows]}
        return Order(lengths, sizes[rows], **own)

    base = Order(np.bincount(shard_of, minlength=len(shards)), sizes, **options, repeats=uses)
    return BucketOrder(base, assigned, part, uses=uses, sizes=sizes, window_mb=options["window_mb"])


COUNTS = [(48,), (24, 36), (100, 3, 17), (1, 1, 1, 1, 60), (5,), (1,)]
WINDOWS = [256, 0.02]  # the whole set; a few samples of every lane


def uses_at_ends(order, epochs):
    """How often each sample was used when as many steps are done as the bucket's samples fill in so many epochs."""
    counts = np.bincount(order.assigned.of)
    owed = [int(n) * epochs // BATCH for n in counts]
    done, used, step = [0] * len(counts), Counter(), 0
    while sum(done) < sum(owed):
        ids = order.ids(step)
        (bucket,) = set(order.assigned.of[ids].tolist())
        assert order.size(step) == order.assigned.size(bucket)
        done[bucket] += 1
        if done[bucket] <= owed[bucket]:
            used.update(ids.tolist())
        step += 1
        assert step < 10_000
    return used, done, owed


@pytest.mark.parametrize("window_mb", WINDOWS)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_every_sample_is_used_once_an_epoch_and_none_starves(counts, window_mb):
    """Twelve epochs are whole steps in every bucket: then each sample was used twelve times exactly."""
    order = bucket_order(assignment(counts), window_mb=window_mb)
    used, done, owed = uses_at_ends(order, BATCH)
    assert used == Counter(dict.fromkeys(range(sum(counts)), BATCH))
    assert done == owed  # no bucket runs ahead


def test_a_remainder_that_is_thrown_away_would_be_noticed(monkeypatch):
    """The control: every bucket starts each epoch anew."""
    dropped = bucket_order(assignment((100, 3, 17)), remainder="drop", lanes=1)
    with pytest.raises(AssertionError):
        used, *_ = uses_at_ends(dropped, BATCH)
        assert used == Counter(dict.fromkeys(range(120), BATCH))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_buckets_keep_pace_with_each_other(counts):
    """After any number of steps a bucket has had its share of them, to within the steps of a window."""
    order = bucket_order(assignment(counts), window_mb=0.004)
    buckets = [order._parts[order._find(step)[0]][0] for step in range(300)]
    for end in (75, 150, 300):
        for bucket, count in enumerate(counts):
            had = buckets[:end].count(bucket)
            assert abs(had - end * count / sum(counts)) <= 2 + len(counts)


def test_an_order_is_a_function_of_seed_and_step():
    assigned = assignment((40, 30, 5))
    one, two = bucket_order(assigned), bucket_order(assigned)
    backwards = [two.ids(step).tolist() for step in reversed(range(40))][::-1]
    assert [one.ids(step).tolist() for step in range(40)] == backwards
    assert backwards != [bucket_order(assigned, seed=1).ids(step).tolist() for step in range(40)]
    other = bucket_order(assigned, seed=1)  # whose buckets take turns in another order
    assert [one._find(s)[0] for s in range(36)] != [other._find(s)[0] for s in range(36)]
    assert [one._step_of(*one._find(step)) for step in range(200)] == list(range(200))


def test_one_bucket_is_the_order_without_buckets():
    assigned = assignment((240,))
    order = bucket_order(assigned, window_mb=0.01)
    plain = Order([75, 135, 30], np.full(240, 1000), seed=0, batch_size=BATCH, window_mb=0.01)
    steps = [0, 1, 17, 18, 1000]
    assert order.lanes == plain.lanes == 6 and order.steps_per_epoch == plain.steps_per_epoch
    for step in steps:
        assert order.ids(step).tolist() == plain.ids(step).tolist()
        assert order.turns(step).tolist() == plain.turns(step).tolist()


def test_turns_count_the_uses_before():
    order, used = bucket_order(assignment((20, 7, 1)), lanes=1), Counter()
    for step in range(60):
        for sample, turn in zip(order.ids(step).tolist(), order.turns(step).tolist(), strict=True):
            assert turn == used[sample]
            used[sample] += 1


def test_repeats_count_in_the_shares():
    uses = np.where(assignment((30, 30)).of == 0, 3, 1)
    order = bucket_order(assignment((30, 30)), uses=uses)
    had = Counter(order._find(step)[0] for step in range(100))
    assert had == {0: 75, 1: 25}


def short_lanes_that_differ(order):
    """Buckets whose lanes are short and of different lengths: their pictures are used differently often."""
    lengths = [part.lane_lengths for _, _, part in order._parts]
    return [n.tolist() for n in lengths if n.min() < n.max() < 1024]


def test_lanes_of_a_bucket_are_even_whatever_its_repeats():
    """Every set's share of an epoch is rounded by itself, not their sum."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        counts = rng.integers(1, 40, 3)
        uses = np.repeat([1.0, *rng.uniform(0.3, 4, 2)], counts)
        assigned = Assignment(np.array([(8, 64), (16, 56)]), np.repeat([0, 1], [counts.sum(), 64]))
        order = bucket_order(assigned, uses=np.concatenate([uses, np.ones(64)]), batch_size=8, lanes=8)
        assert short_lanes_that_differ(order) == []
    assert short_lanes_that_differ(bucket_order(assignment((13,)), batch_size=8, lanes=8)) == []
    uneven = SimpleNamespace(_parts=[(0, None, Order([13], [1] * 13, seed=0, batch_size=8, lanes=8))])
    assert short_lanes_that_differ(uneven) != []  # the control


def test_a_bucket_of_two_small_shares_is_no_reason_to_refuse_lanes():
    """10 x 0.349 and 10 x 0.449 are 3 + 4 samples, though the sum is 7.98."""
    assigned = Assignment(np.array([(8, 64), (16, 56)]), np.repeat([0, 1], [20, 64]))
    uses = np.repeat([0.349, 0.449, 1.0], [10, 10, 64])
    order = bucket_order(assigned, uses=uses, batch_size=8, lanes=8)
    assert [part.num_samples for _, _, part in order._parts] == [7, 64] and order._parts[0][2].lanes == 1


def test_drop_counts_the_samples_that_shares_leave():
    """14 + 4 x 0.5 + 4 x 0.25 are 17, a batch of 16 and one more."""
    assigned = Assignment(np.array([(8, 64), (16, 56)]), np.repeat([0, 1], [22, 64]))
    images = assigned.sizes[assigned.of]
    uses = np.repeat([1.0, 0.5, 0.25, 1.0], [14, 4, 4, 64])
    order = bucket_order(assigned, uses=uses, batch_size=16, remainder="drop")
    assert [(bucket, part.num_samples) for bucket, _, part in order._parts] == [(0, 17), (1, 64)]
    assert "rarer" not in in_words(report(assigned, images), order, "center")
    short = np.repeat([0.649, 0.549, 0.749, 1.0], [14, 4, 4, 64])  # 9 + 2 + 3
    order = bucket_order(assigned, uses=short, batch_size=16, remainder="drop")
    line = in_words(report(assigned, images), order, "center")
    assert [bucket for bucket, _, _ in order._parts] == [1]
    assert line.endswith("; rarer than a batch of 16 and never used with data.remainder=drop: 8x64 (22)")


def test_drop_leaves_the_rest_of_an_epoch():
    order = bucket_order(assignment((30, 13, 3)), remainder="drop", lanes=1)
    assert order.steps_per_epoch == 3 and {order._find(s)[0] for s in range(30)} == {0, 1}
    for epoch in range(4):
        ids = np.concatenate([order.ids(step) for step in range(3 * epoch, 3 * epoch + 3)])
        assert len(set(ids.tolist())) == 36
    with pytest.raises(LdmError, match="no bucket has a complete step"):
        bucket_order(assignment((8, 8, 8)), remainder="drop")


def test_a_replacement_is_another_picture_of_the_bucket_then_of_its_neighbours():
    order = bucket_order(assignment((30, 1, 9, 20)))
    of = order.assigned.of
    for step in range(80):
        bad, bucket = int(order.ids(step)[4]), int(of[order.ids(step)[0]])
        tried = [order.reserve(step * BATCH + 4, attempt) for attempt in range(59)]
        own = int((of == bucket).sum()) - 1
        assert {of[i] for i in tried[:own]} <= {bucket} and bad not in tried[:own]
        assert len(tried[own:]) == 59 - own and bucket not in {int(of[i]) for i in tried[own:]}
        assert len(set(tried)) == 59  # every other picture once, though lanes are short
        nearest = {0: 1, 1: {0, 2}, 2: {1, 3}, 3: 2}[bucket]  # of all sizes these are the most alike
        first = int(of[tried[own]])
        assert first == nearest or (isinstance(nearest, set) and first in nearest)
        alone = order.of_encoded(np.ones(len(order.assigned.of), dtype=bool))
        assert {int(of[alone.reserve(step * BATCH + 4, attempt)]) for attempt in range(70)} == {bucket}


@pytest.mark.parametrize("each", [10.0, 2.5, 0.3])
def test_every_picture_of_the_bucket_is_tried_before_a_neighbour_whatever_the_repeats(each):
    """No attempt is spent on a copy of a picture, nor does one that is not in the epoch's share stay out."""
    assigned = assignment((16, 44))
    uses = np.where(assigned.of == 0, each, 1.0)
    mine = set(np.flatnonzero(assigned.of == 0).tolist())
    for lanes in (1, 4):
        order = bucket_order(assigned, uses=uses, lanes=lanes)
        for step in [step for step in range(60) if order._find(step)[0] == 0][:4]:
            for place in range(BATCH):
                tried = [order.reserve(step * BATCH + place, attempt) for attempt in range(15)]
                assert sorted(tried) == sorted(mine - {int(order.ids(step)[place])})


def test_a_single_picture_is_its_own_replacement():
    order = bucket_order(assignment((1,)))
    assert [order.reserve(5, attempt) for attempt in range(3)] == [0, 0, 0]


def test_a_million_pictures_resume_at_once():
    """The time is that of a slow machine with a margin; counting through the order would take minutes."""
    import time

    rng = np.random.default_rng(0)
    images = np.stack([rng.integers(300, 1500, 10**6), rng.integers(200, 1500, 10**6)], axis=1)
    assigned = Buckets(512, bucket_no_upscale=True).assign(images)
    start = time.process_time()
    order = bucket_order(assigned, shards=(1,) * 100, batch_size=64)
    order.ids(900_000), order.turns(900_000), order.reserve(64 * 900_000, 3)
    assert time.process_time() - start < 2
    assert len(set(assigned.of[order.ids(900_000)].tolist())) == 1


# ---- the report


def test_the_report_counts_what_is_cut_away():
    images = np.array([[100, 100], [200, 100], [100, 400]])
    assert cut_away(images, np.array([64, 64])).tolist() == pytest.approx([0, 0.5, 0.75])
    assigned = Buckets(64, bucket_reso_steps=8, min_bucket_reso=8, max_bucket_reso=512).assign(images)
    found = report(assigned, images)
    assert found["square_cuts_away"] == pytest.approx(1.25 / 3) and found["cut_away"] < 0.05
    assert [row["pictures"] for row in found["buckets"]] == [1, 1, 1]
    line = in_words(found, bucket_order(assigned, shards=(1, 1)), "center")
    assert line.startswith("3 buckets (") and "to a square it would be 41.7 %" in line
    assert "3 of them, with 3 pictures, are rarer than a batch of 12 and wait up to 12 epochs for one" in line
    assigned = assignment((24,))
    line = in_words(report(assigned, assigned.sizes[assigned.of]), bucket_order(assigned), "pad")
    assert "padding is" in line and "rarer" not in line


# ---- the picture

GRID = np.stack([*np.meshgrid(np.arange(120), np.arange(90)), np.zeros((90, 120))], axis=-1).astype(np.uint8)


def once(transform, image, size, slot=0):
    draw = transform.draws(torch.tensor([slot]))[0]
    return transform(image, draw, size), transform.sizes(*image.size, draw, size)


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("flip_prob", [0.0, 1.0])
@pytest.mark.parametrize("size", [(40, 20), (20, 40), (24, 24), (40, 30), (120, 30)])
def test_the_corner_that_sdxl_is_told_is_where_the_crop_lies(crop, flip_prob, size):
    """The picture's values are its coordinates."""
    transform = Transform(24, crop=crop, flip_prob=flip_prob, key=7)
    scale = max(size[0] / 120, size[1] / 90)
    seen_whole = GRID[:, ::-1] if flip_prob else GRID
    for slot in range(6):
        seen, (height, width, top, left, high, wide) = once(transform, Image.fromarray(GRID), size, slot)
        assert seen.shape == (size[1], size[0], 3) and (height, width, wide, high) == (90, 120, *size)
        # the pixel in the middle of what is seen, in the coordinates of the whole
        x, y = (left + wide / 2) / scale - 0.5, (top + high / 2) / scale - 0.5
        expected = seen_whole[round(y), round(x), :2].astype(int)
        found = seen[high // 2 - 1 : high // 2 + 1, wide // 2 - 1 : wide // 2 + 1, :2].mean(axis=(0, 1))
        assert np.abs(found - expected).max() <= 0.75 / scale + 0.5  # the corner is told in whole pixels
        assert 0 <= top <= math.ceil(90 * scale) - high and 0 <= left <= math.ceil(120 * scale) - wide


def test_pad_brings_a_picture_into_its_bucket():
    white = Image.new("RGB", (60, 20), "white")
    pixels, sizes = once(Transform(24, crop="pad", background=(255, 0, 0)), white, (32, 16))
    assert pixels.shape == (16, 32, 3) and sizes == (20, 60, 0, 0, 16, 32)
    filled = (pixels == 255).all(axis=2).any(axis=1)
    assert filled.sum() == 11 and filled[2:13].all()  # 32 * 20 / 60 rows
    with pytest.raises(BadSample):
        once(Transform(24, crop="pad", upscale=False), Image.new("RGB", (31, 15)), (32, 16))
    once(Transform(24, crop="pad", upscale=False), Image.new("RGB", (31, 16)), (32, 16))


def test_upscale_off_refuses_what_does_not_cover_its_bucket():
    with pytest.raises(BadSample, match="smaller than 32x16"):
        once(Transform(8, upscale=False), Image.new("RGB", (31, 400)), (32, 16))
    once(Transform(64, upscale=False), Image.new("RGB", (32, 16)), (32, 16))


def test_a_jpeg_is_decoded_as_large_as_its_bucket_needs():
    assert Transform(24).short_side(4000, 1000, None) == 24
    assert Transform(24).short_side(4000, 1000, (48, 12)) == 12
    assert Transform(24).short_side(4000, 1000, (24, 24)) == 24
    assert Transform(24).short_side(1000, 1000, (48, 12)) == 48  # the width is what counts


# ---- the stream

SHAPES = [(10, 10), (20, 10), (10, 20), (10, 10), (40, 10), (20, 10), (12, 9), (9, 30)]
SETTINGS = {"enable_bucket": True, "bucket_reso_steps": 4}
NUM = 36


def shards(folder, lengths, bad=()):
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, length in enumerate(lengths):
        members = []
        for n in range(number, number + length):
            data = picture(n, SHAPES[n % len(SHAPES)])
            data = data[: len(data) // 2] if n in bad else data  # the header is whole: the index sees its size
            members += [(f"s{n:05d}.png", data), (f"s{n:05d}.txt", b"a picture")]
        write_tar(folder / f"train-{shard}.tar", members)
        number += length
    return folder


def module(path, **options):
    run = {"seed": 0, "batch_size": 12, "num_workers": 0}
    run |= {k: options.pop(k) for k in ("rank", "world_size", "accumulate", "start_step", "batch_size") if k in options}
    settings = {"image_size": 16, "crop": "random", "flip_prob": 0.5, "bucket": SETTINGS, **options}
    return DataModule(str(path), **settings).open().configure(**run)


@pytest.mark.parametrize("lengths", [[36], [17, 19], [1, 1, 9, 20, 5], [5, 6, 5, 5, 5, 5, 5]], ids=len)
def test_any_ranks_workers_and_shards_give_the_same_batches(lengths, tmp_path, monkeypatch):
    """As `test_exactness.py`: ranks and workers are simulated in one process."""
    data = module(shards(tmp_path / "data", lengths))
    order, dataset = data._run["order"], data.dataset("train")
    transform, steps = Transform(16, crop="random", flip_prob=0.5, key=run_key(0)), 4

    def run(ranks, workers, accumulate=1, start=0):
        slots, keys, shapes, sums = [], [], [], []
        for step in range(start, steps):
            rows = []
            for rank in range(ranks):
                for micro in range(accumulate):
                    j = (step - start) * accumulate + micro
                    rows.append(next(streams[rank][j % max(1, workers)]))
            shapes.append({tuple(batch.images.shape[2:]) for batch in rows})
            slots.append([s for batch in rows for s in batch.slots.tolist()])
            keys.append([k for batch in rows for k in batch.keys])
            sums.append([float(v) for batch in rows for v in batch.images.flatten(1).sum(1)])
        return slots, keys, shapes, sums

    def streams_of(ranks, workers, accumulate, start):
        found = []
        for rank in range(ranks):
            plan, mine = TrainPlan(order, rank, ranks, accumulate), []
            for worker in range(workers or 1):
                info = SimpleNamespace(id=worker, num_workers=workers) if workers else None
                monkeypatch.setattr(pipeline, "get_worker_info", lambda info=info: info)
                stream = iter(stages(dataset, plan, transform, start=start * accumulate))
                count = len(range(worker, (steps - start) * accumulate, workers or 1))
                mine.append(iter([batch for batch, _ in islice(stream, count)]))
            found.append(mine)
        return found

    streams = streams_of(1, 0, 1, 0)
    reference = run(1, 0)
    slots, keys, shapes, _ = reference
    assert [s for step in slots for s in step] == list(range(12 * steps))
    assert all(len(found) == 1 for found in shapes) and len(set.union(*shapes)) > 1
    for step in range(steps):
        assert shapes[step] == {order.size(step)[::-1]}
        assert keys[step] == [f"s{n:05d}" for n in order.ids(step)]
    for ranks in (1, 2, 3, 4):
        for workers in (0, 1, 3):
            for accumulate in {1, 12 // ranks // 2}:
                streams = streams_of(ranks, workers, accumulate, 0)
                assert run(ranks, workers, accumulate) == reference
    streams = streams_of(2, 3, 1, 2)
    assert run(2, 3, start=2) == tuple(part[2:] for part in reference)


def test_the_module_streams_resume_and_report(tmp_path):
    path = shards(tmp_path, [20, 16])
    stream = iter(module(path).train_dataloader())
    first = [next(stream) for _ in range(9)]
    later = iter(module(path, start_step=6).train_dataloader())
    for batch in first[6:]:
        again = next(later)
        assert again.keys == batch.keys and torch.equal(again.images, batch.images)
    line = module(path).bucket_report()
    assert "buckets (" in line and "rarer than a batch of 12" in line
    assert module(path, bucket=None).bucket_report() is None
    square = next(iter(module(path, bucket={"enable_bucket": False}).train_dataloader()))
    assert square.images.shape == (12, 3, 16, 16)


def test_sdxl_is_told_the_size_of_the_bucket(tmp_path):
    data = module(shards(tmp_path, [36]), columns={"size": "@size"}, flip_prob=0.0)
    for batch in islice(data.train_dataloader(), 6):
        for key, told in zip(batch.keys, batch.columns["size"], strict=True):
            width, height = SHAPES[int(key[1:]) % len(SHAPES)]
            assert told[:2] == (height, width) and told[4:] == tuple(batch.images.shape[2:])


@pytest.mark.parametrize("batch_size", [1, 4, 50])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_pass_shows_every_picture_once_in_equally_many_batches(tmp_path, batch_size, world_size):
    assigned = module(shards(tmp_path, [36])).assigned("train")
    plans = [BucketPass(assigned, batch_size, rank, world_size, pad=True) for rank in range(world_size)]
    seen = []
    assert len({plan.num_batches for plan in plans}) == 1
    for j in range(plans[0].num_batches):
        assert len({(plan.size(j), len(plan.slots(j))) for plan in plans}) == 1
        for plan in plans:
            assert {assigned.size(assigned.of[i]) for i in plan.ids(j).tolist()} == {plan.size(j)}
            assert (plan.ids(j)[plan.valid(j)] == plan.slots(j)[plan.valid(j)]).all()
            assert len(plan.slots(j)) <= batch_size
            seen += plan.slots(j)[plan.valid(j)].tolist()
    assert sorted(seen) == list(range(NUM))
    padding = sum(len(p.slots(j)) for p in plans for j in range(p.num_batches)) - NUM
    assert padding < world_size * len(assigned)
    unpadded = [BucketPass(assigned, batch_size, rank, world_size) for rank in range(world_size)]
    slots = [s for plan in unpadded for j in range(plan.num_batches) for s in plan.slots(j).tolist()]
    assert sorted(slots) == list(range(NUM))


def test_validation_and_encoding_batches_have_one_size(tmp_path):
    path = shards(tmp_path, [36], bad={5})
    data = module(path, val_path=str(path))
    seen = []
    for batch in data.val_dataloader(5):
        assert batch.images.shape[0] <= 5
        seen += batch.slots[batch.valid].tolist()
        sizes = {tuple(data.assigned("val").sizes[data.assigned("val").of[i]]) for i in batch.slots.tolist()}
        assert sizes == {tuple(batch.images.shape[:1:-1])}  # a picture that cannot be read has the bucket's size
    assert sorted(seen) == [i for i in range(36) if i != 5]
    encoded = list(data.encode_dataloader("train", 8))
    assert sorted(s for b in encoded for s in b.slots.tolist()) == list(range(36))
    assert len({b.images.shape[2:] for b in encoded}) == len(data.assigned("train"))


def test_a_bad_picture_is_replaced_and_the_batch_keeps_its_size(tmp_path):
    """Sample 7 (9x30) is alone with its kind; 4 and its kind are all bad: then a neighbour is cropped to the size."""
    path = shards(tmp_path, [36], bad={3, 4, 12, 20, 28})
    data = module(path, max_bad_fraction=1.0, flip_prob=0.0)
    assigned = data.assigned("train")
    lost = assigned.of[4]
    assert set(np.flatnonzero(assigned.of == lost).tolist()) == {4, 12, 20, 28}
    seen = set()
    for step, batch in enumerate(islice(data.train_dataloader(), 40)):
        assert batch.valid.all() and batch.images.shape[2:] == data._run["order"].size(step)[::-1]
        numbers = {int(key[1:]) for key in batch.keys}
        assert not numbers & {3, 4, 12, 20, 28}
        if data._run["order"].size(step) == assigned.size(lost):
            seen |= {int(assigned.of[n]) for n in numbers}
    assert len(seen) == 1 and lost not in seen  # the nearest bucket stood in


def test_with_moments_a_replacement_has_the_same_size(tmp_path):
    """Encoded pictures cannot be cropped anew: the bucket's own stand in."""
    data = module(shards(tmp_path, [36]), crop="center", flip_prob=0.0, max_bad_fraction=1.0)
    assigned = data.assigned("train")
    sizes = assigned.sizes
    tables = [torch.full((int((assigned.of == k).sum()), 2, *size[::-1]), float(k)) for k, size in enumerate(sizes)]
    rows = np.array([int((assigned.of[:i] == k).sum()) for i, k in enumerate(assigned.of)])
    usable = np.arange(36) % 9 != 0
    data.use_moments(MomentTables(tables, np.stack([assigned.of, rows], axis=1), usable))
    replaced = 0
    for step, batch in enumerate(islice(data.train_dataloader(), 30)):
        assert batch.images is None and batch.moments.shape[2:] == data._run["order"].size(step)[::-1]
        replaced += sum(int(key[1:]) != i for key, i in zip(batch.keys, data._run["order"].ids(step), strict=True))
        assert all(int(key[1:]) % 9 for key in batch.keys)
    assert replaced > 0


def test_a_bucket_of_which_nothing_could_be_encoded_gives_its_steps_to_its_neighbour(tmp_path):
    """As from pixels, but at the neighbour's size: the same keys at all steps of other buckets."""
    bad = {4, 12, 20, 28, 7, 15, 23, 31}  # all of two kinds
    path = shards(tmp_path, [36], bad=bad)
    data = module(path, crop="center", flip_prob=0.0, max_bad_fraction=1.0)
    assigned = data.assigned("train")
    of, dead = assigned.of, {int(assigned.of[7]), int(assigned.of[4])}
    assert set(np.flatnonzero(np.isin(of, list(dead))).tolist()) == bad
    pixels = list(islice(data.train_dataloader(), 60))
    tables = [torch.full((int((of == k).sum()), 2, *size[::-1]), float(k)) for k, size in enumerate(assigned.sizes)]
    rows = np.array([int((of[:i] == k).sum()) for i, k in enumerate(of)])
    usable = np.isin(np.arange(36), list(bad), invert=True)
    data = module(path, crop="center", flip_prob=0.0, max_bad_fraction=1.0)
    data.use_moments(MomentTables(tables, np.stack([of, rows], axis=1), usable))
    elsewhere = 0
    for step, (a, b) in enumerate(zip(pixels, data.train_dataloader(), strict=False)):
        bucket = int(of[data._run["order"].ids(step)[0]])
        assert b.valid.all() and len({float(value) for value in b.moments.flatten()}) == 1
        assert {int(of[int(key[1:])]) for key in b.keys} == {int(b.moments[0, 0, 0, 0])}
        if bucket in dead:
            elsewhere += 1
            assert int(b.moments[0, 0, 0, 0]) not in dead
        else:
            assert a.keys == b.keys and b.moments.shape[2:] == a.images.shape[2:]
    assert dict(data.ledger.counts) == {"decode": 12 * elsewhere} != {}


def test_the_one_good_picture_of_a_neighbour_stands_in():
    order = bucket_order(assignment((3, 4, 5)))
    usable = np.zeros(12, dtype=bool)
    usable[5] = True
    encoded = order.of_encoded(usable)
    for step in range(40):
        for place in range(BATCH):
            tried = {encoded.reserve(step * BATCH + place, attempt) for attempt in range(12)}
            assert 5 in tried | {int(order.ids(step)[place])}
        assert encoded.size(step) == order.assigned.size(order.assigned.of[5])
    assert order.of_encoded(np.zeros(12, dtype=bool)).size(0) == order.size(0)  # nothing stands in for nothing


def test_a_slot_that_stays_empty_does_not_change_the_size_of_its_batch(tmp_path):
    """With few attempts a slot of a dead bucket may find nothing; the others come from a bucket of another size."""
    bad = {4, 12, 20, 28, 1, 5, 9, 13}
    path = shards(tmp_path, [36], bad=bad)
    data = module(path, crop="center", flip_prob=0.0, max_bad_fraction=1.0, max_consecutive_bad=1)
    of = data.assigned("train").of
    sizes = data.assigned("train").sizes
    tables = [torch.full((int((of == k).sum()), 2, *size[::-1]), float(k)) for k, size in enumerate(sizes)]
    rows = np.array([int((of[:i] == k).sum()) for i, k in enumerate(of)])
    usable = np.isin(np.arange(36), list(bad), invert=True)
    data.use_moments(MomentTables(tables, np.stack([of, rows], axis=1), usable))
    data.ledger = None  # which would stop it
    mixed = [batch for batch in islice(data.train_dataloader(), 40) if 0 < batch.valid.sum() < 12]
    assert any(int(of[int(key[1:])]) == int(of[4]) for batch in mixed for key in batch.keys)
    for batch in mixed:
        assert len({float(value) for value in batch.moments.flatten()}) == 1
