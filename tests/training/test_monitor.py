"""The monitor never stops or slows training."""

import json
import subprocess
import sys
import time

import pytest

from ldm.errors import LdmError
from ldm.training.callbacks.monitor import QUEUE_SIZE, Monitor, choose_mode


def monitor(tmp_path, mode="offline"):
    return Monitor(
        mode=mode, project="p", name="n", stage="diffusion", run_id="abc123", folder=tmp_path, config={"seed": 0}
    )


def test_auto_is_online_only_with_a_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert choose_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert choose_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode("auto") == "disabled"
    with pytest.raises(LdmError, match=r"logger\.mode"):
        choose_mode("sometimes")


def test_offline_run_holds_what_was_logged(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    watch = monitor(tmp_path)
    for step in range(1, 4):
        watch.log({"train/step": step, "train/loss": 1.0 / step})
    watch.close()
    runs = list((tmp_path / "wandb").glob("offline-run-*-abc123"))
    assert len(runs) == 1
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(runs[0])]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60)
    rows = [json.loads(line) for line in output.stdout.splitlines() if '"history"' in line]
    assert len(rows) == 3 and "train/loss" in json.dumps(rows[0]), output.stderr


def test_a_stalled_service_costs_no_step_more_than_a_moment(monkeypatch, tmp_path):
    monkeypatch.setattr(Monitor, "_start", lambda self: time.sleep(60))
    watch = monitor(tmp_path)
    slowest = 0.0
    for step in range(3 * QUEUE_SIZE):
        before = time.monotonic()
        watch.log({"train/step": step})
        slowest = max(slowest, time.monotonic() - before)
    assert slowest < 0.05
    assert watch.dropped >= 2 * QUEUE_SIZE - 1
    before = time.monotonic()
    watch.close(timeout_s=0.3)
    assert time.monotonic() - before < 2


def test_an_unreachable_service_is_survived(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(Monitor, "_start", lambda self: (_ for _ in ()).throw(OSError("no route")))
    watch = monitor(tmp_path)
    watch.log({"train/step": 1})
    watch.close(timeout_s=5)
    assert "no route" in caplog.text and "training goes on" in caplog.text
