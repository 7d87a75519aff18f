"""From shards to pictures with the real functions and commands, at toy size."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoints.run import find_run, point_latest
from ldm.checkpoints.store import Store
from ldm.errors import LdmError
from ldm.model import LatentDiffusion
from ldm.sampling.outputs import read_recipe
from ldm.training.fit import train
from tests.integration.tiny import command, compare_runs, config, metrics, overrides


def test_a_run_holds_what_it_promises(finished):
    assert sorted(p.name for p in finished.iterdir()) == [
        "autoencoder",
        "config.yaml",
        "diffusion",
        "errors",
        "lock",
        "run.json",
    ]
    for stage in ("autoencoder", "diffusion"):
        rows = metrics(finished, stage)
        assert [row["train/step"] for row in rows] == list(range(1, 13))
        assert all(np.isfinite(row["train/loss"]) and row["perf/images_per_second"] > 0 for row in rows)
        assert [row["train/step"] for row in rows if "val/loss" in row] == [4, 8, 12]
        state = Store(finished / stage / "ckpt").newest().document("state")
        assert state["finished"] and state["train_step"] == state["updates"] == 12 and state["samples_seen"] == 96
    assert "val/psnr" in metrics(finished, "autoencoder")[-1]
    assert sum("val/loss_at" in key for key in metrics(finished, "diffusion")[-1]) == 8


def test_checkpoints_open_with_plain_readers(finished):
    from safetensors.torch import load_file

    for folder in finished.glob("*/ckpt/step-*"):
        names = {p.name for p in folder.iterdir()}
        assert names == {
            "model.safetensors",
            "ema.safetensors",
            "optim.safetensors",
            "optim.json",
            "state.json",
            "config.json",
            "manifest.json",
        }
        for path in folder.glob("*.json"):
            json.loads(path.read_text())
        assert load_file(folder / "model.safetensors").keys() >= load_file(folder / "ema.safetensors").keys()
    diffusion = load_file(Store(finished / "diffusion" / "ckpt").newest().path / "model.safetensors")
    assert not any(name.startswith("autoencoder") for name in diffusion)  # the frozen part is not saved again
    assert any(name.startswith("conditioner.") for name in diffusion)  # the part that is trained along is


def test_statistics_standardise_the_training_set(finished, shards):
    """Mean 0 and deviation 1 per channel over all training pictures, by a way of its own."""
    model = LatentDiffusion.load(finished)
    assert int(model.autoencoder.statistics.count) == 61
    from ldm.data.datamodule import DataModule

    data = DataModule(str(shards), image_size=16).open()
    data.configure(seed=0, batch_size=8)
    latents = torch.cat([model.encode(b.images[b.valid]) for b in data.encode_dataloader("train", batch_size=16)])
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(4), rtol=1e-3, atol=0)


@pytest.mark.slow
def test_moments_in_memory_equal_moments_on_the_way(finished, shards, tmp_path):
    """Encoding once and encoding every time draw the same posterior samples: the same losses to rounding."""
    shutil.copytree(finished / "autoencoder", tmp_path / "tiny" / "autoencoder")
    shutil.copy(finished / "run.json", tmp_path / "tiny" / "run.json")
    train(config(shards, tmp_path, "stage.diffusion.cache_latents_mb=0"))
    online = [row["train/loss"] for row in metrics(tmp_path / "tiny", "diffusion")]
    cached = [row["train/loss"] for row in metrics(finished, "diffusion")]
    np.testing.assert_allclose(online, cached, rtol=1e-4)


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(finished, shards, tmp_path):
    train(config(shards, tmp_path, "loader.num_workers=2", "stages=[autoencoder]"))
    assert compare_runs(finished, tmp_path / "tiny", "autoencoder") == []


@pytest.mark.slow
def test_one_batch_is_learnt_by_heart(shards, tmp_path):
    """debug=overfit: in both stages the loss falls tenfold within 200 steps."""
    wider = [
        "model.autoencoder.block_channels=[32,32]",
        "model.network.block_channels=[64]",
        *(f"stage.{stage}.max_steps=200" for stage in ("autoencoder", "diffusion")),
        "stage.autoencoder.optimizer.lr=0.003",
        "stage.diffusion.batch_size=64",
    ]
    train(config(shards, tmp_path, "debug=overfit", *wider, save_every=100))
    for stage in ("autoencoder", "diffusion"):
        losses = [row["train/loss"] for row in metrics(tmp_path / "tiny", stage)]
        assert len(losses) == 200
        assert np.mean(losses[-10:]) < losses[0] / 10, f"{stage}: {losses[0]} to {np.mean(losses[-10:])}"


@pytest.mark.slow
def test_another_autoencoder_is_refused(finished, shards, tmp_path):
    shutil.copytree(finished, tmp_path / "tiny")
    train(config(shards, tmp_path / "other", "seed=5", "stages=[autoencoder]"))
    shutil.rmtree(tmp_path / "tiny" / "autoencoder")
    shutil.copytree(tmp_path / "other" / "tiny" / "autoencoder", tmp_path / "tiny" / "autoencoder")
    with pytest.raises(LdmError) as refused:
        LatentDiffusion.load(tmp_path / "tiny")
    assert refused.value.code == "LATENT-ID" and refused.value.exit_code == 2


def test_sampling_command(finished, tmp_path):
    prompt = "a {red} star, 'left' of \"x\" = [1, 2]; ${nothing} 100 % é 🦊"
    words = [f"run={finished}", f"prompt={prompt}", f"output_dir={tmp_path}", "count=3", "trajectory=true"]
    code, output = command([*words, "sampler.steps=3"], "sample.py")
    assert code == 0, output
    strips = sorted(tmp_path.glob("0*-trajectory.png"))
    pictures = sorted(set(tmp_path.glob("0*.png")) - set(strips))
    assert len(pictures) == len(strips) == 3 and (tmp_path / "grid.png").exists()
    recipe = read_recipe(pictures[1])
    assert recipe["prompt"] == prompt and recipe["seed"] == 1 and recipe["steps"] == 3
    assert recipe["sampler"] == "sample_euler"
    assert recipe["model"].items() >= {"run": "tiny", "step": 12, "weights": "ema"}.items()
    assert Image.open(pictures[0]).size == (16, 16)
    before = pictures[0].read_bytes()
    code, output = command([*words, "sampler.steps=3"], "sample.py")
    assert code == 0 and len(list(tmp_path.glob("0*.png"))) == 12  # nothing is overwritten
    assert pictures[0].read_bytes() == before
    again = [p for p in sorted(tmp_path.glob("000000012-0*.png")) if "trajectory" not in p.name]
    assert np.array_equal(*(np.asarray(Image.open(p)) for p in again))


@pytest.mark.slow
def test_fine_tuning_on_a_folder(finished, shards, tmp_path):
    """init_from: weights of another run, its autoencoder unchanged; the folder's pictures change the samples."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(9):
        Image.new("RGB", (20 + i, 24), (200, 10 * i, 40)).save(folder / f"logo-{i}.png")
        (folder / f"logo-{i}.txt").write_text(f"my logo number {i}")
    more = ["data=folder", f"data.path={folder}", "data.image_size=16", f"init_from={finished}", "stages=[diffusion]"]
    train(config(folder, tmp_path / "runs", *more))
    tuned = tmp_path / "runs" / "tiny"
    old, new = LatentDiffusion.load(finished), LatentDiffusion.load(tuned)
    assert old.autoencoder.latent_id() == new.autoencoder.latent_id()
    before = dict(old.denoiser.named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in new.denoiser.named_parameters())
    first = metrics(tuned, "diffusion")[0]
    assert first["train/step"] == 1
    with pytest.raises(LdmError, match="do not fit the model"):
        train(config(folder, tmp_path / "wide", *more, "model.network.block_channels=[32]"))


def test_help_and_errors_leave_no_run(shards, tmp_path):
    for words, code, text in (
        ([f"data.path={tmp_path}/nothing"], 2, "nothing"),
        (["stage.diffusion.batch_size=0"], 2, "batch_size=0"),
        (["data.image_size=18"], 2, "image_size"),
        (["stage.diffusion.learning_rate=1"], 2, "learning_rate"),
    ):
        got, output = command(overrides(shards, tmp_path / "runs", *words))
        assert got == code and text in output and "Traceback" not in output, output
        assert output.count("error[") == 1, output
    assert not list((tmp_path / "runs").rglob("step-*"))


def test_a_refused_command_leaves_nothing_and_changes_nothing(finished, shards, tmp_path):
    """Neither a run folder, nor another LATEST, nor the configuration of a run that is there."""
    runs = tmp_path / "runs"
    shutil.copytree(finished.parent, runs)
    point_latest(runs / "tiny")
    kept = (runs / "tiny" / "config.yaml").read_bytes()
    for words, text in (
        (["name=a", f"init_from={tmp_path}/nowhere"], "init_from="),
        (["name=b", "resume.mode=must"], "nothing to resume"),
        (["name=c", "stages=[diffusion]"], "needs a trained autoencoder"),
        (["name=d", "trainer.devices=2", "stage.diffusion.batch_size=7"], "global batch of 7"),
        (["name=e", "data.cache=/nowhere"], "/nowhere"),
        (["name=tiny", "stage.diffusion.optimizer.lr=0.5"], "optimizer.lr"),
    ):
        with pytest.raises(LdmError, match=text) as refused:
            train(config(shards, runs, *words))
        assert refused.value.exit_code == 2
        assert find_run(None, runs) == runs / "tiny" and (runs / "tiny" / "config.yaml").read_bytes() == kept
        assert [path.name for path in runs.iterdir() if path.is_dir()] == ["tiny"], words
