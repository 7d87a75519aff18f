"""Both stages on pictures of several sizes: batches of one bucket each, resumed to the bit."""

import shutil

import pytest
from PIL import Image

from ldm.checkpoints.store import Store
from ldm.cli import compose
from ldm.errors import LdmError
from ldm.training.diffusion_module import DiffusionModule
from ldm.training.fingerprint import settings_of
from ldm.training.fit import train
from tests.data.making import encoded, write_tar
from tests.integration.test_pixels import TINY
from tests.integration.tiny import compare_runs, config, history

SHAPES = [(32, 32), (48, 24), (20, 40), (16, 16), (64, 16), (40, 30)]
BUCKETS = ["data.bucket.enable_bucket=true", "data.bucket.bucket_reso_steps=4", "data.crop=center"]
UNET = ["model.network.block_channels=[8,16]", "model.network.transformer_depth=[0,1]"]  # halves latents of odd sizes
PIXELS = [  # a pixel model that is told SDXL's sizes
    "experiment=ddpm_pixels",
    "model.network.vector_size=48",
    "+data.columns.size='@size'",
    "stage.diffusion.sample_every=null",
    "data.bucket.enable_bucket=true",
    "data.bucket.bucket_reso_steps=4",
    "data.crop=random",
]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """41 training and 11 held-out pictures of one colour each."""
    folder = tmp_path_factory.mktemp("mixed")
    for name, numbers in (("train-0", range(30)), ("train-1", range(30, 41)), ("val-0", range(41, 52))):
        members = []
        for n in numbers:
            colour = (5 * n, 255 - 4 * n, 128)
            members += [(f"{n:04d}.png", encoded(Image.new("RGB", SHAPES[n % len(SHAPES)], colour)))]
            members += [(f"{n:04d}.txt", f"colour {n}".encode())]
        write_tar(folder / f"{name}.tar", members)
    return folder


def pixels(data, runs, *more):
    words = [*TINY, *PIXELS, f"data.path={data}", f"output_dir={runs}", *more]
    found = compose("train", words)
    size = {"_target_": "ldm.models.conditioner.size.Size", "column": "size", "num_sinusoids": 8, "drop_prob": 0.0}
    return {**found, "model": {**found["model"], "conditioner": size}}


@pytest.fixture
def seen(monkeypatch):
    """The sizes of the latents that the denoiser was trained on, by whether they came from memory."""
    shapes: dict[bool, set] = {True: set(), False: set()}
    loss = DiffusionModule.loss

    def watched(self, batch, draws):
        x = batch.moments if batch.moments is not None else batch.images
        shapes[batch.moments is not None].add(tuple(x.shape[2:]))
        return loss(self, batch, draws)

    monkeypatch.setattr(DiffusionModule, "loss", watched)
    return shapes


def test_pixels_of_several_sizes_are_trained_on(mixed, tmp_path, seen, capsys):
    """From memory, told SDXL's sizes."""
    short = ["stage.diffusion.max_steps=3", "stage.diffusion.save_every=3", "data.max_val_samples=4"]
    train(pixels(mixed, tmp_path, "data.crop=center", *short))
    said = capsys.readouterr().out
    assert "diffusion: 4 buckets (16x16: 14 (0 %), 20x12: 13 (18 %), 12x20: 7 (17 %), 32x8: 7 (0 %))" in said
    rows = history(tmp_path / "tiny", "diffusion")
    assert len(rows) == 3 and rows[-1]["val/loss"] > 0
    assert len(seen[True]) >= 2 and not seen[False]  # h, w of moments from memory


@pytest.mark.slow
def test_both_stages_train_on_several_sizes(mixed, tmp_path, seen, capsys):
    """Encoded once, as a small set is; with a shift of the noise that follows the size of the latents."""
    more = [*BUCKETS, *UNET, "stage.diffusion.sample_every=5", "stage.diffusion.sample_prompts=[colour 3]"]
    more += ["sampler.steps=2", "scheduler/schedule=flow_shifted", "scheduler.schedule.base_positions=16"]
    train(config(mixed, tmp_path, *more, steps=5, save_every=5))
    said = capsys.readouterr().out
    assert "autoencoder: 4 buckets (16x16: 14 (0 %), 20x12: 13 (18 %), 12x20: 7 (17 %), 32x8: 7 (0 %))" in said
    assert "cropping takes 8.6 %, to a square it would be 33.5 %; 2 of them, with 14 pictures, are rarer" in said
    rows = history(tmp_path / "tiny", "diffusion")
    assert len(rows) == 5 and rows[-1]["val/loss"] > 0
    assert len(seen[True]) >= 3 and not seen[False]  # h, w of moments from memory


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_resumed_equals_undisturbed(mixed, tmp_path, seen, kind):
    def run(name):
        if kind == "pixels":
            train(pixels(mixed, tmp_path / name, "stage.diffusion.cache_latents_mb=0"))
            return
        more = [*BUCKETS, *UNET, "data.crop=random", "stage.diffusion.accumulate=2"]
        train(config(mixed, tmp_path / name, *more, steps=6, save_every=3))

    run("whole")
    assert len(seen[False]) >= 3 and not seen[True]  # H, W of pictures
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    stages = ("autoencoder", "diffusion")[kind == "pixels" :]
    for stage in stages:
        store = Store(tmp_path / "stopped" / "tiny" / stage / "ckpt")
        for step in store.steps()[1:]:
            shutil.rmtree(store.path(step))
    run("stopped")
    for stage in stages:
        assert compare_runs(tmp_path / "whole" / "tiny", tmp_path / "stopped" / "tiny", stage) == []
        rows = [history(tmp_path / name / "tiny", stage) for name in ("whole", "stopped")]
        assert rows[0] == rows[1] and len(rows[0]) > 4


def test_sides_that_the_autoencoder_cannot_halve_are_refused(mixed, tmp_path):
    with pytest.raises(LdmError) as refused:
        train(config(mixed, tmp_path, *BUCKETS, "data.bucket.bucket_reso_steps=2"))
    assert "downsampling 4" in refused.value.line() and "bucket_reso_steps=4" in refused.value.line()
    with pytest.raises(LdmError, match="leave no choice"):
        train(config(mixed, tmp_path, "data.bucket.enable_bucket=true"))
    assert not (tmp_path / "tiny").exists()


def test_buckets_belong_to_what_a_step_computes(mixed, tmp_path):
    plain, switched_off = config(mixed, tmp_path), config(mixed, tmp_path, "data.bucket.bucket_reso_steps=4")
    assert settings_of(plain, "autoencoder") == settings_of(switched_off, "autoencoder")
    older = {**plain, "data": {k: v for k, v in plain["data"].items() if k != "bucket"}}  # before buckets existed
    assert settings_of(older, "autoencoder") == settings_of(plain, "autoencoder")
    on = settings_of(config(mixed, tmp_path, *BUCKETS), "autoencoder")
    more = settings_of(config(mixed, tmp_path, *BUCKETS, "data.bucket.max_bucket_reso=24"), "autoencoder")
    assert {key for key in on if on[key] != more[key]} == {"data.bucket.max_bucket_reso"}
    assert "data.bucket.enable_bucket" in on
