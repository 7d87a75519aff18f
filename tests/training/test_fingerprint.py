"""What makes a resumed run another run, and what does not."""

from dataclasses import asdict

import pytest

from ldm.cli import compose
from ldm.data.captions import Captions
from ldm.training.fingerprint import settings_of


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


def test_the_files_that_a_frozen_tower_started_from_may_move():
    def settings(weights):
        words = ["model/conditioner=open_clip", f"model.conditioner.weights={weights}"]
        return settings_of(compose("train", words), "diffusion")

    assert settings("here.safetensors") == settings("there.safetensors")


def test_every_setting_of_the_text_and_of_repeats_counts():
    cfg = compose("train", ["experiment=demo"])
    before = settings_of(cfg, "diffusion")
    others = ["a {title}", True, "random", True, 2, ";", "a ", " b"]
    changed = dict(zip(asdict(Captions()), others, strict=True)) | {"repeats": 3}
    for key, value in changed.items():
        now = settings_of({**cfg, "data": {**cfg["data"], key: value}}, "diffusion")
        assert {k for k in now if now[k] != before.get(k)} == {f"data.{key}"}
    older = {k: v for k, v in cfg["data"].items() if k not in changed or "fix" in k}  # before these settings existed
    assert settings_of({**cfg, "data": older}, "diffusion") == before
