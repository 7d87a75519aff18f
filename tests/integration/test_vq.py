"""A whole run on a quantised autoencoder: both stages, the cache, and pictures of it."""

import pytest
import torch

from ldm.checkpoints.store import Store
from ldm.errors import LdmError
from ldm.model import LatentDiffusion
from ldm.models.autoencoder.vq import AutoencoderVQ
from ldm.sampling.main import sample
from ldm.sampling.outputs import read_recipe
from ldm.sampling.request import read_request
from ldm.tools.cache import Options, cache
from ldm.tools.export_model import read_run
from ldm.training.fit import train
from tests.integration.tiny import compose, config, metrics

VQ = ["model/autoencoder=vq_toy", "model.autoencoder.codebook_size=32", "model.autoencoder.revive_every=2"]


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    runs = tmp_path_factory.mktemp("vq")
    train(config(shards, runs, *VQ, steps=4))
    return runs / "tiny"


def test_a_denoiser_is_trained_on_latents_before_the_codebook(run, tmp_path):
    model = LatentDiffusion.load(run)
    autoencoder = model.autoencoder
    assert isinstance(autoencoder, AutoencoderVQ) and int(autoencoder.statistics.count) == 61
    state = Store(run / "diffusion/ckpt").newest().document("state")
    assert state["latent_id"] == autoencoder.latent_id() and state["latent_shape"] == [4, 4, 4]
    images = torch.rand(8, 3, 16, 16, generator=torch.manual_seed(0)) * 2 - 1
    z = autoencoder.moments(images)
    assert torch.equal(model.encode(images), autoencoder.statistics.standardise(z))
    codes = autoencoder.quantize.nearest(z)
    assert torch.equal(model.decode(model.encode(images)), model.decode(autoencoder.statistics.standardise(z)))
    assert not torch.allclose(autoencoder.quantize.look_up(codes), z)
    assert all(torch.isfinite(torch.tensor(row["train/loss"])) for row in metrics(run, "diffusion"))
    revived = [row["train/revived_codes"] for row in metrics(run, "autoencoder")]
    assert revived[0] > 0 and revived[1] == revived[3] == 0  # every second step may: the first and the third
    cfg = compose("sample", [f"run={run}", f"output_dir={tmp_path}", "prompt=a ring", "count=2", "sampler.steps=2"])
    sample(cfg, read_request(cfg))
    assert len(list(tmp_path.glob("0*.png"))) == 2


def test_the_cache_holds_them_too(run, shards, tmp_path):
    about = cache(tmp_path / "c", Options(run=str(run)))
    assert about["usable"] == 81 and about["latent_id"] == LatentDiffusion.load(run).autoencoder.latent_id()
    (piece,) = {tuple(file["shape"]) for file in about["files"].values()}
    assert piece == (4, 4, 4)


def test_export_refuses_what_stable_diffusion_is_not(run):
    with pytest.raises(LdmError, match="EXPORT") as refused:
        read_run(run)
    assert "model.autoencoder" in refused.value.line()


def test_tiles_of_a_picture(run, tmp_path):
    words = [f"run={run}", "prompt=a ring", "count=1", "sampler.steps=2", "height=48", "width=32"]
    recipes = {}
    for tile in ("null", 32):
        cfg = compose("sample", [*words, f"tile={tile}", f"output_dir={tmp_path / str(tile)}"])
        sample(cfg, read_request(cfg))
        (path,) = (tmp_path / str(tile)).glob("0*.png")
        recipes[tile] = (read_recipe(path)["tile"], path.read_bytes())
    assert recipes["null"][0] is None and recipes[32][0] == 32
    cfg = compose("sample", [*words, "tile=30", f"output_dir={tmp_path / 'no'}"])
    with pytest.raises(LdmError, match="SIZE") as refused:
        sample(cfg, read_request(cfg))
    assert "tile=32" in refused.value.line() and not list(tmp_path.glob("no/*.png"))
