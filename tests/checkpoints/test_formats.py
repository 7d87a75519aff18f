"""Other projects' files: read safely, mapped one to one, refused with names, and nothing half-written."""

import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.build import build, build_saved, to_saved
from ldm.checkpoints.formats import clip, compvis, diffusers, keymap, settings
from ldm.checkpoints.formats.reading import read_file, read_json, read_part
from ldm.checkpoints.formats.schedules import (
    SD_SCHEDULE,
    betas_of,
    read_scheduler_config,
    recognise_betas,
    what_differs,
)
from ldm.checkpoints.formats.statistics import scaling_factor
from ldm.checkpoints.store import Store
from ldm.cli import compose
from ldm.diffusion.schedule import DiscreteVP, ZeroTerminalSNR
from ldm.errors import LdmError
from ldm.model import LatentDiffusion, load_source
from ldm.models.autoencoder.kl import AutoencoderKL
from ldm.models.conditioner.open_clip import OpenClipText
from ldm.models.unet.unet import UNet
from ldm.tools import export_autoencoder, export_model
from ldm.tools.export_model import read_run
from ldm.tools.import_model import import_model, shapes_of
from tests.conftest import CONFIGS
from tests.interop import making

FAMILIES = ("sd1", "sd2", "sdxl")


# ---- key maps


def full(part: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of ours at full size."""
    with torch.device("meta"):
        if part == "vae":
            return shapes_of(AutoencoderKL())
        if part == "text1":
            text = clip.arguments(768, 12, heads=12, quick_gelu=True, projection=None, pad_id=49407)
            return shapes_of(OpenClipText(**text))
        if part == "text2":
            return shapes_of(OpenClipText("ViT-H-14"))
        return shapes_of(UNet(**making.FULL_OURS[part]))


LAYOUTS = {
    "diffusers": {"sd1": diffusers.map_unet, "sd2": diffusers.map_unet, "sdxl": diffusers.map_unet,
                  "vae": diffusers.map_vae, "text1": diffusers.map_text, "text2": diffusers.map_text},
    "compvis": {"sd1": compvis.map_unet, "sd2": compvis.map_unet, "sdxl": compvis.map_unet,
                "vae": compvis.map_vae, "text1": compvis.map_text_transformers, "text2": compvis.map_text_open_clip},
}  # fmt: skip
# Frozen names and shapes, checked against diffusers and transformers themselves in tests/interop.
# After a deliberate change: python -m tests.checkpoints.test_formats
GOLDEN: dict[str, tuple[int, str]] = json.loads((Path(__file__).parent / "golden_keys.json").read_text())


def fingerprint(shapes: dict[str, tuple[int, ...]]) -> list[object]:
    text = "\n".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
    return [len(shapes), hashlib.sha256(text.encode()).hexdigest()[:16]]


def all_fingerprints() -> dict[str, list[object]]:
    found = {}
    for part in LAYOUTS["diffusers"]:
        ours = full(part)
        found[f"ours {part}"] = fingerprint(ours)
        for layout, rules in LAYOUTS.items():
            found[f"{layout} {part}"] = fingerprint(keymap.their_shapes(rules[part](ours), ours))
    return found


def test_names_and_shapes_of_every_layout_are_the_frozen_ones():
    assert all_fingerprints() == GOLDEN


@pytest.mark.parametrize("part", LAYOUTS["diffusers"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_key_maps_are_bijections_over_the_full_models(layout, part):
    ours = full(part)
    table = LAYOUTS[layout][part](ours)
    assert set(table) == set(ours)
    theirs = [name for place in table.values() for name in place.names]
    assert len(theirs) == len(set(theirs))
    pieces = sum(len(place.names) - 1 for place in table.values())
    assert len(theirs) == len(ours) + pieces and (pieces > 0) == (
        part == "text1" or (layout, part) == ("diffusers", "text2")
    )
    # every element has a place: nothing is lost in cutting and turning
    sizes = [sum(torch.Size(s).numel() for s in shapes.values()) for shapes in (ours, keymap.their_shapes(table, ours))]
    assert sizes[0] == sizes[1]


def test_a_map_that_loses_a_tensor_is_refused():
    with pytest.raises(ValueError, match="share a place: b"):
        keymap.make(["a", "c"], lambda name: keymap.Place(("b",)))


def test_a_tensor_goes_and_comes_back_in_every_form():
    table = {
        "stack": keymap.Place(("q", "k", "v")),
        "conv": keymap.Place(("c",), "conv"),
        "matrix": keymap.Place(("m",), "transposed"),
    }
    ours = {"stack": torch.randn(6, 2), "conv": torch.randn(3, 4), "matrix": torch.randn(3, 5)}
    theirs = keymap.to_theirs(table, ours)
    assert {k: tuple(v.shape) for k, v in theirs.items()} == keymap.their_shapes(
        table, {k: tuple(v.shape) for k, v in ours.items()}
    )
    assert theirs["c"].shape == (3, 4, 1, 1) and theirs["m"].shape == (5, 3) and theirs["k"].shape == (2, 2)
    back = keymap.to_ours(table, theirs)
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_what_does_not_fit_is_listed_ten_at_most_of_each():
    expected = {f"gone.{i:02}": (1,) for i in range(12)} | {f"same.{i:02}": (2,) for i in range(11)} | {"ok": (1,)}
    found = {f"new.{i:02}": (1,) for i in range(15)} | {f"same.{i:02}": (3,) for i in range(11)} | {"ok": (1,)}
    with pytest.raises(LdmError) as caught:
        keymap.check_shapes(expected, found, "file")
    words = caught.value.line()
    assert "12 missing" in words and "gone.09" in words and "gone.10" not in words and "and 2 more" in words
    assert "15 unexpected" in words and "new.09" in words and "new.10" not in words and "and 5 more" in words
    assert "11 of another shape" in words and "same.09 is [3] instead of [2]" in words and "same.10" not in words
    keymap.check_shapes({"ok": (1,)}, {"ok": (1,)}, "file")


# ---- files


class Evil:
    """Runs code when a pickle that holds it is loaded without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def evil_zip(path: Path, marker: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callbacks": Evil(marker)}, path)


def evil_plain(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps({"a": Evil(marker)}, protocol=2))  # torch reads protocol 2 only


@pytest.mark.parametrize("write", [evil_zip, evil_plain])
def test_a_pickle_with_code_does_not_run(tmp_path, monkeypatch, write):
    path, marker = tmp_path / "model.ckpt", tmp_path / "marker"
    write(path, marker)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(LdmError, match=r"none of its code runs.*mkdir.*safetensors") as caught:
        read_file(path)
    assert "False" not in caught.value.line()  # no advice to switch the safety off
    with pytest.raises(LdmError, match="mkdir"):
        import_model(path, tmp_path / "run")
    assert not marker.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["model.ckpt"]
    with suppress(RuntimeError):  # afterwards torch misses its own header in a plain pickle
        torch.load(path, weights_only=False)
    assert marker.exists()  # the payload is alive


def test_torch_files_and_safetensors_are_read_alike(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4, dtype=torch.float16)}
    save_file(tensors, tmp_path / "m.safetensors", {"modelspec.prediction_type": "v"})
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "m.ckpt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("m.safetensors", "m.ckpt", "old.pt"):
        found, metadata = read_file(tmp_path / name)
        assert all(torch.equal(found[k], tensors[k]) and found[k].dtype == tensors[k].dtype for k in tensors)
    assert metadata == {} and read_file(tmp_path / "m.safetensors")[1] == {"modelspec.prediction_type": "v"}


def compressed(path: Path) -> None:
    plain = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


@pytest.mark.parametrize(
    "name, write, words",
    [
        ("m.ckpt", compressed, "compressed"),
        ("m.ckpt", lambda p: p.write_bytes(b"PK\x03\x04 torn"), "none of its code runs"),
        ("m.ckpt", lambda p: torch.save({"a": 3}, p), "not a table of tensors.*a"),
        ("m.ckpt", lambda p: torch.save([torch.zeros(1)], p), "not a table of tensors"),
        ("m.safetensors", lambda p: p.write_bytes(b"\x08"), "not a safetensors file"),
        ("m.safetensors", lambda p: save_file({"x": torch.zeros(1)}, p), "no Stable Diffusion model"),
        ("m.onnx", lambda p: p.write_bytes(b""), "what a .onnx file is"),
        ("m", lambda p: p.mkdir(), "model_index.json"),
        ("m.bin", lambda p: None, "no such file"),
    ],
)
def test_other_files_are_refused_with_a_sentence(tmp_path, name, write, words):
    write(tmp_path / name)
    with pytest.raises(LdmError, match=words):
        import_model(tmp_path / name, tmp_path / "run")
    assert not [p for p in tmp_path.iterdir() if p.name != name]


def test_parts_in_shards_and_variants(tmp_path):
    tensors = {name: torch.randn(2) for name in "abc"}
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(halves, tmp_path / "model.fp16.safetensors")
    assert read_part(tmp_path)[1].name == "model.fp16.safetensors"  # better than nothing
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    found, file = read_part(tmp_path)
    assert file.name == "pytorch_model.bin" and found["a"].dtype == torch.float32  # full precision comes first
    torch.save(halves, tmp_path / "pytorch_model.fp16.bin")
    assert read_part(tmp_path)[1].name == "pytorch_model.bin"
    for number, names in ((1, "ab"), (2, "c")):
        save_file(
            {n: tensors[n] for n in names}, tmp_path / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        )
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    where = {n: f"diffusion_pytorch_model-0000{1 if n in 'ab' else 2}-of-00002.safetensors" for n in tensors}
    index.write_text(json.dumps({"weight_map": where}))
    found, file = read_part(tmp_path)
    assert file == index and all(torch.equal(found[n], tensors[n]) for n in tensors)
    index.write_text(json.dumps({"weight_map": {**where, "d": where["a"]}}))
    with pytest.raises(LdmError, match=r"do not hold.*d"):
        read_part(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/model.safetensors"}}))
    with pytest.raises(LdmError, match="no file beside it"):
        read_part(tmp_path)


def test_settings_are_json_objects_of_reasonable_size(tmp_path):
    path = tmp_path / "config.json"
    for content in (b"[1]", b"{", b'{"a": ' + b"[" * 100_000, b" " * (11 * 2**20)):
        path.write_bytes(content)
        with pytest.raises(LdmError, match="config"):
            read_json(path)


# ---- there and back


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    return {
        family: making.our_run(home / family, family, prediction=p)
        for family, p in (("sd1", "Epsilon"), ("sd2", "Velocity"))
    }


def export(run: Path, out: Path, layout: str, *more: str) -> Path:
    assert export_model.main([str(run), str(out), "--format", layout, *more]) == 0
    return out


def same(a: Path, b: Path) -> None:
    left, right = making.tensors_of(a), making.tensors_of(b)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_to_compvis_and_back_is_bit_equal(runs, tmp_path, family, capsys):
    file = export(runs[family], tmp_path / "model.safetensors", "compvis")
    import_model(file, tmp_path / "back")
    same(runs[family], tmp_path / "back")
    assert f"predicts {'v' if family == 'sd2' else 'epsilon'}" in capsys.readouterr().out
    again = export(tmp_path / "back", tmp_path / "again.safetensors", "compvis")
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_to_diffusers_and_back_is_bit_equal(runs, tmp_path, family):
    folder = export(runs[family], tmp_path / "folder", "diffusers")
    import_model(folder, tmp_path / "back")
    back, before = making.tensors_of(tmp_path / "back"), making.tensors_of(runs[family])
    # the last block of SD2's tower and the projection behind it are never used, and diffusers has no place for them
    unused = {n for n in before if ".resblocks.2." in n or n.endswith("text_projection")} if family == "sd2" else set()
    assert len(unused) == (13 if family == "sd2" else 0)
    assert back.keys() == before.keys() - unused
    assert all(torch.equal(back[name], before[name]) for name in back)
    same_again = export(tmp_path / "back", tmp_path / "again", "diffusers")
    import_model(same_again, tmp_path / "back2")
    same(tmp_path / "back", tmp_path / "back2")
    prompts = ["a red fox", ""]
    old, new = (LatentDiffusion.load(path).condition(prompts).tokens for path in (runs[family], tmp_path / "back"))
    assert torch.equal(old, new)


def test_an_imported_run_is_a_whole_run(runs, tmp_path):
    import_model(export(runs["sd1"], tmp_path / "m.safetensors", "compvis"), tmp_path / "back")
    model = LatentDiffusion.load(tmp_path / "back")
    assert model.image_size == 64
    assert float(model.autoencoder.statistics.std[0]) == pytest.approx(1 / 0.18215)
    state = Store(tmp_path / "back" / "autoencoder" / "ckpt").newest().document("state")
    assert state["latent_id"] == model.autoencoder.latent_id() and state["finished"]
    assert json.loads((tmp_path / "back" / "run.json").read_text())["name"] == "back"
    assert "init_from" in (tmp_path / "back" / "experiment.yaml").read_text()
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp")]


def test_half_precision_stays_half_and_can_be_asked_for(runs, tmp_path):
    folder = export(runs["sd1"], tmp_path / "half", "diffusers", "--dtype", "float16")
    assert {t.dtype for t in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }
    import_model(folder, tmp_path / "back")
    found = making.tensors_of(tmp_path / "back")
    assert found["diffusion/denoiser.network.conv_in.weight"].dtype == torch.float16
    assert LatentDiffusion.load(tmp_path / "back").denoiser.network.conv_in.weight.dtype == torch.float32


def test_averaged_weights_of_a_training_file_become_the_average(runs, tmp_path):
    file = export(runs["sd1"], tmp_path / "m.safetensors", "compvis")
    tensors = load_file(file)
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in tensors.items()
        if name.startswith("model.diffusion_model.")
    }
    torch.save({"state_dict": {**tensors, **averages, "model_ema.decay": torch.tensor(0.9)}}, tmp_path / "m.ckpt")
    import_model(tmp_path / "m.ckpt", tmp_path / "back")
    raw, averaged = (LatentDiffusion.load(tmp_path / "back", weights=w) for w in ("raw", "ema"))
    name = "denoiser.network.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(raw.state_dict()[name] + 1, averaged.state_dict()[name])
    assert torch.equal(raw.autoencoder.decoder.conv_out.weight, averaged.autoencoder.decoder.conv_out.weight)


def test_old_names_of_the_autoencoders_attention(runs, tmp_path):
    folder = export(runs["sd1"], tmp_path / "old", "diffusers")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(file).items():
        part = next((p for p in old if f".attentions.0.{p}." in name), None)
        renamed[name.replace(part, old[part]) if part else name] = tensor
    assert len([n for n in renamed if "proj_attn" in n]) == 4
    save_file(renamed, file)
    import_model(folder, tmp_path / "back")
    same(runs["sd1"], tmp_path / "back")


# ---- what a file does not say


def without_metadata(source: Path, target: Path) -> Path:
    save_file(load_file(source), target)
    return target


def test_stable_diffusion_2_needs_its_prediction_and_1_is_assumed(runs, tmp_path, capsys):
    second = without_metadata(export(runs["sd2"], tmp_path / "2.safetensors", "compvis"), tmp_path / "bare.safetensors")
    with pytest.raises(LdmError, match=r"two predictions.*--prediction v"):
        import_model(second, tmp_path / "run")
    import_model(second, tmp_path / "run", "v")
    assert type(LatentDiffusion.load(tmp_path / "run").denoiser.prediction).__name__ == "Velocity"
    with pytest.raises(LdmError, match="says prediction v, not epsilon"):
        import_model(tmp_path / "2.safetensors", tmp_path / "other", "epsilon")
    first = without_metadata(export(runs["sd1"], tmp_path / "1.safetensors", "compvis"), tmp_path / "plain.safetensors")
    capsys.readouterr()
    import_model(first, tmp_path / "run1")
    assert "does not say what it predicts: epsilon" in capsys.readouterr().out
    with pytest.raises(LdmError, match="scheduler says prediction epsilon, not v"):
        import_model(export(runs["sd1"], tmp_path / "folder", "diffusers"), tmp_path / "other", "v")


@pytest.mark.parametrize("layout, name", [("diffusers", "folder"), ("compvis", "model.safetensors")])
def test_a_schedule_that_ends_in_pure_noise_stays_one(tmp_path, layout, name):
    inner = {"class": "ldm.diffusion.schedule.DiscreteVP", "args": {}}
    schedule = {"class": "ldm.diffusion.schedule.ZeroTerminalSNR", "args": {"schedule": inner}}
    sampler = {"spacing": "trailing", "offset": 0}
    run = making.our_run(tmp_path / "run", prediction="Velocity", schedule=schedule, sampler=sampler)
    import_model(export(run, tmp_path / name, layout), tmp_path / "back")
    before, after = LatentDiffusion.load(run), LatentDiffusion.load(tmp_path / "back")
    assert (
        after.denoiser.schedule == before.denoiser.schedule and after.denoiser.prediction == before.denoiser.prediction
    )
    levels = [build({**model.sampler, "steps": 20}).levels(model.denoiser.schedule) for model in (before, after)]
    assert [float(level.alpha) for level in levels[0]] == [float(level.alpha) for level in levels[1]]
    assert float(levels[1][0].alpha) == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["scaled_linear", "linear", "sigmoid"])
@pytest.mark.parametrize("ends", [(0.00085, 0.012), (0.0015, 0.0195), (1e-4, 0.02)])
def test_betas_are_recognised_in_every_precision(kind, ends, dtype):
    schedule = {"betas": kind, "beta_start": ends[0], "beta_end": ends[1], "num_timesteps": 1000}
    assert recognise_betas(betas_of(schedule).to(dtype), "file") == schedule


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_betas_are_refused(dtype):
    table = betas_of(SD_SCHEDULE)
    table[500] *= 1 + 4 * max(1e-5, torch.finfo(dtype).eps)
    for betas in (table, torch.linspace(0.01, 0.2, 1000) ** 3, table.flip(0), table[:1], table[None], -table):
        with pytest.raises(LdmError, match="none of scaled_linear, linear, sigmoid"):
            recognise_betas(betas.to(dtype), "file")
    with pytest.raises(LdmError, match="none of"):
        recognise_betas(torch.arange(5), "file")


def test_the_betas_are_those_of_the_papers():
    """Ho et al. 2020; Rombach et al. 2022; the sigmoid runs from -6 to 6."""
    expected = {
        "linear": torch.linspace(0.00085, 0.012, 1000).double(),
        "scaled_linear": torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2,
        "sigmoid": 0.00085 + 0.01115 * torch.sigmoid(torch.linspace(-6, 6, 1000).double()),
    }
    for kind, betas in expected.items():
        torch.testing.assert_close(betas_of({**SD_SCHEDULE, "betas": kind}), betas, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout, name", [("diffusers", "folder"), ("compvis", "model.safetensors")])
def test_a_sigmoid_schedule_stays_one(tmp_path, layout, name, capsys):
    schedule = {"class": "ldm.diffusion.schedule.DiscreteVP", "args": {"betas": "sigmoid"}}
    run = making.our_run(tmp_path / "run", schedule=schedule)
    out = export(run, tmp_path / name, layout)
    if layout == "diffusers":
        theirs = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
        ours = LatentDiffusion.load(run).denoiser.schedule.at(torch.arange(1000.0).double()).alpha ** 2
        torch.testing.assert_close(torch.tensor(theirs["trained_betas"]).neg().add(1).double().cumprod(0), ours,
                                   rtol=1e-4, atol=0)  # fmt: skip
    import_model(out, tmp_path / "back")
    assert "sigmoid betas 0.00085 to 0.012" in capsys.readouterr().out
    before, after = LatentDiffusion.load(run), LatentDiffusion.load(tmp_path / "back")
    assert after.denoiser.schedule == before.denoiser.schedule


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_single_file_in_half_precision_keeps_its_schedule(runs, tmp_path, dtype):
    """Converters turn the table of betas to half precision with everything else."""
    tensors = load_file(export(runs["sd1"], tmp_path / "m.safetensors", "compvis"))
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / "half.safetensors")
    import_model(tmp_path / "half.safetensors", tmp_path / "back")
    assert LatentDiffusion.load(tmp_path / "back").denoiser.schedule == DiscreteVP()


# ---- what a pipeline would draw otherwise


def sampler(function: str = "ddim.sample_ddim", eta: float | None = 0.0, **changes) -> dict:
    options = {} if eta is None else {"eta": eta}
    node = {"_target_": f"ldm.diffusion.samplers.{function}", "_partial_": True, **options}
    return {"function": node, "steps": 20, "spacing": "leading", "offset": 1, "final": "first", **changes}


SAME = [
    sampler(),
    sampler("euler.sample_euler", eta=None),
    sampler(steps=30, final="clean"),
    sampler(spacing="trailing", offset=0, final="clean"),
]
OTHER = {
    "sampler=dpmpp_2m becomes ddim": sampler("dpmpp.sample_dpmpp_2m", eta=None),
    "eta=0.5": sampler(eta=0.5),
    "spacing=karras becomes trailing": sampler(spacing="karras", offset=0, final="clean"),
    "spacing=uniform becomes linspace": sampler(spacing="uniform", offset=0, final="clean"),
    "offset=0 becomes 1": sampler(offset=0, final="clean"),
    "steps=30 does not divide 1000": sampler(spacing="trailing", offset=0, final="clean", steps=30),
    "shift=2.0 is lost": sampler(shift=2.0),
    "guidance_interval is lost": sampler(guidance_interval=[0.2, 0.8]),
}


def differs(node: dict, prediction: str = "v") -> list[str]:
    return what_differs(export_model.sampling_of(node), 1000, prediction)


def test_what_a_pipeline_draws_otherwise():
    """That these are all of them, and only they: tests/interop."""
    assert [differs(node) for node in SAME] == [[]] * len(SAME)
    for words, node in OTHER.items():
        assert len(differs(node)) == 1 and words in differs(node)[0]
    assert len(differs(sampler("unipc.sample_unipc", spacing="karras", shift=3.0))) == 3
    rescaled = sampler(guidance_rescale=0.7)  # ours is of v whatever the network predicts
    assert differs(rescaled) == [] and "guidance_rescale=0.7 is of v" in differs(rescaled, "epsilon")[0]


def test_export_says_how_to_draw_and_what_will_be_another_picture(tmp_path, capsys):
    run = making.our_run(tmp_path / "run", sampler=sampler(eta=0.5, spacing="trailing", offset=0, guidance_rescale=0.7))
    export(run, tmp_path / "out", "diffusers")
    said = capsys.readouterr().out
    assert "pipe(prompt, num_inference_steps=20, guidance_scale=5.0, guidance_rescale=0.7, eta=0.5)" in said
    assert "another picture than sample.py's: eta=0.5 takes its noise from elsewhere" in said
    export(run, tmp_path / "parts", "diffusers", "--parts", "unet,vae")
    assert "pipe(" not in capsys.readouterr().out  # nothing to draw with


def test_import_says_what_it_does_not_take_over(folder, tmp_path, capsys):
    edit(folder / SCHEDULER, lambda c: c.update(_class_name="DPMSolverMultistepScheduler"))
    import_model(folder, tmp_path / "a")
    assert "names DPMSolverMultistepScheduler: the run draws with DDIM" in capsys.readouterr().out
    edit(folder / SCHEDULER, lambda c: c.update(timestep_spacing="linspace", set_alpha_to_one=False))
    import_model(folder, tmp_path / "b")
    assert "goes on to clean" in capsys.readouterr().out
    model = LatentDiffusion.load(tmp_path / "b")
    build(model.sampler).check(model.denoiser.schedule)
    torch.save(load_file(folder / WEIGHTS), (folder / WEIGHTS).with_suffix(".bin"))
    (folder / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    import_model(folder, tmp_path / "c")
    assert "unet is read from diffusion_pytorch_model.bin" in capsys.readouterr().out


# ---- refusals: nothing is left


@pytest.fixture
def folder(runs, tmp_path):
    return export(runs["sd1"], tmp_path / "folder", "diffusers")


def edit(path: Path, change) -> None:
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


UNET, VAE = "unet/config.json", "vae/config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCHEDULER, TEXT = "scheduler/scheduler_config.json", "text_encoder/config.json"


@pytest.mark.parametrize(
    "file, change, words",
    [
        (WEIGHTS, lambda t: t.pop("conv_in.bias"), "1 missing: conv_in.bias"),
        (WEIGHTS, lambda t: t.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (WEIGHTS, lambda t: t.update({"conv_in.bias": torch.zeros(3)}), r"conv_in.bias is \[3\] instead of \[32\]"),
        (WEIGHTS, lambda t: t["conv_in.bias"].fill_(float("nan")), "conv_in.bias holds NaN"),
        ("vae/diffusion_pytorch_model.safetensors", lambda t: t.pop("quant_conv.bias"), "missing: quant_conv.bias"),
        ("text_encoder/model.safetensors", lambda t: t.pop("text_model.final_layer_norm.bias"), "final_layer_norm"),
        (UNET, lambda c: c.update(resnet_time_scale_shift="scale_shift"), "resnet_time_scale_shift"),
        (UNET, lambda c: c.update(class_embed_type="timestep"), "class_embed_type"),
        (UNET, lambda c: c.update(new_trick=3), "new_trick=3"),
        (UNET, lambda c: c.update(down_block_types=["KDownBlock2D"] * 4), "down_block_types"),
        (UNET, lambda c: c.update(up_block_types=["UpBlock2D"] * 4), "up_block_types"),
        (UNET, lambda c: c.update(in_channels=9), "9 channels: an inpainting"),
        (UNET, lambda c: c.update(attention_head_dim=[8, 4, 2, 3]), "attention_head_dim"),
        (VAE, lambda c: c.update(act_fn="relu"), "act_fn"),
        (VAE, lambda c: c.update(use_post_quant_conv=False), "use_post_quant_conv"),
        (TEXT, lambda c: c.update(layer_norm_eps=1e-3), "layer_norm_eps"),
        ("tokenizer/vocab.json", lambda c: c.update({"<sks>": 49408}), "tokenizer is not CLIP's.*sks"),
        (SCHEDULER, lambda c: c.update(beta_schedule="squaredcos_cap_v2"), "beta_schedule"),
        (SCHEDULER, lambda c: c.update(trained_betas=[0.1]), "its betas"),
        (SCHEDULER, lambda c: c.update(trained_betas="abc"), "trained_betas"),
        (SCHEDULER, lambda c: c.update(rescale_betas_zero_snr=True), "Epsilon divides by alpha.*--prediction v"),
        (SCHEDULER, lambda c: c.update(num_train_timesteps=10**12), "num_train_timesteps"),
        (SCHEDULER, lambda c: c.update(prediction_type="flow"), "prediction_type"),
        ("model_index.json", lambda c: c.update(_class_name="StableDiffusionInpaintPipeline"), "InpaintPipeline"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_fit_is_refused_and_nothing_is_left(folder, tmp_path, file, change, words):
    edit(folder / file, change)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(LdmError, match=words) as caught:
        import_model(folder, tmp_path / "run")
    assert caught.value.exit_code in (2, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_file_whose_prediction_and_schedule_contradict_each_other_is_refused(runs, tmp_path):
    tensors = load_file(export(runs["sd1"], tmp_path / "m.safetensors", "compvis"))
    save_file({**tensors, "ztsnr": torch.zeros(0)}, tmp_path / "z.safetensors")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(LdmError, match="Epsilon divides by alpha"):
        import_model(tmp_path / "z.safetensors", tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    import_model(tmp_path / "z.safetensors", tmp_path / "run", "v")
    assert LatentDiffusion.load(tmp_path / "run").denoiser.schedule == ZeroTerminalSNR()


STRANGE = [None, True, -1, 0, 3, 0.5, 1e30, float("nan"), "x", [], ["x"], [3], [None] * 4, {}, {"a": 1}]
READERS = {
    UNET: (settings.read_unet_config, UNet),
    VAE: (lambda *given: settings.read_vae_config(*given)[0], AutoencoderKL),
    SCHEDULER: (lambda *given: read_scheduler_config(*given)["schedule"], DiscreteVP),
    TEXT: (lambda *given: clip.arguments_from_transformers(*given, projection=True, pad_id=0), OpenClipText),
}


@pytest.mark.parametrize("file", READERS)
def test_strange_settings_are_refused_in_one_line_or_give_a_model(runs, tmp_path_factory, file):
    """Whatever stands at any key: no other error than ours."""
    folder = tmp_path_factory.getbasetemp() / "settings"
    if not folder.exists():
        export(runs["sd1"], folder, "diffusers")
    original, refused, built = json.loads((folder / file).read_text()), [], set()
    read, kind = READERS[file]
    for key in original:
        for value in STRANGE:
            try:
                args = read({**original, key: value}, "file")
                if str(args) in built:
                    continue
                built.add(str(args))
                with torch.device("meta" if issubclass(kind, torch.nn.Module) else "cpu"):
                    build_saved({"class": f"{kind.__module__}.{kind.__name__}", "args": args})
            except LdmError:
                refused.append(key)
    assert len(refused) > len(original) and set(refused) < set(original)


@pytest.mark.parametrize("value", [v for v in STRANGE if v not in (None, "x")] + ["<pad>"])
def test_a_strange_padding_token_is_refused(value):
    with pytest.raises(LdmError, match="padding token"):
        clip.read_pad_id({"pad_token": value}, clip.vocabulary()[0], "folder")


def test_nothing_is_overwritten_and_a_crash_leaves_nothing(runs, folder, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    with pytest.raises(LdmError, match="something at this place"):
        import_model(folder, tmp_path / "taken")
    with pytest.raises(LdmError, match="cannot name a run"):
        import_model(folder, tmp_path / "Not A Name")
    before = sorted(p.name for p in tmp_path.iterdir())
    save = Store.save

    def torn(self, step, **contents):
        if "diffusion" in str(self.folder):
            raise OSError(28, "No space left on device")
        return save(self, step, **contents)

    monkeypatch.setattr(Store, "save", torn)
    with pytest.raises(OSError):
        import_model(folder, tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    monkeypatch.setattr(export_autoencoder, "write_tensors", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    for layout, name in (("diffusers", "out"), ("compvis", "out.safetensors")):
        with pytest.raises(OSError):
            export(runs["sd1"], tmp_path / name, layout)
        assert sorted(p.name for p in tmp_path.iterdir()) == before


# ---- what these layouts cannot say


@pytest.mark.parametrize(
    "layout, changes, words",
    [
        ("diffusers", {"network": {"qk_norm": True}}, "qk_norm=true"),
        ("compvis", {"network": {"qk_norm": True}}, "qk_norm=true"),
        ("diffusers", {"network": {"mid_transformer_depth": 0}}, "mid_transformer_depth=0"),
        ("diffusers", {"autoencoder": {"patch_size": 2}}, "patch_size=2"),
        ("compvis", {"network": {"num_heads": 4}}, "num_heads=4"),
        ("compvis", {"network": {"norm_groups": 16}}, "norm_groups=16"),
        ("diffusers", {"network": {"vector_size": 64}}, "vector of 64"),
        ("diffusers", {"prediction": "Flow", "schedule": {"class": "ldm.diffusion.schedule.RectifiedFlow", "args": {}}},
         "RectifiedFlow"),
        ("diffusers", {"text": {"class": "ldm.models.conditioner.text_transformer.TextTransformer",
                                "args": {"width": 64, "embedding_size": 8}}}, "TextTransformer"),
        ("diffusers", {"text": {"class": "ldm.models.conditioner.open_clip.OpenClipText",
                                "args": {**making.our_text("sd1"), "pad_id": 5}}}, "pad_id=5"),
        ("compvis", {"text": {"class": "ldm.models.conditioner.open_clip.OpenClipText",
                              "args": {**making.our_text("sd1"), "pad_id": 0}}}, "pad_id=0"),
        ("diffusers", {"text": {"class": "ldm.models.conditioner.open_clip.OpenClipText",
                                "args": {**making.our_text("sd1"), "final_norm": False}}}, "final_norm=false"),
    ],
)  # fmt: skip
def test_a_part_that_cannot_be_said_is_named(tmp_path, layout, changes, words):
    run = making.our_run(tmp_path / "run", **changes)
    out = tmp_path / ("out.safetensors" if layout == "compvis" else "out")
    with pytest.raises(LdmError, match=words) as caught:
        export(run, out, layout)
    assert caught.value.code == "EXPORT" and sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_the_networks_alone_of_a_run_whose_text_encoder_is_ours(tmp_path):
    text = {
        "class": "ldm.models.conditioner.text_transformer.TextTransformer",
        "args": {"width": 64, "embedding_size": 8},
    }
    run = making.our_run(tmp_path / "run", text=text)
    folder = export(run, tmp_path / "out", "diffusers", "--parts", "unet,vae")
    assert sorted(p.name for p in folder.iterdir()) == ["unet", "vae"]
    ours = making.tensors_of(run)
    for name, tensor in load_file(folder / WEIGHTS).items():
        assert torch.equal(tensor, ours[f"diffusion/denoiser.network.{name}"])


# ---- XL


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    home = tmp_path_factory.mktemp("xl")
    return making.our_run(home / "run", "sdxl", text=making.our_xl_text(), std=1 / 0.13025)


def xl_file(run: Path, path: Path) -> Path:
    """Both towers beside the networks, under the names that Stability AI published them with."""
    tensors = load_file(export(run, path, "compvis", "--parts", "unet,vae"))
    ours = {k.removeprefix("diffusion/conditioner.parts."): v for k, v in making.tensors_of(run).items()}
    first = {k.removeprefix("clip."): v for k, v in ours.items() if k.startswith("clip.")}
    home = "conditioner.embedders.0.transformer.text_model."
    tensors |= keymap.to_theirs(clip.map_transformers(first, text_model=home), first)
    second = {k.removeprefix("open_clip.tower."): v for k, v in ours.items() if k.startswith("open_clip.")}
    tensors |= {f"conditioner.embedders.1.model.{k}": v for k, v in second.items()}
    tensors |= {
        f"{home}embeddings.position_ids": torch.arange(77),
        "conditioner.embedders.1.model.logit_scale": torch.ones(()),
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def test_xl_comes_with_both_of_its_text_towers(xl, tmp_path, capsys):
    import_model(xl_file(xl, tmp_path / "xl.safetensors"), tmp_path / "back")
    said = capsys.readouterr().out
    assert "Stable Diffusion XL" in said and "clip 3." in said and "sample.py run=" in said
    same(xl, tmp_path / "back")
    old, new = LatentDiffusion.load(xl), LatentDiffusion.load(tmp_path / "back")
    columns = {"size": [(64, 64, 0, 0, 64, 64)] * 2}
    before, after = (model.condition(["a red fox", ""], columns) for model in (old, new))
    assert torch.equal(before.tokens, after.tokens) and torch.equal(before.vector, after.vector)
    assert before.tokens.shape == (2, 77, 96) and before.vector.shape == (2, 96)
    assert new.reads == ("caption", "size") and "size" in new.conditioner.keep
    with pytest.raises(LdmError, match="vector of 96"):
        export(tmp_path / "back", tmp_path / "out", "diffusers")
    again = export(tmp_path / "back", tmp_path / "again.safetensors", "compvis", "--parts", "unet,vae")
    first = export(xl, tmp_path / "first.safetensors", "compvis", "--parts", "unet,vae")
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("conditioner.embedders.1.model.ln_final.bias"), "1 missing: .*ln_final.bias"),
        (lambda t: t.update({"conditioner.embedders.0.model.x": torch.zeros(1)}), "refiner"),
        (lambda t: t.update({"cond_stage_model.model.x": torch.zeros(1)}), "1 unexpected: cond_stage_model.model.x"),
        (lambda t: [t.pop(k) for k in list(t) if "embedders.0" in k], "tokens of width 96 .*towers give .* 800"),
    ],
)
def test_an_xl_file_that_does_not_fit_is_refused(xl, tmp_path, change, words):
    file = xl_file(xl, tmp_path / "xl.safetensors")
    edit(file, change)
    with pytest.raises(LdmError, match=words):
        import_model(file, tmp_path / "back")
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_xl_without_its_text_encoders_says_what_is_missing(tmp_path, capsys):
    """A narrow UNet with XL's own widths of text: the towers are known, their weights are not there."""
    sizes = {"context_size": 2048, "vector_size": 2816, "transformer_depth": [0, 1, 1], "mid_transformer_depth": 1}
    text = {"class": "ldm.models.conditioner.compose.Compose", "args": {"parts": {}}}
    run = making.our_run(tmp_path / "run", "sdxl", network=sizes, text=text)
    file = export(run, tmp_path / "xl.safetensors", "compvis", "--parts", "unet,vae")
    import_model(file, tmp_path / "back")
    said = capsys.readouterr().out
    assert "no weights of the text towers clip, open_clip" in said and "try: python sample.py" not in said
    keys = [f"model.conditioner.parts.{name}.weights=FILE" for name in ("clip", "open_clip")]
    assert " ".join(keys) in said
    with pytest.raises(LdmError, match=r"no weights of its text towers: .*clip, .*open_clip; .*weights=FILE") as caught:
        LatentDiffusion.load(tmp_path / "back")
    assert caught.value.code == "WEIGHTS"
    # the same as the preset, whose second tower open_clip knows by name
    config = Store(tmp_path / "back" / "diffusion" / "ckpt").newest().document("config")
    preset = to_saved(compose("train", ["model/conditioner=sdxl"])["model"]["conditioner"])
    with torch.device("meta"):
        shapes = [shapes_of(build_saved(node)) for node in (config["conditioner"], preset)]
    assert shapes[0] == shapes[1]
    for node in (config["conditioner"], preset):
        del node["args"]["parts"]["open_clip"]["args"]["config"]
    assert config["conditioner"] == preset
    shutil.copytree(CONFIGS, tmp_path / "configs")
    shutil.copy(tmp_path / "back" / "experiment.yaml", tmp_path / "configs" / "experiment" / "mine.yaml")
    words = ["experiment=mine", "data.path=shards"]
    files = [key.replace("FILE", f"{i}.safetensors") for i, key in enumerate(keys)]
    cfg = compose("train", words + files, config_dir=tmp_path / "configs")
    assert cfg["data"]["columns"] == {"size": "@size"} and cfg["model"]["network"]["context_size"] == 2048
    assert cfg["model"]["conditioner"]["parts"]["open_clip"]["weights"] == "1.safetensors"


def without_towers(xl: Path, folder: Path, *names: str) -> Path:
    """A copy of the run whose checkpoint lacks these text towers."""
    shutil.copytree(xl, folder)
    old = Store(folder / "diffusion" / "ckpt").newest()
    tensors = {k: v for k, v in old.tensors("model").items() if k.split(".")[2] not in names}
    documents = {name: old.document(name) for name in ("state", "config")}
    Store(folder / "diffusion" / "ckpt").save(8, tensors={"model": tensors}, trees={}, documents=documents)
    return folder


def test_a_training_brings_the_towers_that_its_source_lacks(xl, tmp_path):
    source = Store(without_towers(xl, tmp_path / "half", "clip", "open_clip") / "diffusion" / "ckpt").newest()
    whole = LatentDiffusion.load(xl)
    node = making.our_xl_text()

    def fresh() -> LatentDiffusion:
        conditioner = build_saved(node)
        denoiser = build_saved(source.document("config")["denoiser"])
        return LatentDiffusion(whole.autoencoder, conditioner, denoiser, image_size=64)

    with pytest.raises(LdmError, match=r"towers: conditioner\.parts\.clip, conditioner\.parts\.open_clip;"):
        load_source(fresh(), source)
    for name in ("clip", "open_clip"):
        state = whole.conditioner.parts[name].tower.state_dict()
        save_file(state, tmp_path / f"{name}.safetensors")
        node["args"]["parts"][name]["args"]["weights"] = str(tmp_path / f"{name}.safetensors")
    model = fresh()
    load_source(model, source)
    expected = whole.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    # a tower that the source holds comes from there, whatever file it names
    (tmp_path / "clip.safetensors").unlink()
    one = Store(without_towers(xl, tmp_path / "one", "open_clip") / "diffusion" / "ckpt").newest()
    model = fresh()
    load_source(model, one)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


# ---- statistics


@pytest.mark.parametrize("quant_conv", [True, False])
def test_statistics_of_each_channel_are_worked_into_the_autoencoder(tmp_path, quant_conv):
    mean, std = [0.3, -1.0, 0.0, 2.0], [2.0, 0.5, 5.0, 1.0]
    run = making.our_run(tmp_path / "run", mean=mean, std=std, autoencoder={"quant_conv": quant_conv})
    exported = read_run(run)
    assert scaling_factor(exported.mean, exported.std) is None
    folded, args, scale = exported.scaled()
    assert scale == 0.18215 and args["quant_conv"]
    theirs = build_saved({"class": "ldm.models.autoencoder.kl.AutoencoderKL", "args": args}).double()
    theirs.load_state_dict({**theirs.state_dict(), **folded})
    ours = LatentDiffusion.load(run).autoencoder.double()
    images, noise = torch.rand(2, 3, 32, 32).double() * 2 - 1, torch.randn(2, 4, 4, 4).double()
    raw = theirs.moments(images)
    latents = (raw[:, :4] + torch.exp(0.5 * raw[:, 4:]) * noise) * scale  # as diffusers' pipelines do it
    torch.testing.assert_close(latents, ours.encode(images, noise), rtol=1e-5, atol=1e-6)  # folded weights are float32
    torch.testing.assert_close(theirs.decode_raw(latents / scale), ours.decode(latents), rtol=1e-5, atol=1e-5)
    untouched = ours.encode(images, noise) - ours.latents(ours.moments(images) * 1.01, noise)
    assert untouched.abs().max() > 1e-4  # what a wrong factor would do


def test_one_factor_for_all_channels_needs_no_change(runs):
    exported = read_run(runs["sd1"])
    weights, _, scale = exported.scaled()
    assert scale == 0.18215 and weights is exported.vae
    assert exported.scaled(0.13025)[0] is not exported.vae


# ---- the commands


@pytest.mark.parametrize(
    "words, text",
    [
        (["import"], "required: PATH, OUT"),
        (["import", "nowhere", "out"], "no such file or folder"),
        (["import", "a", "b", "--prediction", "w"], "--prediction"),
        (["export", "a", "b", "--format", "onnx"], "invalid choice"),
        (["export", "a", "b", "--format", "compvis", "--parts", "clip"], "--parts clip"),
        (["exprt"], "export"),
    ],
)
def test_wrong_commands_are_one_line(monkeypatch, capsys, words, text):
    from ldm.__main__ import main

    monkeypatch.setattr("sys.argv", ["ldm", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr().err
    assert caught.value.code == 2 and text in said and said.count("error[") == 1 and "Traceback" not in said


if __name__ == "__main__":
    (Path(__file__).parent / "golden_keys.json").write_text(json.dumps(all_fingerprints(), indent=1) + "\n")
