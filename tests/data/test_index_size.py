"""An index of a million samples: seconds, megabytes, and a file that anybody may have written."""

import errno
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from ldm.data import index as indexing
from ldm.data.index import Index, index_all, save
from ldm.data.packed import Picked, Strings
from ldm.data.shards import open_dataset
from ldm.data.splits import check_data
from tests.data.making import picture, write_shards, write_tar

SECONDS, MEGABYTES = 2, 200

_OPEN = """
import json, sys, time
import numpy
from pathlib import Path
from ldm.data.shards import open_dataset
def peak():  # not ru_maxrss, which a process takes over from the one that started it
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
before, began = peak(), time.process_time()
data = open_dataset(sys.argv[1])
held = [str(key) for key in data.keys] if len(sys.argv) > 2 else []
seconds = time.process_time() - began
print(json.dumps({"samples": data.num_samples, "seconds": seconds, "megabytes": peak() - before, "of": data.problems}))
"""

_RESUME = """
import json, sys, time
from ldm.data.splits import check_data
from ldm.data.datamodule import DataModule
node = {"_target_": "ldm.data.datamodule.DataModule", "path": sys.argv[1], "image_size": 8, "val_fraction": 0.01}
check_data(node)
began = time.process_time()
data = DataModule(**{k: v for k, v in node.items() if k != "_target_"}).open()
data.configure(seed=0, batch_size=64, start_step=900_000 // 64)
batch = next(iter(data.train_dataloader()))
print(json.dumps({"seconds": time.process_time() - began, "good": int(batch.valid.sum()), "slot": int(batch.slots[0])}))
"""


def million(folder, num_shards, *, further=True):
    """Tars of 16 samples each, and indexes that say they hold a million: row r is the sample r mod 16."""
    write_shards(folder, [16] * num_shards)
    shards = sorted(folder.glob("*.tar"))
    rng = np.random.default_rng(0)
    for number, shard in enumerate(shards):
        count = 1_000_000 // num_shards
        (index,) = index_all([shard], folder / "elsewhere")
        row = np.arange(count) % 16
        rows = {name: getattr(index, name)[row] for name in ("members", "sizes", "json_captions", "named")}
        keys = Strings(
            np.frombuffer(b"".join(b"%03d%09d" % (number, n) for n in range(count)), np.uint8).copy(),
            np.arange(1, count + 1, dtype=np.int64) * 12,
        )
        more = {}
        if further:
            masks = np.zeros(count, dtype=indexing.FURTHER)
            masks["place"] = index.members[row, 0]
            of = np.arange(count, dtype=np.int32)
            more = {"further": masks, "further_of": of, "further_names": [".mask.png"]}
        digests = rng.integers(0, 2**64, count, dtype=np.uint64)
        save(
            Index(keys=keys, digests=digests, signature=index.signature, sha256=index.sha256, **rows, **more),
            shard,
            None,
        )
    return folder


def run(code, *words):
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc/self/status")
@pytest.mark.slow  # for the making; what is measured takes 0.1 to 0.4 s
@pytest.mark.parametrize("num_shards", [1, 100])
def test_a_million_samples_open_in_two_seconds_and_200_megabytes(tmp_path, num_shards):
    """Every sample has a mask. Seconds of this process's time on one core; memory above that of the imports."""
    path = million(tmp_path, num_shards)
    found = run(_OPEN, path)
    assert found["samples"] == 1_000_000 and not found["of"]
    assert found["seconds"] < SECONDS and found["megabytes"] < MEGABYTES, found
    control = run(_OPEN, path, "a list of strings")
    assert control["megabytes"] > found["megabytes"] + 40, control
    first = run(_RESUME, path)
    assert first["seconds"] < SECONDS and first["good"] == 64 and first["slot"] == 900_000 // 64 * 64, first


# ---- the parts


def test_packed_strings():
    words = ["", "a", "ünï-日本", "\udcff.png", "", "x" * 1000]
    packed = Strings.of(words)
    assert packed == words and list(packed) == words and packed[-1] == words[-1] and packed[1:4] == words[1:4]
    assert packed != words[:-1] and packed != [*words[:-1], "y"] and Strings.of([]) == []
    assert "a" in packed and packed.index("a") == 1 and Strings(packed.text, packed.ends) == words
    for at in (6, -7):
        with pytest.raises(IndexError):
            packed[at]
    for ends in ([1, 0], [-1, 3], [5], []):
        with pytest.raises(ValueError):
            Strings(np.zeros(3, np.uint8), np.array(ends, dtype=np.int64))
    picked = Picked([packed, Strings.of("bc")], np.array([1, 0, 1], np.int32), np.array([1, 2, 0], np.int32))
    assert picked == ["c", words[2], "b"]


def test_an_index_that_is_in_use_is_not_read_again(tmp_path, monkeypatch):
    write_shards(tmp_path, [3, 2])
    first = open_dataset(str(tmp_path))
    monkeypatch.setattr(indexing, "_load", lambda *_: pytest.fail("was read again"))
    again = open_dataset(str(tmp_path))
    assert all(a is b for a, b in zip(first.indexes, again.indexes, strict=True))
    write_tar(tmp_path / "train-000001.tar", [("x.png", picture()), ("x.txt", b"x")])
    monkeypatch.undo()
    changed = open_dataset(str(tmp_path))
    assert changed.indexes[0] is first.indexes[0] and changed.keys[3:] == ["x"]


def test_what_was_checked_is_handed_on(tmp_path, monkeypatch):
    from ldm.data.datamodule import DataModule

    write_shards(tmp_path, [3, 2])
    open_dataset(str(tmp_path))
    check_data({"_target_": "ldm.data.datamodule.DataModule", "path": str(tmp_path)})
    monkeypatch.setattr(indexing, "_load", lambda *_: pytest.fail("was read again"))
    assert DataModule(str(tmp_path)).open().num_train == 5


POISON = {
    "a size beyond the limit": lambda i: i.members["size"].__setitem__((0, 0), 2**30),
    "a negative size": lambda i: i.members["size"].__setitem__((0, 0), -1),
    "a sample without area": lambda i: i.sizes.__setitem__((0, 0), 0),
    "members of no sample": lambda i: i.further_of.__setitem__(0, 99),
    "members that do not rise": lambda i: i.further_of.__setitem__(0, 2),
    "a name that there is not": lambda i: i.further["name"].__setitem__(0, 7),
    "a member nowhere": lambda i: i.further["place"]["offset"].__setitem__(0, -1),
    "fewer hashes": lambda i: setattr(i, "digests", i.digests[:-1]),
    "another type": lambda i: setattr(i, "sizes", i.sizes.astype(np.float32)),
    "keys that are not cut": lambda i: i.keys.ends.__setitem__(0, 10**6),
    "a sample without a picture": lambda i: i.members["offset"].__setitem__((0, 0), -1),
    "another signature": lambda i: setattr(i, "signature", "0-0"),
    "another version": lambda i: None,  # altered where it is saved
}


@pytest.mark.parametrize("case", [*POISON, "the control"])
def test_a_saved_index_that_does_not_fit_is_built_again(tmp_path, case, capfd, monkeypatch):
    content = [m for n in "abc" for m in ((f"{n}.png", picture()), (f"{n}.txt", b"x"), (f"{n}.m.png", picture(1)))]
    shard = write_tar(tmp_path / "a.tar", content)
    (index,) = index_all([shard], None)
    for name in ("members", "sizes", "further", "further_of", "digests"):
        setattr(index, name, getattr(index, name).copy())
    index.keys.ends = index.keys.ends.copy()
    POISON.get(case, lambda i: None)(index)
    with monkeypatch.context() as patched:
        if case == "another version":
            patched.setattr(indexing, "_VERSION", indexing._VERSION - 1)
        save(index, shard, None)
    del index
    capfd.readouterr()
    data = open_dataset(str(shard))
    assert data.keys == ["a", "b", "c"] and data.read(2, ("txt", ".m.png")) == {"txt": b"x", ".m.png": picture(1)}
    assert ("indexed" in capfd.readouterr().err) == (case != "the control")


@pytest.mark.parametrize("umask,rights", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_saved_index_has_the_rights_of_any_new_file(tmp_path, umask, rights):
    write_shards(tmp_path, [3])
    before = os.umask(umask)
    try:
        open_dataset(str(tmp_path))
    finally:
        os.umask(before)
    (saved,) = (tmp_path / ".ldm-index").iterdir()
    assert saved.stat().st_mode & 0o777 == rights


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_index_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, error):
    write_shards(tmp_path, [3])

    def full(file, **_):
        file.write(b"x" * 1000)
        raise error

    monkeypatch.setattr(np, "savez", full)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with suppress(KeyboardInterrupt):
        assert open_dataset(str(tmp_path)).num_samples == 3
    assert (tmp_path / ".ldm-index").is_dir() and not [p for p in tmp_path.rglob("*.tmp*") if p.is_file()]
