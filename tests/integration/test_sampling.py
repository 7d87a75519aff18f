"""Sampling: what the same seed promises, image to image, and bad input by the real command."""

import runpy
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.build import build
from ldm.errors import LdmError
from ldm.model import LatentDiffusion
from ldm.sampling.outputs import captioned_grid, read_recipe, save_png, to_uint8
from ldm.sampling.tasks import text_to_image
from tests.integration.tiny import ROOT, command

PROMPTS = ["a red star on a white ground", "a ring", "a longer prompt with a blue heart above a green cross", ""]


@pytest.fixture(scope="module")
def model(finished):
    return LatentDiffusion.load(finished)


def sampling(model, **changes):
    return build({**model.sampler, "steps": 6, **changes})


def test_a_picture_depends_on_its_own_seed_alone(model):
    together = text_to_image(model, PROMPTS, [3, 4, 5, 6], sampling(model))
    alone = torch.cat([text_to_image(model, [p], [s], sampling(model)) for p, s in zip(PROMPTS, (3, 4, 5, 6))])
    assert float((together - alone).abs().max()) * 127.5 <= 1.0  # kernels choose other algorithms per batch size
    other = text_to_image(model, PROMPTS, [7, 8, 9, 10], sampling(model))
    assert float((together - other).abs().max()) > 0.05


def test_first_noise_is_bit_equal_whatever_the_batch(model):
    seen = []

    def remember(denoise, x, levels, *, noise=None, on_step=None):
        seen.append((x, noise(3, x.shape)))
        return x

    settings = replace(sampling(model), function=remember)
    text_to_image(model, PROMPTS, [3, 4, 5, 6], settings)
    text_to_image(model, PROMPTS[2:3], [5], settings)
    (many, many_noise), (one, one_noise) = seen
    assert torch.equal(many[2], one[0]) and torch.equal(many_noise[2], one_noise[0])


def test_image_to_image_keeps_more_at_small_strength(model):
    start = torch.full((1, 3, 16, 16), 0.5)
    reconstruction = model.decode(model.encode(start))

    def distance(strength):
        settings = sampling(model, steps=20)
        result = text_to_image(model, ["a star"], [0], settings, images=start, strength=strength)
        return float((result - reconstruction).abs().mean())

    distances = [distance(s) for s in (0.1, 0.5, 1.0)]
    assert distances[0] < distances[1] < distances[2]


def test_other_sizes(model):
    assert text_to_image(model, ["a star"], [0], sampling(model), size=(24, 32)).shape == (1, 3, 24, 32)
    with pytest.raises(LdmError, match="multiples of 4"):
        text_to_image(model, ["a star"], [0], sampling(model), size=(23, 32))


def test_raw_weights_differ_from_the_average(finished, model):
    raw = LatentDiffusion.load(finished, weights="raw")
    assert not torch.equal(raw.denoiser.network.conv_in.weight, model.denoiser.network.conv_in.weight)
    assert torch.equal(raw.autoencoder.decoder.conv_out.weight, model.autoencoder.decoder.conv_out.weight)


def test_grid_shows_every_picture_and_nothing_of_a_caption_is_obeyed(tmp_path):
    pictures = [Image.new("RGB", (16, 16), (i * 30, 0, 0)) for i in range(5)]
    grid = captioned_grid(pictures, ["plain", "a\nb\x00\u202eb", "é 🦊", "", "long " * 60])
    colours = set(grid.getdata())
    assert {(i * 30, 0, 0) for i in range(5)} <= colours
    save_png(grid, tmp_path / "grid.png", {"prompt": "a\nb é 🦊", "seed": 3})
    assert read_recipe(tmp_path / "grid.png") == {"prompt": "a\nb é 🦊", "seed": 3}
    assert to_uint8(torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1))[0].getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize(
    "words,text",
    [
        ([], "give either a prompt or a file"),
        (["prompt=x", "strength=0"], "strength=0"),
        (["prompt=x", "height=23"], "multiples of 4"),
        (["prompt=x", "sampler.steps=0"], "sampler.steps=0"),
        (["prompt=x", "sampler=eulr"], "euler"),
        (["prompt=x", "sampler=edm"], "the sampler edm does not fit the schedule RectifiedFlow"),
        (["prompt=x", "sampler=unipc", "sampler.function.order=4"], "order must be 1, 2 or 3"),
        (["prompt=x", "sampler.spacing=leading"], "'leading' belongs to discrete schedules"),
        (["prompt=x", "sampler.spacing=karras", "sampler.sigma_min=9", "sampler.sigma_max=2"], "sigma_min"),
        (["prompt=x", "image=/nowhere.png"], "/nowhere.png"),
        (["prompts_file=/nowhere.txt"], "nowhere.txt"),
        (["prompt=x", "run=/nowhere"], "nowhere"),
        (["prompt=x", "device=cuda:99"], "cuda:99"),
        (["prompt=x", "weights=best"], "weights"),
    ],
)
def test_bad_input_is_one_line(finished, tmp_path, words, text, monkeypatch, capfd):
    run = [] if any(w.startswith("run=") for w in words) else [f"run={finished}"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *run, f"output_dir={tmp_path}", *words])
    with pytest.raises(SystemExit) as left:  # in this process: a new one would import torch for each of them
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    code, output = left.value.code, "".join(capfd.readouterr())
    assert code == 2 and text in output and "Traceback" not in output, output
    assert output.count("error[") == 1, output
    assert not list(tmp_path.glob("*.png"))


def test_any_sampler_and_spacing_from_the_command_line(finished, tmp_path):
    words = ["sampler=unipc", "sampler.spacing=karras", "sampler.steps=3", "sampler.shift=2", "prompt=x", "count=1"]
    code, output = command([f"run={finished}", f"output_dir={tmp_path}", *words], "sample.py")
    assert code == 0, output
    assert [read_recipe(p)["spacing"] for p in tmp_path.glob("*.png")] == ["karras"]


def test_decoding_is_float32_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        decoded = model.decode(torch.randn(1, 4, 4, 4))
    assert decoded.dtype == torch.float32 and np.isfinite(decoded.numpy()).all()
