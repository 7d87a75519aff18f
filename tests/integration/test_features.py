"""The stage `features` by the way of all stages, and the perceptual distance that an autoencoder takes from it."""

import shutil
import signal

import numpy as np
import pytest
import torch

from ldm.checkpoints.drift import Drift
from ldm.checkpoints.store import Store
from ldm.cli import compose
from ldm.data.datamodule import DataModule
from ldm.distances import trained_features
from ldm.errors import LdmError
from ldm.training.fit import train
from tests.integration.test_resume import kill_after
from tests.integration.tiny import command, compare_runs, config, history, metrics, start

TINY = [
    "experiment=features_toy",
    "data.image_size=16",
    "model.features.image.channels=[4,8]",
    "model.features.image.norm_groups=2",
    "model.features.text.width=16",
    "model.features.text.depth=1",
    "model.features.text.num_heads=2",
    "model.features.text.embedding_size=4",
    "model.features.embedding_size=8",
    "stage.features.batch_size=8",
    "stage.features.save_every=4",
    "stage.features.validate_every=4",
    "stage.features.precision=32",
    "stage.features.lr_schedule.warmup_steps=2",
    "name=tower",
    "logger.mode=disabled",
    "checkpoint.keep_last=50",
]
NODE = "stage.autoencoder.objective.perceptual"


def words(shards, runs, *more, steps=8):
    return [*TINY, f"data.path={shards}", f"output_dir={runs}", f"stage.features.max_steps={steps}", *more]


@pytest.fixture(scope="module")
def tower(shards, tmp_path_factory):
    """The folder of a finished run of the stage. Read it, do not change it."""
    runs = tmp_path_factory.mktemp("features")
    train(compose("train", words(shards, runs)))
    return runs / "tower"


def test_the_stage_leaves_a_run_like_any_other(tower):
    rows = metrics(tower, "features")
    assert [row["train/step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] and rows[0]["train/scale"] == pytest.approx(1 / 0.07)
    assert 0 <= rows[-1]["val/caption_found"] <= 1 and rows[-1]["val/loss"] > 0
    checkpoint = Store(tower / "features" / "ckpt").newest()
    assert checkpoint.document("state")["finished"] and set(checkpoint.document("config")) == {"features"}


@pytest.mark.slow
def test_an_autoencoder_learns_through_the_features_of_a_run(tower, shards, tmp_path):
    """Nothing but the perceptual term: it reaches every weight of the autoencoder, and of the tower none."""
    distance = trained_features(str(tower))
    assert distance.label == f"features-{distance.identity.partition(':')[2][:8]}"
    more = ["stages=[autoencoder]", "perceptual=features", f"{NODE}.run={tower}"]
    cfg = config(shards, tmp_path, *more, steps=4)
    train(cfg)
    rows = metrics(tmp_path / "tiny", "autoencoder")
    assert all(row[f"train/perceptual_{distance.label}"] > 0 for row in rows)
    assert rows[-1][f"val/perceptual_{distance.label}"] > 0
    checkpoint = Store(tmp_path / "tiny" / "autoencoder" / "ckpt").newest()
    assert not any("perceptual" in name for name in checkpoint.tensors("model"))  # the frozen part is not saved
    assert checkpoint.document("state")["fingerprint"]["perceptual"] == distance.identity

    shutil.copytree(tower, tmp_path / "moved")
    more[2] = f"{NODE}.run={tmp_path / 'moved'}"
    train(config(shards, tmp_path, *more, steps=4))  # finished, and the same tower elsewhere is no drift
    other = Store(tmp_path / "moved" / "features" / "ckpt")
    shutil.rmtree(other.path(8))  # an earlier step of it is another tower
    with pytest.raises(Drift, match="perceptual; checkpoint features-"):
        train(config(shards, tmp_path, *more, "resume.allow=[stage.autoencoder.max_steps]", steps=6))


def test_a_run_without_the_stage_is_refused(finished):
    with pytest.raises(LdmError, match="stage 'features' of this run has no checkpoint"):
        trained_features(str(finished))
    with pytest.raises(LdmError, match=rf"{NODE}.run=nowhere"):
        trained_features("nowhere")


def test_a_folder_of_pictures_will_do(shards, tmp_path):
    from PIL import Image

    data = DataModule(str(shards), image_size=16).open()
    data.configure(seed=0, batch_size=8)
    batch = next(iter(data.train_dataloader()))
    folder = tmp_path / "logos"
    folder.mkdir()
    for number, (image, caption) in enumerate(zip(batch.images, batch.captions, strict=True)):
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    more = ["data=folder", "data.image_size=16", "data.val_fraction=0", "stage.features.batch_size=4"]
    train(compose("train", words(folder, tmp_path, *more, steps=2)))
    assert len(metrics(tmp_path / "tower", "features")) == 2


@pytest.mark.slow
def test_killed_equals_undisturbed(shards, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command(words(shards, whole, steps=20))[0] == 0
    again = words(shards, broken, steps=20)
    code, output = kill_after(start(again), broken / "tower", "features", 9)
    assert code == -signal.SIGKILL, output
    code, output = command(again)
    assert code == 0 and "continuing at step" in output, output
    assert compare_runs(whole / "tower", broken / "tower", "features") == []
    assert history(whole / "tower", "features") == history(broken / "tower", "features")


@pytest.mark.slow
def test_two_processes_equal_one(shards, tmp_path):
    """The contrast is over the batch of all: with the pictures of its own rank alone the loss would be far smaller."""
    sgd = ["optimizer@stage.features.optimizer=sgd", "stage.features.optimizer.lr=0.05"]
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    for name, more in (("one", sgd), ("two", [*sgd, *ddp])):
        code, output = command(words(shards, tmp_path / name, *more, steps=12))
        assert code == 0, output
    assert "(2 x 4 x 1)" in output
    one, two = (history(tmp_path / name / "tower", "features") for name in ("one", "two"))
    for key in ("train/loss", "train/grad_norm"):
        np.testing.assert_allclose([row[key] for row in one], [row[key] for row in two], rtol=2e-5, err_msg=key)
    left, right = (Store(tmp_path / name / "tower" / "features" / "ckpt").newest() for name in ("one", "two"))
    for name, weight in left.tensors("model").items():
        torch.testing.assert_close(weight, right.tensors("model")[name], rtol=1e-4, atol=1e-5, msg=name)
