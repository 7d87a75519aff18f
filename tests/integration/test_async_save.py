"""A run that writes its checkpoints beside training is the same run."""

import signal

import pytest

from ldm.checkpoints.store import SaveFailed, Store
from ldm.errors import LdmError
from ldm.training.fit import train
from tests.integration.test_resume import kill_after
from tests.integration.tiny import command, compare_runs, config, history, overrides, start

BEHIND = "checkpoint.async_save=true"


def test_every_checkpoint_is_that_of_a_run_that_waits(finished, shards, tmp_path):
    train(config(shards, tmp_path, BEHIND))
    for stage in ("autoencoder", "diffusion"):
        assert compare_runs(finished, tmp_path / "tiny", stage) == []
        assert history(finished, stage) == history(tmp_path / "tiny", stage)


@pytest.mark.slow
def test_killed_and_stopped(shards, tmp_path):
    words = overrides(shards, tmp_path / "broken", BEHIND, steps=12, save_every=2)
    assert command(overrides(shards, tmp_path / "whole", steps=12, save_every=2))[0] == 0  # threads as the others
    for stage, step in (("autoencoder", 7), ("diffusion", 4)):
        code, output = kill_after(start(words), tmp_path / "broken/tiny", stage, step)
        assert code == -signal.SIGKILL, output
    code, output = kill_after(start(words), tmp_path / "broken/tiny", "diffusion", 7, signal.SIGTERM)
    assert code == 143 and "saved" in output, output
    assert command(words)[0] == 0
    for stage in ("autoencoder", "diffusion"):
        assert compare_runs(tmp_path / "whole/tiny", tmp_path / "broken/tiny", stage) == []


def refuse(step):
    raise SaveFailed("DISK", "checkpoint not saved", where="here", next="free space", exit_code=75)


def test_a_full_disk_is_survived_so_often_and_then_ends_the_run(shards, tmp_path, monkeypatch, caplog):
    save = Store.save
    monkeypatch.setattr(
        Store, "save", lambda self, step, **s: refuse(step) if 2 <= step <= 4 else save(self, step, **s)
    )
    words = (BEHIND, "stages=[autoencoder]", "checkpoint.max_failed_saves=3")
    train(config(shards, tmp_path / "a", *words, steps=8, save_every=1))
    assert Store(tmp_path / "a/tiny/autoencoder/ckpt").steps() == [1, 5, 6, 7, 8]
    assert "(3 of 3)" in caplog.text
    monkeypatch.setattr(Store, "save", lambda self, step, **s: refuse(step) if step > 1 else save(self, step, **s))
    with pytest.raises(LdmError, match="DISK") as ended:
        train(config(shards, tmp_path / "b", *words, steps=8, save_every=1))
    assert ended.value.exit_code == 75
    assert Store(tmp_path / "b/tiny/autoencoder/ckpt").steps() == [1]


def test_too_little_space_or_time_is_said_after_the_first_step(shards, tmp_path, monkeypatch, caplog):
    words = ("stages=[autoencoder]", "checkpoint.grace_s=0", BEHIND)
    train(config(shards, tmp_path / "a", *words, steps=2))
    assert caplog.text.count("a checkpoint of") == 1 and "checkpoint.grace_s=0" in caplog.text
    caplog.clear()
    monkeypatch.setattr(Store, "_free", lambda self: 1000)
    with pytest.raises(LdmError, match="DISK"):
        train(config(shards, tmp_path / "b", *words, steps=2))
    assert "training goes on, and 4 failed saves end it" in caplog.text
