"""What makes a resumed run another run, and what does not."""

import pytest

from ldm.cli import compose
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
