"""What makes a resumed run another run, and what does not."""

from dataclasses import asdict

import pytest

from ldm.checkpoints.drift import Drift
from ldm.cli import compose
from ldm.data.captions import Captions
from ldm.training.fingerprint import settings_of
from ldm.training.fit import is_finished


@pytest.mark.parametrize(
    "word, counts",
    [
        ("model.network.head_dim=16", True),
        ("model.conditioner.drop_prob=0.3", True),
        ("model.network.gradient_checkpointing=true", False),
        ("loader.num_workers=7", False),
    ],
)
def test_a_setting_counts_if_it_changes_what_a_step_computes(word, counts):
    before, after = (settings_of(compose("train", ["experiment=demo", *words]), "diffusion") for words in ([], [word]))
    assert (before != after) is counts


def test_a_weight_of_what_masks_leave_out_counts_where_there_is_one():
    cfg = compose("train", ["experiment=demo"])
    older = {key: value for key, value in cfg["scheduler"].items() if key != "unmasked_weight"}
    some = {**older, "unmasked_weight": 0.5}
    before, missing, now = (settings_of({**cfg, "scheduler": s}, "diffusion") for s in (cfg["scheduler"], older, some))
    assert before == missing and now == {**before, "scheduler.unmasked_weight": 0.5}


def test_the_files_that_a_frozen_tower_started_from_may_move():
    def settings(weights):
        words = ["model/conditioner=open_clip", f"model.conditioner.weights={weights}"]
        return settings_of(compose("train", words), "diffusion")

    assert settings("here.safetensors") == settings("there.safetensors")


def test_every_setting_of_the_text_and_of_repeats_counts():
    cfg = compose("train", ["experiment=demo"])
    before = settings_of(cfg, "diffusion")
    others = ["a {title}", True, "random", True, 2, ";", "a ", " b"]
    *names, missing = asdict(Captions())
    changed = dict(zip(names, others, strict=True)) | {"repeats": 3}
    for key, value in changed.items():
        now = settings_of({**cfg, "data": {**cfg["data"], key: value}}, "diffusion")
        assert {k for k in now if now[k] != before.get(k)} == {f"data.{key}"}
    older = {k: v for k, v in cfg["data"].items() if k not in changed or "fix" in k}  # before these settings existed
    assert settings_of({**cfg, "data": older}, "diffusion") == before
    assert missing == "on_missing_caption"  # of which the number of samples tells
    assert settings_of({**cfg, "data": {**cfg["data"], missing: "empty"}}, "diffusion") == before


class _Checkpoint:
    """A finished stage of the demo, as its last checkpoint records it."""

    def __init__(self, stage, words):
        cfg = compose("train", ["experiment=demo", *words])
        found = {"data.num_train": 7, "data.manifest": "0", "data.lanes": 8, "data.window_mb": 256}
        found |= {"data.remainder": "carry", "latent_id": "1"}
        self.state = {
            "finished": True,
            "train_step": cfg["stage"][stage]["max_steps"],
            "fingerprint": {**settings_of(cfg, stage), **found},
        }

    def document(self, name):
        return getattr(self, name)


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
@pytest.mark.parametrize(
    "then, now",
    [
        ([], []),
        (["data.repeats=3"], []),
        ([], ["data.repeats=3"]),
        (["data.weights=[9,1]"], ["data.weights=[1,9]"]),
        (["data.weights=[9,1]"], []),
    ],
)
def test_a_finished_stage_notices_settings_that_come_and_go(stage, then, now):
    cfg = compose("train", ["experiment=demo", *now])
    if then == now:
        assert is_finished(cfg, _Checkpoint(stage, then), stage)
    else:
        with pytest.raises(Drift, match=(then or now)[0].partition("=")[0]):
            is_finished(cfg, _Checkpoint(stage, then), stage)


def test_a_finished_autoencoder_does_not_ask_for_captions():
    cfg = compose("train", ["experiment=demo", "data.shuffle_caption=true", "data.caption_suffix=ok"])
    assert is_finished(cfg, _Checkpoint("autoencoder", ["data.caption_prefix=a "]), "autoencoder")
    with pytest.raises(Drift, match="caption_suffix"):
        is_finished(cfg, _Checkpoint("diffusion", []), "diffusion")


def test_a_setting_that_is_recorded_no_longer_is_not_missed():
    checkpoint = _Checkpoint("diffusion", [])
    checkpoint.state["fingerprint"]["data.on_missing_caption"] = "empty"
    assert is_finished(compose("train", ["experiment=demo"]), checkpoint, "diffusion")
