"""1,024 ranks without starting one: what each of them would read, from the plan that each of them would have."""

import resource
import time

import numpy as np
import pytest

from ldm.data.buckets import Assignment, BucketOrder
from ldm.data.order import Order, efficient_sizes
from ldm.data.pipeline import TrainPlan

RANKS, PER_NODE = 1024, 8


def shards(num_samples, num_shards, seed=0):
    """Lengths that differ a lot, the sizes of the samples in bytes, and an order over them."""
    rng = np.random.default_rng(seed)
    lengths = np.diff(
        np.sort(rng.choice(num_samples - 1, num_shards - 1, replace=False)) + 1, prepend=0, append=num_samples
    )
    return lengths, rng.integers(20_000, 200_000, num_samples)


def order(num_samples, num_shards, batch_size=2048, **options):
    lengths, sizes = shards(num_samples, num_shards)
    return Order(lengths, sizes, seed=1, batch_size=batch_size, **{"lanes": 8, "window_mb": 8, **options})


def step_of_all(of, step, world_size, accumulate=1, ranks=None):
    """[B] ids and slots of a step, rank by rank, from plans that know nothing of each other."""
    ids, slots = [], []
    for rank in range(world_size) if ranks is None else ranks:
        plan = TrainPlan(of, rank, world_size, accumulate)
        for micro in range(accumulate):
            ids.append(plan.ids(step * accumulate + micro))
            slots.append(plan.slots(step * accumulate + micro))
    return np.concatenate(ids), np.concatenate(slots)


@pytest.mark.parametrize(
    "num_samples,num_shards,lanes",
    [
        (20_000, 64, 8),
        pytest.param(20_480, 2, 1024, marks=pytest.mark.slow),  # two shards for 128 nodes
        pytest.param(50_001, 1000, 128, marks=pytest.mark.slow),  # 50 samples a shard, none as long as another
        pytest.param(200_003, 17, 64, marks=pytest.mark.slow),
    ],
)
def test_all_ranks_together_see_every_sample_once_an_epoch(num_samples, num_shards, lanes):
    of = order(num_samples, num_shards, lanes=lanes)
    used = np.zeros(num_samples, dtype=np.int64)
    for step in range(of.steps_per_epoch):
        ids, slots = step_of_all(of, step, RANKS)
        assert slots.tolist() == list(range(2048 * step, 2048 * (step + 1)))  # none twice, none left out
        used += np.bincount(ids, minlength=num_samples)
    # lanes differ by at most a sample, and the last step of the epoch begins the next one
    extra = 2048 * of.steps_per_epoch - num_samples
    assert used.min() == 1 and used.sum() - num_samples == extra and (used > 1).sum() <= extra


@pytest.mark.parametrize("world_size,accumulate", [(1, 1), (8, 4), (64, 1), (512, 2), (RANKS, 1)])
def test_every_world_size_sees_the_order_of_one(world_size, accumulate):
    of = order(20_000, 64)
    for step in (0, 9, 10, 12_345):  # of which one straddles two epochs
        assert step_of_all(of, step, world_size, accumulate)[0].tolist() == of.ids(step).tolist()


def test_another_cut_would_be_noticed():
    """Negative control: a rank that believes in another world size."""
    of = order(20_000, 64)
    ids = np.concatenate([TrainPlan(of, rank, 512 if rank == 3 else RANKS).ids(0)[:2] for rank in range(RANKS)])
    assert ids.tolist() != of.ids(0).tolist()


def test_resuming_anywhere_on_another_number_of_ranks_goes_on_with_the_same_samples():
    """The order is a function of the step, so a fresh process at step k continues: 1024 ranks, then 256, then 512."""
    reference = order(20_000, 64)
    whole = [reference.ids(step).tolist() for step in range(5, 17)]
    lives = [(5, 9, RANKS), (9, 12, 256), (12, 17, 512)]
    again = [
        step_of_all(order(20_000, 64), step, world_size)[0].tolist()
        for first, last, world_size in lives
        for step in range(first, last)
    ]
    assert again == whole


def test_a_node_reads_its_own_lanes_alone():
    """With 128 lanes a node of 8 ranks has one: 1/128 of the epoch's bytes, from shards that lie side by side."""
    of = order(40_960, 256, lanes=128)
    nodes = [set(), set()]
    for step in range(of.steps_per_epoch):
        for node, mine in zip((0, 77), nodes, strict=True):
            mine |= set(step_of_all(of, step, RANKS, ranks=range(PER_NODE * node, PER_NODE * (node + 1)))[0].tolist())
    assert [len(mine) for mine in nodes] == [320, 320] and not nodes[0] & nodes[1]
    ends = np.cumsum(shards(40_960, 256)[0])
    assert all(len(set(np.searchsorted(ends, sorted(mine), side="right"))) <= 12 for mine in nodes)  # of 256 shards
    # negative control: with 8 lanes, 16 nodes share one, and each of them reads from all its shards
    shared = order(40_960, 256, lanes=8)
    ids = [step_of_all(shared, step, RANKS, ranks=range(PER_NODE))[0] for step in range(shared.steps_per_epoch)]
    assert len(set(np.searchsorted(ends, np.concatenate(ids), side="right"))) > 20


def test_the_numbers_of_processes_that_fit_the_lanes():
    assert efficient_sizes(48, 8) == [1, 2, 4, 8, 16, 24, 48]  # not 3, 6 and 12, which divide the batch
    assert efficient_sizes(2048, 8)[-3:] == [512, 1024, 2048]
    assert efficient_sizes(48, 8, accumulate=4) == [1, 2, 4]  # of 12, what each accumulates


def test_buckets_are_planned_alike_on_all_ranks():
    num_samples, sizes = 20_000, np.array([[64, 64], [80, 48], [48, 80]])
    lengths, weights = shards(num_samples, 64)
    assigned = Assignment(sizes, np.random.default_rng(0).choice(3, num_samples, p=[0.6, 0.3, 0.1]))
    starts = np.concatenate([[0], np.cumsum(lengths)])

    def part(rows, lanes, window_mb):
        own = np.diff(np.searchsorted(rows, starts))
        return Order(own[own > 0], weights[rows], seed=1, batch_size=2048, lanes=lanes, window_mb=window_mb)

    base = Order(lengths, weights, seed=1, batch_size=2048, lanes=8, window_mb=8)
    of = BucketOrder(base, assigned, part, uses=np.ones(num_samples), sizes=weights, window_mb=8)
    used = np.zeros(num_samples, dtype=np.int64)
    for step in range(of.steps_per_epoch):
        ids, _ = step_of_all(of, step, RANKS)
        assert ids.tolist() == of.ids(step).tolist()
        assert {tuple(assigned.sizes[assigned.of[i]]) for i in ids} == {of.size(step)}  # one bucket, on every rank
        used += np.bincount(ids, minlength=num_samples)
    assert used.min() >= 1


@pytest.mark.slow
def test_what_it_costs_a_rank_to_find_its_place():
    """Ten million samples, 1,024 lanes, step 123,456: docs/scaling.md gives these figures."""
    lengths, sizes = shards(10_000_000, 4000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    of = Order(lengths, sizes, seed=1, batch_size=16_384, lanes=RANKS)
    built = time.process_time() - began
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    plan = TrainPlan(of, 1000, RANKS)
    began = time.process_time()
    plan.ids(123_456)
    found = time.process_time() - began
    began = time.process_time()
    for step in range(1000):
        plan.ids(123_457 + step)
    each = (time.process_time() - began) / 1000
    print(
        f"built in {built:.2f} s, {megabytes:.0f} MB, place found in {found * 1e3:.1f} ms, next in {each * 1e6:.0f} us"
    )
    assert built < 20 and megabytes < 1000 and found < 2 and each < 0.005
