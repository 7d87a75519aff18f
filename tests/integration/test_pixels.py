"""Pixel models by the same way as all others: no autoencoder stage, unconditional and by class."""

import json
from copy import deepcopy
from functools import cache, reduce
from operator import getitem
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoints.store import Store
from ldm.cli import compose
from ldm.data.datamodule import DataModule
from ldm.data.moments import MomentTables
from ldm.errors import LdmError
from ldm.model import LatentDiffusion
from ldm.models.autoencoder.identity import Identity
from ldm.models.autoencoder.kl import AutoencoderKL
from ldm.precompute.moments import encode_dataset
from ldm.random import Draws, Purpose
from ldm.sampling.main import sample
from ldm.sampling.outputs import read_recipe
from ldm.sampling.request import read_request
from ldm.sampling.tasks import one_for_each
from ldm.training.diffusion_module import DiffusionModule
from ldm.training.fit import train
from ldm.types import Batch
from tests.integration.tiny import metrics

TINY = [
    "data.image_size=16",
    "model.network.block_channels=[8,16]",
    "model.network.transformer_depth=[0,1]",
    "model.network.head_dim=8",
    "model.network.norm_groups=4",
    "stage.diffusion.max_steps=6",
    "stage.diffusion.batch_size=8",
    "stage.diffusion.save_every=3",
    "stage.diffusion.validate_every=3",
    "stage.diffusion.sample_every=6",
    "stage.diffusion.precision=32",
    "stage.diffusion.lr_schedule.warmup_steps=2",
    "sampler.steps=2",
    "name=tiny",
    "logger.mode=disabled",
]


@cache
def composed(experiment):
    return compose("train", [f"experiment={experiment}"])


def config(experiment, shards, runs, *more):
    return compose("train", [f"experiment={experiment}", f"data.path={shards}", f"output_dir={runs}", *TINY, *more])


@pytest.fixture(scope="module")
def unconditional(shards, tmp_path_factory):
    runs = tmp_path_factory.mktemp("pixels")
    train(config("ddpm_pixels", shards, runs))
    return runs / "tiny"


@pytest.fixture(scope="module")
def by_shape(shards, tmp_path_factory):
    runs = tmp_path_factory.mktemp("pixels")
    train(config("ddpm_pixels_class", shards, runs, "model.conditioner.width=8"))
    return runs / "tiny"


def draw(run, folder, *words):
    cfg = compose("sample", [f"run={run}", f"output_dir={folder}", "sampler.steps=2", *words])
    sample(cfg, read_request(cfg))
    return sorted(folder.glob("0*.png"))


def test_an_unconditional_run_is_whole_without_an_autoencoder(unconditional, tmp_path):
    assert not (unconditional / "autoencoder").exists()
    assert all(np.isfinite(row["train/loss"]) for row in metrics(unconditional, "diffusion"))
    assert (unconditional / "diffusion/samples/step-000000006.png").exists()
    model = LatentDiffusion.load(unconditional)
    assert isinstance(model.autoencoder, Identity) and model.reads == ()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(model.encode(images), images) and torch.equal(model.decode(images), images)
    state = Store(unconditional / "diffusion/ckpt").newest().document("state")
    assert state["latent_id"] == Identity().latent_id() and state["latent_shape"] == [3, 16, 16]
    assert len(draw(unconditional, tmp_path, "count=3")) == 3  # no prompt


def drawn_pixels(run, folder, *words):
    """Pixels by (shape, seed)."""
    found = {}
    for path in draw(run, folder, *words):
        recipe = read_recipe(path)
        found[recipe["shape"], recipe["seed"]] = np.asarray(Image.open(path)).astype(int)
    return found


def test_a_class_decides_the_picture(by_shape, tmp_path):
    pixels = drawn_pixels(by_shape, tmp_path / "both", "columns.shape=[star,ring]", "count=2")
    assert sorted(pixels) == [("ring", 0), ("ring", 1), ("star", 0), ("star", 1)]
    for seed in (0, 1):  # from the same noise; 15 of 255 apart where this was written
        assert np.abs(pixels["star", seed] - pixels["ring", seed]).mean() > 2
    alone = drawn_pixels(by_shape, tmp_path / "alone", "columns.shape=ring", "count=2")
    for key, picture in alone.items():
        assert np.abs(picture - pixels[key]).max() <= 1  # whatever else is drawn beside it


def test_a_model_reads_its_column(by_shape):
    model = LatentDiffusion.load(by_shape)
    given, null = ({"shape": ["star", "ring"]}, model.null("", {"shape": ["star", "ring"]}, 2))
    cond = model.condition(["", ""], given)
    assert not torch.equal(cond.vector[0], cond.vector[1]) and torch.equal(null.vector[0], null.vector[1])
    assert torch.equal(null.vector, model.condition(["", ""]).vector)  # no class is the null
    assert model.has_null(given) and cond.tokens is None


@pytest.mark.parametrize(
    "words,text",
    [
        (["columns.shape=sta"], "star"),
        (["columns.shap=star"], "'shape'"),
        (["prompt=a star"], "reads no text"),
        (["columns.shape=[star,ring]", "negative_prompt=x"], "reads no text"),
    ],
)
def test_what_a_model_cannot_read_is_refused(by_shape, tmp_path, words, text):
    with pytest.raises(LdmError) as refused:
        draw(by_shape, tmp_path, *words)
    assert refused.value.exit_code == 2 and text in refused.value.line()
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    "experiment,words,text",
    [
        ("ddpm_pixels", {"stages": ["autoencoder", "diffusion"]}, "nothing to train"),
        ("ddpm_pixels", {"model.network.in_channels": 4}, "in_channels=4, model.autoencoder gives 3"),
        ("ddpm_pixels", {"model.network.vector_size": 7}, "needs the vector of a condition"),
        ("ddpm_pixels_class", {"model.network.vector_size": None}, "reads shape, but model.network uses nothing of it"),
        ("ddpm_pixels_class", {"model.conditioner.column": "colour"}, "data.columns.colour=FIELD"),
        ("ddpm_pixels_class", {"model.network.vector_size": 7}, "vector_size=7, model.conditioner gives vector"),
        ("ddpm_pixels_class", {"data.columns.shape": "@shape"}, "nothing that the column 'shape' can hold"),
        ("ddpm_pixels_class", {"stage.diffusion.sample_columns.shape": ["ring", "sta"]}, "did you mean 'star'"),
        ("demo", {"model.network.context_size": 64}, "context_size=64, model.conditioner gives tokens of width 128"),
        ("demo", {"model.network.vector_size": 2816}, "vector_size=2816"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_anything_is_trained(shards, tmp_path, experiment, words, text):
    whole = deepcopy(composed(experiment))
    for key, value in {"data.path": str(shards), "output_dir": str(tmp_path), **words}.items():
        *path, last = key.split(".")
        reduce(getitem, path, whole)[last] = value
    with pytest.raises(LdmError) as refused:
        train(whole)
    assert refused.value.exit_code == 2 and text in refused.value.line()
    assert not list(tmp_path.iterdir())


def test_columns_travel_with_pictures_and_with_moments(shards):
    columns = {"shape": "marks.0.shape", "px": "width", "size": "@size"}
    data = DataModule(str(shards), image_size=16, columns=columns).open()
    data.configure(seed=0, batch_size=8)
    batch = next(iter(data.train_dataloader()))
    assert list(batch.columns) == list(columns) and batch.columns["px"] == [16] * 8
    assert batch.columns["size"] == [(16, 16, 0, 0, 16, 16)] * 8
    assert all(shape in caption for shape, caption in zip(batch.columns["shape"], batch.captions, strict=True))
    assert len(set(batch.columns["shape"])) > 1
    data.use_moments(MomentTables.of(torch.zeros(61, 6, 2, 2)))
    cached = next(iter(data.train_dataloader()))
    assert cached.images is None and cached.columns == batch.columns
    held_out = list(data.val_dataloader(16))[-1]  # 20 = 16 + 4: padded rows have no value
    assert held_out.columns["shape"][4:] == [None] * 12 and None not in held_out.columns["shape"][:4]


def test_pixels_are_their_own_moments():
    """No variance is stored, and no noise is drawn for a posterior that there is not."""
    autoencoder, images = Identity(), torch.rand(5, 3, 8, 8)
    assert autoencoder.moments(images) is images and autoencoder.moment_channels == 3
    encoded = encode_dataset(autoencoder, [make_batch(images)], np.full((5, 2), 8))
    assert torch.equal(encoded.tables[0], images) and encoded.usable.all()
    assert AutoencoderKL(block_channels=[32]).moment_channels == 8

    class NoDraws(Draws):
        def normal(self, purpose, shape=()):
            raise AssertionError(f"noise for {purpose!r}")

    module = SimpleNamespace(model=SimpleNamespace(autoencoder=autoencoder), device=images.device)
    for batch in (make_batch(images), make_batch(None, moments=images)):
        latents = DiffusionModule.latents(module, batch, NoDraws(0, batch.slots), Purpose.POSTERIOR)
        assert torch.equal(latents, images)


def make_batch(images, moments=None):
    slots = torch.arange(5)
    return Batch(slots, ["k"] * 5, images, moments, [""] * 5, {}, torch.ones(5, dtype=torch.bool))


def test_a_label_that_is_no_class_is_a_bad_sample(shards, tmp_path):
    """The model says what it can read, and the data count, name and replace what it cannot."""
    classes = "[disc,ring,square,triangle,star,hexagon,cross,heart,crescent]"  # no arrow
    words = (
        f"model.conditioner.classes={classes}",
        "model.conditioner.width=8",
        "stage.diffusion.sample_columns.shape=star",
    )
    runs = tmp_path / "runs"
    train(config("ddpm_pixels_class", shards, runs, *words))
    stage = runs / "tiny" / "diffusion"
    ledger = [json.loads(line) for line in (stage / "bad_samples.jsonl").read_text().splitlines()]
    assert ledger and {row["kind"] for row in ledger} == {"column_value"}
    assert all("'arrow' is not a class" in row["reason"] and row["shard"].endswith(".tar") for row in ledger)
    counts = Store(stage / "ckpt").newest().document("state")["bad_samples"]["counts"]
    assert counts["column_value"] > 0  # those trained on; the ledger may know of some that were read ahead


def test_a_sample_without_its_field_is_bad(shards):
    columns = {"border": "border"}
    data = DataModule(str(shards), image_size=16, columns=columns, max_bad_fraction=1.0, lanes=1).open()
    data.configure(seed=0, batch_size=8)
    batch = next(iter(data.train_dataloader()))  # the border is null in six of seven: others take their place
    assert batch.valid.all() and all(isinstance(colour, str) for colour in batch.columns["border"])
    assert data.ledger.counts["column_missing"] > 8
    strict = DataModule(str(shards), image_size=16, columns={"x": "marks.9.shape"}).open()
    strict.configure(seed=0, batch_size=8)
    with pytest.raises(LdmError, match="column_missing") as stopped:
        next(iter(strict.train_dataloader()))
    assert stopped.value.exit_code == 3


def test_prompts_and_columns_are_matched():
    assert one_for_each(["a"], {"x": [1, 2], "y": 3}) == (["a", "a"], {"x": [1, 2], "y": [3, 3]})
    assert one_for_each(["a", "b"], {}) == (["a", "b"], {})
    with pytest.raises(LdmError, match="2 of caption, 3 of x"):
        one_for_each(["a", "b"], {"x": [1, 2, 3]})
