"""The order function: coverage, epochs, lanes, world sizes, replacements."""

import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from ldm.data.order import Order, check_cut, cut, lanes_default, permutation
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
        cut(o.ids(3), rank, world_size, accumulate, micro) for rank in range(world_size) for micro in range(accumulate)
    ]
    assert np.concatenate(pieces).tolist() == o.ids(3).tolist()


def test_a_world_size_that_does_not_divide_is_refused_with_the_valid_ones():
    check_cut(18, 3, 2)
    with pytest.raises(LdmError, match=r"valid numbers of devices with accumulate=1: 1, 2, 3, 6, 9, 18") as refused:
        check_cut(18, 4, 1)
    assert refused.value.exit_code == 2


def test_lanes():
    assert lanes_default(32, 1000) == 8
    assert lanes_default(12, 1000) == 6
    assert lanes_default(7, 1000) == 7
    assert lanes_default(11, 1000) == 1
    assert lanes_default(32, 3) == 2
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
    o = order(SHARDS[5], seed=7)
    assert permutation(8, 1, "x").tolist() == FROZEN_PERMUTATION
    assert o.ids(5).tolist() == FROZEN_IDS
    assert pickle.loads(pickle.dumps(o)).ids(5).tolist() == FROZEN_IDS
    assert [o.ids(s).tolist() for s in (9, 2, 9)] == [order(SHARDS[5], seed=7).ids(s).tolist() for s in (9, 2, 9)]
    assert order(SHARDS[5], seed=8).ids(5).tolist() != FROZEN_IDS


def test_reserves_stay_in_the_lane():
    o = order(SHARDS[7], batch_size=8, lanes=2)
    for slot in (0, 3, 4, 7, 8 * 5 + 6):
        lane, b = slot % 8 // 4, 4
        epoch_ids = lane_stream(o, lane, 40)
        length = o.lane_lengths[lane]
        epoch = (slot // 8 * b + slot % b) // length
        lane_ids = set(epoch_ids[epoch * length : (epoch + 1) * length].tolist())
        drawn = [o.reserve(slot, attempt) for attempt in range(20)]
        assert set(drawn) <= lane_ids and len(set(drawn)) > 3
        assert drawn == [o.reserve(slot, attempt) for attempt in range(20)]


def test_no_sample_is_refused_with_words():
    with pytest.raises(LdmError, match="no sample"):
        order([0])


def test_neighbours_differ():
    o = order([50, 50], batch_size=10)
    assert all(a.tolist() != b.tolist() for a, b in pairwise(o.ids(s) for s in range(20)))
