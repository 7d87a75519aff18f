"""An autoencoder comes from diffusers alone, its decoder is trained on, and diffusers opens the result."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.checkpoints.run import open_autoencoder
from ldm.cli import compose
from ldm.model import load_autoencoder
from ldm.tools import export_model, import_model
from ldm.training.fit import train
from tests.interop import making

pytest.importorskip("diffusers")

PICTURES = torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 64, 64, 3).movedim(-1, 1)
# float32 through some thirty convolutions, pictures in [-1, 1]; 2e-6 was seen at most
EQUAL = 2e-5


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Saved by diffusers itself, with SDXL's factor; and the run that it became."""
    home = tmp_path_factory.mktemp("vae")
    vae = making.vae(scaling_factor=0.13025)
    vae.save_pretrained(home / "vae")
    assert import_model.main([str(home / "vae"), str(home / "imported")]) == 0
    return vae, home / "imported"


def ours(run: Path):
    return load_autoencoder(open_autoencoder(run))


def test_latents_and_pictures_are_theirs(theirs):
    vae, run = theirs
    model = ours(run)
    with torch.no_grad():
        latents = vae.encode(PICTURES).latent_dist.mean * vae.config.scaling_factor
        pictures = vae.decode(latents / vae.config.scaling_factor).sample
        assert making.relative(model.encode(PICTURES), latents) < EQUAL
        assert float((model.decode(latents) - pictures).abs().max()) < EQUAL
        model.statistics.std.fill_(1 / 0.18215)  # what a factor taken for granted would do
        assert making.relative(model.encode(PICTURES), latents) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["diffusers", "compvis"])
def test_a_decoder_that_was_trained_on_goes_back(theirs, tmp_path, layout):
    from diffusers import AutoencoderKL

    vae, run = theirs
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (64, 64), (40 * i, 200, 255 - 40 * i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a picture")
    words = ["stages=[autoencoder]", f"init_from={run}", "stage.autoencoder.train=decoder", "model/autoencoder=kl_sd"]
    words += ["model.autoencoder.block_channels=[32,32,64,64]", "data=folder", f"data.path={folder}"]
    words += ["data.image_size=64", f"data.index_dir={tmp_path / 'index'}", f"output_dir={tmp_path}", "name=tuned"]
    stage = ["max_steps=2", "batch_size=2", "precision=32", "sample_every=null", "validate_every=null", "save_every=2"]
    words += [f"stage.autoencoder.{word}" for word in (*stage, "lr_schedule.warmup_steps=0", "optimizer.lr=0.01")]
    train(compose("train", [*words, "logger.mode=disabled"]))
    out = tmp_path / ("out" if layout == "diffusers" else "out.safetensors")
    assert export_model.main([str(tmp_path / "tuned"), str(out), "--format", layout, "--parts", "vae"]) == 0
    if layout == "diffusers":
        back = AutoencoderKL.from_pretrained(out, local_files_only=True)
    else:
        back = AutoencoderKL.from_single_file(str(out), config=str(run.parent / "vae"), local_files_only=True)
    assert back.config.scaling_factor == 0.13025
    model = ours(tmp_path / "tuned")
    assert model.latent_id() == ours(run).latent_id()
    before, after = vae.state_dict(), back.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    with torch.no_grad():
        latents = vae.encode(PICTURES).latent_dist.mean
        pictures = back.decode(latents).sample
        assert float((model.decode(latents * 0.13025) - pictures).abs().max()) < EQUAL
        assert float((vae.decode(latents).sample - pictures).abs().max()) > 100 * EQUAL
