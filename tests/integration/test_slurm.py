"""The batch script of docs/scaling.md as it stands there, with stand-ins for srun and scontrol and real processes."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys

import pytest

from tests.integration.tiny import ROOT, metrics, overrides, reach

pytestmark = pytest.mark.slow

_SRUN = """#!{python}
# two tasks, as srun starts them on two nodes; leaves with the largest exit code
import os, subprocess, sys
words = [word for word in sys.argv[1:] if not word.startswith("--")]
step = {{"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}}
step["SLURM_STEP_NODELIST"] = "127.0.0.[1-2]"
tasks = []
for task in range(2):
    place = {{"SLURM_PROCID": str(task), "SLURM_LOCALID": "0"}}
    tasks.append(subprocess.Popen(words, env={{**os.environ, **step, **place}}))
open({pids!r}, "w").write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""


def a_free_job():
    """A job's number whose port nobody has."""
    while True:
        job = 1_000_000 + int.from_bytes(os.urandom(2)) % 10_000
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 15_000 + job % 10_000)):
                return str(job)


def test_the_documented_script_saves_requeues_and_goes_on(shards, tmp_path):
    (script,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL)
    line = 'experiment=sd "stages=[diffusion]" trainer=ddp data.path=/data/shards'
    assert line in script
    words = overrides(shards, tmp_path / "runs", "stages=[autoencoder]", "trainer=ddp", steps=300, save_every=250)
    script = script.replace(line, shlex.join([*words, "trainer.accelerator=cpu"]))
    tools, pids, requeued = tmp_path / "bin", tmp_path / "pids", tmp_path / "requeued"
    tools.mkdir()
    for name, text in {
        "srun": _SRUN.format(python=sys.executable, pids=str(pids)),
        "scontrol": f'#!/bin/sh\necho "$@" >> {requeued}\n',
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    job = a_free_job()
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": job,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }

    def submitted():
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
        return subprocess.Popen(["bash", "-c", script], env=environment, **options)

    process = submitted()
    reach(process, tmp_path / "runs" / "tiny", "autoencoder", 5)
    for pid in map(int, pids.read_text().split()):  # as --signal=USR1@180 sends it
        os.kill(pid, signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and output.count("stopped by SIGUSR1") == 2, output
    assert requeued.read_text() == f"requeue {job}\n"

    process = submitted()
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and "continuing at step" in output, output
    assert [row["train/step"] for row in metrics(tmp_path / "runs" / "tiny", "autoencoder")] == list(range(1, 301))
    assert requeued.read_text() == f"requeue {job}\n"
