"""Half precisions, with the real loop: they follow float32, and a resume keeps fp16's loss scale."""

import shutil

import pytest

from ldm.checkpoints.store import Store
from ldm.training.fit import train
from tests.integration.tiny import compare_runs, config, history

STAGES = ("autoencoder", "diffusion")


def in_precision(precision, shards, folder, *more, **sizes):
    words = [f"stage.{stage}.precision={precision}" for stage in STAGES]
    train(config(shards, folder, *words, *more, **sizes))
    return folder / "tiny"


def losses(run, stage):
    return [row["train/loss"] for row in history(run, stage)]


@pytest.mark.slow
@pytest.mark.parametrize("precision, tolerance", [("bf16-mixed", 2e-2), ("16-mixed", 2e-3)])
def test_half_precision_follows_float32(finished, shards, tmp_path, precision, tolerance):
    """The first steps differ by the rounding of the products alone: 2^-8 in bfloat16, 2^-11 in float16."""
    alone = in_precision(precision, shards, tmp_path / "alone", "stages=[autoencoder]")
    shutil.copytree(finished, tmp_path / "behind" / "tiny", ignore=shutil.ignore_patterns("diffusion"))
    behind = in_precision(precision, shards, tmp_path / "behind", "stages=[diffusion]")  # on the same latents
    for stage, run in zip(STAGES, (alone, behind), strict=True):
        half, full = losses(run, stage)[:4], losses(finished, stage)[:4]
        assert half == pytest.approx(full, rel=tolerance) and half != full
        assert Store(run / stage / "ckpt").newest().document("state")["environment"]["precision"] == precision


@pytest.mark.slow
def test_a_resume_keeps_the_loss_scale_and_every_bit(shards, tmp_path):
    whole = in_precision("16-mixed", shards, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for stage in STAGES:
        store = Store(tmp_path / "cut" / "tiny" / stage / "ckpt")
        for step in (8, 12):
            shutil.rmtree(store.path(step))
    cut = in_precision("16-mixed", shards, tmp_path / "cut")
    for stage in STAGES:
        assert compare_runs(whole, cut, stage) == []
        scaler = Store(cut / stage / "ckpt").newest().document("state")["scaler"]
        assert scaler["good_steps"] + scaler["overflows"] == 12
