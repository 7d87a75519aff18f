"""Gradient checkpointing: the same gradients to the bit, and less memory."""

import pytest
import torch

from ldm.models.unet.unet import UNet
from ldm.types import Conditioning


def unet(wanted, **options):
    torch.manual_seed(0)
    shape = {"block_channels": [16, 32], "layers_per_block": 1, "transformer_depth": [1, 2], "context_size": 12}
    return UNet(**{**shape, "head_dim": 8, "norm_groups": 8, **options}, gradient_checkpointing=wanted)


def conditioning():
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return Conditioning(tokens=torch.randn(2, 5, 12, generator=generator), mask=mask)


def gradients(net, seed=3):
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(seed)  # of dropout
    cond = conditioning() if net.context_size else Conditioning()
    net(x, torch.tensor([1.0, 900.0]), cond).square().mean().backward()
    return {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize(
    "options", [{}, {"dropout": 0.5}, {"qk_norm": True}, {"plain_attention": True, "context_size": None}], ids=str
)
def test_gradients_are_equal(options):
    if "plain_attention" in options:
        options = {**options, "transformer_depth": [0, 1]}
    kept, again = gradients(unet(False, **options)), gradients(unet(True, **options))
    assert kept.keys() == again.keys()
    for name in kept:
        assert torch.equal(kept[name], again[name]), name
    if "dropout" in options:  # else dropout would not have been tested
        other = gradients(unet(True, **options), seed=4)
        assert any(not torch.equal(kept[name], other[name]) for name in kept)


def bytes_kept(net):
    """Of what autograd holds between forward and backward, apart from the parameters."""
    found, own = {}, {p.data_ptr() for p in net.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            found[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(torch.randn(2, 4, 16, 16), torch.ones(2), conditioning())
    assert out.requires_grad
    return sum(found.values())


def test_less_is_kept_for_backward():
    kept, again = bytes_kept(unet(False)), bytes_kept(unet(True))
    assert again < kept / 6, (again, kept)  # measured: a twelfth


def test_sampling_computes_nothing_twice():
    net, calls = unet(True), []
    net.mid_block.resnets[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        net(torch.randn(2, 4, 16, 16), torch.ones(2), conditioning())
    assert calls == [1]
