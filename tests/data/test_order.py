"""The order function: coverage, epochs, lanes, world sizes, replacements."""

import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from ldm.data.order import Order, check_cut, lanes_default, permutation, piece, samples_per_epoch
from ldm.errors import LdmError

SHARDS = {1: [23], 2: [10, 13], 3: [5, 0, 18], 5: [1, 2, 3, 4, 13], 7: [4, 4, 4, 4, 4, 2, 1]}


FROZEN_PERMUTATION = [7, 6, 4, 2, 1, 5, 0, 3]
FROZEN_IDS = [0, 6, 8, 0, 11, 15, 17, 21]


def order(lengths, batch_size=8, seed=0, size=100, **options):
    return Order(lengths, [size] * sum(lengths), seed=seed, batch_size=batch_size, **options)


def lane_stream(o, lane, num_steps):
    b = o.batch_size // o.lanes
    return np.concatenate([o.ids(step)[lane * b : (lane + 1) * b] for step in range(num_steps)])


@pytest.mark.parametrize("lanes", [1, 2, 8])
@pytest.mark.parametrize("lengths", SHARDS.values(), ids=lambda x: f"{len(x)}shards")
@pytest.mark.parametrize("window_mb", [256, 0.0005])  # one window, and about five samples each
def test_every_sample_once_per_epoch(lengths, lanes, window_mb):
    o = order(lengths, lanes=lanes, window_mb=window_mb)
    epochs = [[], [], []]
    for lane, length in enumerate(o.lane_lengths):
        stream = lane_stream(o, lane, 40)
        for epoch in range(3):
            epochs[epoch].extend(stream[epoch * length : (epoch + 1) * length])
    for ids in epochs:
        assert sorted(ids) == list(range(23))
    assert epochs[0] != epochs[1] != epochs[2]


def test_drop_uses_no_sample_twice_in_an_epoch_and_starts_each_at_a_step():
    o = order(SHARDS[5], lanes=2, remainder="drop")
    assert o.steps_per_epoch == 2  # lanes of 11 and 12, 4 per step
    for epoch in range(3):
        ids = np.concatenate([o.ids(2 * epoch + s) for s in range(2)])
        assert len(set(ids.tolist())) == 16


def test_a_batch_larger_than_the_dataset():
    o = order([3], batch_size=8, lanes=2)
    counts = Counter(np.concatenate([o.ids(s) for s in range(3)]).tolist())
    assert sum(counts.values()) == 24 and set(counts) == {0, 1, 2}


@pytest.mark.parametrize("world_size,accumulate", [(1, 1), (1, 4), (2, 2), (3, 1), (3, 4), (6, 2), (12, 1)])
def test_any_cut_gives_the_same_global_batch(world_size, accumulate):
    o = order(SHARDS[7], batch_size=12, lanes=2)
    pieces = [
        o.ids(3, piece(12, rank, world_size, accumulate, micro))
        for rank in range(world_size)
        for micro in range(accumulate)
    ]
    assert np.concatenate(pieces).tolist() == o.ids(3).tolist()


def test_a_world_size_that_does_not_divide_is_refused_with_the_valid_ones():
    check_cut(18, 3, 2)
    with pytest.raises(LdmError, match=r"valid numbers of devices with accumulate=1: 1, 2, 3, 6, 9, 18") as refused:
        check_cut(18, 4, 1)
    assert refused.value.exit_code == 2


def test_lanes():
    assert lanes_default(32, 1000) == 8
    assert lanes_default(12, 1000) == 4  # six lanes of 166 or 167: these would be used 0.6 % less often
    assert lanes_default(12, 10_000) == 6
    assert lanes_default(7, 1000) == 1
    assert lanes_default(11, 1000) == 1
    assert lanes_default(32, 3) == 1 and lanes_default(32, 4) == 4
    with pytest.raises(LdmError, match="valid: 1, 2, 4, 8"):
        order([100], lanes=3)


def test_windows_bound_the_bytes_that_are_shuffled_together():
    o = order([1000], batch_size=1, size=1000, window_mb=0.1)  # 104 samples
    first = lane_stream(o, 0, 1000)
    assert np.abs(first - np.arange(1000)).max() < 106
    whole = lane_stream(order([1000], batch_size=1, size=1000), 0, 1000)
    assert np.abs(whole - np.arange(1000)).max() > 500


def test_a_lane_holds_whole_runs_of_the_permuted_shards():
    o = order([10] * 6, batch_size=6, lanes=3)
    for lane in range(3):
        shards = set((lane_stream(o, lane, 10) // 10).tolist())
        assert len(shards) == 2


def test_pure_and_equal_across_processes():
    """Frozen numbers: another numpy or machine must give the same order."""
    o = order(SHARDS[5], seed=7, lanes=8)
    assert permutation(8, 1, "x").tolist() == FROZEN_PERMUTATION
    assert o.ids(5).tolist() == FROZEN_IDS
    assert pickle.loads(pickle.dumps(o)).ids(5).tolist() == FROZEN_IDS
    again = order(SHARDS[5], seed=7, lanes=8)
    assert [o.ids(s).tolist() for s in (9, 2, 9)] == [again.ids(s).tolist() for s in (9, 2, 9)]
    assert order(SHARDS[5], seed=8, lanes=8).ids(5).tolist() != FROZEN_IDS


def test_reserves_stay_in_the_lane():
    o = order(SHARDS[7], batch_size=8, lanes=2)
    for slot in (0, 3, 4, 7, 8 * 5 + 6):
        lane, b = slot % 8 // 4, 4
        epoch_ids = lane_stream(o, lane, 40)
        length = o.lane_lengths[lane]
        epoch = (slot // 8 * b + slot % b) // length
        lane_ids = set(epoch_ids[epoch * length : (epoch + 1) * length].tolist())
        own = int(o.ids(slot // 8)[slot % 8])
        drawn = [o.reserve(slot, attempt) for attempt in range(length - 1)]
        assert sorted(drawn) == sorted(lane_ids - {own})  # each of them once
        assert drawn == [o.reserve(slot, attempt) for attempt in range(length - 1)]
        beyond = [o.reserve(slot, length - 1 + attempt) for attempt in range(22)]
        assert sorted(beyond) == sorted(set(range(23)) - {own})


@pytest.mark.parametrize("lanes", [1, 2, 4, 8])
@pytest.mark.parametrize("remainder", ["carry", "drop"])
def test_every_other_sample_is_offered_once_before_one_is_offered_again(lanes, remainder):
    o = order(SHARDS[7], batch_size=8, lanes=lanes, remainder=remainder)
    for slot in range(48):
        others = sorted(set(range(23)) - {int(o.ids(slot // 8)[slot % 8])})
        drawn = [o.reserve(slot, attempt) for attempt in range(44)]
        assert sorted(drawn[:22]) == others and drawn[22:] == drawn[:22]


def test_a_lane_of_one_sample_is_replaced_from_the_others():
    """The first attempt must not be the bad sample itself, a thousand times."""
    o = order([3], batch_size=3, lanes=3)
    for slot, own in enumerate(o.ids(0).tolist()):
        assert {o.reserve(slot, 0), o.reserve(slot, 1)} == {0, 1, 2} - {own}
    alone = order([1], batch_size=1)
    assert alone.reserve(0, 5) == 0


def test_no_sample_is_refused_with_words():
    with pytest.raises(LdmError, match="no sample"):
        order([0])


def test_neighbours_differ():
    o = order([50, 50], batch_size=10)
    assert all(a.tolist() != b.tolist() for a, b in pairwise(o.ids(s) for s in range(20)))


# ---- repeats

REPEATS = [1, 2, 3, 6] * 6  # of 24 samples: 72 uses an epoch


@pytest.mark.parametrize("lanes", [1, 2, 8])
@pytest.mark.parametrize("lengths", [[24], [11, 13], [5, 0, 19], [1, 2, 3, 4, 14], [4, 4, 4, 4, 5, 2, 1]], ids=len)
@pytest.mark.parametrize("window_mb", [256, 0.0005])
def test_every_sample_as_often_as_it_repeats_in_every_epoch(lengths, lanes, window_mb):
    o = order(lengths, lanes=lanes, window_mb=window_mb, repeats=REPEATS)
    assert o.num_samples == 72 and o.steps_per_epoch == 9
    epochs = [np.concatenate([o.ids(9 * epoch + s) for s in range(9)]) for epoch in range(3)]
    for ids in epochs:
        assert np.bincount(ids, minlength=24).tolist() == REPEATS
    assert epochs[0].tolist() != epochs[1].tolist() != epochs[2].tolist()


def test_the_coverage_test_notices_a_sample_used_once_too_often():
    o = order([24], lanes=1, repeats=[2, *REPEATS[1:]])
    ids = np.concatenate([o.ids(s) for s in range(9)])
    assert np.bincount(ids, minlength=24).tolist() != REPEATS


@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_turns_count_the_uses_of_each_sample(lanes):
    o = order([11, 13], lanes=lanes, repeats=REPEATS)
    turns = {n: [] for n in range(24)}
    for step in range(27):
        for sample_id, turn in zip(o.ids(step).tolist(), o.turns(step).tolist(), strict=True):
            turns[sample_id].append(turn)
    for sample_id, seen in turns.items():
        assert sorted(seen) == list(range(3 * REPEATS[sample_id]))  # three epochs


def test_repeats_of_one_change_nothing():
    plain, ones = order(SHARDS[5], seed=7, lanes=8), order(SHARDS[5], seed=7, lanes=8, repeats=[1] * 23)
    assert ones.ids(5).tolist() == plain.ids(5).tolist() == FROZEN_IDS
    assert set(plain.turns(0).tolist()) == {0}


def test_copies_lie_apart():
    """Uses of a sample are spread over the epoch, though windows are small: each pass is permuted as a shard."""
    o = order([40] * 5, batch_size=1, window_mb=0.001, repeats=[4] * 200)
    stream = lane_stream(o, 0, 800)
    nearest = min(int(np.diff(np.flatnonzero(stream == n)).min()) for n in range(200))
    together = order([160] * 5, batch_size=1, window_mb=0.001)  # the control: copies laid beside each other
    beside = lane_stream(together, 0, 800) // 4
    assert nearest > 10 >= min(int(np.diff(np.flatnonzero(beside == n)).min()) for n in range(200))


def test_reserves_of_repeated_samples_are_samples():
    o = order([11, 13], lanes=2, repeats=REPEATS)
    assert {o.reserve(slot, 0) for slot in range(1000)} == set(range(24))


def test_wrong_repeats():
    for repeats in ([1] * 22, [0] + [1] * 22):
        with pytest.raises(ValueError, match="repeats"):
            order(SHARDS[5], repeats=repeats)


def test_a_large_order_with_repeats_is_cheap():
    """A million samples, ten times each for a tenth of them: a first step anywhere, in bounded memory."""
    sizes, repeats = np.full(1_000_000, 50_000), np.where(np.arange(1_000_000) % 10 == 0, 10, 1)
    o = Order([10_000] * 100, sizes, seed=0, batch_size=256, repeats=repeats)
    assert o.num_samples == 1_900_000
    assert len(set(o.ids(900_000 // 256).tolist())) > 200
    held = sum(x.nbytes for x in vars(o._whole_passes).values())
    assert held < 50e6


# ---- parts of a set

SHARES = [1.0] * 10 + [0.4] * 5 + [2.5] * 6 + [1.25] * 3  # 10 + 2 + 15 + round(3.75) uses


@pytest.mark.parametrize("lanes", [1, 2, 8])
@pytest.mark.parametrize("lengths", [[24], [10, 5, 6, 3], [4, 4, 4, 4, 5, 2, 1]], ids=len)
def test_a_share_of_the_samples_takes_turns(lengths, lanes):
    o = order(lengths, lanes=lanes, repeats=SHARES, remainder="carry", batch_size=8)
    assert o.num_samples == 31
    streams = [lane_stream(o, lane, 4 * 40) for lane in range(lanes)]
    used = np.zeros((40, 24), dtype=int)
    for epoch in range(40):
        for stream, length in zip(streams, o.lane_lengths, strict=True):
            used[epoch] += np.bincount(stream[epoch * length : (epoch + 1) * length], minlength=24)
    low = np.floor(SHARES).astype(int)
    assert (used.sum(1) == 31).all() and (used >= low).all() and (used <= low + 1).all()
    for first, last in ((0, 10), (10, 15), (15, 21), (21, 24)):  # within a set nobody goes ahead by more than one use
        total = np.cumsum(used[:, first:last], axis=0)
        assert (total.max(1) - total.min(1) <= 1).all()
    assert used[:, 10:15].sum() == 40 * 2 and len(set(map(tuple, used[:, 10:15].tolist()))) > 1


def test_samples_per_epoch_are_those_of_the_order():
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = rng.integers(1, 12, 4)
        repeats = rng.permutation(np.repeat([2.0, *rng.uniform(0.01, 3, 3)], counts))
        assert samples_per_epoch(repeats) == order([len(repeats)], lanes=1, repeats=repeats).num_samples
    assert samples_per_epoch(np.repeat([0.349, 0.449], 10)) == 7 != round(7.98)


def test_turns_count_the_uses_of_samples_that_take_turns():
    o = order([10, 14], lanes=1, repeats=SHARES, batch_size=31)
    seen = {n: [] for n in range(24)}
    for step in range(30):
        for sample_id, turn in zip(o.ids(step).tolist(), o.turns(step).tolist(), strict=True):
            seen[sample_id].append(turn)
    for turns in seen.values():
        assert sorted(turns) == list(range(len(turns)))
    assert pickle.loads(pickle.dumps(o)).ids(17).tolist() == o.ids(17).tolist()
