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


def test_a_square_of_bfloat16_attention_equals_the_fused_kernel():
    """The written-out attention that makes the CPU fast is the same function."""
    import torch
    import torch.nn.functional as F

    from ldm.models.layers.attention import attention

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 48, 16, dtype=torch.float64).unbind(0)
    mask = torch.arange(48).view(1, 1, 1, 48) < 40
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(attention(q, k, v, mask), expected, rtol=1e-12, atol=1e-12)


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
