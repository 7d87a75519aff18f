"""Numbers that go wrong in real runs: in half precision, on one rank of two, and what looking for it may not change."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ldm.checkpoints.store import Store
from ldm.data import loader
from ldm.diffusion.objective import Objective
from ldm.errors import NON_FINITE, LdmError
from ldm.training import stage_module
from ldm.training.fit import train
from ldm.training.launch import free_port
from ldm.training.nonfinite import NOT_FOUND
from ldm.training.step import Scaler
from tests.integration.tiny import GAN, ROOT, compare_runs, config, history, overrides

pytestmark = pytest.mark.slow


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def spoil(monkeypatch, wanted):
    """An infinite pixel in the pictures of the training steps for which `wanted(step)`."""
    steps, decode = iter(range(1, 10**6)), loader.to_images

    def altered(pixels):
        images = decode(pixels)
        if len(images) == 8 and wanted(next(steps)):
            images[5, 1, 2, 3] = torch.inf
        return images

    monkeypatch.setattr(loader, "to_images", altered)


VQ = ["model/autoencoder=vq_toy", "model.autoencoder.codebook_size=16", "model.autoencoder.revive_every=4"]


def test_looking_for_the_origin_changes_nothing(shards, tmp_path, monkeypatch):
    """Weights, averages, moments, codes, the discriminator and what follows, bit for bit."""
    for name in ("looked", "blind"):
        with monkeypatch.context() as patched:
            if name == "blind":
                patched.setattr(stage_module, "origin_of_step", lambda *_: NOT_FOUND)
            spoil(patched, lambda step: step in (2, 5, 6))
            more = ["stages=[autoencoder]", "stage.autoencoder.validate_every=null", *VQ, *GAN]
            train(config(shards, tmp_path / name, *more, steps=8, save_every=1))
    found = [rows(tmp_path / name / "tiny" / "autoencoder" / "nonfinite.jsonl") for name in ("looked", "blind")]
    assert [row["where"] for row in found[0]] == ["input"] * 3
    assert [row["where"] for row in found[1]] == ["none in float32"] * 3
    assert compare_runs(tmp_path / "looked" / "tiny", tmp_path / "blind" / "tiny", "autoencoder") == []
    assert history(tmp_path / "looked" / "tiny", "autoencoder") == history(tmp_path / "blind" / "tiny", "autoencoder")


def test_a_gradient_that_is_not_finite_in_the_denoiser(finished, shards, tmp_path, monkeypatch):
    """The loss is finite; its derivative at 0 is not."""
    plain, calls = Objective.loss, iter(range(10**6))

    def with_a_root(self, denoiser, x0, *more):
        loss = plain(self, denoiser, x0, *more)
        if next(calls) // 2 < 1:  # the first step, and its repetition
            loss = loss + (denoiser.network.conv_out.bias.sum() * 0).abs().sqrt()
        return loss

    monkeypatch.setattr(Objective, "loss", with_a_root)
    train(config(shards, tmp_path, "stages=[diffusion]", f"init_from={finished}", steps=3, save_every=3))
    (row,) = rows(tmp_path / "tiny" / "diffusion" / "nonfinite.jsonl")
    assert (row["train/step"], row["module"], row["where"]) == (1, "denoiser.network.conv_out", "backward")
    assert all(sample["loss"] is not None for sample in row["samples"])


@pytest.mark.parametrize("bad", [False, True])
def test_float16_short_of_range_is_no_fault_but_a_bad_picture_is(shards, tmp_path, monkeypatch, bad):
    words = ["stages=[autoencoder]", "stage.autoencoder.precision=16-mixed"]
    if not bad:
        monkeypatch.setattr(Scaler.__init__, "__defaults__", (2.0**40, *Scaler.__init__.__defaults__[1:]))
        train(config(shards, tmp_path, *words, steps=40, save_every=40))
        state = Store(tmp_path / "tiny" / "autoencoder" / "ckpt").newest().document("state")
        assert state["scaler"]["overflows"] > 5 and state["recent_skips"] == []
        assert not (tmp_path / "tiny" / "autoencoder" / "nonfinite.jsonl").exists()
        return
    spoil(monkeypatch, lambda step: step > 2)
    with pytest.raises(LdmError, match=r"NON-FINITE.* at step 7; first in batch.images \(input\)") as raised:
        train(config(shards, tmp_path, *words, save_every=2))
    assert raised.value.exit_code == NON_FINITE
    assert len(rows(tmp_path / "tiny" / "autoencoder" / "nonfinite.jsonl")) == 5


def test_bfloat16_as_the_cause(finished, shards, tmp_path, monkeypatch):
    """A weight that float32 holds and bfloat16 does not; what it is multiplied with is nothing."""
    plain = Objective.loss

    def with_a_large_number(self, denoiser, x0, *more):
        large = torch.full((1, 1), 3.4e38)
        extra = torch.nn.functional.linear(torch.zeros(1, 1), large).sum()
        return plain(self, denoiser, x0, *more) + extra

    monkeypatch.setattr(Objective, "loss", with_a_large_number)
    words = ["stages=[diffusion]", f"init_from={finished}", "stage.diffusion.precision=bf16-mixed"]
    with pytest.raises(LdmError, match=r"NON-FINITE.* at step 5; none in float32"):
        train(config(shards, tmp_path, *words))
    found = rows(tmp_path / "tiny" / "diffusion" / "nonfinite.jsonl")
    assert [(row["module"], row["where"], row["rank"]) for row in found] == [(None, "none in float32", None)] * 5


_TWO = """
import json, os, sys, torch
from ldm.cli import handled, compose
from ldm.data import loader
from ldm.training import agreement, autoencoder_module
from ldm.training.fit import train
kind, words = sys.argv[1], json.loads(sys.argv[2])
if os.environ["RANK"] == "1":
    decode, calls = loader.to_images, iter(range(1, 10**6))
    def altered(pixels):
        images = decode(pixels)
        if len(images) == 2 and next(calls) in (3, 7):  # the first half of the steps 2 and 4
            images[1, 0, 3, 3] = torch.inf
        return images
    if kind == "pixel":
        loader.to_images = altered
    ended = autoencoder_module.AutoencoderModule.step_ended
    def perturbed(self):
        ended(self)
        if self.step.train_step == 3:
            with torch.no_grad():
                weight = self.autoencoder.encoder.conv_in.weight
                weight.view(-1)[0] *= 1 + 2**-23
    if kind != "pixel":
        autoencoder_module.AutoencoderModule.step_ended = perturbed
if kind == "unseen":
    agreement.compare_ranks = lambda *_: None
if __name__ == "__main__":
    sys.exit(handled(lambda: train(compose("train", words)), argv=words))
"""


def two(shards, folder, kind):
    """Both ranks' exit codes and words."""
    folder.mkdir()
    (folder / "two.py").write_text(_TWO)
    more = ["stages=[autoencoder]", "stage.autoencoder.validate_every=null", "trainer.accelerator=cpu"]
    more += ["stage.autoencoder.accumulate=2"]
    words = overrides(shards, folder, *GAN, *more, steps=6, save_every=2)
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    running = []
    for rank in "01":
        env = {**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(folder / "two.py"), kind, json.dumps(words)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
        running.append(subprocess.Popen(command, env=env, **options))
    said = [process.communicate(timeout=200)[0] for process in running]
    return [process.returncode for process in running], said


def test_one_rank_alone_is_not_finite(shards, tmp_path):
    """It ends well, so the weights of the ranks are equal: every checkpoint compares them. The other rank looks through
    both halves of its batch while this one has found what it looked for: a collective in there would not be answered.
    """
    codes, said = two(shards, tmp_path / "a", "pixel")
    assert codes == [0, 0], said
    found = rows(tmp_path / "a" / "tiny" / "autoencoder" / "nonfinite.jsonl")
    assert [(row["train/step"], row["module"], row["where"], row["rank"]) for row in found] == [
        (2, "batch.images", "input", 1),
        (4, "batch.images", "input", 1),
    ]
    assert [[i for i, s in enumerate(row["samples"]) if s["loss"] is None] for row in found] == [[5], [5]]
    assert [row["train/applied"] for row in history(tmp_path / "a" / "tiny", "autoencoder")] == [1, 0, 1, 0, 1, 1]


def test_ranks_whose_weights_differ_end_before_the_checkpoint(shards, tmp_path):
    codes, said = two(shards, tmp_path / "b", "weight")
    assert all(codes), (codes, said)
    assert codes[0] == 1 and "error[DIVERGED]: the weights are not the same on all ranks at step 4" in said[0], said
    assert "it differs: rank 0 from rank 1" in said[0]
    assert Store(tmp_path / "b" / "tiny" / "autoencoder" / "ckpt").steps() == [2]
    codes, said = two(shards, tmp_path / "c", "unseen")
    assert codes == [0, 0], said  # the control: nobody else would notice
