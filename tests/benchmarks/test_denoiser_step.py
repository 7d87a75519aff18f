"""The speed benchmark: options are checked, and both arms compute the same loss before anything is timed."""

import pytest

from benchmarks import denoiser_step
from ldm.errors import LdmError


@pytest.mark.parametrize(
    ("argument", "said"),
    [("sise=reduced", "did you mean 'size'"), ("size=huge", "must be one of"), ("rounds=x", "cannot read")],
)
def test_bad_options_are_named(argument, said):
    with pytest.raises(LdmError, match=said):
        denoiser_step.main([argument])


@pytest.mark.slow
def test_it_prints_both_arms_of_one_run(capsys):
    pytest.importorskip("diffusers")
    denoiser_step.main(["device=cpu", "rounds=1", "batch=1"])
    said = capsys.readouterr().out
    assert "ours is" in said and "diffusers" in said and "MFU" in said


@pytest.mark.slow
def test_arms_that_differ_are_refused(monkeypatch):
    pytest.importorskip("diffusers")
    honest = denoiser_step.network

    def spoiled(arm, size, device):
        model = honest(arm, size, device)
        if arm == "diffusers":
            model.load_state_dict = lambda tensors: None
        return model

    monkeypatch.setattr(denoiser_step, "network", spoiled)
    with pytest.raises(LdmError, match="same loss"):
        denoiser_step.main(["device=cpu", "rounds=1", "batch=1"])
