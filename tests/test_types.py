"""Values that move between rooms: frozen, movable, sliceable, known to pytree."""

import dataclasses

import pytest
import torch
from torch.utils import _pytree as pytree

from ldm.types import Batch, Conditioning, Level


def batch(n: int = 4) -> Batch:
    return Batch(
        slots=torch.arange(n),
        keys=[f"k{i}" for i in range(n)],
        images=torch.zeros(n, 3, 8, 8),
        moments=None,
        captions=[f"c{i}" for i in range(n)],
        columns={"score": torch.arange(n).float(), "names": [str(i) for i in range(n)]},
        valid=torch.ones(n, dtype=torch.bool),
    )


def conditioning(n: int = 4, **more) -> Conditioning:
    return Conditioning(tokens=torch.randn(n, 5, 2), mask=torch.ones(n, 5, dtype=torch.bool), **more)


@pytest.mark.parametrize("value", [batch(), conditioning(), Level(torch.ones(()), torch.ones(()), torch.zeros(()))])
def test_frozen(value):
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)


def test_to_changes_the_dtype_of_floats_only():
    moved = batch().to(torch.bfloat16)
    assert moved.images.dtype == moved.columns["score"].dtype == torch.bfloat16
    assert (moved.slots.dtype, moved.valid.dtype) == (torch.int64, torch.bool)
    assert moved.captions == batch().captions


@pytest.mark.parametrize("device", [torch.device("meta"), "meta"])
def test_to_moves_every_tensor(device):
    moved = batch().to(device)
    tensors = [t for t in pytree.tree_leaves(moved) if isinstance(t, torch.Tensor)]
    assert len(tensors) == 4
    assert [t.device.type for t in tensors if t is not moved.slots] == ["meta"] * 3
    assert moved.slots.tolist() == [0, 1, 2, 3]  # they stay on the host
    residuals = conditioning(residuals=(torch.ones(4, 2), torch.ones(4, 3))).to(device).residuals
    assert [r.device.type for r in residuals] == ["meta", "meta"]


def test_slice_cuts_tensors_lists_and_columns():
    part = batch().slice(slice(1, 3))
    assert len(part) == 2
    assert part.slots.tolist() == [1, 2]
    assert (part.keys, part.captions) == (["k1", "k2"], ["c1", "c2"])
    assert (part.columns["score"].tolist(), part.columns["names"]) == ([1.0, 2.0], ["1", "2"])
    assert part.moments is None


def test_slices_joined_are_the_whole():
    whole = conditioning(residuals=(torch.randn(4, 2),))
    joined = whole.slice(slice(0, 1)).cat(whole.slice(slice(1, 4)))
    assert torch.equal(joined.tokens, whole.tokens)
    assert torch.equal(joined.residuals[0], whole.residuals[0])
    assert joined.vector is None


def test_cat_refuses_different_fields():
    with pytest.raises(ValueError, match="vector is present in one"):
        conditioning().cat(conditioning(vector=torch.ones(4, 2)))


def test_pytree_knows_them():
    doubled = pytree.tree_map_only(torch.Tensor, lambda t: t * 2, conditioning())
    assert isinstance(doubled, Conditioning)
    leaves, spec = pytree.tree_flatten(batch())
    assert pytree.tree_unflatten(leaves, spec).keys == batch().keys


def test_a_class_that_is_not_registered_would_be_one_leaf():
    @dataclasses.dataclass(frozen=True)
    class Stranger:
        x: torch.Tensor

    assert len(pytree.tree_leaves(Stranger(torch.ones(1)))) == 1
    assert isinstance(pytree.tree_leaves(Stranger(torch.ones(1)))[0], Stranger)
