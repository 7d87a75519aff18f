"""Training goes on while a checkpoint is written, and what is written is what was there when it was asked for."""

import gc
import threading
import weakref

import pytest
import torch

from ldm.checkpoints.background import Writer, copied
from ldm.checkpoints.store import SaveFailed, Store
from ldm.errors import LdmError
from tests.checkpoints.states import loads_as, state


class Slow(Store):
    """A disk that writes only when it is let."""

    def __init__(self, folder):
        super().__init__(folder)
        self.let, self.begun = threading.Event(), []
        self.claim()

    def save(self, step, **content):
        self.begun.append(step)
        assert self.let.wait(10)
        return super().save(step, **content)


@pytest.fixture
def disk(tmp_path):
    disk = Slow(tmp_path / "ckpt")
    yield disk
    disk.let.set()


def spoil(content):
    """What the next optimizer steps do to the state."""
    for tensors in content["tensors"].values():
        for tensor in tensors.values():
            tensor.add_(1)
    content["trees"]["optim"]["state"][0]["exp_avg"].zero_()


def test_what_is_written_is_the_state_of_the_call(disk):
    writer, content = Writer(disk, background=True), state(4)
    writer.save(4, **content)
    spoil(content)
    assert disk.steps() == []  # and we are here
    disk.let.set()
    writer.join()
    loads_as(disk.load(4), 4)
    assert writer.result == (0, None)


def test_without_the_copy_another_state_would_be_written(disk, monkeypatch):
    monkeypatch.setattr("ldm.checkpoints.background.copied", lambda tree: tree)
    writer, content = Writer(disk, background=True), state(4)
    writer.save(4, **content)
    spoil(content)
    disk.let.set()
    writer.join()
    with pytest.raises(AssertionError):
        loads_as(disk.load(4), 4)


def test_the_copy_is_gone_when_it_is_written(disk, monkeypatch):
    """Without waiting for the collector of cycles: else a second copy would lie beside the next."""
    taken = []

    def watched(tree, *rest):
        copy = copied(tree, *rest)
        if not rest:
            taken.append(weakref.ref(copy["tensors"]["model"]["weight"]))
        return copy

    monkeypatch.setattr("ldm.checkpoints.background.copied", watched)
    disk.let.set()
    gc.disable()
    try:
        writer = Writer(disk, background=True)
        writer.save(1, **state(1))
        writer.join()
        assert taken[0]() is None
    finally:
        gc.enable()


def test_one_at_a_time(disk):
    writer = Writer(disk, background=True)
    writer.save(1, **state(1))
    second = threading.Thread(target=writer.save, args=(2,), kwargs=state(2))
    second.start()
    second.join(0.2)
    assert second.is_alive() and disk.begun == [1]  # it waits with its copy, too
    disk.let.set()
    second.join(10)
    writer.join()
    assert disk.steps() == [1, 2]


def test_to_wait_is_to_wait(disk):
    disk.let.set()
    writer = Writer(disk, background=True)
    writer.save(1, **state(1))
    writer.save(2, wait=True, **state(2))
    assert disk.steps() == [1, 2]
    Writer(disk).save(3, **state(3))
    assert disk.steps() == [1, 2, 3]


def test_a_disk_that_does_not_answer_is_given_up(disk):
    writer = Writer(disk, background=True)
    writer.save(1, **state(1))
    with pytest.raises(LdmError, match="DISK") as refused:
        writer.save(2, deadline_s=0.05, **state(2))
    assert refused.value.exit_code == 75 and "still being written" in refused.value.line()
    assert disk.begun == [1]


def test_failures_are_counted_until_one_succeeds(tmp_path, monkeypatch):
    disk = Store(tmp_path / "ckpt")
    disk.claim()
    writer = Writer(disk, background=True)
    monkeypatch.setattr("ldm.checkpoints.store._HEADROOM", 1e18)
    for n in (1, 2):
        writer.save(n, **state(n))
        writer.join()
        assert writer.result.failed == n and isinstance(writer.result.error, SaveFailed)
    monkeypatch.undo()
    writer.save(3, **state(3))
    writer.join()
    assert writer.result == (0, None) and disk.steps() == [3]
    bad = state(4)
    bad["tensors"]["model"]["weight"][0] = float("nan")
    writer.save(4, **bad)
    writer.join()
    assert writer.result.failed == float("inf") and writer.result.error.exit_code == 4 and disk.steps() == [3]


def test_tied_tensors_stay_tied_and_the_copy_is_no_larger_than_the_state():
    weight = torch.randn(5, 3)
    tree = {"a": weight, "b": [weight.view(5, 3), (weight.mT, 1, "x")], "c": torch.nn.Parameter(weight)}
    copy = copied(tree)
    assert copy["a"].data_ptr() == copy["b"][0].data_ptr() == copy["c"].data_ptr() != weight.data_ptr()
    assert torch.equal(copy["b"][1][0], weight.mT) and copy["b"][1][1:] == (1, "x")
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert copied(channels_last).is_contiguous(memory_format=torch.channels_last)


def test_the_copy_is_gone_when_it_could_not_be_written(tmp_path, monkeypatch):
    """An error holds frames, and frames the state: with a full disk there would be two copies."""
    disk, content = Store(tmp_path / "ckpt"), state(1)
    disk.claim()
    held = weakref.ref(content["tensors"]["model"]["weight"])
    monkeypatch.setattr("ldm.checkpoints.store._HEADROOM", 1e18)
    writer = Writer(disk)
    writer.save(1, **content)
    del content
    assert writer.result.failed == 1 and held() is None


def test_empty_tensors_are_told_apart():
    tree = {"a": torch.empty(0, 3), "b": torch.empty(0, 5, dtype=torch.int64)}
    copy = copied(tree)
    assert copy["a"].shape == (0, 3) and copy["b"].shape == (0, 5) and copy["b"].dtype == torch.int64
