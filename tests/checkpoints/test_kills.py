"""SIGKILL at any moment of a save: the newest valid checkpoint loads, and is not older than what was committed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from ldm.checkpoints.store import Store
from ldm.errors import LdmError
from tests.checkpoints.saver import NUMEL
from tests.checkpoints.states import FILES, fingerprint, leftovers, loads_as


class Saver:
    """A real process that saves, to be killed."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoints.saver"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, folder, stop=None, in_place=False):
        self.process.stdin.write(json.dumps([str(folder), stop, in_place]) + "\n")
        self.process.stdin.flush()
        self.pid = int(self.answer())

    def answer(self):
        return self.process.stdout.readline().strip()

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        assert self.answer() == "gone"


@pytest.fixture(scope="module")
def saver():
    made = Saver()
    yield made
    made.process.stdin.close()
    assert made.process.wait(timeout=20) == 0


def kill_at_random(saver, folder, times, seed):
    rng, last, torn = random.Random(seed), 0, 0
    store = Store(folder)
    for _ in range(times):
        saver.start(folder)
        deadline = time.monotonic() + 20
        while not store.steps() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        saver.kill()
        torn += bool(leftovers(folder))
        newest = store.newest()
        assert newest.step >= last
        loads_as(newest, newest.step, NUMEL)
        last = newest.step
    return last, torn


def test_killed_at_random(saver, tmp_path):
    last, _ = kill_at_random(saver, tmp_path / "ckpt", times=8, seed=1)
    assert last > 1


@pytest.mark.slow
def test_killed_at_random_many_times(saver, tmp_path):
    last, torn = kill_at_random(saver, tmp_path / "ckpt", times=30, seed=2)
    assert last > 10 and torn > 5  # else the kills missed the saves and prove nothing


@pytest.mark.parametrize("stop", [*FILES, "rename"])
def test_killed_between_files(saver, tmp_path, stop):
    folder = tmp_path / "ckpt"
    store = Store(folder)
    saver.start(folder, stop)
    assert saver.answer() == "stopped"
    if stop == "rename":
        saver.kill()
        loads_as(store.newest(), 1, NUMEL)  # committed, although LATEST was never written
        assert not (folder / "LATEST").exists()
    else:
        assert store.steps() == [] and len(leftovers(folder)) == 1
        os.kill(saver.pid, signal.SIGCONT)  # lets step 1 through; the next stop is in step 2
        assert saver.answer() == "stopped"
        before = fingerprint(store.path(1))
        saver.kill()
        loads_as(store.newest(), 1, NUMEL)
        assert fingerprint(store.path(1)) == before and store.steps() == [1]
    store.claim()
    assert leftovers(folder) == []


def test_without_the_temporary_folder_the_same_kill_leaves_a_torn_checkpoint(saver, tmp_path):
    """Negative control: written in place, the kill is seen as what it is."""
    saver.start(tmp_path / "ckpt", "model.safetensors", in_place=True)
    assert saver.answer() == "stopped"
    saver.kill()
    with pytest.raises(LdmError, match=r"manifest\.json is missing"):
        Store(tmp_path / "ckpt").newest()
