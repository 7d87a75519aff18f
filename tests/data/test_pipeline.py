"""Shards to batches: coverage, order over workers and ranks, resume, replacements, budgets, moments."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from ldm.data.bad_samples import Bad, BadSamples
from ldm.data.captions import Captions
from ldm.data.loader import Stream, check_slots
from ldm.data.moments import MomentTables
from ldm.data.order import Order
from ldm.data.pipeline import Batches, Decode, PassPlan, Source, TrainPlan, stages
from ldm.data.shards import open_dataset
from ldm.data.transforms import Transform
from ldm.errors import LdmError
from tests.data.making import picture, sample, write_shards, write_tar

TRANSFORM = Transform(8, crop="random", flip_prob=0.5, key=3)


def training(data, batch_size=8, num_workers=0, lanes=None, seed=0, start=0, rank=0, world_size=1, accumulate=1, **kw):
    order = Order(data.shard_lengths, data.sizes, seed=seed, batch_size=batch_size, lanes=lanes)
    plan = TrainPlan(order, rank, world_size, accumulate)
    ledger, transform = kw.pop("ledger", None), kw.pop("transform", TRANSFORM)
    return Stream(stages(data, plan, transform, start=start, **kw), num_workers=num_workers, ledger=ledger)


def take(stream, count):
    batches = iter(stream)
    return [next(batches) for _ in range(count)]


def same(a, b):
    images = torch.equal(a.images, b.images) if a.images is not None else torch.equal(a.moments, b.moments)
    return images and torch.equal(a.slots, b.slots) and (a.keys, a.captions) == (b.keys, b.captions)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_dataset(str(write_shards(tmp_path_factory.mktemp("shards"), [5, 9, 2, 7])))


@pytest.mark.parametrize("lanes", [1, 2, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[16], [7, 9], [5, 0, 11], [1, 1, 1, 1, 12], [3, 3, 3, 3, 2, 1, 1]])
def test_exact_coverage_and_equal_batches_for_every_cut(lengths, world_size, lanes, tmp_path):
    """16 samples and a batch of 24: two steps are three epochs."""
    folder = write_shards(tmp_path / "data", lengths)
    data = open_dataset(str(folder))
    ranks = [take(training(data, 24, lanes=lanes, rank=r, world_size=world_size), 2) for r in range(world_size)]
    slots = torch.cat([b.slots for step in zip(*ranks, strict=True) for b in step])
    assert slots.tolist() == list(range(48))
    keys = [key for step in zip(*ranks, strict=True) for b in step for key in b.keys]
    assert all(keys.count(key) == 3 for key in data.keys)
    captions = [c for step in zip(*ranks, strict=True) for b in step for c in b.captions]
    assert captions == [f"caption {int(key[1:])}" for key in keys]
    whole = take(training(data, 24, lanes=lanes), 2)
    images = torch.cat([b.images for step in zip(*ranks, strict=True) for b in step])
    assert torch.equal(images, torch.cat([b.images for b in whole]))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_do_not_change_the_batches(data, num_workers):
    alone, many = (take(training(data, accumulate=2, num_workers=n), 13) for n in (0, num_workers))
    assert all(same(a, b) for a, b in zip(alone, many, strict=True))


@pytest.mark.slow
def test_workers_that_are_not_forked(data):
    plan = TrainPlan(Order(data.shard_lengths, data.sizes, seed=0, batch_size=8))
    stream = Stream(stages(data, plan, TRANSFORM), num_workers=1, start_method="forkserver")
    assert same(take(stream, 1)[0], take(training(data), 1)[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_equals_the_tail(data, num_workers):
    whole = take(training(data, accumulate=2), 12)
    tail = take(training(data, accumulate=2, start=5, num_workers=num_workers), 7)
    assert all(same(a, b) for a, b in zip(whole[5:], tail, strict=True))


def test_epochs_and_seeds_differ(data):
    keys = [[k for b in take(training(data, 23, lanes=1, seed=s), 2) for k in b.keys] for s in (0, 1)]
    assert sorted(keys[0][:23]) == sorted(keys[0][23:]) == data.keys
    assert keys[0][:23] != keys[0][23:] and keys[0] != keys[1]


def test_a_dropping_or_reordering_stage_is_noticed(data):
    plan = TrainPlan(Order(data.shard_lengths, data.sizes, seed=0, batch_size=8))
    source = Source(data, plan, TRANSFORM)

    def dropping(samples):
        return (s for s in samples if s["__slot__"] != 5)

    def swapping(samples):
        held = [next(samples), next(samples)]
        yield from reversed(held)
        yield from samples

    import webdataset

    for stage in (dropping, swapping):
        pipeline = webdataset.DataPipeline(source, stage, Decode(source), Batches())
        with pytest.raises(LdmError, match="other samples than planned"):
            take(Stream(pipeline), 2)
    batch = take(training(data), 1)[0]
    check_slots(batch, plan, 0)
    with pytest.raises(LdmError):
        check_slots(replace(batch, slots=batch.slots.flip(0)), plan, 0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_a_pass_covers_everything_once_with_equal_counts(data, world_size):
    plans = [PassPlan(data.num_samples, 4, r, world_size, pad=True) for r in range(world_size)]
    assert len({plan.num_batches for plan in plans}) == 1
    seen = []
    for plan in plans:
        batches = list(Stream(stages(data, plan, TRANSFORM.without_chance())))
        assert len(batches) == plan.num_batches and all(len(b) == 4 for b in batches)
        seen += [int(s) for b in batches for s, v in zip(b.slots, b.valid, strict=True) if v]
    assert sorted(seen) == list(range(data.num_samples))
    bare = [PassPlan(data.num_samples, 4, r, world_size) for r in range(world_size)]
    ids = [i for plan in bare for j in range(plan.num_batches) for i in plan.ids(j).tolist()]
    assert sorted(ids) == list(range(data.num_samples)) and all(p.valid(0).all() for p in bare)


# ---- bad samples


def broken(number):
    """A picture whose header is whole and whose pixels are cut: only decoding can tell."""
    whole = picture(number, (40, 40))
    key = f"s{number:05d}"
    return [(f"{key}.png", whole[: len(whole) // 2]), (f"{key}.txt", b"never seen")]


@pytest.fixture
def mixed(tmp_path):
    """20 samples, two of them broken."""
    members = [m for n in range(20) for m in (broken(n) if n in (3, 11) else sample(n))]
    return open_dataset(str(write_tar(tmp_path / "a.tar", members)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_sample_keeps_its_slot_and_is_replaced_deterministically(mixed, tmp_path, num_workers):
    file = tmp_path / "run" / "bad_samples.jsonl"
    ledger = BadSamples(max_fraction=1.0, num_samples=20, file=file)
    batches = take(training(mixed, 4, lanes=2, ledger=ledger, num_workers=num_workers), 10)
    assert [int(s) for b in batches for s in b.slots] == list(range(40)) and all(b.valid.all() for b in batches)
    keys = [key for b in batches for key in b.keys]
    assert not {"s00003", "s00011"} & set(keys) and len(keys) == 40
    assert all(c == f"caption {int(k[1:])}" for b in batches for c, k in zip(b.captions, b.keys, strict=True))
    again = take(training(mixed, 4, lanes=2), 10)
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))
    assert ledger.counts["decode"] >= 4  # two broken samples, two epochs, and replacements that are broken as well
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(row["kind"], row["shard"], row["key"]) for row in lines} == {
        ("decode", "a.tar", "s00003"),
        ("decode", "a.tar", "s00011"),
    }


def labelled(number, value):
    return [*sample(number), (f"s{number:05d}.json", json.dumps({"score": value}).encode())]


def at_most_ten(value):
    if not isinstance(value, float) or not value <= 10:
        raise LdmError("CONDITION", f"{value!r} is above 10")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_value_that_the_model_cannot_read_makes_a_sample_bad(tmp_path, num_workers):
    wrong = {2: 11.0, 5: "9", 7: True, 8: 10**400, 13: 10**5000, 14: float("nan"), 15: [1.0], 16: [1, "2"]}
    sys.set_int_max_str_digits(0)
    try:
        members = [m for n in range(20) for m in labelled(n, wrong.get(n, 0.5))]
    finally:
        sys.set_int_max_str_digits(4300)
    data = open_dataset(str(write_tar(tmp_path / "a.tar", members)))
    file = tmp_path / "bad_samples.jsonl"
    settings = {"columns": {"s": "score"}, "checks": {"s": [at_most_ten]}}
    ledger = BadSamples(max_fraction=1.0, num_samples=20, file=file)
    batches = take(training(data, 4, lanes=2, ledger=ledger, num_workers=num_workers, **settings), 10)
    assert all(b.valid.all() and b.columns["s"] == [0.5] * 4 for b in batches)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    kinds = {(row["kind"], int(row["key"][1:])) for row in rows if row["shard"] == "a.tar"}
    assert kinds == {("column_value", n) for n in (2, 5, 7, 8, 15)} | {("column_missing", n) for n in (13, 14, 16)}
    assert all(
        len(row["reason"]) <= 200 and "'score'" in row["reason"] for row in rows if row["kind"] == "column_value"
    )
    again = take(training(data, 4, lanes=2, **settings), 10)
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))
    alone = Stream(stages(data, PassPlan(20, 20), TRANSFORM.without_chance(), **settings))
    (batch,) = alone
    assert sorted(batch.slots[~batch.valid].tolist()) == sorted(wrong)
    strict = BadSamples(num_samples=20, strict=True)
    with pytest.raises(LdmError, match=r"column_|above 10") as stopped:
        take(training(data, 4, lanes=2, ledger=strict, max_attempts=0, **settings), 10)
    assert stopped.value.exit_code == 3


def test_a_stream_without_replacement_marks_what_is_bad(mixed):
    batches = list(Stream(stages(mixed, PassPlan(20, 8), TRANSFORM.without_chance())))
    assert [int(s) for b in batches for s, v in zip(b.slots, b.valid, strict=True) if not v] == [3, 11]
    assert batches[0].images.shape == (8, 3, 8, 8) and len(batches[2]) == 4


def test_garbage_ends_quickly_with_exit_3(tmp_path):
    one = broken(0)[0][1]
    members = [m for n in range(2000) for m in ((f"s{n:05d}.png", one), (f"s{n:05d}.txt", b"x"))]
    data = open_dataset(str(write_tar(tmp_path / "shard-0007.tar", members)))
    file = tmp_path / "bad_samples.jsonl"
    ledger = BadSamples(num_samples=2000, file=file)
    with pytest.raises(LdmError) as stopped:
        take(training(data, ledger=ledger), 200)
    assert stopped.value.exit_code == 3
    line = stopped.value.line()
    assert line.startswith("error[DATA-BUDGET]: ") and "mostly decode in shard-0007.tar" in line and str(file) in line
    assert len(file.read_text().splitlines()) == 10
    rows = take(training(data, max_attempts=3), 1)[0]  # without a ledger the batch itself says so
    assert not rows.valid.any()


def report(slot, kind="decode", shard="shard-0007.tar"):
    return Bad(slot, kind, shard, f"k{slot}", "because")


def test_the_budget_is_a_share_of_a_window():
    ledger = BadSamples(max_fraction=0.01)
    for slot in range(0, 20_000, 100):  # exactly 1 % for two windows
        ledger.update(range(slot, slot + 100), [report(slot)])
    ledger.update([20_000], [report(20_000, "caption_encoding")])
    with pytest.raises(LdmError) as stopped:
        ledger.update([20_001], [report(20_001)])
    assert stopped.value.line() == (
        "error[DATA-BUDGET]: 1.0 % bad samples; mostly decode in shard-0007.tar; limit 1.0 %; set data.max_bad_fraction"
    )
    assert ledger.counts == {"decode": 201, "caption_encoding": 1}


def test_strict_and_consecutive():
    with pytest.raises(LdmError, match=r"1 bad samples in a row; .*limit 0"):
        BadSamples(strict=True).update([0], [report(0)])
    ledger = BadSamples(max_fraction=1.0, max_consecutive=3)
    for slot in range(10):
        ledger.update([slot], [report(slot)] * 3)
    with pytest.raises(LdmError, match="4 bad samples in a row"):
        ledger.update([10], [report(10)] * 4)


def test_counts_continue_over_lives(tmp_path):
    file = tmp_path / "bad.jsonl"
    whole = BadSamples(file=tmp_path / "whole.jsonl")
    first = BadSamples(file=file)
    for ledger in (whole, first):
        for slot in range(0, 60, 3):
            ledger.update([slot, slot + 1, slot + 2], [report(slot)])
    second = BadSamples(file=file)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(next_slot=30))))  # 30.. came by prefetch only
    for slot in range(30, 90, 3):
        second.update([slot, slot + 1, slot + 2], [report(slot)])
    for slot in range(60, 90, 3):
        whole.update([slot, slot + 1, slot + 2], [report(slot)])
    assert second.counts == whole.counts == {"decode": 30}
    assert file.read_text() == (tmp_path / "whole.jsonl").read_text()  # ten lines, none twice


# ---- moments


@pytest.mark.parametrize("num_workers", [0, 2])
def test_moments_instead_of_pictures(data, num_workers, monkeypatch):
    moments = torch.arange(23.0)[:, None, None, None].expand(23, 4, 2, 2).contiguous()
    usable = torch.ones(23, dtype=torch.bool)
    usable[[2, 20]] = False
    encoded, flipless = MomentTables.of(moments, usable), replace(TRANSFORM, flip_prob=0.0)
    monkeypatch.setattr("ldm.data.pipeline.decode_image", None)  # no picture is decoded
    ledger = BadSamples(max_fraction=1.0)
    stream = training(data, transform=flipless, moments=encoded, num_workers=num_workers, ledger=ledger)
    batches = take(stream, 9)
    for batch in batches:
        assert batch.images is None and batch.moments.shape == (8, 4, 2, 2)
        assert [f"s{int(m):05d}" for m in batch.moments[:, 0, 0, 0]] == batch.keys
        assert not {"s00002", "s00020"} & set(batch.keys)
    assert ledger.counts["decode"] >= 4


def test_moments_have_the_order_of_the_pictures(data):
    moments, flipless = torch.zeros(23, 4, 2, 2), replace(TRANSFORM, flip_prob=0.0)
    a = take(training(data, transform=flipless), 5)
    b = take(training(data, moments=MomentTables.of(moments), transform=flipless), 5)
    assert [x.keys for x in a] == [x.keys for x in b] and [x.captions for x in a] == [x.captions for x in b]


def test_affixes_and_missing_captions(tmp_path):
    members = [("a.png", picture()), *sample(1)]
    data = open_dataset(str(write_tar(tmp_path / "a.tar", members)), on_missing_caption="empty")
    captions = Captions(caption_prefix="logo of ", caption_suffix=", flat")
    stream = Stream(stages(data, PassPlan(2, 2), TRANSFORM.without_chance(), captions=captions))
    assert next(iter(stream)).captions == ["logo of , flat", "logo of caption 1, flat"]


def test_webdataset_cannot_open_commands_any_more(data):
    import webdataset

    stages(data, PassPlan(23, 4), TRANSFORM)
    assert webdataset.utils.enforce_security is True


def test_pixels_are_the_pictures(data):
    batch = next(iter(Stream(stages(data, PassPlan(23, 4), TRANSFORM.without_chance()))))
    from ldm.data.decode import decode_image
    from ldm.data.transforms import to_images

    own = Transform(8)
    expected = to_images([own(decode_image(picture(n)), own.draws(torch.tensor([n]))[0]) for n in range(4)])
    assert torch.equal(batch.images, expected)
