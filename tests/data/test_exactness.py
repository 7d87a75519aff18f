"""Every sample as often as it should be, in one order with one text each, for any ranks, workers, shards and repeats.

Ranks and workers are simulated in one process; `test_real_processes` and `test_pipeline.py` have real ones.
"""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm.data import pipeline
from ldm.data.captions import Captions
from ldm.data.order import Order
from ldm.data.pipeline import TrainPlan, stages
from ldm.data.shards import open_dataset
from ldm.data.transforms import Transform
from ldm.random import Purpose, fold, run_key
from tests.data.making import picture, write_tar

LENGTHS = {1: [16], 2: [7, 9], 5: [1, 1, 1, 1, 12], 7: [3, 3, 3, 3, 2, 1, 1]}
REPEATS = {f"s{n:05d}": (1, 2, 3, 6)[n % 4] for n in range(16)}  # 48 uses an epoch: two steps of 24
TEXTS = Captions(caption_lines=True, caption_choice="random", shuffle_caption=True, keep_tokens=1)
TRANSFORM = Transform(8, crop="random", flip_prob=0.5, key=run_key(0))
STEPS = 4  # two epochs


def shards(folder, lengths):
    """Sample n has two captions of five tags."""
    folder.mkdir()
    numbers = iter(range(16))
    for shard, length in enumerate(lengths):
        members = []
        for n in islice(numbers, length):
            lines = "\n".join(f"{n}-{line}, " + ", ".join("abcd") for line in range(2))
            members += [(f"s{n:05d}.png", picture(n, (8, 10))), (f"s{n:05d}.txt", lines.encode())]
        write_tar(folder / f"{shard}.tar", members)
    data = open_dataset(str(folder))
    data.repeats = np.array([REPEATS[key] for key in data.keys])
    return data


def run(data, monkeypatch, *, ranks=1, workers=0, captions=TEXTS, plan=TrainPlan, lanes=None, start=0):
    """(slot, key, caption, pixels) of every slot of `STEPS` steps, in the order of ranks and loaders."""
    order = Order(data.shard_lengths, data.sizes, seed=0, batch_size=24, lanes=lanes, repeats=data.repeats)
    steps: list[list] = [[] for _ in range(start, STEPS)]
    for rank in range(ranks):
        streams = []
        for worker in range(workers or 1):
            info = SimpleNamespace(id=worker, num_workers=workers) if workers else None
            monkeypatch.setattr(pipeline, "get_worker_info", lambda info=info: info)
            stream = iter(stages(data, plan(order, rank, ranks), TRANSFORM, captions=captions, start=start))
            count = len(range(worker, STEPS - start, workers or 1))
            streams.append(iter([batch for batch, _ in islice(stream, count)]))  # runs while `info` is this worker's
        for step in range(start, STEPS):  # torch's loader collects its workers in turn
            batch = next(streams[(step - start) % len(streams)])
            pixels = batch.images.flatten(1).sum(1).tolist()
            steps[step - start] += zip(batch.slots.tolist(), batch.keys, batch.captions, pixels, strict=True)
    return [row for step in steps for row in step]


def check(rows, reference):
    """The rows of a run are those of one rank without workers, and each epoch uses every sample as it repeats."""
    assert [slot for slot, *_ in rows] == list(range(24 * STEPS))
    for epoch in range(2):
        assert Counter(key for _, key, *_ in rows[48 * epoch : 48 * (epoch + 1)]) == REPEATS
    assert rows == reference


@pytest.fixture(scope="module", params=LENGTHS)
def data(request, tmp_path_factory):
    return shards(tmp_path_factory.mktemp("data") / str(request.param), LENGTHS[request.param])


@pytest.mark.parametrize(
    "captions", [TEXTS, Captions(caption_lines=True, caption_choice="cycle")], ids=["random", "cycle"]
)
def test_any_ranks_and_workers(data, monkeypatch, captions):
    reference = run(data, monkeypatch, captions=captions)
    for ranks in (1, 2, 3, 4):
        for workers in (0, 1, 3):
            check(run(data, monkeypatch, ranks=ranks, workers=workers, captions=captions), reference)
    for start in (1, 3):
        assert run(data, monkeypatch, captions=captions, start=start, workers=3) == reference[24 * start :]


def test_lanes_keep_the_coverage(data, monkeypatch):
    for lanes in (1, 2):
        rows = run(data, monkeypatch, lanes=lanes)
        check(rows, rows)


@dataclass(frozen=True)
class ShiftedPlan(TrainPlan):
    """A rank that reads one slot too far."""

    def ids(self, j):
        found = super().ids(j)
        return np.roll(found, 1) if self.rank == 1 else found


def test_a_shifted_slot_would_be_noticed(data, monkeypatch):
    reference = run(data, monkeypatch)
    with pytest.raises(AssertionError):
        check(run(data, monkeypatch, ranks=2, plan=ShiftedPlan), reference)
    check(run(data, monkeypatch, ranks=2), reference)


def test_a_draw_that_depends_on_the_worker_would_be_noticed(data, monkeypatch):
    def local(self, j, slots):
        return np.stack([np.arange(len(slots)) + len(slots)] * 2, axis=1)

    monkeypatch.setattr(pipeline.Source, "text_draws", local)
    one, three = run(data, monkeypatch), run(data, monkeypatch, ranks=3)
    assert [row[:2] for row in one] == [row[:2] for row in three] and one != three


def test_copies_of_a_sample_have_draws_of_their_own(data, monkeypatch):
    rows = [row for row in run(data, monkeypatch) if REPEATS[row[1]] == 6]
    assert len({(key, caption) for _, key, caption, _ in rows}) > 30  # of 48: four samples, twelve uses each
    assert len({pixels for *_, pixels in rows}) > 8
    tails = {caption.split(", ", 1)[1] for *_, caption, _ in rows}
    assert len(tails) > 10 and all(sorted(tail.split(", ")) == list("abcd") for tail in tails)


def test_captions_in_turn_are_used_equally_often(data, monkeypatch):
    rows = run(data, monkeypatch, captions=Captions(caption_lines=True, caption_choice="cycle"))
    uses = Counter((key, caption.split(",")[0]) for _, key, caption, _ in rows)
    assert all(uses[key, f"{int(key[1:])}-{line}"] == times for key, times in REPEATS.items() for line in range(2))
    first = Counter(key for _, key, caption, _ in rows[:48] if caption.startswith(f"{int(key[1:])}-0,"))
    assert first == {key: -(-times // 2) for key, times in REPEATS.items()}  # also within an epoch
    whole = run(data, monkeypatch, captions=Captions(caption_lines=True))
    assert all(caption.startswith(f"{int(key[1:])}-0,") for _, key, caption, _ in whole)  # the control: the first


def test_the_choice_is_the_slots_own_draw(data, monkeypatch):
    rows = run(data, monkeypatch, captions=Captions(caption_lines=True, caption_choice="random"))
    keys = fold(run_key(0), Purpose.CAPTION_CHOICE, torch.arange(24 * STEPS))
    assert [caption.split(",")[0][-1] for *_, caption, _ in rows] == [str(int(key) % 2) for key in keys]


_RANK = """
import json, sys
from itertools import islice
from ldm.data.datamodule import DataModule
if __name__ == "__main__":
    path, rank, world_size, workers = sys.argv[1], *map(int, sys.argv[2:])
    data = DataModule(path, image_size=8, crop="random", flip_prob=0.5, repeats=3, caption_lines=True)
    data.configure(seed=0, batch_size=24, rank=rank, world_size=world_size, num_workers=workers)
    rows = []
    for batch in islice(data.train_dataloader(), 4):
        pixels = batch.images.flatten(1).sum(1).tolist()
        rows.append(list(zip(batch.slots.tolist(), batch.keys, batch.captions, pixels, strict=True)))
    print(json.dumps(rows))
"""


@pytest.mark.slow
def test_real_processes(tmp_path):
    """Every rank is a process of its own with workers of its own; 48 uses an epoch are two steps of 24."""
    data = shards(tmp_path / "shards", LENGTHS[5])
    (tmp_path / "rank.py").write_text(_RANK)

    def rows_of(ranks, workers):
        command = [sys.executable, str(tmp_path / "rank.py"), str(data.shards[0].parent)]
        running = [
            subprocess.Popen([*command, *map(str, (rank, ranks, workers))], stdout=subprocess.PIPE, text=True)
            for rank in range(ranks)
        ]
        said = [json.loads(process.communicate(timeout=200)[0]) for process in running]
        assert not any(process.returncode for process in running)
        return [tuple(row) for step in range(STEPS) for rows in said for row in rows[step]]

    found = rows_of(4, 2)
    assert [slot for slot, *_ in found] == list(range(24 * STEPS))
    for epoch in range(2):
        assert Counter(key for _, key, *_ in found[48 * epoch : 48 * (epoch + 1)]) == dict.fromkeys(REPEATS, 3)
    assert found == rows_of(1, 0)
