"""The hash of a tensor sees every bit and every place; ranks that differ are named."""

import pytest
import torch

from ldm.errors import UNCLASSIFIED, LdmError
from ldm.training import agreement
from ldm.training.agreement import compare_ranks, hashes, tensor_hash


def test_every_flipped_bit_is_seen():
    x = torch.randn(7, generator=torch.manual_seed(0))
    before = int(tensor_hash(x))
    for bit in range(32 * 7):
        bits = x.view(torch.int32).clone()
        bits[bit // 32] ^= -(2**31) if bit % 32 == 31 else 1 << bit % 32
        assert int(tensor_hash(bits.view(torch.float32))) != before
    assert int(tensor_hash(x.clone())) == before


def test_order_and_signs_are_seen():
    x = torch.arange(1.0, 9.0)
    y = x[[1, 0, *range(2, 8)]]
    assert tensor_hash(x) != tensor_hash(y) and tensor_hash(x) != tensor_hash(x.flip(0))
    assert tensor_hash(torch.zeros(3)) != tensor_hash(-torch.zeros(3))


def test_changes_do_not_cancel():
    """Pairs of values change sign; a sum of bit patterns, and one weighted by odd numbers, would miss many of them."""
    x = torch.ones(64)
    seen = {int(tensor_hash(x))}
    pairs = [(i, j) for i in range(64) for j in range(i)]
    for i, j in pairs:
        y = x.clone()
        y[[i, j]] = -1.0
        seen.add(int(tensor_hash(y)))
    assert len(seen) == len(pairs) + 1

    def plain(y):
        return int((agreement._words(y) * (2 * torch.arange(32) + 1)).sum())

    odd = [[i, j] for i, j in pairs if i % 2 and j % 2]
    assert sum(plain(x.index_fill(0, torch.tensor(p), -1.0)) == plain(x) for p in odd) == len(odd)  # the control


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool])
def test_all_kinds_of_tensors(dtype, monkeypatch):
    x = (torch.arange(15).reshape(3, 5) % 7).to(dtype)
    assert tensor_hash(x) == tensor_hash(x.clone()) and tensor_hash(x[:, 1:]) == tensor_hash(x[:, 1:].contiguous())
    assert tensor_hash(x[0, 0]).shape == () and tensor_hash(x[:0]) == 0
    whole = tensor_hash(x)
    monkeypatch.setitem(agreement._CHUNK, "cpu", 2)
    assert tensor_hash(x) == whole


def test_the_values_are_those_of_the_formula():
    """In whole numbers of any size; so they are equal on every kind of device, and ranks may compare them."""
    x = torch.randn(5, generator=torch.manual_seed(0))
    data, total = x.numpy().tobytes() + bytes(4), 0
    for place in range(3):
        z = int.from_bytes(data[8 * place : 8 * place + 8], "little") ^ (place * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        total += z ^ z >> 31
    assert hashes({"x": x}).tolist()[0] % 2**64 == total % 2**64


def ranks(monkeypatch, *others):
    """As if others took part, each with its tensors."""
    from ldm.training.agreement import dist

    def all_reduce(both, op):
        for other in others:
            own = hashes(other)
            both.copy_(torch.maximum(both, torch.cat([own, ~own])))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(agreement, "gathered", lambda mine: [mine, *(int(hashes(o)[1]) for o in others)])


def test_ranks_that_differ_are_named(monkeypatch):
    good = {"a": torch.ones(3), "b": torch.ones(2), "c": torch.ones(1)}
    bad = {**good, "b": torch.tensor([1.0, 1.0 + 2**-23]), "c": torch.zeros(1)}
    ranks(monkeypatch, good, good)
    compare_ranks(good, torch.device("cpu"), 7)
    ranks(monkeypatch, good, bad)
    with pytest.raises(LdmError, match=r"DIVERGED.*step 7; b, 2 of 3 tensors; .*rank 2 from the other 2") as e:
        compare_ranks(good, torch.device("cpu"), 7)
    assert e.value.exit_code == UNCLASSIFIED
    ranks(monkeypatch, bad)
    with pytest.raises(LdmError, match="it differs: rank 0 from rank 1"):
        compare_ranks(good, torch.device("cpu"), 7)
