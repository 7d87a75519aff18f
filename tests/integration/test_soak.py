"""A hundred lives: the command is killed at random again and again, and its end is that of the run nobody disturbed.

`make soak` runs this; it takes about a quarter of an hour.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from ldm.checkpoints.store import Store
from tests.integration.tiny import GAN, ROOT, children, compare_runs, history, overrides

STAGES = ("autoencoder", "diffusion")
TWO_RANKS = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "checkpoint.async_save=true"]
BEHIND = ["checkpoint.async_save=true", "loader.num_workers=2", "stage.autoencoder.accumulate=2"]

_RECORDING = """
import json, os, sys
from ldm.cli import compose
from ldm.training.fit import train
from ldm.training.stage_module import StageModule

train_on = StageModule.training_step

def recorded(self, batch, batch_idx):
    line = json.dumps([self.stage, self.step.train_step, self.step.micro, self.global_rank, list(batch.keys)])
    seen = os.open(sys.argv[1], os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    os.write(seen, (line + "\\n").encode())
    os.close(seen)
    return train_on(self, batch, batch_idx)

StageModule.training_step = recorded
if __name__ == "__main__":
    train(compose("train", json.loads(sys.argv[2])))
"""


class Run:
    """The same training, by itself or killed; `seen` is what every rank was given in every step that it began."""

    def __init__(self, folder, shards, *more, steps):
        self.folder, self.seen, self.script = folder / "tiny", folder / "seen.jsonl", folder / "train.py"
        folder.mkdir()
        self.script.write_text(_RECORDING)
        self.words = overrides(shards, folder, *GAN, "checkpoint.keep_last=2", *more, steps=steps, save_every=4)
        self.newest = dict.fromkeys(STAGES, 0)

    def start(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(self.script), str(self.seen), json.dumps(self.words)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
        return subprocess.Popen(command, env=environment, **options)

    def finish(self):
        """To the end. Returns how long it took to the first new step."""
        process, began, before = self.start(), time.monotonic(), self.steps_done()
        while process.poll() is None and self.steps_done() <= before:
            time.sleep(0.01)
        taken = time.monotonic() - began
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        return taken

    def samples(self):
        """By stage, step, micro-batch and rank; of what was done again, the last time."""
        rows = map(json.loads, self.seen.read_text().splitlines())
        return {(stage, step, micro, rank): keys for stage, step, micro, rank, keys in rows}

    def steps_done(self):
        """Whole lines of the metrics: the last one may have been torn by a kill."""
        files = [self.folder / stage / "metrics.jsonl" for stage in STAGES]
        return sum(file.read_bytes().count(b"\n") for file in files if file.exists())

    def live(self, rng, whom, starting):
        """Started, killed somewhere, and looked at. starting: seconds that a start takes."""
        process = self.start()
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0, starting))
        else:
            self.wait_for_steps(process, rng.randint(1, 7))
            time.sleep(rng.uniform(0, 0.06))
        victims = [process.pid]
        with contextlib.suppress(FileNotFoundError):  # a rank that has just ended
            victims += children(process.pid, "spawn_main") if whom == "any" else []
        try:
            os.kill(rng.choice(victims), signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
        output, _ = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGKILL, 1), output
        self.look()

    def wait_for_steps(self, process, count):
        """Until so many were made since this life began to train."""
        deadline, last, made = time.monotonic() + 120, self.steps_done(), 0
        while made < count:
            assert process.poll() is None, "the run ended before it was killed often enough: " + process.stdout.read()
            assert time.monotonic() < deadline, "the run never got there"
            time.sleep(0.003)
            now = self.steps_done()
            made, last = made + max(0, now - last), now  # fewer when what came after the last save is cut off

    def look(self):
        """The newest checkpoint of each stage is whole, and none that was there before is lost."""
        for stage in STAGES:
            folder = self.folder / stage / "ckpt"
            if folder.is_dir() and (newest := Store(folder).newest()) is not None:
                assert newest.step >= self.newest[stage]
                self.newest[stage] = newest.step


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kills", "steps", "whom", "more"),
    [(40, 100, "it", []), (30, 80, "it", BEHIND), (30, 80, "any", TWO_RANKS)],
    ids=["alone", "saving beside training", "two ranks"],
)
def test_soak(shards, tmp_path, kills, steps, whom, more):
    whole = Run(tmp_path / "whole", shards, *more, steps=steps)
    broken = Run(tmp_path / "broken", shards, *more, steps=steps)
    starting = whole.finish()
    rng = random.Random(kills)
    for _ in range(kills):
        broken.live(rng, whom, starting)
    broken.finish()
    assert broken.samples() == whole.samples()
    begun = len(broken.seen.read_text().splitlines())
    assert begun > len(whole.samples()) + kills // 2  # it was killed while it trained: steps were made again
    for stage in STAGES:
        assert compare_runs(whole.folder, broken.folder, stage) == []
        assert history(whole.folder, stage) == history(broken.folder, stage)


@pytest.mark.slow
def test_soak_would_notice(shards, tmp_path):
    """Negative control: a checkpoint whose position is one step off, in the middle of a run."""
    whole = Run(tmp_path / "whole", shards, "stages=[autoencoder]", steps=60)
    whole.finish()
    broken = Run(tmp_path / "broken", shards, "stages=[autoencoder]", steps=60)
    broken.script.write_text(
        _RECORDING.replace(
            "train_on = ",
            "from ldm.data.datamodule import DataModule\n"
            "configure = DataModule.configure\n"
            "DataModule.configure = lambda s, **o: configure(s, **{**o, 'start_step': o['start_step'] and 5})\n"
            "train_on = ",
        )
    )
    process = broken.start()
    broken.wait_for_steps(process, 6)
    process.kill()
    process.communicate()
    broken.finish()
    assert broken.samples() != whole.samples()
    assert compare_runs(whole.folder, broken.folder, "autoencoder") != []
