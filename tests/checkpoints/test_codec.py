"""Trees and tensors survive a round trip through JSON text and safetensors, type by type."""

import json
import random
from collections import OrderedDict, defaultdict

import numpy
import pytest
import torch
from safetensors.torch import load_file

from ldm.checkpoints.codec import join, split, unalias
from ldm.checkpoints.files import new_file
from ldm.checkpoints.tensorfile import first_non_finite, read_tensors, size_of, write_tensors
from ldm.errors import LdmError
from tests.checkpoints.states import difference, raw

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.complex64, torch.bool, torch.int64, torch.int32, torch.int16, torch.int8]
DTYPES += [torch.uint64, torch.uint32, torch.uint16, torch.uint8]


def round_trip(tree):
    tensors, skeleton = split(tree)
    stored = {name: tensor.clone() for name, tensor in tensors.items()}
    return join(stored, json.loads(json.dumps(skeleton, allow_nan=False)))


def write(path, tensors):
    with new_file(path) as file:
        write_tensors(file, tensors)
    return file


def random_tree(rng: random.Random, depth: int):
    leaves = [
        None, True, False, 0, 1, -(2**70), 0.0, -0.0, 1.0, 1e-300, float("nan"), float("inf"), float("-inf"),
        "", "$", "naïve ✓ \x00 \ud800", torch.tensor(rng.random()), torch.zeros(0, 3), torch.arange(6).view(2, 3).T,
    ]  # fmt: skip
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(leaves)
    children = [random_tree(rng, depth - 1) for _ in range(rng.randrange(4))]
    keys = rng.sample(["a", "b", "a.b", "", "$", "__metadata__", "0", 0, 1, -5, 2**40], len(children))
    return rng.choice([list, tuple, lambda c: dict(zip(keys, c))])(children)


@pytest.mark.parametrize("seed", range(200))
def test_any_tree_comes_back_equal(seed):
    tree = random_tree(random.Random(seed), depth=5)
    assert difference(round_trip(tree), tree) is None


def test_the_equality_of_these_tests_is_strict():
    pairs = [(1, True), (1, 1.0), ((1,), [1]), ({1: 2}, {"1": 2}), (0.0, -0.0), (torch.zeros(1), torch.zeros(1).half())]
    assert all(difference(a, b) is not None for a, b in pairs)


def test_a_real_optimizer_continues_bit_for_bit():
    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    restored = torch.nn.Linear(4, 3)
    restored.load_state_dict(model.state_dict())
    other = torch.optim.AdamW(restored.parameters(), lr=9.0)
    other.load_state_dict(round_trip(optimizer.state_dict()))
    train(model, optimizer, 3)
    train(restored, other, 3)
    assert difference(dict(restored.state_dict()), dict(model.state_dict())) is None
    assert difference(other.state_dict(), optimizer.state_dict()) is None


@pytest.mark.parametrize(
    "value", [{1, 2}, b"x", 1j, object(), numpy.float32(1), OrderedDict(), defaultdict(int), torch.float32, range(3)]
)
def test_anything_else_is_refused_by_path(value):
    with pytest.raises(LdmError) as caught:
        split({"groups": [{"lr": 0.1}, {"betas": (0.9, value)}]})
    assert caught.value.code == "CKPT-CODEC" and caught.value.where == "groups.1.betas.1"
    assert type(value).__name__ in caught.value.what


@pytest.mark.parametrize("key", [None, True, 1.0, (1, 2)])
def test_other_keys_are_refused_by_path(key):
    with pytest.raises(LdmError, match=r"a key of type .*; state\."):
        split({"state": {key: 1}})


@pytest.mark.parametrize("skeleton", [{"$": "tensor", "name": "gone"}, {"$": "code"}, {"$": "float", "value": "1"}])
def test_a_foreign_skeleton_is_refused(skeleton):
    with pytest.raises(LdmError, match="not of this format"):
        join({}, [skeleton])


def test_one_tensor_stays_one_tensor():
    shared = torch.ones(3)
    tensors, skeleton = split({"a": shared, "b": [shared], "view": shared[:2]})
    tree = join(tensors, skeleton)
    assert len(tensors) == 2 and tree["a"] is tree["b"][0] and tree["view"].tolist() == [1, 1]


def test_tied_weights_are_stored_once():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    unique, aliases = unalias(model.state_dict())
    assert list(unique) == ["0.weight"] and aliases == {"1.weight": "0.weight"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_by_the_library(tmp_path, dtype):
    values = (torch.arange(24, dtype=torch.uint8) % (2 if dtype == torch.bool else 24)).view(dtype)
    tensors = {
        "values": values,
        "scalar": values[1].clone(),
        "empty": values[:0].view(0, 2),
        "byte": torch.ones(1).byte(),
    }
    file = write(tmp_path / "x.safetensors", tensors)
    for read in (load_file, read_tensors):
        found = read(tmp_path / "x.safetensors")
        assert difference({k: found[k] for k in tensors}, tensors) is None
    assert file.size == size_of(tensors) == (tmp_path / "x.safetensors").stat().st_size


def test_views_and_strides_are_written_row_major(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"transposed": base.T, "column": base[:, 1], "expanded": base[0, :1].expand(5)}
    write(tmp_path / "x.safetensors", tensors)
    assert difference(read_tensors(tmp_path / "x.safetensors"), {k: tensors[k] for k in sorted(tensors)}) is None


def test_what_was_read_outlives_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, {"a": torch.ones(100_000)})
    found = read_tensors(path)["a"]
    path.write_bytes(b"")  # a memory map would now fault
    assert raw(found) == raw(torch.ones(100_000))


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.empty(2, device="meta"), torch.zeros(1).cdouble()])
def test_what_the_format_lacks_is_refused_by_name(tmp_path, tensor):
    with pytest.raises(LdmError, match="odd"):
        write(tmp_path / "x.safetensors", {"odd": tensor})


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point or d.is_complex], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_is_found(dtype, value):
    good = torch.ones(50).to(dtype)
    bad = good.clone()
    bad[17] = value
    if dtype == torch.float8_e4m3fn and value == value:
        pytest.skip("this type has no infinity")
    tensors = {"empty": torch.zeros(0), "ids": torch.arange(3), "good": good, "bad": bad, "worse": bad}
    assert first_non_finite(tensors) == "bad"
    assert first_non_finite({"good": good, "ids": torch.arange(3)}) is None
