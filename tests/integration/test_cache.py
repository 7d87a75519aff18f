"""`python -m ldm cache` on a finished run, and training with what it wrote."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.torch import save_file

from ldm.checkpoints.store import Store
from ldm.data.cache import Cache
from ldm.errors import LdmError
from ldm.models.autoencoder.kl import AutoencoderKL
from ldm.models.conditioner.open_clip import OpenClipText
from ldm.tools.cache import Options, cache, main
from ldm.training.fit import train
from tests.integration.tiny import ROOT, command, compare_runs, config, metrics, overrides
from tests.precompute.test_cache import TOWER, content


def run_of(finished, folder, stage="autoencoder"):
    """A run with the finished autoencoder alone."""
    shutil.copytree(finished / stage, folder / "tiny" / stage)
    shutil.copy(finished / "run.json", folder / "tiny" / "run.json")
    return folder


def losses(run):
    return [row["train/loss"] for row in metrics(run, "diffusion")]


@pytest.fixture(scope="module")
def cached(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "c"
    assert cache(out, Options(run=str(finished), flipped=True, piece_mb=0.005))["usable"] == 81
    return out


@pytest.mark.slow
def test_training_with_a_cache_equals_training_without(finished, cached, shards, tmp_path, monkeypatch):
    """Losses of every step and of validation; no picture is opened, nothing is encoded."""
    monkeypatch.setattr("ldm.data.pipeline.decode_image", None)
    monkeypatch.setattr(AutoencoderKL, "moments", None)
    train(config(shards, run_of(finished, tmp_path), f"data.cache={cached}"))
    np.testing.assert_allclose(losses(tmp_path / "tiny"), losses(finished), rtol=1e-4)


@pytest.mark.slow
def test_a_run_on_a_cache_is_resumed_to_the_bit(finished, cached, shards, tmp_path):
    """Mirrored by chance, with workers; the second half of it is lost and made again."""
    words = [f"data.cache={cached}", "data.flip_prob=0.5", "stages=[diffusion]", "loader.num_workers=1"]
    whole, again = run_of(finished, tmp_path / "whole"), tmp_path / "again"
    train(config(shards, whole, *words, steps=8))
    shutil.copytree(whole, again)
    shutil.rmtree(Store(again / "tiny" / "diffusion" / "ckpt").path(8))
    train(config(shards, again, *words, steps=8))
    assert compare_runs(whole / "tiny", again / "tiny", "diffusion") == []


@pytest.mark.slow
def test_flips_by_the_cache_equal_flips_of_pictures(finished, cached, shards, tmp_path, monkeypatch):
    words = ["data.flip_prob=0.5", "stages=[diffusion]"]
    train(config(shards, run_of(finished, tmp_path / "a"), *words, steps=6))
    monkeypatch.setattr(AutoencoderKL, "moments", None)
    train(config(shards, run_of(finished, tmp_path / "b"), *words, f"data.cache={cached}", steps=6))
    np.testing.assert_allclose(losses(tmp_path / "b" / "tiny"), losses(tmp_path / "a" / "tiny"), rtol=1e-4)
    with pytest.raises(AssertionError):  # without flips they are others
        np.testing.assert_allclose(losses(tmp_path / "b" / "tiny"), losses(finished)[:6], rtol=1e-4)


def test_another_run_is_refused_before_the_first_step(finished, cached, shards, tmp_path):
    with pytest.raises(LdmError, match="CACHE") as refused:
        words = [f"data.cache={cached}", "data.crop=pad", "data.background=black", "stages=[diffusion]"]
        train(config(shards, run_of(finished, tmp_path), *words))
    assert refused.value.exit_code == 2 and len(refused.value.line().splitlines()) == 2
    assert not (tmp_path / "tiny" / "diffusion" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_texts_of_a_frozen_tower(finished, shards, tmp_path, monkeypatch):
    """Losses with cached embeddings are those of the tower, which is not called for a caption."""
    tower = OpenClipText(config=TOWER, width=8, pooled=True)
    save_file({k.removeprefix("tower."): v for k, v in tower.state_dict().items()}, tmp_path / "tower.safetensors")
    words = [
        "model/conditioner=open_clip",
        "model.conditioner.config={embed_dim:6,text_cfg:{width:8,heads:2,layers:2}}",
        "model.conditioner.width=8",
        "model.conditioner.pooled=true",
        f"model.conditioner.weights={tmp_path}/tower.safetensors",
        "model.network.context_size=8",
        "model.network.vector_size=6",
        "stages=[diffusion]",
    ]

    def settings(folder, *more):
        found = overrides(shards, folder, *words, *more, steps=6)
        return [word for word in found if word.split("=")[0] not in _OF_THE_SMALL_TRANSFORMER]

    from ldm.cli import compose

    train(compose("train", settings(run_of(finished, tmp_path / "a"))))
    about = cache(tmp_path / "c", Options(run=str(tmp_path / "a" / "tiny"), text=True))
    assert about["text"]["count"] > 30 and list(about["text"]["fields"]) == ["text.tokens", "text.vector"]
    called = []
    encode = OpenClipText.encode
    monkeypatch.setattr(OpenClipText, "encode", lambda self, ids: called.append(1) or encode(self, ids))
    train(compose("train", settings(run_of(finished, tmp_path / "b"), f"data.cache={tmp_path}/c")))
    np.testing.assert_allclose(losses(tmp_path / "b" / "tiny"), losses(tmp_path / "a" / "tiny"), rtol=1e-4)
    assert not called
    with pytest.raises(LdmError, match=r"data\.caption_prefix was"):
        train(compose("train", settings(run_of(finished, tmp_path / "d"), f"data.cache={tmp_path}/c",
                                        "data.caption_prefix=x")))  # fmt: skip


_OF_THE_SMALL_TRANSFORMER = [f"model.conditioner.{key}" for key in ("depth", "num_heads", "embedding_size")]


@pytest.mark.parametrize(
    "words, text",
    [
        ([], "expected OUT, got nothing"),
        (["out", "dtype=int8"], "unknown value 'int8'"),
        (["out", "flippd=true"], "did you mean 'flipped'"),
        (["out", "data.crop=random"], "random crops cannot be cached"),
        (["out", "data.image_sze=16"], "image_size"),
        (["out", "text=true"], "trained along"),
        (["out", "run=nowhere"], "there is no such run"),
        (["out", "piece_mb=0"], "at least 0.001"),
        (["/proc/nothing"], "OUT cannot be used"),
    ],
)
def test_mistakes_are_one_line(finished, tmp_path, monkeypatch, words, text):
    monkeypatch.chdir(tmp_path)
    given = [word for word in words if word != "out"]
    run = [] if any(word.startswith("run=") for word in words) else [f"run={finished}"]
    with pytest.raises(LdmError) as refused:
        main([*run, *(["out"] if "out" in words else []), *given])
    assert text in refused.value.line() and refused.value.exit_code == 2 and "\n" not in refused.value.line()
    assert not (tmp_path / "out").exists()


def test_a_run_without_data_asks_for_them(finished, shards, tmp_path):
    run = run_of(finished, tmp_path) / "tiny"
    with pytest.raises(LdmError, match="data=folder or data=shards"):
        cache(tmp_path / "c", Options(run=str(run)))
    words = ["data=shards", f"data.path={shards}", "data.image_size=16", "data.val_fraction=0"]
    assert cache(tmp_path / "c", Options(run=str(run)), words)["count"] == 81


@pytest.mark.slow
def test_a_full_disk_says_so_and_goes_on(finished, cached, tmp_path):
    """A limit on the size of files stands for a full disk."""
    program = "import resource, sys; from ldm.__main__ import main; "
    program += "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)); main()"
    words = ["cache", str(tmp_path / "c"), f"run={finished}", "flipped=true", "piece_mb=0.005"]
    limited = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=ROOT)
    assert limited.returncode == 75 and limited.stderr.splitlines()[-1].startswith("error[DISK]"), limited.stderr
    assert not list((tmp_path / "c").glob("*.safetensors")) and not list((tmp_path / "c").glob(".tmp*"))
    assert main([*words[1:]]) == 0
    assert content(tmp_path / "c") == content(cached)


# ---- real processes


@pytest.mark.slow
def test_two_processes_and_kills_give_the_same_bytes(finished, cached, tmp_path):
    words = [str(tmp_path / "c"), f"run={finished}", "flipped=true", "piece_mb=0.005", "devices=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(3):  # killed at any time: while importing, while writing, or never
        process = subprocess.Popen([sys.executable, "-m", "ldm", "cache", *words], cwd=ROOT, env=environment)
        deadline, had = time.monotonic() + 60, len(list((tmp_path / "c").glob("*.safetensors")))
        while len(list((tmp_path / "c").glob("*.safetensors"))) < had + 2 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run([sys.executable, "-m", "ldm", "cache", *words], cwd=ROOT, env=environment)
    assert done.returncode == 0
    Cache.open(tmp_path / "c")
    assert content(tmp_path / "c") == content(cached)


@pytest.mark.slow
def test_the_command_trains_with_two_processes_on_a_cache(finished, cached, shards, tmp_path):
    more = ["stages=[diffusion]", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    code, output = command(overrides(shards, run_of(finished, tmp_path), f"data.cache={cached}", *more))
    assert code == 0, output
    np.testing.assert_allclose(losses(tmp_path / "tiny"), losses(finished), rtol=1e-3)
