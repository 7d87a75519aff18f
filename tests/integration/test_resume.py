"""The plug is pulled; nothing is lost: the history of all lives equals the run that nobody disturbed."""

import os
import shutil
import signal
import time

import pytest

from ldm.checkpoints.store import Store
from ldm.data.datamodule import DataModule
from ldm.errors import LdmError
from ldm.training.fit import train
from tests.integration.tiny import (
    GAN,
    command,
    compare_runs,
    config,
    first_difference,
    history,
    metrics,
    overrides,
    start,
)


def kill_after(process, run, stage, step, number=signal.SIGKILL):
    """Signals the command as soon as `stage` has written `step` steps; returns exit code and output."""
    deadline = time.monotonic() + 120
    while len(metrics(run, stage)) < step:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.003)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def live_through(words, run, *kills):
    """The command, killed once in each (stage, step) and started again, until it says that it is through."""
    for stage, step in kills:
        code, output = kill_after(start(words), run, stage, step)
        assert code == -signal.SIGKILL, output
    code, output = command(words)
    assert code == 0 and "continuing at step" in output, output


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_twice_equals_undisturbed(shards, tmp_path, workers):
    """SIGKILL in both stages, once across an epoch (61 samples, 8 a step), with all that has a state or a draw."""
    more = [
        f"loader.num_workers={workers}",
        "stage.autoencoder.accumulate=2",
        *GAN,
        "model.conditioner.drop_prob=0.5",
        "model.network.dropout=0.1",
        "stage.diffusion.param_groups={conditioner:{lr:1e-4},*.bias:{weight_decay:0}}",
        "stage.diffusion.cache_latents_mb=0",  # so that pictures are decoded and encoded as they stream
    ]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command(overrides(shards, whole, *more, steps=24))[0] == 0
    words = overrides(shards, broken, *more, steps=24)
    live_through(words, broken / "tiny", ("autoencoder", 6), ("diffusion", 9), ("diffusion", 14))
    for stage in ("autoencoder", "diffusion"):
        assert compare_runs(whole / "tiny", broken / "tiny", stage) == []
        assert history(whole / "tiny", stage) == history(broken / "tiny", stage)
        assert [row["train/step"] for row in history(broken / "tiny", stage)] == list(range(1, 25))


@pytest.mark.slow
def test_a_draw_that_followed_the_clock_would_be_noticed(shards, tmp_path, monkeypatch):
    """Negative control of the proof above: position shifted by one slot after the resume."""
    train(config(shards, tmp_path / "whole", "stages=[autoencoder]"))
    shutil.copytree(tmp_path / "whole", tmp_path / "shifted")
    store = Store(tmp_path / "shifted" / "tiny" / "autoencoder" / "ckpt")
    for step in (8, 12):
        shutil.rmtree(store.path(step))
    configure = DataModule.configure

    def shifted(self, **options):
        return configure(self, **{**options, "start_step": options["start_step"] + 1})

    monkeypatch.setattr(DataModule, "configure", shifted)
    train(config(shards, tmp_path / "shifted", "stages=[autoencoder]"))
    assert compare_runs(tmp_path / "whole" / "tiny", tmp_path / "shifted" / "tiny", "autoencoder") != []


def test_sigterm_saves_and_says_so(shards, tmp_path):
    words = overrides(shards, tmp_path, "stages=[autoencoder]", steps=3000, save_every=2000)
    code, output = kill_after(start(words), tmp_path / "tiny", "autoencoder", 5, signal.SIGTERM)
    assert code == 143, output
    assert "stopped by SIGTERM" in output and "run the same command again" in output
    saved = Store(tmp_path / "tiny" / "autoencoder" / "ckpt").newest()
    assert saved is not None and saved.step == len(metrics(tmp_path / "tiny", "autoencoder"))


def test_a_finished_run_does_nothing(finished, shards, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    train(config(shards, finished.parent))
    assert capsys.readouterr().out.count("already finished") == 2
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}


@pytest.mark.slow
def test_more_steps_need_a_word_and_then_equal_the_longer_run(shards, tmp_path):
    """With a rate that does not depend on the horizon, 8 steps and then 12 are the 12 steps of one life."""
    constant = ["stages=[autoencoder]", "lr_schedule@stage.autoencoder.lr_schedule=constant"]
    train(config(shards, tmp_path / "long", *constant, steps=12))
    train(config(shards, tmp_path / "short", *constant, steps=8))
    with pytest.raises(LdmError) as refused:
        train(config(shards, tmp_path / "short", *constant, steps=12))
    assert refused.value.exit_code == 2
    assert "stage.autoencoder.max_steps; checkpoint 8, now 12" in refused.value.line()
    allow = "resume.allow=[stage.autoencoder.max_steps]"
    train(config(shards, tmp_path / "short", *constant, allow, steps=12))
    ends = [Store(tmp_path / kind / "tiny" / "autoencoder" / "ckpt").load(12) for kind in ("long", "short")]
    assert first_difference(*ends) is None


@pytest.mark.parametrize("change", ["stage.autoencoder.batch_size=4", "seed=1", "data.window_mb=1"])
def test_drift_is_refused_by_name(finished, shards, tmp_path, change):
    shutil.copytree(finished, tmp_path / "tiny")
    more = [
        "stages=[autoencoder]",
        "stage.autoencoder.max_steps=20",
        "resume.allow=[stage.autoencoder.max_steps]",
        change,
    ]
    with pytest.raises(LdmError) as refused:
        train(config(shards, tmp_path, *more))
    assert refused.value.exit_code == 2 and change.split("=")[0].split(".")[-1] in refused.value.line()


def test_resume_modes(finished, shards, tmp_path):
    with pytest.raises(LdmError, match="nothing to resume"):
        train(config(shards, tmp_path / "a", "resume.mode=must"))
    shutil.copytree(finished, tmp_path / "b" / "tiny")
    with pytest.raises(LdmError, match="exists already"):
        train(config(shards, tmp_path / "b", "resume.mode=never"))
    with pytest.raises(LdmError, match="CKPT-MISSING") as missing:
        train(config(shards, tmp_path / "b", "resume.step=5", "stages=[autoencoder]"))
    assert missing.value.exit_code == 2
    with pytest.raises(LdmError, match="older than the newest"):
        train(config(shards, tmp_path / "b", "resume.step=4", "stages=[autoencoder]"))
    train(config(shards, tmp_path / "b", "resume.step=4", "resume.truncate=true", "stages=[autoencoder]"))
    assert compare_runs(finished, tmp_path / "b" / "tiny", "autoencoder") == []
    assert (tmp_path / "b" / "tiny" / "autoencoder" / "ckpt" / "abandoned-step-000000012").is_dir()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken_on_request(finished, shards, tmp_path):
    shutil.copytree(finished, tmp_path / "tiny")
    broken = tmp_path / "tiny" / "diffusion" / "ckpt" / "step-000000012" / "ema.safetensors"
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    with pytest.raises(LdmError) as refused:
        train(config(shards, tmp_path))
    assert "ema.safetensors" in refused.value.line() and "resume.fallback=true" in refused.value.line()
    train(config(shards, tmp_path, "resume.fallback=true"))
    assert compare_runs(finished, tmp_path / "tiny", "diffusion") == []


@pytest.mark.slow
def test_a_run_keeps_the_lanes_it_began_with(shards, tmp_path, monkeypatch):
    """They are chosen from the number of samples: another choice by a later version must not change the order."""
    monkeypatch.setattr("ldm.data.order.lanes_default", lambda batch_size, num_samples: 4)
    train(config(shards, tmp_path, "stages=[autoencoder]", "stage.autoencoder.max_steps=4"))
    monkeypatch.undo()
    train(config(shards, tmp_path, "stages=[autoencoder]", "resume.allow=[stage.autoencoder.max_steps]"))
    kept = [
        Store(tmp_path / "tiny" / "autoencoder" / "ckpt").load(step).document("state")["fingerprint"]["data.lanes"]
        for step in (4, 12)
    ]
    assert kept == [4, 4]
