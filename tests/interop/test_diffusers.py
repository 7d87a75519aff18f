"""Models go to diffusers and come from it, and both draw the same picture from the same noise."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.toy_logos.make import write_set
from ldm.build import build
from ldm.checkpoints.formats import clip, diffusers, keymap, schedules, settings
from ldm.checkpoints.store import Store
from ldm.diffusion.schedule import DiscreteVP
from ldm.model import LatentDiffusion
from ldm.models.autoencoder.kl import AutoencoderKL
from ldm.random import Draws, Purpose
from ldm.sampling.tasks import SAMPLING_KEY, text_to_image
from ldm.tools import export_model
from ldm.tools.import_model import import_model
from tests.checkpoints.test_formats import OTHER, SAME, full
from tests.integration.tiny import command
from tests.interop import making

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

PROMPTS, NEGATIVE, SEEDS = ["a red fox, flat logo", "un café, déjà vu"], "blurry", [3, 4]
# float32 over 20 guided steps and a decoder; 1e-5 was seen at most, pictures in [-1, 1]
PICTURE = 5e-5
PREDICTIONS = {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Nine logos of 64 pixels."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_set(folder, num_samples=9, num_val=2, num_shards=1, size=64)
    return folder


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Saved by diffusers itself, and imported: family -> (pipeline, its folder, our run)."""
    home = tmp_path_factory.mktemp("pipelines")
    found = {}
    for family, prediction in PREDICTIONS.items():
        pipe = making.pipeline(family, home / family, prediction)
        import_model(home / family, home / f"run-{family}")
        found[family] = (pipe, home / family, home / f"run-{family}")
    return found


def our_pictures(run: Path, **changes) -> torch.Tensor:
    model = LatentDiffusion.load(run)
    sampling = build({**model.sampler, "steps": 20, "guidance_scale": 5.0, **changes})
    return text_to_image(model, PROMPTS, SEEDS, sampling, negative_prompt=NEGATIVE)


def their_pictures(pipe) -> torch.Tensor:
    """From the noise that our seeds stand for."""
    noise = Draws(SAMPLING_KEY, torch.tensor(SEEDS)).normal(Purpose.SAMPLE_INIT, (4, 8, 8))
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        found = pipe(
            PROMPTS, negative_prompt=[NEGATIVE] * 2, latents=noise, num_inference_steps=20, guidance_scale=5.0,
            output_type="pt",
        )  # fmt: skip
    return found.images * 2 - 1


@pytest.mark.parametrize("family", ["sd1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd2", "sdxl"))])
def test_an_imported_pipeline_draws_the_same_picture(pipelines, family):
    pipe, _, run = pipelines[family]
    ours, theirs = our_pictures(run), their_pictures(pipe)
    assert ours.std() > 0.2 and (ours[0] - ours[1]).abs().max() > 0.1
    assert (ours - theirs).abs().max() < PICTURE
    # what a wrong reading of the scheduler would do
    for change in ({"offset": 20}, {"spacing": "trailing", "offset": 0}, {"guidance_scale": 4.5}, {"final": "clean"}):
        assert (our_pictures(run, **change) - theirs).abs().max() > 10 * PICTURE, change


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_an_exported_model_draws_the_same_picture(pipelines, tmp_path, family):
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    run = pipelines[family][2]
    ours = our_pictures(run)
    for name, layout in (("folder", "diffusers"), ("model.safetensors", "compvis")):
        export_model.main([str(run), str(tmp_path / name), "--format", layout])
    folder = DiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert type(folder) is StableDiffusionPipeline
    assert (their_pictures(folder) - ours).abs().max() < PICTURE
    file = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "model-config"), local_files_only=True
    )
    assert (their_pictures(file) - ours).abs().max() < PICTURE


@pytest.mark.slow
def test_a_run_with_all_that_differs_draws_the_same_picture(tmp_path):
    """SD2's whole tower of 24 blocks with its last one unused, and statistics of each channel, in a single file."""
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    text = {"class": "ldm.models.conditioner.open_clip.OpenClipText", "args": making.our_text("sd2", layers=24)}
    changes = {"mean": [0.3, -0.2, 0.0, 0.5], "std": [3.0, 5.0, 6.0, 4.0], "text": text}
    run = making.our_run(tmp_path / "run", "sd2", prediction="Velocity", **changes)
    ours = our_pictures(run)
    export_model.main([str(run), str(tmp_path / "folder"), "--format", "diffusers"])
    export_model.main([str(run), str(tmp_path / "model.safetensors"), "--format", "compvis"])
    folder = DiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert folder.text_encoder.config.num_hidden_layers == 23 and folder.tokenizer.pad_token_id == 0
    file = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "model-config"), local_files_only=True
    )
    assert (their_pictures(folder) - ours).abs().max() < PICTURE
    assert (their_pictures(file) - ours).abs().max() < PICTURE
    folder.vae.config.scaling_factor = 0.2
    assert (their_pictures(folder) - ours).abs().max() > 10 * PICTURE


@pytest.mark.slow
@pytest.mark.parametrize("how", ["shards", "fp16", "bin"])
def test_the_other_ways_in_which_diffusers_saves(pipelines, tmp_path, how):
    from diffusers import DiffusionPipeline

    pipe, folder, run = pipelines["sd1"]
    out = tmp_path / "folder"
    if how == "shards":
        pipe.save_pretrained(out, max_shard_size="4MB")
        assert len(list((out / "unet").glob("*.safetensors"))) > 1
    elif how == "fp16":
        DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16).save_pretrained(out, variant="fp16")
        assert (out / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    else:
        pipe.save_pretrained(out)
        for part in ("unet", "vae"):
            file = out / part / "diffusion_pytorch_model.safetensors"
            torch.save(getattr(pipe, part).state_dict(), file.with_suffix(".bin"))
            file.unlink()
    import_model(out, tmp_path / "run")
    expected, found = making.tensors_of(run), making.tensors_of(tmp_path / "run")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        wanted = tensor.half() if how == "fp16" and "statistics" not in name else tensor
        assert torch.equal(found[name], wanted), name


def both_ways(node: dict) -> float:
    """How far diffusers' DDIM, set up as an export sets it up, ends from our sampler, for one known denoiser."""
    from diffusers import DDIMScheduler

    args, schedule = export_model.sampling_of(node), DiscreteVP()
    sampling = build({"_target_": "ldm.sampling.tasks.Sampling", **node})
    start = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0)).double()
    noise = torch.randn(60, 2, 4, 8, 8, generator=torch.manual_seed(1)).double()

    def x0(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        return torch.tanh(2 * x - alpha)

    levels = sampling.levels(schedule)
    ours = sampling.function(lambda x, level: x0(x, level.alpha), start, levels, noise=lambda step, shape: noise[step])
    theirs = DDIMScheduler.from_config(schedules.scheduler_config(schedules.SD_SCHEDULE, False, "x0", args))
    theirs.set_timesteps(args["steps"])
    x = start
    for t in theirs.timesteps:
        x = theirs.step(x0(x, theirs.alphas_cumprod[t].sqrt()), t, x, eta=args["function"].get("eta", 0.0)).prev_sample
    return float((ours - x).abs().max())


def test_only_what_export_names_draws_another_picture():
    """Diffusers keeps its tables in float32; 8e-6 was seen at most."""
    assert max(both_ways(node) for node in SAME) < 2e-5
    others = {words: both_ways(node) for words, node in OTHER.items() if "interval" not in words}
    assert min(others.values()) > 1e-3, others


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["diffusers", "compvis"])
def test_a_sigmoid_schedule_draws_the_same_picture(tmp_path, layout):
    """DDIMScheduler has no name for it: it goes as a table of betas."""
    from diffusers import StableDiffusionPipeline

    schedule = {"class": "ldm.diffusion.schedule.DiscreteVP", "args": {"betas": "sigmoid"}}
    run = making.our_run(tmp_path / "run", schedule=schedule)
    out = tmp_path / ("out" if layout == "diffusers" else "out.safetensors")
    export_model.main([str(run), str(out), "--format", layout])
    if layout == "diffusers":
        pipe = StableDiffusionPipeline.from_pretrained(out, local_files_only=True)
    else:
        pipe = StableDiffusionPipeline.from_single_file(
            str(out), config=str(tmp_path / "out-config"), local_files_only=True
        )
    ours = our_pictures(run)
    assert (their_pictures(pipe) - ours).abs().max() < PICTURE
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, trained_betas=None)  # linear
    assert (their_pictures(pipe) - ours).abs().max() > 10 * PICTURE


@pytest.mark.parametrize("part", ["sd1", "sd2", "sdxl", "vae", "text1", "text2"])
def test_full_key_sets_are_those_of_the_libraries(part):
    """Names and shapes of what we write equal what the library's own model of that size has."""
    from diffusers import AutoencoderKL as Theirs
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    ours = full(part)
    with torch.device("meta"):
        if part == "vae":
            table, model = diffusers.map_vae(ours), Theirs(**making.FULL_VAE)
        elif part.startswith("text"):
            width, layers = (768, 12) if part == "text1" else (1024, 24)
            sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
            model = CLIPTextModel(CLIPTextConfig(num_hidden_layers=layers, **sizes))
            text = "text_model." if hasattr(model, "text_model") else ""
            names = [name for name in ours if name != "tower.text_projection"]
            table = clip.map_transformers(names, text_model=text)
        else:
            table, model = diffusers.map_unet(ours), UNet2DConditionModel(**making.FULL_UNETS[part])
    theirs = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert keymap.their_shapes(table, ours) == theirs


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_settings_go_there_and_come_back(family):
    theirs = dict(making.unet(family).config)
    args = settings.read_unet_config(theirs, "config.json")
    expected = {"concat_channels": 0, "norm_groups": 32, "vector_size": None, **making.OURS[family]}
    assert {key: args[key] for key in expected} == expected
    with_all = {"qk_norm": False, "plain_attention": False, **args}
    written = settings.unet_config(with_all, 8)
    assert settings.read_unet_config(written, "config.json") == args
    from diffusers import UNet2DConditionModel

    again = UNet2DConditionModel.from_config(written)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (again, making.unet(family))]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(
    "changes", [{}, {"use_quant_conv": False, "use_post_quant_conv": False}, {"latent_channels": 16}]
)
def test_the_autoencoder_equals_diffusers(dtype, limit, changes):
    reference = making.vae(**changes).to(dtype)
    args, _, _ = settings.read_vae_config(dict(reference.config), "config.json")
    ours = AutoencoderKL(**args).to(dtype)
    table = diffusers.map_vae([name for name in ours.state_dict() if not name.startswith("statistics.")])
    ours.load_state_dict({**ours.state_dict(), **keymap.to_ours(table, reference.state_dict())})
    images = torch.rand(2, 3, 64, 48, generator=torch.manual_seed(0)).to(dtype) * 2 - 1
    with torch.no_grad():
        posterior = reference.encode(images).latent_dist
        moments = ours.moments(images)
        assert making.relative(moments, torch.cat([posterior.mean, posterior.logvar], 1)) < limit
        assert making.relative(ours.decode_raw(posterior.mean), reference.decode(posterior.mean).sample) < limit
        ours.encoder.down_blocks[0].downsamplers[0].asymmetric = False  # pads on all sides, as a UNet does
        ours.encoder.down_blocks[0].downsamplers[0].conv.padding = (1, 1)
        assert making.relative(ours.moments(images), torch.cat([posterior.mean, posterior.logvar], 1)) > 100 * limit


@pytest.mark.slow
def test_the_commands(pipelines, tmp_path):
    """The import and a picture of it."""
    folder = pipelines["sd1"][1]
    done = subprocess.run(
        [sys.executable, "-m", "ldm", "import", str(folder), str(tmp_path / "mine")], capture_output=True, text=True
    )
    assert done.returncode == 0 and "found: Stable Diffusion 1" in done.stdout, done.stderr
    words = [f"run={tmp_path / 'mine'}", "prompt=a red fox", "count=1", "sampler.steps=2", f"output_dir={tmp_path}"]
    code, output = command(words, "sample.py")
    assert code == 0, output
    assert Image.open(next(tmp_path.glob("*.png"))).size == (64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("family", PREDICTIONS)
def test_training_goes_on_from_an_imported_run(pipelines, shards, tmp_path, family):
    from ldm.config import compose
    from ldm.training.fit import train
    from tests.conftest import CONFIGS

    run = pipelines[family][2]
    shutil.copytree(CONFIGS, tmp_path / "configs")
    shutil.copy(run / "experiment.yaml", tmp_path / "configs" / "experiment" / "mine.yaml")
    stage = ["max_steps=2", "lr_schedule.warmup_steps=0", "batch_size=2", "sample_every=null", "validate_every=null"]
    words = ["experiment=mine", f"data.path={shards}", f"output_dir={tmp_path}", "name=tuned", "logger.mode=disabled"]
    words += [f"stage.diffusion.{word}" for word in (*stage, "precision=32", "sample_prompts=[]")]
    train(compose("train", words, config_dir=tmp_path / "configs"))
    before, after = making.tensors_of(run), making.tensors_of(tmp_path / "tuned")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("diffusion/denoiser.") for name in changed)  # the towers are frozen
    config = Store(tmp_path / "tuned" / "diffusion" / "ckpt").newest().document("config")
    prediction = config["denoiser"]["args"]["prediction"]["class"]
    assert prediction.endswith("Velocity" if family == "sd2" else "Epsilon")
