"""Attention and its options."""

import pytest
import torch

from ldm.models.layers.attention import Attention


@pytest.mark.parametrize("context_size", [None, 24])
def test_qk_norm_makes_attention_blind_to_the_scale_of_queries_and_keys(context_size):
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    context = torch.randn(2, 5, 24, dtype=torch.float64) if context_size else None
    outputs = {}
    for qk_norm in (True, False):
        layer = Attention(16, 4, context_size, qk_norm=qk_norm).double()
        before = layer(x, context)
        with torch.no_grad():
            layer.to_q.weight *= 50
            layer.to_k.weight *= 50
        outputs[qk_norm] = float((layer(x, context) - before).abs().max())
    assert outputs[True] < 1e-4  # the norm's eps is felt by small queries
    assert outputs[False] > 1e-2


def test_without_qk_norm_no_parameter_is_added():
    assert not [name for name, _ in Attention(16, 4).named_parameters() if "norm" in name]
    shapes = {name: p.shape for name, p in Attention(16, 4, qk_norm=True).named_parameters() if "norm" in name}
    assert shapes == {"norm_q.weight": (4,), "norm_k.weight": (4,)}
