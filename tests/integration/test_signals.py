"""Real signals and real failures in one process and in several: what is saved, what is said, and who is left."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml

from ldm.checkpoints.store import Store
from ldm.errors import LdmError
from ldm.model import LatentDiffusion
from ldm.sampling.tasks import Sampling
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.callbacks.samples import Samples
from ldm.training.fit import train
from ldm.training.launch import free_port
from tests.checkpoints.test_disk import needs_mount
from tests.integration.tiny import (
    ROOT,
    children,
    command,
    config,
    first_difference,
    history,
    is_running,
    metrics,
    overrides,
    reach,
    start,
)

ENDLESS = {"steps": 4000, "save_every": 3000}
STAGE = "autoencoder"


def words(shards, runs, *more, devices=1, **sizes):
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={devices}"] if devices > 1 else []
    return overrides(shards, runs, f"stages=[{STAGE}]", *ddp, *more, **(sizes or ENDLESS))


def joined(shards, runs, *more, ranks=2, **sizes):
    """Processes as torchrun starts them, of which each can be asked how it ended."""
    port = str(free_port())
    places = [
        {
            "RANK": str(r),
            "LOCAL_RANK": str(r),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for r in range(ranks)
    ]
    return [start(words(shards, runs, *more, "trainer.accelerator=cpu", **sizes), **place) for place in places]


def saved_step(runs):
    found = Store(runs / "tiny" / STAGE / "ckpt").newest()
    return None if found is None else found.step


@pytest.fixture
def one_thread():
    """As the commands that `start` starts: bit-equal weights need as many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- signals


@pytest.mark.slow
@pytest.mark.parametrize(
    "number,to,code", [(signal.SIGUSR1, [0], 143), (signal.SIGTERM, [1], 143), (signal.SIGINT, [0, 1], 130)]
)
def test_whoever_is_signalled_all_save_and_leave_alike(shards, tmp_path, number, to, code):
    running = joined(shards, tmp_path)
    reach(running[0], tmp_path / "tiny", STAGE, 5)
    since = time.monotonic()
    for rank in to:
        os.kill(running[rank].pid, number)
    said = [process.communicate(timeout=60)[0] for process in running]
    took = time.monotonic() - since
    assert [process.returncode for process in running] == [code, code], said
    assert all(
        f"stopped by {signal.Signals(number).name} at step {saved_step(tmp_path)}, saved" in text for text in said
    )
    assert saved_step(tmp_path) == len(metrics(tmp_path / "tiny", STAGE))
    assert took < 5 or os.getloadavg()[0] > 2, f"{took:.1f} s"


@pytest.mark.slow
def test_a_signal_to_the_whole_tree_is_one_request(shards, tmp_path):
    """As SLURM, systemd and `timeout` send it: the launcher, its ranks and their loader workers, twice each."""
    process = start(words(shards, tmp_path, "loader.num_workers=1", devices=2))
    reach(process, tmp_path / "tiny", STAGE, 5)
    ranks = children(process.pid, "spawn_main")
    tree = [process.pid, *ranks, *(worker for rank in ranks for worker in children(rank))]
    assert len(tree) >= 5
    for pid in tree * 2:
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and output.count("error[") == 1 and "saved" in output, output
    assert saved_step(tmp_path) == len(metrics(tmp_path / "tiny", STAGE))
    assert not any(map(is_running, tree))


@pytest.mark.slow
def test_a_storm_of_sigusr1_is_one_stop_and_the_run_goes_on_from_there(shards, tmp_path, one_thread):
    constant = f"lr_schedule@stage.{STAGE}.lr_schedule=constant"
    process = start(words(shards, tmp_path / "b", constant, steps=4000, save_every=4))
    reach(process, tmp_path / "b" / "tiny", STAGE, 3)
    for _ in range(100):
        os.kill(process.pid, signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    step = saved_step(tmp_path / "b")
    assert process.returncode == 143 and f"stopped by SIGUSR1 at step {step}, saved" in output, output
    sizes = {"steps": step + 5, "save_every": 4}
    more = [f"stages=[{STAGE}]", constant, f"resume.allow=[stage.{STAGE}.max_steps]"]
    train(config(shards, tmp_path / "b", *more, **sizes))
    train(config(shards, tmp_path / "a", *more, **sizes))
    ends = [Store(tmp_path / kind / "tiny" / STAGE / "ckpt").load(step + 5) for kind in "ab"]
    assert first_difference(*ends) is None


@pytest.mark.slow
def test_killed_soon_after_sigterm(shards, tmp_path):
    """The grace was too short: whatever was being written, the newest checkpoint is valid."""
    for life, delay in enumerate((0.2, 0.02, 0.0)):
        process = start(words(shards, tmp_path, steps=4000, save_every=2))
        reach(process, tmp_path / "tiny", STAGE, (saved_step(tmp_path) or 0) + 5)
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(delay)
        process.kill()
        process.communicate(timeout=60)
        step, written = saved_step(tmp_path), len(metrics(tmp_path / "tiny", STAGE))
        assert step is not None and written - 2 <= step <= written, (life, step, written)


@pytest.mark.slow
def test_a_signal_before_training_says_that_there_is_nothing_to_save(shards, tmp_path):
    process = start(words(shards, tmp_path, devices=2))
    deadline = time.monotonic() + 100
    while not (tmp_path / "tiny" / "run.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "nothing to save" in output, output


def test_validation_is_cut_short(shards, tmp_path, monkeypatch):
    """It looks at the flag between batches; the step that follows saves."""
    terms, seen = AutoencoderModule.validation_terms, []

    def signalled(self, batch):
        seen.append(self.step.train_step)
        os.kill(os.getpid(), signal.SIGTERM)
        return terms(self, batch)

    monkeypatch.setattr(AutoencoderModule, "validation_terms", signalled)
    with pytest.raises(LdmError, match="stopped by SIGTERM at step 5, saved") as stopped:
        train(config(shards, tmp_path, f"stages=[{STAGE}]"))
    assert stopped.value.exit_code == 143 and saved_step(tmp_path) == 5
    assert seen == [4]  # of three batches
    assert not any("val/loss" in row for row in metrics(tmp_path / "tiny", STAGE))


def test_drawing_is_cut_short(finished, tmp_path):
    model = LatentDiffusion.load(finished)
    calls = []

    def sampler(denoise, x, levels, *, noise, on_step):
        for step in range(3):
            calls.append(step)
            on_step(step, x, x)
        return x

    samples = Samples(1, tmp_path, prompts=["a"], sampling=Sampling(function=sampler, steps=3))
    assert samples._from_prompts(SimpleNamespace(model=model, stop_due=True)) is None and calls == [0]
    assert samples._from_prompts(SimpleNamespace(model=model, stop_due=False)) is not None


# ---- failures

_FAULTY = """
import datetime, os, signal, sys, time
sys.path.insert(0, {root!r})
import train
from ldm.cli import run
from ldm.training import group
from ldm.training.autoencoder_module import AutoencoderModule

loss, fault = AutoencoderModule.loss, {fault!r}
group.STEP_TIMEOUT = datetime.timedelta(seconds=4)


def a_bad_day(self, batch, draws):
    if os.environ["RANK"] == "1" and self.step.train_step == 5:
        if fault == "raise":
            raise ValueError("the dog ate it")
        time.sleep(600)
    return loss(self, batch, draws)


AutoencoderModule.loss = a_bad_day
if __name__ == "__main__":
    run(train.main, "train")
"""


def faulty(tmp_path, fault):
    path = tmp_path / "faulty.py"
    path.write_text(_FAULTY.format(root=str(ROOT), fault=fault))
    return str(path)


@pytest.mark.slow
def test_the_first_error_of_any_rank_is_what_is_said(shards, tmp_path):
    code, output = command(words(shards, tmp_path, devices=2), script=faulty(tmp_path, "raise"))
    ended = time.time()
    errors = tmp_path / "tiny" / "errors"
    assert code == 1 and output.count("error[") == 1, output
    assert "error[UNCLASSIFIED]: ValueError: the dog ate it; " in output, output
    assert str(errors / "rank1.txt") in output
    first = (errors / "first.txt").read_text()
    assert first.startswith("rank 1,") and "in a_bad_day" in first and first == (errors / "rank1.txt").read_text()
    assert ended - (errors / "first.txt").stat().st_mtime < 10 + 2 * os.getloadavg()[0]


@pytest.mark.slow
def test_a_silent_rank_is_named_with_the_place_where_it_was(shards, tmp_path):
    code, output = command(words(shards, tmp_path, devices=2), script=faulty(tmp_path, "hang"))
    assert code == 75 and output.count("error[") == 1, output
    assert "error[PEER]: rank 1 did not answer; in a_bad_day, " in output and "faulty.py:" in output, output
    assert "in training_step" in (tmp_path / "tiny" / "errors" / "rank1.txt").read_text()


@pytest.mark.slow
def test_a_killed_loader_worker_and_a_killed_launcher(shards, tmp_path):
    run = words(shards, tmp_path, "loader.num_workers=1", devices=2)
    process = start(run)
    reach(process, tmp_path / "tiny", STAGE, 5)
    ranks = children(process.pid, "spawn_main")
    os.kill(children(ranks[1])[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and output.count("error[") == 1, output
    assert "error[LOADER]" in output and "out of memory" in output and "shared memory free" in output, output
    assert "MB used by the trainer" in output and "rerun the same command" in output, output

    shutil.rmtree(tmp_path / "tiny")
    process = start(run)
    reach(process, tmp_path / "tiny", STAGE, 5)
    ranks = children(process.pid, "spawn_main")
    tree = [*ranks, *(worker for rank in ranks for worker in children(rank))]
    assert len(tree) == 4
    process.kill()
    deadline = time.monotonic() + 5
    while any(map(is_running, tree)):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)
    process.communicate(timeout=10)


@needs_mount
@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "64k"])
def test_without_shared_memory_the_cause_is_named(shards, tmp_path, size):
    """The worker cannot start, or its batch is lost on the way and it lives on."""
    run = words(shards, tmp_path, "loader.num_workers=1", "loader.timeout_s=4", f"stage.{STAGE}.batch_size=60")
    mounted = f'mount -t tmpfs -o size={size} none /dev/shm && exec "$0" "$@"'
    command = ["unshare", "-m", "sh", "-c", mounted, sys.executable, str(ROOT / "train.py"), *run]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 75, ended.stderr
    assert "1 workers keep up to 0 MB of pictures in shared memory" in ended.stderr
    assert "no shared memory is left: lower loader.num_workers" in ended.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_run_folder_that_vanishes(shards, tmp_path):
    """Where the folder was, a stale mount for one, the message names it; nothing is written elsewhere."""
    process = start(words(shards, tmp_path, steps=4000, save_every=3))
    reach(process, tmp_path / "tiny", STAGE, 7)
    shutil.move(tmp_path / "tiny", tmp_path / "elsewhere")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "error[DISK]" in output and str(tmp_path / "tiny") in output, output
    shutil.rmtree(tmp_path / "tiny", ignore_errors=True)  # what a mount that comes back covers
    shutil.move(tmp_path / "elsewhere", tmp_path / "tiny")
    code, output = command(words(shards, tmp_path, "stage.autoencoder.max_steps=12", steps=4000, save_every=3))
    assert code == 2 and "DRIFT" in output, output  # it is there, and known: the same command would go on
    assert (saved_step(tmp_path) or 0) >= 6


# ---- launching


@pytest.mark.slow
def test_a_port_in_use_is_named(shards, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        code, output = command(words(shards, tmp_path), **place)
    assert code == 2 and f"port {port}" in output and "MASTER_PORT" in output, output


@pytest.mark.slow
def test_ranks_that_were_given_different_things_do_not_train(shards, tmp_path):
    port, running = str(free_port()), []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        running.append(start(words(shards, tmp_path, "trainer.accelerator=cpu", f"seed={rank}"), **place))
    said = [process.communicate(timeout=100)[0] for process in running]
    assert [process.returncode for process in running] == [2, 2], said
    assert all("error[RANKS]" in text and "settings.seed; rank 0: 0, rank 1: 1" in text for text in said), said


@pytest.mark.slow
def test_workers_get_what_the_parent_composed(shards, tmp_path):
    """Command line, environment and files may change while they start: nobody reads them a second time."""
    script = tmp_path / "moving.py"
    script.write_text(
        f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
if __name__ == "__main__":
    from ldm.cli import compose
    from ldm.training.fit import train
    cfg = compose("train", sys.argv[1:])
    sys.argv[1:] = ["seed=1", "no.such.key=2"]
    os.environ["LDM_WORD"] = "after"
    os.makedirs({str(tmp_path / "runs" / "tiny")!r})
    open({str(tmp_path / "runs" / "tiny" / "config.yaml")!r}, "w").write("seed: 3\\n")
    train(cfg)
"""
    )
    sizes = {"steps": 3, "save_every": 3}
    given = words(shards, tmp_path / "runs", "seed=7", "logger.project=${oc.env:LDM_WORD}", devices=2, **sizes)
    code, output = command(given, script=str(script), LDM_WORD="before")
    assert code == 0, output
    kept = yaml.safe_load((tmp_path / "runs" / "tiny" / "config.yaml").read_text())  # which a worker has written
    assert kept["seed"] == 7 and kept["logger"]["project"] == "before"
    state = Store(tmp_path / "runs" / "tiny" / STAGE / "ckpt").newest().document("state")
    assert state["fingerprint"]["seed"] == 7
    assert [row["train/step"] for row in metrics(tmp_path / "runs" / "tiny", STAGE)] == [1, 2, 3]


@pytest.mark.slow
def test_two_nodes_under_torchrun(shards, tmp_path, finished):
    """The line of docs/scaling.md, both nodes on this machine: the batches of one process."""
    port, running = str(free_port()), []
    for node in range(2):
        line = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc-per-node=1",
            f"--node-rank={node}",
        ]
        line += ["--master-addr=127.0.0.1", f"--master-port={port}", str(ROOT / "train.py")]
        line += overrides(shards, tmp_path, f"stages=[{STAGE}]", "trainer=ddp", "trainer.accelerator=cpu")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
        running.append(subprocess.Popen(line, env=environment, **options))
    said = [process.communicate(timeout=200)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    one, two = ([row["train/loss"] for row in history(run, STAGE)] for run in (finished, tmp_path / "tiny"))
    assert len(two) == 12
    assert two[:3] == pytest.approx(one[:3], rel=1e-4)
