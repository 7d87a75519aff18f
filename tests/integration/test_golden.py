"""Runs of every released format are still read: sampled, verified and continued."""

import json
import shutil

import pytest
import torch

from ldm.checkpoints.manifest import SCHEMA_VERSION
from ldm.checkpoints.store import Store
from ldm.config import compose
from ldm.training.fit import train
from tests.checkpoints.golden import FOLDER, make_data, pictures, words

FORMATS = [f"schema-{version}" for version in range(1, SCHEMA_VERSION + 1)]


@pytest.mark.parametrize("name", FORMATS)
def test_it_draws_what_it_drew(name):
    expected = json.loads((FOLDER / name / "pictures.json").read_text())
    torch.testing.assert_close(pictures(FOLDER / name).flatten(), torch.tensor(expected), atol=3e-4, rtol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_command_continues_it(name, tmp_path, capfd):
    """No setting that came later is taken for a difference."""
    shutil.copytree(FOLDER / name, tmp_path / "golden")
    longer = ["stage.autoencoder.max_steps", "stage.diffusion.max_steps"]
    allow = (
        f"resume.allow=[{','.join([*longer, 'data.manifest', 'latent_id'])}]"  # other versions of Pillow, other bytes
    )
    train(compose("train", words(make_data(tmp_path / "shards"), tmp_path, 8, allow)))
    assert capfd.readouterr().out.count("continuing at step 4") == 2
    for stage in ("autoencoder", "diffusion"):
        store = Store(tmp_path / "golden" / stage / "ckpt")
        assert store.steps() == [4, 8] and store.load(8).document("state")["updates"] == 8
        before, after = (store.load(step) for step in (4, 8))
        assert before.manifest["files"].keys() == after.manifest["files"].keys()
        for optimizer in ("optim", "optim_discriminator")[: 1 + (stage == "autoencoder")]:
            steps = {int(each["step"]) for each in after.tree(optimizer)["state"].values()}
            assert steps == ({8} if optimizer == "optim" else {7})  # 4, had it begun anew; a discriminator starts at 1
        for file in ("model", "ema"):
            left, right = before.tensors(file), after.tensors(file)
            assert left.keys() == right.keys() and any(not torch.equal(left[key], right[key]) for key in left)
