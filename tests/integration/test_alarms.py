"""Bad pictures and bad numbers in the autoencoder's stage, in real runs at toy size."""

import json

import pytest
import torch
from PIL import Image

from ldm.checkpoints.store import Store
from ldm.data import loader
from ldm.errors import NON_FINITE, REFUSED, LdmError
from ldm.training.fit import train
from ldm.training.stage_module import StageModule
from ldm.validate import validate
from tests.integration.tiny import config, contents, metrics

GAN = [
    "adversarial=patchgan",
    "stage.autoencoder.objective.adversarial.start_step=0",
    "stage.autoencoder.objective.adversarial.discriminator.layers=1",
    "stage.autoencoder.objective.adversarial.discriminator.width=8",
    "stage.autoencoder.objective.adversarial.discriminator.norm_groups=4",
]


@pytest.fixture
def spoil(monkeypatch):
    """spoil(change): change(n, images) alters the pictures [8, 3, H, W] of training step n."""
    steps, decode = iter(range(1, 10**6)), loader.to_images
    monkeypatch.setattr(StageModule, "evaluation_batch", 61)

    def use(change):
        def altered(pixels):
            images = decode(pixels)
            if len(images) == 8:  # those of validation come by twenty, of the statistics by 61 as set above
                change(next(steps), images)
            return images

        monkeypatch.setattr(loader, "to_images", altered)

    return use


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def checkpoints(run):
    store = Store(run / "autoencoder" / "ckpt")
    return [store.load(step) for step in store.steps()]


def all_finite(checkpoint):
    tensors = [v for v in contents(checkpoint).values() if isinstance(v, torch.Tensor)]
    if "objective.safetensors" in checkpoint.manifest["files"]:
        tensors += checkpoint.tensors("objective").values()
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())


def test_a_spoilt_pixel_costs_one_step_and_a_blank_picture_is_named(shards, tmp_path, spoil):
    """With a discriminator, which sees the same pictures. Grids and statistics at the end are of the clean ones."""

    def change(step, images):
        if step == 2:
            images[5] = 0.25
        if step in (3, 5):
            images[6, 1, 2, 3] = torch.nan if step == 3 else torch.inf

    spoil(change)
    more = ["stages=[autoencoder]", "stage.autoencoder.sample_every=6"]
    train(config(shards, tmp_path, *GAN, *more, steps=6, save_every=3))
    folder = tmp_path / "tiny" / "autoencoder"
    found = metrics(tmp_path / "tiny", "autoencoder")
    assert [row["train/applied"] for row in found] == [1, 1, 0, 1, 0, 1]
    assert all("train/logits_real" in row for row in found)
    skipped = rows(folder / "nonfinite.jsonl")
    assert [(row["train/step"], len(row["samples"])) for row in skipped] == [(3, 8), (5, 8)]
    assert [(row["module"], row["where"], row["rank"]) for row in skipped] == [("batch.images", "input", 0)] * 2
    (alarm,) = rows(folder / "alarms.jsonl")
    assert (alarm["train/step"], alarm["alarm"], len(alarm["pictures"])) == (2, "constant_images", 1)
    assert [c.step for c in checkpoints(tmp_path / "tiny")] == [3, 6]  # 3 was skipped: the weights of step 2
    assert all(all_finite(c) for c in checkpoints(tmp_path / "tiny"))
    # the end of the stage
    state = checkpoints(tmp_path / "tiny")[-1].document("state")
    assert state["latent_source"].startswith("measured on 61 of 61 training pictures (manifest ")
    assert state["latent_source"].endswith("with the averaged weights of step 6")
    last = found[-1]
    assert {"val/psnr", "val/ssim", "val/latent_std", "val/latent_drift"} <= last.keys()
    assert "val/latent_drift" not in found[2] and state["validated_latent_std"] is not None
    grid = Image.open(folder / "samples" / "step-000000006.png")
    assert grid.width > grid.height * 2  # eight pictures wide, three rows


@pytest.mark.slow
def test_nothing_but_spoilt_pictures_ends_the_run(shards, tmp_path, spoil):
    def change(step, images):
        if step > 2:
            images[step % 8] = torch.nan

    spoil(change)
    said = r"error\[NON-FINITE\]: .* at step 7; first in batch.images \(input\), pictures .*; the last good step is 2;"
    with pytest.raises(LdmError, match=said) as raised:
        train(config(shards, tmp_path, "stages=[autoencoder]", save_every=2))
    assert raised.value.exit_code == NON_FINITE
    for row in rows(tmp_path / "tiny" / "autoencoder" / "nonfinite.jsonl"):
        assert [i for i, sample in enumerate(row["samples"]) if sample["loss"] is None] == [row["train/step"]]
    assert max(c.step for c in checkpoints(tmp_path / "tiny")) < 7
    assert all(all_finite(c) for c in checkpoints(tmp_path / "tiny"))


def test_an_alarm_may_end_the_run(shards, tmp_path, spoil):
    def change(step, images):
        if step == 4:
            images[0] = 1.0

    spoil(change)
    with pytest.raises(LdmError, match=r"error\[ALARM\]: constant_images: .*; step 4, pictures ") as raised:
        train(config(shards, tmp_path, "stages=[autoencoder]", "stage.autoencoder.alarms=raise", save_every=2))
    assert raised.value.exit_code == NON_FINITE
    assert [c.step for c in checkpoints(tmp_path / "tiny")] == [2]  # not that of step 4, which was due


def test_statistics_of_too_few_pictures_are_refused_at_the_start(shards, tmp_path):
    with pytest.raises(LdmError, match=r"statistics_images.*at least 61 of the 61") as refused:
        train(config(shards, tmp_path, "stages=[autoencoder]", "stage.autoencoder.statistics_images=60"))
    assert refused.value.exit_code == REFUSED and not (tmp_path / "tiny").exists()


@pytest.mark.parametrize("stages", ["[autoencoder]", "[diffusion]"])
def test_sizes_that_the_autoencoder_cannot_halve_are_refused_at_the_start(shards, tmp_path, stages):
    said = r"data\.image_size=18 is not a multiple of the autoencoder's downsampling 4; set data\.image_size=16"
    with pytest.raises(LdmError, match=said):
        validate(cfg := config(shards, tmp_path, f"stages={stages}", "data.image_size=18"))  # as the command does first
    with pytest.raises(LdmError, match=said) as refused:
        train(cfg)  # from the network itself: one of the user's own has no block_channels to read off
    assert refused.value.exit_code == REFUSED and not (tmp_path / "tiny").exists()
