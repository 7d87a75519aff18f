"""Compiled networks and channels-last weights: the same training to rounding, and the same promises."""

import os
import shutil

import pytest
import torch
from torch import nn

from ldm.checkpoints.store import Store
from ldm.errors import LdmError
from ldm.training.acceleration import accelerate
from ldm.training.fit import train
from tests.integration.tiny import GAN, compare_runs, config, metrics

STAGES = ("autoencoder", "diffusion")
MORE = [
    *GAN,  # whose adaptive weight looks inside the decoder
    "stage.autoencoder.objective.adversarial.start_step=1",
]
DROPOUT = "model.network.dropout=0.1"


def lived(shards, runs, *more):
    train(config(shards, runs, *MORE, *more, steps=4, save_every=2))
    return runs / "tiny"


def check(shards, tmp_path, *words):
    """Equal to a plain run but for rounding; and with dropout bit-equal to a run whose second half is made again."""
    plain, other = lived(shards, tmp_path / "plain"), lived(shards, tmp_path / "other", *words)
    for stage in STAGES:
        for a, b in zip(metrics(plain, stage), metrics(other, stage), strict=True):
            logged = [{k: v for k, v in row.items() if k.startswith(("train/", "val/"))} for row in (a, b)]
            assert logged[0] == pytest.approx(logged[1], rel=1e-3, abs=1e-3)
    whole = lived(shards, tmp_path / "whole", *words, DROPOUT)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for stage in STAGES:
        shutil.rmtree(Store(tmp_path / "again" / "tiny" / stage / "ckpt").path(4))
    again = lived(shards, tmp_path / "again", *words, DROPOUT)
    for stage in STAGES:
        assert compare_runs(whole, again, stage) == []
    return other


def test_what_is_prepared():
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv3d(2, 2, 2), nn.Linear(2, 2))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    accelerate([network], {"channels_last": True, "compile": True})
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last) and not network[0].weight.is_contiguous()
    assert network._compiled_call_impl is not None
    after = network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    plain = nn.Conv2d(2, 3, 3)
    accelerate([plain], {"channels_last": False, "compile": False})
    assert plain.weight.is_contiguous() and plain._compiled_call_impl is None


def test_channels_last(shards, tmp_path):
    run = check(shards, tmp_path, "trainer.channels_last=true")
    assert Store(run / "diffusion" / "ckpt").newest().document("state")["environment"]["channels_last"] is True


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled(shards, tmp_path):
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    check(shards, tmp_path, "trainer.compile=true", "stage.diffusion.accumulate=2")


def test_a_missing_compiler_is_said_before_anything_is_made(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(LdmError, match=r"no no-such-compiler; trainer\.compile; .*CXX=") as refused:
        lived(shards, tmp_path, "trainer.compile=true")
    assert refused.value.exit_code == 2 and not (tmp_path / "tiny").exists()
