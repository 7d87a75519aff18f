"""Compiled networks and channels-last weights: the same training to rounding, and the same promises."""

import os
import shutil

import pytest

from ldm.checkpoints.store import Store
from ldm.errors import LdmError
from ldm.training.fit import train
from tests.integration.tiny import GAN, compare_runs, config, metrics

STAGES = ("autoencoder", "diffusion")
MORE = [*GAN, "stage.autoencoder.objective.adversarial.start_step=1"]  # whose adaptive weight looks inside the decoder


def lived(shards, runs, *more):
    train(config(shards, runs, *MORE, *more, steps=4, save_every=2))
    return runs / "tiny"


def check(shards, tmp_path, word, tolerance):
    """Equal to a plain run but for rounding, and bit-equal to a run whose second half was lost and made again."""
    plain, other = lived(shards, tmp_path / "plain"), lived(shards, tmp_path / "other", word)
    for stage in STAGES:
        for a, b in zip(metrics(plain, stage), metrics(other, stage), strict=True):
            logged = [{k: v for k, v in row.items() if k.startswith(("train/", "val/"))} for row in (a, b)]
            assert logged[0] == pytest.approx(logged[1], rel=tolerance, abs=tolerance)
    shutil.copytree(tmp_path / "other", tmp_path / "again")
    for stage in STAGES:
        shutil.rmtree(Store(tmp_path / "again" / "tiny" / stage / "ckpt").path(4))
    again = lived(shards, tmp_path / "again", word)
    for stage in STAGES:
        assert compare_runs(other, again, stage) == []
    return other


def test_channels_last(shards, tmp_path):
    run = check(shards, tmp_path, "trainer.channels_last=true", 1e-3)
    assert Store(run / "diffusion" / "ckpt").newest().document("state")["environment"]["channels_last"] is True


@pytest.mark.slow
def test_compiled(shards, tmp_path):
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    check(shards, tmp_path, "trainer.compile=true", 1e-3)


def test_a_missing_compiler_is_said_before_anything_is_made(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(LdmError, match=r"no no-such-compiler; trainer\.compile; .*CXX=") as refused:
        lived(shards, tmp_path, "trainer.compile=true")
    assert refused.value.exit_code == 2 and not (tmp_path / "tiny").exists()
