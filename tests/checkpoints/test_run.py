"""The run folder: lock, records, pointer, errors, JSON lines, redaction."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml

from ldm.checkpoints.files import append_jsonl, truncate_jsonl
from ldm.checkpoints.run import (
    StagePaths,
    find_run,
    open_run,
    open_stage,
    point_latest,
    redact,
    write_config,
    write_error,
)
from ldm.errors import LdmError

HOLDER = """
import os, sys, time
from ldm.checkpoints.run import open_run
run = open_run(sys.argv[1], "a")
child = os.fork() if "fork" in sys.argv else None
if child != 0:
    print(child or "locked", flush=True)
time.sleep(60)
"""


def hold(tmp_path, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), *arguments],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )


def refused(code, *words, **options):
    with pytest.raises(LdmError) as caught:
        open_run(**options)
    assert caught.value.code == code and caught.value.exit_code == 2
    assert all(word in caught.value.line() for word in words), caught.value.line()


# ---- lock


def test_the_second_process_is_refused_until_the_holder_is_killed(tmp_path, caplog):
    holder = hold(tmp_path)
    try:
        assert holder.stdout.readline() == "locked\n"
        for steal in (False, True):  # a live holder of this host is never robbed
            words = (f"pid {holder.pid} on {os.uname().nodename}", str(tmp_path / "a"))
            refused("LOCKED", *words, output_dir=tmp_path, name="a", steal_lock=steal)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with open_run(tmp_path, "a"):
        assert f"recovered the lock of pid {holder.pid}" in caplog.text
        assert json.loads((tmp_path / "a/lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "a/lock").read_text() == ""


def test_a_forked_child_that_survives_does_not_keep_the_lock(tmp_path):
    holder = hold(tmp_path, "fork")
    child = int(holder.stdout.readline())
    try:
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it lives
        open_run(tmp_path, "a").close()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_the_lock_of_another_host_needs_the_users_word(tmp_path):
    open_run(tmp_path, "a").close()
    (tmp_path / "a/lock").write_text('{"host": "elsewhere", "pid": 12}')
    refused("LOCKED", "pid 12 on elsewhere", "resume.steal_lock=true", output_dir=tmp_path, name="a")
    open_run(tmp_path, "a", steal_lock=True).close()
    open_run(tmp_path, "a").close()


def test_an_unreachable_flock_of_another_host_can_be_stolen(tmp_path):
    """As a network mount shows it: the flock is held, and the holder is not of this machine."""
    holder = hold(tmp_path)
    try:
        assert holder.stdout.readline() == "locked\n"
        (tmp_path / "a/lock").write_text('{"host": "elsewhere", "pid": 12}')
        refused("LOCKED", "resume.steal_lock=true", output_dir=tmp_path, name="a")
        with open_run(tmp_path, "a", steal_lock=True):
            refused("LOCKED", f"pid {os.getpid()}", output_dir=tmp_path, name="a", steal_lock=True)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


# ---- opening


@pytest.mark.parametrize("name", ["", "A", "a b", "../a", "a/b", "a" * 65, "ü", "a\n", "a.b"])
def test_names_are_of_a_fixed_alphabet(tmp_path, name):
    refused("NAME", "1 to 64 of a-z", output_dir=tmp_path / "runs", name=name)
    assert not (tmp_path / "runs").exists()


def test_an_unusable_place_is_named_with_path_and_uid(tmp_path):
    (tmp_path / "file").touch()
    words = (str(tmp_path / "file/a"), f"uid {os.geteuid()}", "output_dir=")
    refused("RUN-FOLDER", *words, output_dir=tmp_path / "file", name="a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere; test_disk.py has the read-only mount")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o555)
    refused("RUN-FOLDER", "Permission denied", output_dir=tmp_path, name="a")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_the_folder_of_another_user_is_refused(tmp_path):
    open_run(tmp_path, "a").close()
    os.chown(tmp_path / "a", 12345, -1)
    refused("RUN-FOLDER", "owner uid 12345", "resume.trust_dir=true", output_dir=tmp_path, name="a")
    open_run(tmp_path, "a", trust_dir=True).close()


def test_the_record_survives_and_is_updated(tmp_path):
    with open_run(tmp_path, "a") as run:
        created = run.record["created"]
        assert run.stage_record("diffusion") == {"wandb_id": None, "exact": True}
        run.update_stage("diffusion", wandb_id="x1")
        run.update_stage("diffusion", exact=False)
    with open_run(tmp_path, "a") as run:
        stages = {"diffusion": {"wandb_id": "x1", "exact": False}}
        assert run.record == {"name": "a", "created": created, "schema_version": 1, "stages": stages}


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"schema_version": 1, "stages": 3}', '{"schema_version": 9, "stages": {}}']
)
def test_an_unreadable_record_is_refused_and_kept(tmp_path, content):
    open_run(tmp_path, "a").close()
    (tmp_path / "a/run.json").write_text(content)
    refused("RUN-FOLDER", "run.json", output_dir=tmp_path, name="a")
    assert (tmp_path / "a/run.json").read_text() == content
    assert (tmp_path / "a/lock").read_text() == ""


def test_a_stage_has_its_places(tmp_path):
    with open_run(tmp_path, "a") as run:
        paths = run.stage("autoencoder")
        assert paths == StagePaths(tmp_path / "a/autoencoder") and paths.ckpt.is_dir() and paths.samples.is_dir()
        names = [p.relative_to(run.folder).as_posix() for p in (paths.metrics, paths.bad_samples, paths.nonfinite)]
        assert names == [f"autoencoder/{name}.jsonl" for name in ("metrics", "bad_samples", "nonfinite")]
        with pytest.raises(LdmError, match="cannot name a stage"):
            run.stage("../x")


# ---- finding


def test_find_run(tmp_path):
    runs = tmp_path / "runs"
    with pytest.raises(LdmError, match=r"nothing has been trained yet; .*runs; run: python train\.py"):
        find_run(output_dir=runs)
    for name in ("cats", "dogs"):
        with open_run(runs, name) as run:
            point_latest(run.folder)
    assert find_run(output_dir=runs) == runs / "dogs"
    assert find_run("cats", runs) == runs / "cats"
    assert find_run(runs / "cats", runs) == runs / "cats"
    assert find_run(runs / "cats/run.json", runs).is_file()
    with pytest.raises(LdmError, match="no such run; run=cat; did you mean 'cats'"):
        find_run("cat", runs)
    with pytest.raises(LdmError, match=f"no such run; run={runs}/cat; did you mean 'cats'"):
        find_run(runs / "cat", tmp_path / "elsewhere")
    with pytest.raises(LdmError, match="no such run; init_from=zebra; known: cats, dogs"):
        find_run("zebra", runs, where="init_from")
    with pytest.raises(LdmError, match=f"holds runs and is none; .*choose one: run={runs}/cats, run={runs}/dogs"):
        find_run(runs)


def test_a_folder_that_is_no_run_is_not_to_be_trained(tmp_path):
    with pytest.raises(LdmError, match=r"no run with a stage 'diffusion'; .*name a run's folder"):
        open_stage(find_run(tmp_path), "diffusion")
    open_run(tmp_path, "cats").close()
    with pytest.raises(LdmError, match=r"has no checkpoint; .*train\.py name=cats stages=\[diffusion\]"):
        open_stage(find_run(tmp_path / "cats"), "diffusion")


@pytest.mark.parametrize("content", ["", "[]", '{"run": "gone"}', '{"run": "../a"}', '{"run": 3}'])
def test_a_pointer_to_nowhere_lists_what_exists(tmp_path, content):
    open_run(tmp_path / "runs", "cats").close()
    open_run(tmp_path, "a").close()
    (tmp_path / "runs/LATEST").write_text(content)
    with pytest.raises(LdmError, match=r"LATEST names .*run=PATH; known: cats"):
        find_run(output_dir=tmp_path / "runs")


# ---- errors and secrets


def test_the_first_error_of_a_job_stays_first(tmp_path):
    for life in range(2):
        with open_run(tmp_path, "a") as run:
            write_error(run.folder, 1, f"Traceback of life {life}")
            run.write_error(0, "connection lost")
        first = (tmp_path / "a/errors/first.txt").read_text()
        assert first.startswith("rank 1, 20") and f"of life {life}" in first
        assert "connection lost" in (tmp_path / "a/errors/rank0.txt").read_text()


def test_secrets_are_redacted(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "abcdef-123456")
    text = """
logger: {api_key: hunter22, entity: me, note: "key abcdef-123456 inside"}
hub: {hf_token: hunter22, token: "${oc.env:HF_TOKEN}", fallback_token: "${oc.env:HF_TOKEN,hunter22}"}
text: {num_tokens: 77, tokenizer: clip, pad_token: 49407, token: null}
list: [{password: hunter22}, {secret: [hunter22]}]
"""
    with open_run(tmp_path, "a") as run:
        write_config(run.folder, text)
        run.write_error(0, "failed with abcdef-123456")
        shown = (run.folder / "config.yaml").read_text() + (run.folder / "errors/rank0.txt").read_text()
    assert "hunter22" not in shown and "123456" not in shown
    kept = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert kept["text"] == {"num_tokens": 77, "tokenizer": "clip", "pad_token": 49407, "token": None}
    assert kept["hub"]["token"] == "${oc.env:HF_TOKEN}" and kept["logger"]["entity"] == "me"
    monkeypatch.delenv("SOME_API_KEY")
    assert redact("abcdef-123456") == "abcdef-123456"  # control: the variable was the reason


# ---- JSON lines


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("torn", [b'{"train_step": 8, "lo', b'{"train_step": 5}', b"\xff"])
def test_resume_leaves_each_step_once(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 8):
        assert append_jsonl(path, {"train_step": step, "loss": 1 / step, "life": 1})
    append_jsonl(path, {"note": "no step"})
    with open(path, "ab") as file:
        file.write(torn)  # by a kill: no line end
    assert truncate_jsonl(path, "train_step", 5) == 3
    for step in (6, 7):
        append_jsonl(path, {"train_step": step, "life": 2})
    assert [r["train_step"] for r in lines(path) if "train_step" in r] == [1, 2, 3, 4, 5, 6, 7]
    assert lines(path)[5] == {"note": "no step"}


def test_truncation_changes_nothing_when_nothing_is_newer(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert truncate_jsonl(path, "train_step", 5) == 0 and not path.exists()
    append_jsonl(path, {"train_step": 5})
    inode = path.stat().st_ino
    assert truncate_jsonl(path, "train_step", 5) == 0
    assert path.stat().st_ino == inode and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_numbers_that_json_lacks_become_gaps(tmp_path):
    append_jsonl(tmp_path / "m.jsonl", {"loss": float("nan"), "all": [1.0, float("inf")], "ok": 0.5})
    assert lines(tmp_path / "m.jsonl") == [{"loss": None, "all": [1.0, None], "ok": 0.5}]


def test_a_log_that_cannot_be_written_stops_nothing(caplog):
    assert append_jsonl("/dev/full", {"train_step": 1}) is False
    assert "No space left" in caplog.text
