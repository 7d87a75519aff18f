"""Several averages of one training, their snapshots, and averages that were not kept made of those that were."""

import shutil
from pathlib import Path

import pytest
import torch

from ldm.__main__ import VERBS
from ldm.checkpoints.manifest import read
from ldm.checkpoints.snapshots import Snapshots
from ldm.checkpoints.store import Store
from ldm.errors import LdmError
from ldm.model import LatentDiffusion, load_autoencoder
from ldm.tools.ema import weighted_sum
from ldm.training.ema import EMA
from ldm.training.fit import train
from ldm.training.posthoc import solve
from tests.integration.test_processes import SGD
from tests.integration.test_resume import live_through
from tests.integration.tiny import command, compare_runs, config, first_difference, overrides

STEPS, EVERY = 24, 3
STAGE = "autoencoder"
KEPT = [
    "stage.autoencoder.ema.half_life_images=[30,300]",
    "stage.autoencoder.ema.warmup=false",
    "stage.autoencoder.ema.lengths=[0.05,0.07,0.1]",
    f"stage.autoencoder.ema.snapshot_every={EVERY}",
    "stage.autoencoder.validate_every=null",
    "lr_schedule@stage.autoencoder.lr_schedule=constant",
]
DENOISER = [
    "stage.diffusion.validate_every=null",
    "stage.diffusion.max_steps=3",
    "stage.diffusion.ema.lengths=[0.05,0.1]",
    "stage.diffusion.ema.snapshot_every=1",
]
FILES = ("ema", "ema_half_life_300", "ema_length_0-05", "ema_length_0-07", "ema_length_0-1")


def settings(shards, runs, *more, steps=STEPS):
    return config(shards, runs, *KEPT, f"stages=[{STAGE}]", *more, steps=steps, save_every=8)


@pytest.fixture(scope="module")
def averaged(shards, tmp_path_factory) -> Path:
    """A run whose autoencoder has five averages, and its denoiser three. Read it, do not change it."""
    runs = tmp_path_factory.mktemp("runs")
    train(settings(shards, runs, *DENOISER, "stages=[autoencoder,diffusion]"))
    return runs / "tiny"


@pytest.fixture
def cut_off(averaged, tmp_path) -> Path:
    """The same after a kill: of what came after step 8, the snapshots are there, and the checkpoints are not."""
    run = tmp_path / "tiny"
    shutil.copytree(averaged, run)
    shutil.rmtree(run / "diffusion")
    for step in (16, STEPS):
        shutil.rmtree(run / STAGE / "ckpt" / f"step-{step:09d}")
    return run


def ema(*words):
    return VERBS["ema"]([str(word) for word in words])


def flat(tensors):
    return torch.cat([value.double().flatten() for _, value in sorted(tensors.items())])


def snapshots_of(run, stage=STAGE):
    """Steps and all hashes of the files."""
    found = Snapshots(run / stage / "ema")
    return {step: read(found.store.path(step))["files"] for step in found.store.steps()}


def test_a_checkpoint_holds_every_average_beside_the_raw_weights(averaged):
    for step in (8, 16, STEPS):
        checkpoint = Store(averaged / STAGE / "ckpt").load(step)
        raw = checkpoint.tensors("model")
        found = [flat(checkpoint.tensors(name)) for name in FILES]
        found.append(flat({name: raw[name] for name in checkpoint.tensors("ema")}))
        for i, one in enumerate(found):
            assert all((one - other).norm() > 1e-3 for other in found[i + 1 :])
    assert list(snapshots_of(averaged)) == list(range(EVERY, STEPS + 1, EVERY))
    last = Snapshots(averaged / STAGE / "ema").open(STEPS)
    for name in FILES[2:]:
        assert torch.equal(flat(last.tensors(name)), flat(checkpoint.tensors(name)))


def test_an_average_that_was_not_kept_is_made_of_those_that_were(averaged):
    """Of length 0.07 from the snapshots of 0.05 and 0.1, against the one that was averaged along."""
    snapshots = Snapshots(averaged / STAGE / "ema")
    keys = [(s.step, name, s.updates, own) for s in snapshots.all() for name, own in s.lengths.items() if own != 0.07]
    tracked = flat(snapshots.open(STEPS).tensors("ema_length_0-07"))
    made_of = torch.stack([flat(snapshots.open(step).tensors(name)) for step, name, _, _ in keys])
    nearest = float((made_of - tracked).norm(dim=1).min())

    def distance(lengths):
        found = solve([(u, lengths[own]) for _, _, u, own in keys], STEPS, 0.07)
        weights = {(step, name): w for (step, name, _, _), w in zip(keys, found.weights, strict=True)}
        return float((flat(weighted_sum(snapshots, weights)) - tracked).norm())

    assert distance({0.05: 0.05, 0.1: 0.1}) < nearest / 50  # seen: 1/91; 0.013 of the profile's norm is left
    assert distance({0.05: 0.055, 0.1: 0.11}) > nearest / 5  # negative controls: other gammas
    assert distance({0.05: 0.1, 0.1: 0.05}) > nearest / 5


def test_the_verb_makes_a_run(averaged, shards, tmp_path, capsys):
    """Which draws and trains on; of a length that was kept it is the average itself."""
    out = tmp_path / "tenth"
    before = {path: path.stat().st_mtime_ns for path in averaged.rglob("*")}
    assert ema(averaged, "--length", 0.1, "--out", out) == 0
    assert {path: path.stat().st_mtime_ns for path in averaged.rglob("*")} == before
    said = capsys.readouterr().out
    assert "at step 3, from steps 1, 2, 3" in said and "6 averages, sum of their weights 1.000000" in said
    average = Store(averaged / "diffusion" / "ckpt").newest().tensors("ema_length_0-1")
    model = LatentDiffusion.load(out)
    for name, value in average.items():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=0, atol=1e-7)
    about = Store(out / "diffusion" / "ckpt").newest().document("state")["average"]
    assert (about["run"], about["length"], about["step"], about["updates"]) == ("tiny", 0.1, 3, 3)
    assert len(about["from"]) == 6 and about["error"] < 1e-6

    train(config(shards, tmp_path, "name=tuned", "stages=[diffusion]", f"init_from={out}", steps=2))
    with pytest.raises(LdmError, match="DRIFT"):  # it is begun from, and not continued
        train(config(shards, tmp_path, "name=tenth", "stages=[diffusion]"))


def test_the_verb_takes_an_autoencoder_and_a_half_life(averaged, tmp_path, capsys):
    """Its latents are others: a denoiser of the old ones is not taken along."""
    out = tmp_path / "half"
    assert ema(averaged, "--stage", STAGE, "--half-life-images", 300, "step=16", f"out={out}") == 0
    new, old = Store(out / STAGE / "ckpt").newest(), Store(averaged / STAGE / "ckpt")
    weights = new.tensors("model")
    assert all(torch.equal(weights[name], value) for name, value in old.load(16).tensors(FILES[1]).items())
    assert torch.equal(weights["statistics.std"], old.newest().tensors("model")["statistics.std"])
    assert new.document("state")["latent_id"] == load_autoencoder(new).latent_id() != latent_id(old.newest())
    assert not (out / "diffusion").exists() and "not taken from" in capsys.readouterr().out

    assert ema(averaged, f"stage={STAGE}", "length=0.1", "step=12", f"out={tmp_path / 'earlier'}") == 0
    weights = Store(tmp_path / "earlier" / STAGE / "ckpt").load(12).tensors("model")
    for name, value in Snapshots(averaged / STAGE / "ema").open(12).tensors(FILES[-1]).items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-7)


def latent_id(checkpoint):
    return checkpoint.document("state")["latent_id"]


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            ["--length", "0.01"],
            r"EMA.*cannot express length 0.01.*relative error 0\.\d+, at most 0.1.*the nearest that they can is 0.04",
        ),
        (["--length", "0.3"], r"CONFIG.*length=0.3.*0.001 to 0.28"),
        (["--length", "wide"], r"CONFIG.*length is a number"),
        (["--length"], r"CONFIG.*--length needs a value"),
        ([], r"CONFIG.*give the average that you want.*length=0.05"),
        (["length=0.05", "half_life_images=30"], r"CONFIG.*both given"),
        (["length=0.05", "step=4"], r"EMA.*no snapshot of step 4.*have: 1, 2, 3"),
        (["length=0.05", "stage=autoencoder", "step=0"], r"EMA.*no snapshot of step 0"),
        (["length=0.05", "stage=features"], r"NO-CHECKPOINT.*features"),
        (["length=0.05", "--stage", "denoiser"], r"CONFIG.*'denoiser'.*autoencoder, diffusion, features"),
        (["half_life_images=5", "stage=autoencoder"], r"EMA.*keeps no average of 5 images.*have: 30, 300"),
        (["length=0.05", "out=tiny"], r"EXISTS"),
    ],
)
def test_what_cannot_be_is_one_line(averaged, words, expected):
    before = sorted(averaged.parent.iterdir())
    with pytest.raises(LdmError, match=expected) as refused:
        ema(averaged, *words)
    assert refused.value.exit_code == 2 and "\n" not in refused.value.line()
    assert sorted(averaged.parent.iterdir()) == before


def test_a_damaged_snapshot_is_named(averaged, tmp_path):
    shutil.copytree(averaged, tmp_path / "tiny")
    broken = tmp_path / "tiny" / STAGE / "ema" / "step-000000009"
    data = bytearray((broken / "ema_length_0-05.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (broken / "ema_length_0-05.safetensors").write_bytes(data)
    with pytest.raises(LdmError, match=r"ema_length_0-05.safetensors does not match its sha256.*move this folder away"):
        ema(tmp_path / "tiny", "length=0.08", f"stage={STAGE}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]
    shutil.move(broken, tmp_path / "away")
    assert ema(tmp_path / "tiny", "length=0.08", f"stage={STAGE}") == 0
    assert Store(tmp_path / "tiny-ema-0-08" / STAGE / "ckpt").newest().step == STEPS


def test_a_life_cut_off_leaves_no_trace(averaged, cut_off, shards):
    """What it had written after the checkpoint is set aside and written again: all is as it was."""
    spoilt = cut_off / STAGE / "ema" / "step-000000012" / "state.json"
    spoilt.write_text(spoilt.read_text().replace("12", "13"))
    train(settings(shards, cut_off.parent))
    assert compare_runs(averaged, cut_off, STAGE) == []
    assert snapshots_of(cut_off) == snapshots_of(averaged)
    assert (spoilt.parents[1] / "abandoned-step-000000012").is_dir()


@pytest.mark.slow
def test_a_reset_average_would_be_noticed(averaged, cut_off, shards, monkeypatch):
    """Negative control of the one above."""
    load = EMA.load
    monkeypatch.setattr(EMA, "load", lambda self, file, t: None if file == FILES[-1] else load(self, file, t))
    train(settings(shards, cut_off.parent))
    found = compare_runs(averaged, cut_off, STAGE)
    assert len(found) == 2 and all(FILES[-1] in words for words in found)
    assert snapshots_of(cut_off) != snapshots_of(averaged)


@pytest.mark.slow
def test_extended_equals_longer(averaged, shards, tmp_path):
    """All averages too: 12 steps and then 24 are the 24 steps of one life."""
    train(settings(shards, tmp_path, steps=12))
    train(settings(shards, tmp_path, "resume.allow=[stage.autoencoder.max_steps]"))
    ends = [Store(run / STAGE / "ckpt").load(STEPS) for run in (averaged, tmp_path / "tiny")]
    assert first_difference(*ends) is None
    assert snapshots_of(tmp_path / "tiny") == snapshots_of(averaged)  # the last of the first life was due


def test_averages_begin_with_their_stage(cut_off, shards):
    changed = "stage.autoencoder.ema.lengths=[0.05,0.2]"
    with pytest.raises(LdmError, match=r"DRIFT.*stage.autoencoder.ema.lengths"):
        train(settings(shards, cut_off.parent, changed))
    with pytest.raises(LdmError, match=r"CKPT-CONTENT.*holds no average ema_length_0-2"):
        train(settings(shards, cut_off.parent, changed, "resume.allow=[stage.autoencoder.ema.lengths]"))


def test_codes_that_are_revived_are_no_average(shards, tmp_path):
    with pytest.raises(LdmError, match=r"codes are revived.*stage.autoencoder.ema.lengths"):
        train(config(shards, tmp_path, "model/autoencoder=vq_toy", "stage.autoencoder.ema.lengths=[0.1]"))


# ---- with real signals and processes


@pytest.mark.slow
def test_killed_twice_equals_undisturbed(shards, tmp_path):
    """Both stages, validated with the average right before each checkpoint; half precision on disk for one of them."""
    more = [*KEPT, "stage.autoencoder.ema.snapshot_dtype=float16", *DENOISER, f"stage.diffusion.max_steps={STEPS}"]
    more += [f"stage.{stage}.validate_every=4" for stage in ("autoencoder", "diffusion")]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, output = command(overrides(shards, whole, *more, steps=STEPS))
    assert code == 0, output
    words = overrides(shards, broken, *more, steps=STEPS)
    live_through(words, broken / "tiny", ("autoencoder", 7), ("diffusion", 10), ("diffusion", 15))
    for stage in ("autoencoder", "diffusion"):
        assert compare_runs(whole / "tiny", broken / "tiny", stage) == []
        assert snapshots_of(whole / "tiny", stage) == snapshots_of(broken / "tiny", stage)
    half = Snapshots(whole / "tiny" / "autoencoder" / "ema").open(6).tensors(FILES[-1])
    assert {value.dtype for value in half.values()} == {torch.float16}


@pytest.mark.slow
def test_two_processes_keep_the_averages_of_one(shards, tmp_path):
    more = [*KEPT, *" ".join(SGD).split(), "stages=[autoencoder]"]
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    for name, words in (("one", []), ("two", ddp)):
        code, output = command(overrides(shards, tmp_path / name, *more, *words, steps=STEPS, save_every=8))
        assert code == 0, output
    one, two = (Snapshots(tmp_path / name / "tiny" / STAGE / "ema") for name in ("one", "two"))
    assert one.store.steps() == two.store.steps() == list(range(EVERY, STEPS + 1, EVERY))
    for snapshot in one.all():
        pairs = [[flat(of.open(snapshot.step).tensors(name)) for of in (one, two)] for name in snapshot.lengths]
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert one.all() == two.all()
