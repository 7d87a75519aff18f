"""Sampling: what the same seed promises, image to image, and bad input by the real command."""

import hashlib
import runpy
import shutil
import subprocess
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
        (["prompt=x", "output_dir=/proc/foo"], "output_dir=/proc/foo"),
        (["prompt=x", "experiment=demo"], "unknown key 'experiment'; sample.py; it belongs to train.py"),
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


def drawn(monkeypatch, run, folder, *words):
    """The recipes of the pictures that the real command draws, in this process, by name."""
    monkeypatch.setattr(sys, "argv", ["sample.py", f"run={run}", f"output_dir={folder}", "sampler.steps=3", *words])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    assert left.value.code == 0
    return {p.stem: read_recipe(p) for p in sorted(folder.glob("*.png"))}


def test_the_recipe_of_image_to_image_says_how_to_repeat_it(finished, tmp_path, monkeypatch):
    start = tmp_path / "start.png"
    Image.new("RGB", (20, 30), (200, 30, 30)).save(start)
    words = ["prompt=a ring", f"image={start}", "strength=0.4", "seed=5", "count=1"]
    (recipe,) = drawn(monkeypatch, finished, tmp_path / "a", *words).values()
    assert recipe["image"] == {"file": "start.png", "sha256": hashlib.sha256(start.read_bytes()).hexdigest()}
    assert recipe["strength"] == 0.4
    model = LatentDiffusion.load(finished)
    assert recipe["model"]["run"] == "tiny" and recipe["model"]["step"] == 12 and recipe["model"]["weights"] == "ema"
    assert recipe["model"]["latent_id"] == model.autoencoder.latent_id()
    manifest = (finished / "diffusion/ckpt/step-000000012/manifest.json").read_text()
    assert recipe["model"]["checkpoint"] in manifest
    assert str(tmp_path) not in str(recipe) and str(finished.parent) not in str(recipe)

    again = [f"{key}={recipe[key]}" for key in ("prompt", "strength", "seed", "height", "width")]
    drawn(monkeypatch, finished, tmp_path / "b", *again, f"image={start}", "count=1")
    first, second = (np.asarray(Image.open(next((tmp_path / f).glob("*.png")))) for f in "ab")
    assert (first == second).all()
    assert drawn(monkeypatch, finished, tmp_path / "c", "prompt=x", "count=1")["000000012-0"]["image"] is None


def test_every_picture_has_a_strip_and_sixteen_at_most(finished, tmp_path, monkeypatch):
    words = ["prompt=a ring", "trajectory=true", "batch_size=7"]
    recipes = drawn(monkeypatch, finished, tmp_path / "a", *words, "count=3")
    strips = {name: recipe["seed"] for name, recipe in recipes.items() if name.endswith("-trajectory")}
    assert strips == {f"000000012-{seed}-trajectory": seed for seed in range(3)}
    last = Image.open(tmp_path / "a/000000012-1-trajectory.png")
    assert last.width == 3 * (128 + 12) + 12  # its three steps
    recipes = drawn(monkeypatch, finished, tmp_path / "b", *words, "count=17")
    assert len([name for name in recipes if name.endswith("-trajectory")]) == 16 and len(recipes) == 17 + 16 + 1


def test_a_damaged_checkpoint_is_refused_with_advice_that_this_command_can_follow(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "tiny")
    broken = tmp_path / "tiny" / "diffusion" / "ckpt" / "step-000000012" / "ema.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    with pytest.raises(LdmError) as refused:
        LatentDiffusion.load(tmp_path / "tiny")
    line = refused.value.line()
    assert "ema.safetensors" in line and "newest valid is 8" in line
    assert "the training command of this run with resume.fallback=true" in line and "rerun" not in line


MISTAKES = """
import contextlib, runpy, sys
words = {words!r}
for given in words:
    sys.argv = ["sample.py", "run={run}", *given]
    try:
        runpy.run_path("sample.py", run_name="__main__")
    except SystemExit as left:
        print(left.code, sorted({{"torch", "pytorch_lightning"}} & set(sys.modules)))
"""


def test_files_and_texts_are_looked_at_before_torch_is_imported(finished, tmp_path):
    words = [
        [],
        ["prompts_file=/nowhere"],
        ["prompt=x", "image=/nowhere.png"],
        ["prompt=x", "output_dir=/proc/foo"],
        ["prompt=x", "run=/nowhere"],
        ["prompt=x", "strength=7"],
    ]
    program = MISTAKES.format(words=words, run=finished)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["2 []"] * len(words), done.stderr
    assert len(done.stderr.splitlines()) == len(words)


def test_any_sampler_and_spacing_from_the_command_line(finished, tmp_path):
    words = ["sampler=unipc", "sampler.spacing=karras", "sampler.steps=3", "sampler.shift=2", "prompt=x", "count=1"]
    code, output = command([f"run={finished}", f"output_dir={tmp_path}", *words], "sample.py")
    assert code == 0, output
    assert [read_recipe(p)["spacing"] for p in tmp_path.glob("*.png")] == ["karras"]


def test_decoding_is_float32_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        decoded = model.decode(torch.randn(1, 4, 4, 4))
    assert decoded.dtype == torch.float32 and np.isfinite(decoded.numpy()).all()
