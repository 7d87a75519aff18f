"""Several gloo processes against one: the same batches, draws and losses, weights equal to rounding."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.checkpoints.store import Store
from ldm.training.launch import free_port
from tests.integration.tiny import GAN, ROOT, command, first_difference, history, metrics, overrides, start

pytestmark = pytest.mark.slow

# Adam turns the rounding noise of a zero gradient into full steps; plain gradient descent keeps rounding small
SGD = [
    f"optimizer@stage.{stage}.optimizer=sgd stage.{stage}.optimizer.lr=0.05" for stage in ("autoencoder", "diffusion")
]


def words(shards, runs, devices, *more, **sizes):
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={devices}"] if devices > 1 else []
    return overrides(shards, runs, *" ".join(SGD).split(), *ddp, *more, **sizes)


@pytest.mark.parametrize("devices,accumulate", [(2, 1), (2, 2)])
def test_processes_equal_one(shards, tmp_path, devices, accumulate):
    code, output = command(words(shards, tmp_path / "one", 1))
    assert code == 0, output
    more = [f"stage.{stage}.accumulate={accumulate}" for stage in ("autoencoder", "diffusion")]
    more += [f"trainer.channels_last={str(accumulate > 1).lower()}"]  # which changes nothing but rounding
    code, output = command(words(shards, tmp_path / "many", devices, *more))
    assert code == 0, output
    assert f"({devices} x {8 // devices // accumulate} x {accumulate})" in output
    for stage in ("autoencoder", "diffusion"):
        one, many = (history(tmp_path / kind / "tiny", stage) for kind in ("one", "many"))
        measures = ("val/psnr", "val/latent_std") if stage == "autoencoder" else ()
        for key in ("train/loss", "train/grad_norm", "val/loss", *measures):
            a, b = ([row[key] for row in rows if key in row] for rows in (one, many))
            np.testing.assert_allclose(a, b, rtol=2e-5, err_msg=f"{stage} {key}")
        stores = [Store(tmp_path / kind / "tiny" / stage / "ckpt") for kind in ("one", "many")]
        assert stores[0].steps() == stores[1].steps()
        a, b = (store.newest() for store in stores)
        if stage == "autoencoder":
            for key in ("latent_mean", "latent_std", "latent_images"):
                np.testing.assert_allclose(a.document("state")[key], b.document("state")[key], rtol=1e-4, atol=1e-6)
        left, right = a.tensors("ema"), b.tensors("ema")
        for name in left:
            np.testing.assert_allclose(left[name], right[name], rtol=1e-4, atol=1e-5, err_msg=name)


_IN_DOUBLE = """
import json, sys, torch
torch.set_default_dtype(torch.float64)
from ldm.cli import compose
from ldm.data import loader
from ldm.data.transforms import to_images
from ldm.training.fit import train
loader.to_images = lambda pixels: to_images(pixels).double()
if __name__ == "__main__":
    train(compose("train", json.loads(sys.argv[1])))
"""


def in_double(folder, data, stage, *more, ranks, steps):
    """One stage in float64, as torchrun starts it."""
    words = overrides(data, folder, *more, f"stages=[{stage}]", "trainer.accelerator=cpu", steps=steps)
    script, port, running = folder.parent / "double.py", free_port(), []
    script.write_text(_IN_DOUBLE)
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "PYTHONPATH": str(ROOT)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
        command = [sys.executable, str(script), json.dumps(words)]
        running.append(subprocess.Popen(command, env={**os.environ, **place}, **options))
    try:
        said = [process.communicate(timeout=250)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert not any(process.returncode for process in running), said
    return said[0]


@pytest.mark.timeout(900)
def test_weights_in_float64_equal_to_rounding(shards, tmp_path):
    """AdamW, both stages, a discriminator: one process, three ranks that do not fit the four lanes, and two ranks, one,
    and two again, a third of the way each. What differs is the order of summation alone.
    """
    stages = ("autoencoder", "diffusion")
    more = ["stage.diffusion.cache_latents_mb=0", "data.lanes=4", *GAN]
    for stage in stages:
        more += [f"stage.{stage}.ema=null", f"stage.{stage}.batch_size=12"]
        more += [f"lr_schedule@stage.{stage}.lr_schedule=constant"]
    for stage in stages:
        allow = f"resume.allow=[stage.{stage}.max_steps]"
        in_double(tmp_path / "one", shards, stage, *more, allow, ranks=1, steps=12)
        in_double(tmp_path / "three", shards, stage, *more, allow, ranks=3, steps=12)
        for ranks, steps in ((2, 4), (1, 8), (2, 12)):
            said = in_double(tmp_path / "elastic", shards, stage, *more, allow, ranks=ranks, steps=steps)
            assert steps == 4 or "world_size; checkpoint" in said
    for stage, what in (("autoencoder", "model"), ("autoencoder", "objective"), ("diffusion", "model")):
        one, *others = (
            Store(tmp_path / folder / "tiny" / stage / "ckpt").newest().tensors(what)
            for folder in ("one", "three", "elastic")
        )
        for other in others:
            assert one.keys() == other.keys()
            for name, weight in one.items():
                if weight.is_floating_point() and not name.startswith("statistics"):
                    assert weight.dtype == torch.float64, name
                    np.testing.assert_allclose(weight, other[name], rtol=1e-9, atol=1e-11, err_msg=f"{stage} {name}")


def test_another_batch_would_be_noticed(shards, tmp_path):
    """Negative control: another seed gives losses that are not equal to rounding."""
    for seed in (0, 1):
        assert command(words(shards, tmp_path / str(seed), 1, f"seed={seed}", "stages=[autoencoder]"))[0] == 0
    a, b = ([row["train/loss"] for row in history(tmp_path / str(s) / "tiny", "autoencoder")] for s in (0, 1))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(a, b, rtol=2e-5)


def test_sigterm_to_the_parent_saves_on_all_and_resumes(shards, tmp_path):
    more = ["stages=[autoencoder]"]
    process = start(words(shards, tmp_path / "b", 2, *more, steps=400, save_every=390))
    deadline = time.monotonic() + 120
    while len(metrics(tmp_path / "b" / "tiny", "autoencoder")) < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped by SIGTERM" in output, output
    assert command(words(shards, tmp_path / "b", 2, *more, steps=400, save_every=390))[0] == 0
    assert command(words(shards, tmp_path / "a", 2, *more, steps=400, save_every=390))[0] == 0
    ends = [Store(tmp_path / kind / "tiny" / "autoencoder" / "ckpt").load(400) for kind in "ab"]
    assert first_difference(*ends) is None


def test_a_dead_worker_ends_the_run(shards, tmp_path):
    process = start(words(shards, tmp_path, 2, "stages=[autoencoder]", steps=4000, save_every=3000))
    deadline = time.monotonic() + 120
    while len(metrics(tmp_path / "tiny", "autoencoder")) < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [int(p) for p in children if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "worker 1 died" in output and "SIGKILL" in output, output


def test_a_batch_that_cannot_be_cut_names_what_can(shards, tmp_path):
    code, output = command(words(shards, tmp_path, 2, "stage.autoencoder.batch_size=7", "stages=[autoencoder]"))
    assert code == 2 and "global batch of 7" in output and "accumulate=1: 1, 7" in output, output
