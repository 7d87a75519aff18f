"""Differences between the settings of a checkpoint and those of now."""

import pickle

import pytest

from ldm.checkpoints.drift import Drift, compare, notes

SAVED = {
    "seed": 1,
    "stage.diffusion.batch_size": 40,
    "stage.diffusion.max_steps": 1000,
    "stage.diffusion.optimizer.betas": [0.9, 0.99],
    "data.lanes": 8,
    "latent_id": "abc",
}


def test_equal_settings_pass():
    assert compare(SAVED, {**SAVED, "stage.diffusion.optimizer.betas": (0.9, 0.99)}) == []


@pytest.mark.parametrize("key", SAVED)
def test_each_key_is_guarded_and_can_be_accepted(key):
    now = {**SAVED, key: 8}
    if key == "data.lanes":
        now[key] = 4
    with pytest.raises(Drift) as caught:
        compare(SAVED, now, ["other.key"])
    assert caught.value.exit_code == 2 and caught.value.line().startswith(f"error[DRIFT]: {key}; checkpoint ")
    assert caught.value.line().endswith(f"restore it, choose another name=, or add resume.allow=[{key}]")
    assert len(compare(SAVED, now, [key])) == 1


def test_the_words():
    with pytest.raises(Drift) as caught:
        compare(SAVED, {**SAVED, "stage.diffusion.batch_size": 8})
    assert caught.value.line() == (
        "error[DRIFT]: stage.diffusion.batch_size; checkpoint 40, now 8; "
        "restore it, choose another name=, or add resume.allow=[stage.diffusion.batch_size]"
    )


def test_one_line_per_key_and_one_remedy():
    now = {**SAVED, "seed": 2, "latent_id": "x\ny", "data.lanes": 4}
    del now["stage.diffusion.max_steps"]
    with pytest.raises(Drift) as caught:
        compare(SAVED, now, ["data.lanes"])
    shown = caught.value.line().splitlines()
    assert shown[0] == "error[DRIFT]: latent_id; checkpoint abc, now x\\ny"
    assert shown[1] == "error[DRIFT]: seed; checkpoint 1, now 2"
    assert shown[2].startswith(
        "error[DRIFT]: stage.diffusion.max_steps; checkpoint 1000, now absent; "
        "restore it, choose another name=, or add "
    )
    assert shown[2].endswith("resume.allow=[latent_id,seed,stage.diffusion.max_steps]") and len(shown) == 3
    assert pickle.loads(pickle.dumps(caught.value)).line() == caught.value.line()


def test_hardware_is_noted_not_refused():
    saved = {"precision": "bf16-mixed", "device": "cuda", "world_size": 4, "micro_batch": 8, "threads": 2}
    assert notes(saved, saved) == []
    shown = notes(saved, {**saved, "precision": "32-true", "world_size": 2})
    assert shown[0].startswith("precision; checkpoint bf16-mixed, now 32-true: data and draws stay the same")
    assert shown[1].startswith("world_size; checkpoint 4, now 2: ") and len(shown) == 2
