"""An autoencoder alone: a folder of diffusers, or a file with or without the names of a whole model, in and out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoints.formats.autoencoders import Factors
from ldm.checkpoints.formats.statistics import factors
from ldm.checkpoints.run import open_autoencoder
from ldm.errors import LdmError
from ldm.model import load_autoencoder
from ldm.tools import export_model, import_model
from tests.interop import making

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A whole run of ours with SDXL's factor."""
    return making.our_run(tmp_path_factory.mktemp("runs") / "whole", std=1 / 0.13025)


@pytest.fixture
def folder(run, tmp_path) -> Path:
    return export(run, tmp_path / "folder", "diffusers")


@pytest.fixture
def file(run, tmp_path) -> Path:
    return export(run, tmp_path / "vae.safetensors", "compvis")


def export(run: Path, out: Path, layout: str) -> Path:
    assert export_model.main([str(run), str(out), "--format", layout, "--parts", "vae"]) == 0
    return out


def take(path: Path, out: Path, *more: str) -> Path:
    assert import_model.main([str(path), str(out), *more]) == 0
    return out


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    return open_autoencoder(run).tensors("model")


def same(a: Path, b: Path) -> None:
    left, right = tensors_of(a), tensors_of(b)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def bare(file: Path, out: Path, prefix: str = "", **more: torch.Tensor) -> Path:
    """As people share it: no metadata, and perhaps the names of a whole model."""
    save_file({**{prefix + name: tensor for name, tensor in load_file(file).items()}, **more}, out)
    return out


# ---- in and out


def test_to_diffusers_and_back_is_bit_equal(run, folder, tmp_path, capsys):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS]
    back = take(folder, tmp_path / "back")
    assert "scaling_factor 0.13025" in (said := capsys.readouterr().out) and "f = 8" in said
    same(run, back)
    assert json.loads((folder / "config.json").read_text())["scaling_factor"] == 0.13025
    state, before = (open_autoencoder(path).document("state") for path in (back, run))
    assert state["finished"] and state["latent_id"] == before["latent_id"]
    assert state["latent_images"] == 0
    assert state["latent_source"].startswith("scaling_factor 0.13025 of ") and "not measured" in state["latent_source"]
    assert not (back / "diffusion").exists() and "train: decoder" in (back / "experiment.yaml").read_text()
    again = export(back, tmp_path / "again", "diffusers")
    for name in ("config.json", WEIGHTS):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_to_one_file_and_back_is_bit_equal(run, file, tmp_path):
    assert all(name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")) for name in load_file(file))
    same(run, take(file, tmp_path / "back"))


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_file_of_others_needs_the_users_word_on_its_factor(run, file, tmp_path, prefix):
    """The autoencoders of Stable Diffusion 1 and XL have equal shapes: nothing in such a file tells them apart."""
    theirs = bare(file, tmp_path / "theirs.safetensors", prefix)
    with pytest.raises(LdmError, match=r"0.18215 \(Stable Diffusion 1 and 2\) or 0.13025 \(XL\)") as refused:
        take(theirs, tmp_path / "back")
    assert refused.value.exit_code == 2 and not (tmp_path / "back").exists()
    same(run, take(theirs, tmp_path / "back", "--scaling-factor", "0.13025"))
    other = take(theirs, tmp_path / "other", "--scaling-factor", "0.18215")
    with pytest.raises(AssertionError):
        same(run, other)


def test_a_file_of_training_says_its_factor_and_holds_more(run, file, tmp_path, capsys):
    more = {
        "scale_factor": torch.tensor(0.13025),
        "loss.logvar": torch.zeros(()),
        "loss.discriminator.main.0.weight": torch.zeros(2),
        "model_ema.decay": torch.zeros(()),
    }
    same(run, take(bare(file, tmp_path / "theirs.safetensors", **more), tmp_path / "back"))
    assert "model_ema) are not read" in capsys.readouterr().out


def test_a_shift_stays_a_shift(tmp_path):
    """Stable Diffusion 3 and FLUX: 16 channels, no convolutions around the latents, a factor and a shift."""
    changes = {"latent_channels": 16, "quant_conv": False}
    args = {**making.OURS["sd1"], "in_channels": 16, "out_channels": 16}
    run = making.our_run(tmp_path / "run", network=args, autoencoder=changes, std=[1 / 0.3611] * 16, mean=[0.1159] * 16)
    for name, layout in (("folder", "diffusers"), ("vae.safetensors", "compvis")):
        out = export(run, tmp_path / name, layout)
        same(run, take(out, tmp_path / f"back-{layout}"))
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (config["scaling_factor"], config["shift_factor"], config["use_quant_conv"]) == (0.3611, 0.1159, False)
    theirs = bare(tmp_path / "vae.safetensors", tmp_path / "theirs.safetensors")
    words = ["--scaling-factor", "0.3611", "--shift-factor", "0.1159"]
    same(run, take(theirs, tmp_path / "said", *words))


def test_statistics_of_each_channel_are_worked_in(tmp_path):
    run = making.our_run(tmp_path / "run", mean=[0.3, -1.0, 0.0, 2.0], std=[2.0, 0.5, 5.0, 1.0])
    back = take(export(run, tmp_path / "folder", "diffusers"), tmp_path / "back")
    ours, theirs = (load_autoencoder(open_autoencoder(path)).double() for path in (run, back))
    assert float(theirs.statistics.std[0]) == pytest.approx(1 / 0.18215)
    images = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32).double()
    latents = ours.encode(images)
    torch.testing.assert_close(theirs.encode(images), latents, rtol=1e-5, atol=1e-5)  # folded weights are float32
    torch.testing.assert_close(theirs.decode(latents), ours.decode(latents), rtol=1e-5, atol=1e-5)
    assert float((ours.encode(images) - ours.moments(images)[:, :4]).abs().max()) > 1e-2  # what folding must undo


def test_factors_of_statistics():
    each = torch.full((4,), 1 / 0.18215)
    assert factors(torch.zeros(4), each) == (0.18215, 0.0)
    assert factors(torch.full((4,), 0.1159), each) == (0.18215, 0.1159)
    assert factors(torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, 2.0])) is None
    assert factors(torch.tensor([0.0, 0.0, 0.0, 1.0]), each) is None


# ---- what is refused


def drop(name):
    return lambda folder: save_file(
        {key: tensor for key, tensor in load_file(folder / WEIGHTS).items() if not key.startswith(name)},
        folder / WEIGHTS,
    )


def edit(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.parametrize(
    "change, more, code, words",
    [
        (drop("decoder.mid_block.resnets.0."), [], "SHAPE", "8 missing: decoder.mid_block.resnets.0.conv1.bias"),
        (drop("encoder."), [], "SHAPE", "104 missing.* and 94 more"),
        (lambda folder: (folder / WEIGHTS).unlink(), [], "FORMAT", "holds no weights"),
        (edit(_class_name="VQModel"), [], "FORMAT", "is a VQModel"),
        (edit(_class_name="UNet2DConditionModel"), [], "FORMAT", "model_index.json"),
        (edit(latent_channels=8), [], "SHAPE", "of another shape"),
        (edit(scaling_factor="x"), [], "FORMAT", "nothing usable of its latents"),
        (edit(scaling_factor=float("nan")), [], "FORMAT", "nothing usable of its latents"),
        (edit(), ["--scaling-factor", "0.2"], "FORMAT", "says scaling_factor 0.13025, not 0.2"),
        (edit(latents_mean=[0.0] * 4, latents_std=[1.0] * 4), ["--shift-factor", "1"], "FORMAT", "each channel"),
        (edit(), ["--prediction", "v"], "CONFIG", "for a whole model"),
        (edit(), ["--scaling-factor", "0"], "CONFIG", "a positive number"),
        (edit(), ["--shift-factor", "nan"], "CONFIG", "a number"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_and_nothing_is_left(folder, tmp_path, change, more, code, words):
    change(folder)
    with pytest.raises(LdmError, match=words) as refused:
        take(folder, tmp_path / "out", *more)
    assert refused.value.code == code and refused.value.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_files_that_do_not_fit_are_refused(folder, file, tmp_path):
    tensors = load_file(file)
    partial = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.up.0.")}
    save_file(partial, tmp_path / "partial.safetensors")
    save_file({**tensors, "quantize.embedding.weight": torch.zeros(8, 4)}, tmp_path / "vq.safetensors")
    save_file({n: t for n, t in tensors.items() if n.startswith("decoder.")}, tmp_path / "decoder.safetensors")
    save_file(tensors, tmp_path / "odd.safetensors", {"scaling_factor": "many"})
    shutil.copy(folder / WEIGHTS, tmp_path / "lonely.safetensors")
    factor = Factors(0.18215)
    for name, words in (
        ("partial.safetensors", "decoder.up.0"),
        ("vq.safetensors", "unexpected: quantize.embedding.weight"),
        ("decoder.safetensors", "no Stable Diffusion model in one file"),
        ("odd.safetensors", "scaling_factor and shift_factor are"),
        ("lonely.safetensors", "the folder that holds config.json"),
        (f"folder/{WEIGHTS}", "import the folder: "),
    ):
        with pytest.raises(LdmError, match=words):
            import_model.import_model(tmp_path / name, tmp_path / "out", factors=factor)
        assert not (tmp_path / "out").exists()


def test_what_is_no_autoencoder_alone_takes_no_factors(run, tmp_path):
    assert export_model.main([str(run), str(tmp_path / "m.safetensors"), "--format", "compvis"]) == 0
    with pytest.raises(LdmError, match="for an autoencoder alone"):
        take(tmp_path / "m.safetensors", tmp_path / "out", "--scaling-factor", "0.2")


def test_export_names_what_it_cannot_write(run, folder, tmp_path):
    alone = take(folder, tmp_path / "alone")
    with pytest.raises(LdmError, match="--parts vae"):
        export_model.main([str(alone), str(tmp_path / "out"), "--format", "diffusers"])
    stem = making.our_run(tmp_path / "stem", autoencoder={"patch_size": 2})
    with pytest.raises(LdmError, match="patch_size=2"):
        export(stem, tmp_path / "out", "diffusers")
    groups = making.our_run(tmp_path / "groups", autoencoder={"norm_groups": 16})
    with pytest.raises(LdmError, match="norm_groups=16"):
        export(groups, tmp_path / "out.safetensors", "compvis")
    pixels = tmp_path / "pixels"
    shutil.copytree(run / "diffusion", pixels / "diffusion")
    with pytest.raises(LdmError, match="works on pixels"):
        export(pixels, tmp_path / "out", "diffusers")
    assert not list(tmp_path.glob("out*"))
