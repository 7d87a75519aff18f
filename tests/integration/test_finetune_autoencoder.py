"""Fine-tuning an autoencoder: what stays, what is taken along, and what is refused."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.checkpoints.run import point_latest
from ldm.checkpoints.store import Store
from ldm.cli import compose
from ldm.errors import LdmError
from ldm.model import LatentDiffusion, load_autoencoder, open_stage, read_weights
from ldm.models.autoencoder.kl import AutoencoderKL
from ldm.models.autoencoder.vq import AutoencoderVQ
from ldm.reconstruction.objective import ReconstructionObjective
from ldm.training.assemble import check_parts
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.fit import train
from ldm.training.stage_module import StageSettings
from ldm.validate import validate
from tests.integration.tiny import GAN, command, compare_runs, config, history, overrides

DECODER = ("decoder.", "post_quant_conv.")
VQ = ["model/autoencoder=vq_toy", "model.autoencoder.codebook_size=32", "model.autoencoder.revive_every=2"]


def tune(shards: Path, runs: Path, source: Path, *more: str, steps: int = 12, save_every: int = 4) -> Path:
    """A decoder trained further, unless `more` says otherwise."""
    words = [f"init_from={source}", "stages=[autoencoder]", "stage.autoencoder.train=decoder", "name=tuned", *more]
    train(config(shards, runs, *words, steps=steps, save_every=save_every))
    return runs / "tuned"


@pytest.fixture(scope="module")
def tuned(finished, shards, tmp_path_factory) -> Path:
    """The decoder of the finished run, trained on with everything that has a state. Read it, do not change it."""
    return tune(shards, tmp_path_factory.mktemp("runs"), finished, *GAN)


def moved(before: Path, after: Path) -> set[str]:
    """Names of tensors that differ between the autoencoders that two runs give, of averaged weights."""
    old, new = (read_weights(open_stage(run, "autoencoder"), "ema") for run in (before, after))
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def test_only_the_decoder_changes(finished, tuned):
    changed = moved(finished, tuned)
    every = set(open_stage(finished, "autoencoder").tensors("model"))
    assert changed == {name for name in every if name.startswith(DECODER)}
    old, new = (open_stage(run, "autoencoder") for run in (finished, tuned))
    assert set(new.tensors("ema")) == changed  # of what is trained, and the checkpoint is whole all the same
    assert len(new.tree("optim")["state"]) == len(changed) + 1  # and the log-variance
    for key in ("latent_id", "latent_mean", "latent_std", "latent_images", "latent_source"):
        assert new.document("state")[key] == old.document("state")[key] is not None, key
    assert load_autoencoder(new).latent_id() == load_autoencoder(old).latent_id()
    # the guard sees what it guards: trained whole, the encoder moves
    first = open_stage(finished, "autoencoder").path.parent
    assert any(
        not torch.equal(a, b)
        for (name, a), b in zip(
            Store(first).load(4).tensors("model").items(), Store(first).load(8).tensors("model").values(), strict=True
        )
        if name.startswith("encoder.")
    )


def test_the_denoiser_comes_along_and_draws_with_the_new_decoder(finished, tuned, capsys):
    old, new = LatentDiffusion.load(finished), LatentDiffusion.load(tuned)
    before = dict(old.denoiser.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in new.denoiser.named_parameters())
    latents = torch.linspace(-1, 1, 4 * 4 * 4).view(1, 4, 4, 4)
    assert float((old.decode(latents) - new.decode(latents)).abs().max()) > 1e-3
    images = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    assert torch.equal(old.encode(images), new.encode(images))


@pytest.mark.slow
def test_it_goes_on_where_it_stopped(finished, shards, tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "tuned")
    store = Store(tmp_path / "tuned" / "autoencoder" / "ckpt")
    for step in (8, 12):
        shutil.rmtree(store.path(step))
    tune(shards, tmp_path, finished, *GAN)
    assert compare_runs(tuned, tmp_path / "tuned", "autoencoder") == []
    assert history(tuned, "autoencoder") == history(tmp_path / "tuned", "autoencoder")


@pytest.mark.slow
def test_another_source_or_another_choice_is_no_continuation(finished, shards, tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "tuned")
    shutil.rmtree(Store(tmp_path / "tuned" / "autoencoder" / "ckpt").path(12))
    other = tmp_path / "other"
    train(config(shards, other, "stages=[autoencoder]", "seed=5", steps=2))
    with pytest.raises(LdmError, match="latent_id; checkpoint"):
        tune(shards, tmp_path, other / "tiny", *GAN)
    with pytest.raises(LdmError, match=r"stage.autoencoder.train; checkpoint decoder, now absent"):
        tune(shards, tmp_path, finished, *GAN, "stage.autoencoder.train=all")


@pytest.mark.slow
def test_trained_whole_it_has_other_latents_and_no_denoiser(finished, shards, tmp_path):
    whole = tune(shards, tmp_path, finished, "stage.autoencoder.train=all", steps=2)
    assert any(name.startswith("encoder.") for name in moved(finished, whole))
    old, new = (open_stage(run, "autoencoder").document("state") for run in (finished, whole))
    assert old["latent_id"] != new["latent_id"] and "of step 2" in new["latent_source"]
    with pytest.raises(LdmError, match="diffusion"):
        LatentDiffusion.load(whole)
    shutil.copytree(finished / "diffusion", whole / "diffusion")  # by hand, then
    with pytest.raises(LdmError, match="latents of another autoencoder") as refused:
        LatentDiffusion.load(whole)
    assert refused.value.code == "LATENT-ID"


def test_a_change_of_the_latents_stops_the_training(finished, shards, tmp_path, monkeypatch):
    def tampered(self):
        with torch.no_grad():  # after the look at what is frozen, which comes with the first step
            self.autoencoder.encoder.conv_in.bias[0] += 1e-6 * (self.step.train_step == 2)

    monkeypatch.setattr(AutoencoderModule, "step_ended", tampered)
    with pytest.raises(LdmError, match="changed the latents") as stopped:
        tune(shards, tmp_path, finished, steps=2)
    assert stopped.value.code == "LATENT-ID" and stopped.value.exit_code == 1
    assert not open_finished(tmp_path / "tuned")


def open_finished(run: Path) -> bool:
    newest = Store(run / "autoencoder" / "ckpt").newest()
    return newest is not None and newest.document("state")["finished"]


@pytest.mark.slow
def test_a_quantiser_stays_as_it_is(shards, tmp_path):
    train(config(shards, tmp_path, *VQ, "stages=[autoencoder]", steps=4))
    tuned = tune(shards, tmp_path, tmp_path / "tiny", *VQ, steps=4)
    changed = moved(tmp_path / "tiny", tuned)
    assert changed and all(name.startswith(DECODER) for name in changed)


@pytest.mark.parametrize("autoencoder", [AutoencoderKL, AutoencoderVQ])
def test_the_encoder_keeps_nothing_for_a_backward_pass(autoencoder):
    """In evaluation mode, without gradients: what autograd keeps is the decoder's."""

    def kept(decoder_only: bool) -> int:
        torch.manual_seed(0)
        vq = {"codebook_size": 8} if autoencoder is AutoencoderVQ else {}
        model = autoencoder(block_channels=[8, 8], norm_groups=4, mid_attention=False, **vq)
        settings = StageSettings(2, 2, torch.optim.AdamW, lambda step: 1.0, None)
        module = AutoencoderModule(settings, model, ReconstructionObjective(), {}, decoder_only=decoder_only)
        parts = {name: part.training for name, part in model.named_children()}
        assert all(on == (not decoder_only or name in ("decoder", "post_quant_conv")) for name, on in parts.items())
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            pictures, code = model(torch.ones(1, 3, 16, 16))
            (pictures.sum() + code.get("codebook", torch.zeros(1)).sum()).backward()
        frozen = [name for name, p in model.named_parameters() if p.grad is None]
        assert bool(frozen) == decoder_only and all(not name.startswith(DECODER) for name in frozen)
        module.eval()
        assert not any(part.training for part in model.modules())
        return total

    assert kept(True) < 0.65 * kept(False)


# ---- what is refused, and what is said


def test_what_cannot_be_a_beginning_is_refused(finished, shards, tmp_path):
    pixels = tmp_path / "pixels"
    shutil.copytree(finished / "diffusion", pixels / "diffusion")
    shutil.copy(finished / "run.json", pixels / "run.json")
    broken = tmp_path / "unfinished"
    shutil.copytree(finished, broken)
    shutil.rmtree(Store(broken / "autoencoder" / "ckpt").path(12))
    cfg = config(shards, tmp_path, f"init_from={finished}", "stages=[autoencoder]", "stage.autoencoder.train=decoder")
    check_parts(cfg)
    (tmp_path / "file.safetensors").write_bytes(b"")
    own = cfg["model"]["autoencoder"]
    quantised = {**own, "_target_": "ldm.models.autoencoder.vq.AutoencoderVQ"}
    for source, node, code, words in (
        (tmp_path / "nowhere", {}, "RUN", "there is no such run; init_from="),
        (tmp_path / "file.safetensors", {}, "RUN", "python -m ldm import"),
        (pixels, {}, "STAGES", "works on pixels"),
        (broken, {}, "LATENTS", "did not finish"),
        (finished, {"latent_channels": 8}, "SHAPE", "set model.autoencoder.latent_channels=4$"),
        (finished, {"norm_groups": 2}, "SHAPE", "norm_groups is 4 there, 2 here"),
        (finished, quantised, "SHAPE", "holds an AutoencoderKL, and model.autoencoder is an AutoencoderVQ"),
    ):
        model = {**cfg["model"], "autoencoder": {**own, **node}}
        with pytest.raises(LdmError, match=words) as refused:
            check_parts({**cfg, "init_from": str(source), "model": model})
        assert refused.value.code == code and refused.value.exit_code == 2, refused.value.line()


def test_a_refused_command_leaves_nothing_of_what_it_adopted(finished, shards, tmp_path, capsys):
    with pytest.raises(LdmError, match="warmup_steps"):
        tune(shards, tmp_path, finished, "stage.autoencoder.lr_schedule.warmup_steps=20")
    assert "taken from" in capsys.readouterr().out and not (tmp_path / "tuned").exists()


@pytest.mark.parametrize(
    "words, text",
    [
        (["stage.autoencoder.train=encoder", "init_from=x"], "did you mean 'decoder'?"),
        (["stage.autoencoder.train=decoder"], "add init_from=RUN"),
    ],
)
def test_the_words_are_checked_before_anything_is_imported(words, text):
    with pytest.raises(LdmError, match=re.escape(text)):
        validate(compose("train", words))


@pytest.mark.slow
def test_a_denoiser_that_does_not_belong_is_left_and_said(finished, shards, tmp_path, capsys):
    half = tmp_path / "half"
    shutil.copytree(finished, half)
    shutil.rmtree(Store(half / "diffusion" / "ckpt").path(12))
    tuned = tune(shards, tmp_path, half, steps=2)
    assert "diffusion: not taken from" in capsys.readouterr().out and not (tuned / "diffusion").exists()


@pytest.mark.slow
def test_a_run_with_nothing_but_an_autoencoder_is_where_a_denoiser_begins(finished, shards, tmp_path, capsys):
    alone = tmp_path / "alone"
    shutil.copytree(finished / "autoencoder", alone / "autoencoder")
    shutil.copy(finished / "run.json", alone / "run.json")
    train(config(shards, tmp_path / "runs", f"init_from={alone}", "stages=[diffusion]", steps=2))
    assert "diffusion: " in (said := capsys.readouterr().out) and "it begins anew" in said
    new = LatentDiffusion.load(tmp_path / "runs" / "tiny")
    assert new.autoencoder.latent_id() == LatentDiffusion.load(finished).autoencoder.latent_id()


# ---- real commands


@pytest.mark.slow
def test_the_commands_and_two_processes(finished, shards, tmp_path):
    """Two ranks train the decoder to the same weights as one, with a discriminator; sample.py draws with it."""
    sgd = ["optimizer@stage.autoencoder.optimizer=sgd", "stage.autoencoder.optimizer.lr=0.05"]
    more = [f"init_from={finished}", "stages=[autoencoder]", "stage.autoencoder.train=decoder", "name=tuned", *sgd]
    for kind, devices in (("one", []), ("two", ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"])):
        code, output = command(overrides(shards, tmp_path / kind, *more, *devices))
        assert code == 0, output
    one, two = (open_stage(tmp_path / kind / "tuned", "autoencoder").tensors("model") for kind in ("one", "two"))
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert moved(finished, tmp_path / "two" / "tuned") == moved(finished, tmp_path / "one" / "tuned") != set()
    point_latest(tmp_path / "two" / "tuned")
    words = [f"run={tmp_path}/two/tuned", "prompt=a star", "count=1", "sampler.steps=2", f"output_dir={tmp_path}/out"]
    code, output = command(words, "sample.py")
    assert code == 0 and list((tmp_path / "out").glob("*.png")), output
