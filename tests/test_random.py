"""The generator against Random123's published answers, and what the project promises of its draws."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.random import Draws, Purpose, bits, fold, normal, philox, run_key, seed_modules, uniform

# Random123's kat_vectors, philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("counter,key,expected", KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    words = philox([torch.tensor([c]) for c in counter], tuple(torch.tensor([k]) for k in key))
    assert [int(w) for w in words] == expected


def test_a_wrong_multiplier_would_be_noticed(monkeypatch):
    monkeypatch.setattr("ldm.random._M0", 0xD2511F55)
    with pytest.raises(AssertionError):
        test_known_answers(*KNOWN_ANSWERS[2])


def test_a_draw_depends_on_its_own_key_alone():
    keys = fold(run_key(0), Purpose.NOISE, torch.arange(8))
    whole = normal(keys, (3, 5))
    for i in range(8):
        assert torch.equal(normal(keys[i : i + 1], (3, 5))[0], whole[i])


def test_keys_of_purposes_seeds_and_indices_never_meet():
    index = torch.arange(2000)
    keys = [fold(run_key(s), p, index) for s, p in itertools.product((0, 1), (Purpose.NOISE, Purpose.TIMESTEP))]
    assert len(torch.cat(keys).unique()) == 8000
    assert (torch.cat(keys) >= 0).all()


def test_large_indices_keep_all_their_bits():
    far = torch.tensor([2**40, 2**40 + 1, 2**62])
    assert len(fold(run_key(0), Purpose.NOISE, far).unique()) == 3


def test_moments_and_independence():
    draws = normal(fold(run_key(3), Purpose.NOISE, torch.arange(400)), (1001,))
    n = draws.numel()
    # three standard errors of each estimate
    assert abs(draws.mean()) < 3 / n**0.5
    assert abs(draws.var() - 1) < 3 * (2 / n) ** 0.5
    assert abs((draws[:-1] * draws[1:]).mean()) < 3 / n**0.5
    u = uniform(fold(run_key(3), Purpose.TIMESTEP, torch.arange(100_000)))
    assert abs(u.mean() - 0.5) < 3 / (12 * 100_000) ** 0.5
    assert u.min() >= 0 and u.max() < 1


def test_bits_prefix_is_stable():
    keys = fold(run_key(1), Purpose.NOISE, torch.arange(4))
    assert torch.equal(bits(keys, 5), bits(keys, 12)[:, :5])


def test_run_key_is_a_constant_of_the_format():
    assert run_key(0) == 0x7469583C47B3AF55  # a run that was begun with another value could not be resumed
    assert run_key(0) != run_key(1)


def test_module_seed_depends_on_position():
    def draw(*position):
        seed_modules(run_key(0), *position)
        return torch.rand(3)

    assert torch.equal(draw(5, 0, 0), draw(5, 0, 0))
    distinct = {tuple(draw(*p).tolist()) for p in [(5, 0, 0), (6, 0, 0), (5, 1, 0), (5, 0, 1)]}
    assert len(distinct) == 4


class FromHost(TorchDispatchMode):
    """Counts the tensors that are made from values of the host: with a GPU the host waits for the copy."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


def test_draws_bring_nothing_from_the_host():
    draws = Draws(run_key(0), torch.arange(4, device="meta"))
    with FromHost() as copies:
        assert draws.keys(Purpose.NOISE).shape == draws.low_discrepancy(Purpose.TIMESTEP).shape == (4,)
    assert copies.count == 0
    with FromHost() as copies:
        torch.tensor(run_key(0)).to("meta")
    assert copies.count == 1


def test_draws_are_one_graph():
    key, index = run_key(0), torch.arange(4)

    def draw(index):
        return Draws(key, index).normal(Purpose.NOISE, (3,))

    assert torch.equal(torch.compile(draw, fullgraph=True, backend="eager")(index), draw(index))


def test_draws_on_the_host_are_the_same():
    there = Draws(run_key(0), torch.arange(4, device="meta"), host=torch.arange(4))
    here = Draws(run_key(0), torch.arange(4))
    assert torch.equal(there.on_host().uniform(Purpose.CONDITION_DROP), here.uniform(Purpose.CONDITION_DROP))
    assert torch.equal(here.on_host().index, here.index)
