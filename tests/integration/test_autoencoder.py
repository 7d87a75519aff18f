"""The autoencoder's stage by its real command: what it can learn, and what its checkpoints hold."""

import pytest
import torch

from ldm.checkpoints.run import open_stage
from ldm.checkpoints.store import Store
from ldm.data.datamodule import DataModule
from ldm.model import load_autoencoder
from ldm.reconstruction.measures import psnr
from ldm.training.fit import train
from tests.integration.tiny import GAN, config, metrics


@pytest.mark.slow
def test_one_batch_is_learnt_to_35_db(shards, tmp_path):
    more = [
        *("stages=[autoencoder]", "data.max_train_samples=8", "stage.autoencoder.validate_every=null"),
        *("stage.autoencoder.objective.kl_weight=0", "stage.autoencoder.optimizer.lr=0.005"),
        *("model.autoencoder.block_channels=[32,32]", "model.autoencoder.latent_channels=16"),
        *("model.autoencoder.patch_size=1", "stage.autoencoder.ema.half_life_images=200"),
    ]
    train(config(shards, tmp_path, *more, steps=1000, save_every=1000))
    data = DataModule(str(shards), image_size=16, max_train_samples=8).open()
    data.configure(seed=0, batch_size=8)
    batch = next(iter(data.encode_dataloader("train", batch_size=8)))
    autoencoder = load_autoencoder(open_stage(tmp_path / "tiny", "autoencoder"))
    found = psnr(autoencoder(batch.images)[0], batch.images)
    assert found.min() > 35, found


def test_the_discriminator_moves_from_its_start_on_and_only_then(shards, tmp_path):
    """One clock: eight steps are eight of both players, less those before the start."""
    train(config(shards, tmp_path, "stages=[autoencoder]", *GAN, steps=8, save_every=1))
    store = Store(tmp_path / "tiny" / "autoencoder" / "ckpt")
    kept = {step: store.load(step) for step in store.steps()}
    name = "adversarial.discriminator.blocks.0.weight"
    weights = {step: checkpoint.tensors("objective")[name] for step, checkpoint in kept.items()}
    for step in range(2, 9):  # the fourth step is the first with a discriminator
        assert torch.equal(weights[step], weights[step - 1]) == (step <= 3), step
    assert kept[8].document("state")["train_step"] == kept[8].document("state")["updates"] == 8
    state = kept[8].tree("optim_discriminator")["state"]
    assert {int(moments["step"]) for moments in state.values()} == {5}
    assert {int(m["step"]) for m in kept[8].tree("optim")["state"].values()} == {8}
    rows = metrics(tmp_path / "tiny", "autoencoder")
    assert ["train/logits_real" in row for row in rows] == [False] * 3 + [True] * 5
    assert "logvar" in kept[8].tensors("objective") and not any("logvar" in n for n in kept[8].tensors("ema"))
