"""Settings to streams: splits, fingerprints, validation, encoding, lost workers."""

import inspect
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from ldm.data.datamodule import DataModule
from ldm.data.moments import MomentTables
from ldm.errors import LdmError
from tests.data.making import picture, sample, shared, write_shards, write_tar


def configured(path, **options):
    of_run = inspect.signature(DataModule.configure).parameters
    run = {"seed": 0, "batch_size": 4, **{k: v for k, v in options.items() if k in of_run}}
    options = {k: v for k, v in options.items() if k not in of_run}
    return DataModule(str(path), image_size=8, **options).open().configure(**run)


def test_a_folder_with_both_splits(tmp_path):
    write_shards(tmp_path, [6, 4])
    write_shards(tmp_path, [3], prefix="val")
    dm = configured(tmp_path)
    assert (dm.num_train, dm.num_val) == (10, 3)
    assert dm.open() is dm and len(dm.manifest) == 3
    (batch,) = dm.val_dataloader(4)
    assert batch.valid.tolist() == [True, True, True, False] and batch.keys[:3] == ["s00000", "s00001", "s00002"]
    assert batch.images.shape == (4, 3, 8, 8)
    assert configured(tmp_path, max_val_samples=2).num_val == 2


def test_a_split_by_keys_depends_on_keys_alone(tmp_path):
    one, two = write_shards(tmp_path / "one", [60]), write_shards(tmp_path / "two", [25, 35])
    sets = [configured(path, val_fraction=0.2) for path in (one, two)]
    keys = [[dm.dataset(split).keys for split in ("train", "val")] for dm in sets]
    assert keys[0] == keys[1] and 4 < len(keys[0][1]) < 22
    assert sorted([*keys[0][0], *keys[0][1]]) == [f"s{n:05d}" for n in range(60)]


def test_without_validation_data(tmp_path):
    dm = configured(write_shards(tmp_path, [5]))
    assert dm.num_val == 0 and dm.val_dataloader() == []
    with pytest.raises(LdmError, match="val_path"):
        dm.dataset("val")


def test_val_path_and_its_errors(tmp_path):
    train, val = write_shards(tmp_path / "t", [5]), write_shards(tmp_path / "v", [3])
    assert configured(train, val_path=str(val)).num_val == 3
    with pytest.raises(LdmError, match=r"data\.val_path"):
        configured(train, val_path=str(tmp_path / "x"))


def test_the_fingerprint_follows_data_and_settings(tmp_path):
    write_shards(tmp_path, [5, 5])
    base = configured(tmp_path).order_fingerprint
    assert base == configured(tmp_path).order_fingerprint and base["lanes"] == 2
    assert configured(tmp_path, lanes=4).order_fingerprint != base
    write_tar(tmp_path / "train-000001.tar", [m for n in range(50, 55) for m in sample(n)])
    assert configured(tmp_path).order_fingerprint["manifest"] != base["manifest"]


def test_ranks_resume_and_workers(tmp_path):
    write_shards(tmp_path, [7, 6])

    def keys(steps, **options):
        batches = iter(configured(tmp_path, **options).train_dataloader())
        return [next(batches).keys for _ in range(steps)]

    whole = keys(8)
    halves = [keys(8, rank=r, world_size=2) for r in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    micro = keys(16, accumulate=2)
    assert [micro[2 * s] + micro[2 * s + 1] for s in range(8)] == whole
    assert keys(3, start_step=5, num_workers=2) == whole[5:]
    with pytest.raises(LdmError, match="valid numbers of devices"):
        configured(tmp_path, world_size=3)


def test_encoding_and_moments(tmp_path):
    write_shards(tmp_path, [7, 6])
    write_shards(tmp_path, [3], prefix="val")
    dm = configured(tmp_path, crop="random")
    batches = list(dm.encode_dataloader("train", 5))
    assert torch.cat([b.slots for b in batches]).tolist() == list(range(13)) and len(batches) == 3
    shards = [configured(tmp_path, rank=r, world_size=2).encode_dataloader("train", 5, sharded=True) for r in range(2)]
    assert sorted(int(s) for stream in shards for b in stream for s in b.slots) == list(range(13))
    means = torch.cat([b.images for b in batches]).mean(dim=(1, 2, 3))
    moments = means[:, None, None, None].expand(13, 2, 1, 1)
    dm.use_moments(MomentTables.of(moments))
    batch = next(iter(dm.train_dataloader()))
    ids = [dm.dataset("train").keys.index(key) for key in batch.keys]
    assert batch.images is None and torch.equal(batch.moments[:, 0, 0, 0], means[ids])
    assert next(iter(dm.val_dataloader(3))).images is not None
    with pytest.raises(ValueError, match="12 moments for 13"):
        dm.use_moments(MomentTables.of(moments[:12]))


def test_what_the_index_rejects_counts_against_the_budget(tmp_path):
    members = [m for n in range(40) for m in sample(n)] + [("x.png", b"<html>"), ("x.txt", b"x")]
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(LdmError) as stopped:
        configured(tmp_path)
    assert stopped.value.exit_code == 3
    assert "2.4 % bad samples" in stopped.value.line() and "mostly decode in a.tar" in stopped.value.line()
    file = tmp_path / "bad.jsonl"
    dm = configured(tmp_path, max_bad_fraction=0.05, bad_samples_file=file)
    assert dm.num_train == 40 and dm.problems == {"decode": 1} and '"key": "x"' in file.read_text()
    write_tar(tmp_path / "a.tar", [*members[:80], ("x.png", picture())])
    assert configured(tmp_path).problems == {"caption_missing": 1}  # the policy is a setting of its own


@pytest.mark.parametrize("named", [True, False])
def test_a_rotten_validation_set_is_refused_too(tmp_path, named):
    write_tar(tmp_path / "train-0.tar", [m for n in range(6) for m in sample(n)])
    rotten = [("x.png", b"<html>"), ("x.txt", b"x")]
    val = write_tar(tmp_path / ("v.tar" if named else "val-0.tar"), [*sample(7), *rotten])
    where = {"val_path": str(val)} if named else {}
    path = tmp_path / "train-0.tar" if named else tmp_path
    with pytest.raises(LdmError) as stopped:
        configured(path, **where)
    assert stopped.value.exit_code == 3
    assert "50.0 % bad samples in the validation set, for example x" in stopped.value.line()
    assert f"mostly decode in {val.name}" in stopped.value.line()
    with pytest.raises(LdmError):
        configured(path, **where, strict=True, max_bad_fraction=0.6)
    file = tmp_path / "bad.jsonl"
    dm = configured(path, **where, max_bad_fraction=0.6, bad_samples_file=file)
    assert dm.num_val == 1 and dm.problems == {"decode": 1} and '"key": "x"' in file.read_text()


def test_what_is_bad_in_a_set_that_is_split_is_counted_once(tmp_path):
    members = [m for n in range(40) for m in sample(n)] + [("x.png", b"<html>"), ("x.txt", b"x")]
    write_tar(tmp_path / "a.tar", members)
    dm = configured(tmp_path, max_bad_fraction=0.05, val_fraction=0.5, bad_samples_file=tmp_path / "bad.jsonl")
    assert dm.num_val and dm.problems == {"decode": 1}
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("options", [{"crop": "x"}, {"background": "blau"}, {"val_fraction": 1.0}])
def test_wrong_settings(options):
    with pytest.raises(LdmError, match=next(iter(options))):
        DataModule("x", **options).open()


def test_a_lost_worker_is_a_temporary_failure_with_words(tmp_path):
    dm = configured(write_shards(tmp_path, [8]), num_workers=1)
    stream = dm.train_dataloader()
    batches = iter(stream)
    next(batches)
    with pytest.raises(LdmError) as lost:  # at once, wherever this thread is
        os.kill(stream.loader._iterator._workers[0].pid, signal.SIGKILL)
        time.sleep(5)
        pytest.fail("nobody noticed")
    stream.close()
    assert lost.value.exit_code == 75 and "loader.num_workers" in lost.value.line()
    assert "train-000000.tar" in lost.value.line()


def test_a_hanging_worker_is_named(tmp_path, monkeypatch):
    dm = configured(write_shards(tmp_path, [8]), num_workers=1, timeout_s=1)
    monkeypatch.setattr("ldm.data.pipeline.decode_image", lambda *_, **__: time.sleep(2))
    stream = dm.train_dataloader()
    with pytest.raises(LdmError, match=r"timed out.*micro-batch 0.*train-000000\.tar.*loader\.timeout_s") as hung:
        next(iter(stream))
    assert hung.value.exit_code == 75
    stream.close()


def test_workers_outlive_a_signal_to_the_group(tmp_path):
    dm = configured(write_shards(tmp_path, [8]), num_workers=1)
    stream = dm.train_dataloader()
    batches = iter(stream)
    next(batches)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(stream.loader._iterator._workers[0].pid, number)
    assert len([next(batches) for _ in range(30)]) == 30
    stream.close()


@pytest.mark.parametrize(
    "name,train,val", [("logos", 2400, 129), ("emoji", 2017, 101), ("food", 156, 5), ("logos-folder", 120, 0)]
)
def test_real_data(tmp_path, name, train, val):
    path = shared(name)
    dm = configured(path, index_dir=str(tmp_path), batch_size=8)
    assert (dm.num_train, dm.num_val) == (train, val)
    batch = next(iter(dm.train_dataloader()))
    assert all(batch.captions) and batch.valid.all() and batch.images.abs().max() <= 1


def test_pictures_that_do_not_fit_into_shared_memory_are_announced(tmp_path, monkeypatch, caplog):
    dm = configured(write_shards(tmp_path, [8]), num_workers=2)
    needed = 2 * 2 * len(dm._run["plan"].slots(0)) * 3 * dm.transform.square[0] * dm.transform.square[1]
    for free, warned in ((needed, False), (needed - 1, True)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr("ldm.data.loader.shutil.disk_usage", lambda _, usage=usage: usage)
        dm.train_dataloader()
        assert ("shared memory" in caplog.text) == warned
    caplog.clear()
    monkeypatch.setattr("ldm.data.loader.shutil.disk_usage", lambda _: SimpleNamespace(free=needed))
    configured(write_shards(tmp_path / "two", [8]), num_workers=2, ranks_here=2).train_dataloader()
    assert "4 workers" in caplog.text
