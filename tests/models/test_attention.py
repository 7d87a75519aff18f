"""Attention and its options."""

import pytest
import torch
import torch.nn.functional as F

from ldm.models.layers.attention import Attention, attention

# queries and keys up to which the CPU's attention is written out
LAST_SMALL = {torch.bfloat16: (1024, 1024), torch.float32: (1024, 128), torch.float64: (1024, 128)}


@pytest.fixture
def fused(monkeypatch):
    """Counts the calls of the fused kernel."""
    calls, kernel = [], F.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(args)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return calls


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("above", [False, True], ids=["written_out", "fused"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_both_ways_of_attention_are_one_function(fused, dtype, tolerance, above, masked):
    """At the last size that is written out and at the first that is not, forward and backward.

    tolerance: relative, some roundings of the type (1e-16, 6e-8, 4e-3); the reference is the kernel in float64.
    """
    kernel = F.scaled_dot_product_attention
    torch.manual_seed(0)
    queries, keys = LAST_SMALL[dtype]
    keys += above
    shapes = ((2, queries), (2, keys), (2, keys))
    exact = [torch.randn(1, heads, n, 8).to(dtype).double().requires_grad_() for heads, n in shapes]
    given = [x.detach().to(dtype).requires_grad_() for x in exact]
    mask = (torch.arange(keys) < keys // 2).view(1, 1, 1, keys) if masked else None
    weight = torch.randn(1, 2, queries, 8).to(dtype)
    fused.clear()
    out = attention(*given, mask)
    assert len(fused) == above and out.dtype == dtype
    expected = kernel(*exact, attn_mask=mask)
    (out * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    pairs = [(out, expected), *((x.grad, y.grad) for x, y in zip(given, exact, strict=True))]
    for got, want in pairs:
        assert (got.double() - want).norm() <= tolerance * want.norm()


def test_compiled_and_on_other_devices_attention_is_the_fused_kernel(fused, monkeypatch):
    q, k, v = torch.randn(3, 1, 2, 4, 8).unbind(0)
    attention(q, k, v)
    assert not fused
    attention(*(x.to("meta") for x in (q, k, v)))
    assert len(fused) == 1
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    attention(q, k, v)
    assert len(fused) == 2


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
