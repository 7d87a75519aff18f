"""Conditioners: what each gives, its null, its share of dropped samples, and several as one."""

import math
import pickle
import re

import pytest
import torch
import yaml
from torch import nn

from ldm.build import build
from ldm.cli import compose
from ldm.errors import LdmError
from ldm.models.conditioner.class_label import ClassLabel
from ldm.models.conditioner.compose import Compose, condition, null_columns
from ldm.models.conditioner.numbers import Numbers
from ldm.models.conditioner.size import Size
from ldm.models.conditioner.text_transformer import TextTransformer
from ldm.random import Draws, Purpose, run_key
from ldm.types import Conditioning
from tests.conftest import CONFIGS

N = 4000


def text(**options):
    torch.manual_seed(0)
    return TextTransformer(width=16, depth=1, num_heads=2, embedding_size=4, **options)


def label(**options):
    torch.manual_seed(1)
    return ClassLabel("shape", ["star", "ring", "disc"], width=16, **options)


def draws(count, seed=0):
    return Draws(run_key(seed), torch.arange(count))


class Echo(nn.Module):
    """Shows what it is given: 1 where a value is there, 0 where it is absent."""

    width, length, provides = None, None, frozenset(["vector"])

    def __init__(self, column, drop_prob=0.0):
        super().__init__()
        self.reads, self.checks, self.vector_size, self.drop_prob = (column,), {}, 1, drop_prob

    def forward(self, values):
        return Conditioning(vector=torch.tensor([[float(v not in (None, ""))] for v in values]))


def present(conditioner, columns, count=N, seed=0):
    """[B, parts]: which part of which sample was given its value."""
    return condition(conditioner, columns, count, draws(count, seed)).vector > 0


@pytest.mark.parametrize("path", sorted((CONFIGS / "model/conditioner").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_yaml_gives_a_conditioner(path):
    """A new one is one file and one YAML: this test finds it, and holds it to the protocol."""
    if "hf_" in path.stem:
        pytest.importorskip("transformers", reason='needs pip install "ldm[interop]"')
    node = yaml.safe_load(path.read_text())
    if "defaults" in node:
        node = compose("train", [f"model/conditioner={path.stem}"])["model"]["conditioner"]
    with torch.device("meta"):
        conditioner = build(node, where="model.conditioner")
    assert isinstance(conditioner.reads, tuple) and 0 <= conditioner.drop_prob <= 1
    assert conditioner.provides <= {"tokens", "mask", "vector"}
    assert (conditioner.width is not None) == ("tokens" in conditioner.provides)
    assert (conditioner.vector_size is not None) == ("vector" in conditioner.provides)
    assert conditioner.length is None or "tokens" in conditioner.provides
    assert set(conditioner.checks) == {*conditioner.reads} - {"caption"}
    assert set(pickle.loads(pickle.dumps(conditioner.checks))) == set(conditioner.checks)  # data workers get a copy


def test_class_label_gives_a_row_for_each_class_and_one_for_none():
    conditioner = label()
    got = conditioner(["ring", None, "star", "ring"])
    table = conditioner.embedding.weight
    assert torch.equal(got.vector, table[[1, 3, 0, 1]])
    assert torch.equal(got.tokens, got.vector[:, None]) and got.mask.shape == (4, 1) and got.mask.all()
    numbered = ClassLabel("id", 3, width=16)
    assert torch.equal(numbered([2, None]).vector, numbered.embedding.weight[[2, 3]])


@pytest.mark.parametrize("value", ["sta", 7, True, 1.5, float("nan"), 10**40, ["star"], {}])
def test_a_label_that_is_no_class_is_named(value):
    with pytest.raises(LdmError, match=re.escape(repr(value))) as refused:
        label()([value])
    assert refused.value.exit_code == 2
    with pytest.raises(LdmError, match=re.escape(repr(value))):
        label().checks["shape"][0](value)
    if value == "sta":
        assert "star" in refused.value.next


@pytest.mark.parametrize("classes", [0, [], ["a", "a"]])
def test_classes_must_differ(classes):
    with pytest.raises(ValueError, match="classes"):
        ClassLabel("shape", classes)


def test_numbers_are_sinusoids_and_a_null_for_each():
    conditioner = Numbers(["score", "year"], width=8, num_sinusoids=4, scale=2.0)
    seen = []
    conditioner.embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        conditioner.null.copy_(torch.arange(8.0).view(2, 4))
    got = conditioner([0.5, None], [None, 3])
    angles = [[2 * v * f for f in (1.0, 1e4**-0.5)] for v in (0.5, 3)]
    score, year = ([math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles)
    expected = torch.tensor([[*score, 4, 5, 6, 7], [0, 1, 2, 3, *year]])
    torch.testing.assert_close(seen[0], expected)
    assert got.vector.shape == (2, 8) and got.tokens.shape == (2, 1, 8)
    got.vector.square().sum().backward()
    assert (conditioner.null.grad != 0).all()  # learned, and in the graph whatever was dropped


@pytest.mark.parametrize("value", ["1", True, float("nan"), -float("inf"), [1], 10**400, 1e300])
def test_a_value_that_is_no_number_is_named(value):
    with pytest.raises(LdmError, match="finite number"):
        Numbers(["score"])([value])
    with pytest.raises(LdmError, match="finite number"):
        Numbers(["score"]).checks["score"][0](value)


def test_large_numbers_stay_finite():
    got = Numbers(["score"], scale=1e6)([10**30, -(10**30), 2**70, 0])
    assert got.vector.isfinite().all()


def test_size_is_six_times_its_sinusoids():
    got = Size(num_sinusoids=4)([(512, 768, 0, 64, 1024, 1024), None]).vector.view(2, 6, 4)
    assert torch.equal(got[1], torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(6, 4))  # cosines and sines of 0
    expected = [math.cos(64), math.cos(0.64), math.sin(64), math.sin(0.64)]
    torch.testing.assert_close(got[0, 3], torch.tensor(expected), rtol=0, atol=1e-5)
    for bad in ((1, 2, 3), "123456", 5, (1, 2, 3, 4, 5, None), (1, 2, 3, 4, 5, 10**400), [1, 2, 3, 4, 5, True]):
        with pytest.raises(LdmError):
            Size()([bad])
        with pytest.raises(LdmError):
            Size().checks["size"][0](bad)


@pytest.mark.parametrize("make,column,values", [(text, "caption", ["a star"]), (label, "shape", ["star"])])
def test_the_null_is_what_an_absent_value_gives(make, column, values):
    """Every sample dropped equals the empty prompt, or no class; none dropped equals the value."""
    never, always = make(drop_prob=0.0), make(drop_prob=1.0)
    columns = {column: values * 3}
    null = condition(never, {column: [""] * 3} if column == "caption" else {}, 3)
    kept = condition(never, columns, 3)
    torch.testing.assert_close(condition(always, columns, 3, draws(3)).vector, null.vector)
    torch.testing.assert_close(condition(never, columns, 3, draws(3)).vector, kept.vector)
    torch.testing.assert_close(condition(always, columns, 3).vector, kept.vector)  # without draws nothing is dropped
    assert (null.vector - kept.vector).abs().max() > 1e-3


def test_a_single_conditioner_drops_its_share_by_the_first_draw():
    given = present(Echo("a", 0.3), {"a": ["x"] * N})[:, 0]
    assert abs(float(given.float().mean()) - 0.7) < 4 * math.sqrt(0.21 / N)
    assert torch.equal(given, draws(N).uniform(Purpose.CONDITION_DROP) >= 0.3)
    assert torch.equal(given, present(Echo("a", 0.3), {"a": ["x"] * N})[:, 0])
    assert not torch.equal(given, present(Echo("a", 0.3), {"a": ["x"] * N}, seed=1)[:, 0])


def test_parts_drop_independently_and_together():
    columns = {"a": ["x"] * N, "b": ["y"] * N, "c": ["z"] * N}
    parts = {"one": Echo("a", 0.3), "two": Echo("b", 0.2), "kept": Echo("c")}
    apart = present(Compose(parts), columns).float()
    share = apart.mean(0)
    assert (share - torch.tensor([0.7, 0.8, 1.0])).abs().max() < 0.03
    both = float((1 - apart[:, :2]).prod(1).mean())
    assert abs(both - 0.06) < 0.015  # never shared by accident: 0.2 if they were
    together = present(Compose(parts, drop_prob=0.1, keep=["kept"]), columns).float()
    assert abs(float((1 - together[:, :2]).prod(1).mean()) - (0.1 + 0.9 * 0.06)) < 0.02
    assert together[:, 2].all()
    fewer = present(Compose({"one": parts["one"]}), columns)
    assert torch.equal(fewer[:, 0], apart[:, 0] > 0)  # a further part changes nobody's draws


def test_guidance_keeps_what_training_never_drops():
    columns = {"a": [1], "c": [2]}
    parts = {"one": Echo("a", 0.3), "kept": Echo("c")}
    assert null_columns(Compose(parts), columns) == {"c": [2]}
    assert null_columns(Compose(parts, drop_prob=0.1), columns) == {}
    assert null_columns(Compose(parts, drop_prob=0.1, keep=["kept"]), columns) == {"c": [2]}
    assert null_columns(Echo("a", 0.0), columns) == columns


def test_tokens_join_along_their_length_and_vectors_side_by_side():
    whole = Compose({"text": text(), "class": label()})
    assert (whole.width, whole.vector_size, whole.reads) == (16, 32, ("caption", "shape"))
    captions, shapes = ["a red star", "a ring"], ["star", None]
    got = condition(whole, {"caption": captions, "shape": shapes}, 2)
    first, second = whole.parts["text"](captions), whole.parts["class"](shapes)
    assert torch.equal(got.tokens, torch.cat([first.tokens, second.tokens], 1))
    assert torch.equal(got.mask, torch.cat([first.mask, second.mask], 1))
    assert torch.equal(got.vector, torch.cat([first.vector, second.vector], 1))
    assert torch.equal(whole(captions, shapes).tokens, got.tokens)
    chosen = Compose({"text": text(), "class": label()}, tokens=["text"], vector=["class", "text"])
    assert torch.equal(condition(chosen, {"caption": captions, "shape": shapes}, 2).vector[:, :16], second.vector)


def test_two_towers_join_token_by_token():
    """As in SDXL: the tokens of both towers side by side, the vector from one of them and the sizes."""
    parts = {"a": text(trim=False), "b": text(trim=False), "size": Size(num_sinusoids=2)}
    whole = Compose(parts, tokens=["a", "b"], vector=["b", "size"], join="channels", drop_prob=0.5, keep=["size"])
    assert (whole.width, whole.vector_size, whole.length) == (32, 16 + 12, 77)
    got = condition(whole, {"caption": ["a star"], "size": [(1, 2, 3, 4, 5, 6)]}, 1)
    assert got.tokens.shape == (1, 77, 32) and got.mask.shape == (1, 77) and got.vector.shape == (1, 28)
    assert torch.equal(got.tokens[..., 16:], parts["b"](["a star"]).tokens)


def test_a_joined_token_counts_if_any_part_of_it_does():
    whole = Compose({"a": text(trim=False), "b": text(trim=False)}, join="channels")
    tokens, vector = torch.zeros(1, 3, 16), torch.zeros(1, 16)

    def mask_of(*masks):
        given = [None if m is None else torch.tensor([m]) > 0 for m in masks]
        found = whole.joined([Conditioning(tokens=tokens, mask=m, vector=vector) for m in given]).mask
        return None if found is None else found.int().tolist()

    assert mask_of([1, 0, 0], [1, 1, 0]) == mask_of([1, 1, 0], [1, 0, 0]) == [[1, 1, 0]]
    assert mask_of([1, 0, 0], None) == [[1, 1, 1]] and mask_of(None, None) is None


def test_a_column_may_be_a_tensor():
    """A vector for each sample, as the data hand it over; the rows that are dropped are absent."""

    class Vector(nn.Module):
        reads, checks, drop_prob = ("v",), {}, 0.5

        def forward(self, values):
            self.got = values
            return Conditioning(vector=torch.zeros(len(values), 1))

    part, vectors = Vector(), torch.arange(1.0, 13).view(4, 3)
    condition(part, {"v": vectors}, 4)
    assert torch.equal(torch.stack(list(part.got)), vectors)
    condition(part, {"v": vectors}, 4, draws(4))
    kept = [v is not None for v in part.got]
    assert 0 < sum(kept) < 4 and all(v is None or torch.equal(v, row) for v, row in zip(part.got, vectors, strict=True))
    condition(part, {}, 4)
    assert part.got == [None] * 4


@pytest.mark.parametrize(
    "a,b,words",
    [
        (text(), text(), "a gives as many as its longest text needs .*trim=false.*, b gives as many"),
        (text(trim=False), text(), "a gives 77, b gives as many"),
        (text(trim=False), label(), "a gives 77, b gives 1$"),
    ],
)
def test_tokens_that_may_differ_in_number_cannot_be_joined_token_by_token(a, b, words):
    """Two trimmed texts differ as soon as one of them is dropped: in the middle of a training."""
    with pytest.raises(ValueError, match=words):
        Compose({"a": a, "b": b}, join="channels")
    assert Compose({"a": a, "b": b}, tokens=["a"], vector=["b"], join="channels").length == a.length


def test_a_column_of_two_readers_is_checked_by_both():
    parts = {"few": ClassLabel("x", 2, width=16), "many": ClassLabel("x", 9, width=16), "n": Numbers(["x"], width=16)}
    assert len(Compose(parts).checks["x"]) == 3


COLUMNS = {"caption": ["a star", ""], "label": [2, None], "score": [0.5, None], "size": [(1, 2, 3, 4, 5, 6), None]}


@pytest.mark.parametrize(
    "make", [text, ClassLabel, lambda: Numbers(["score"]), Size, lambda: Compose({"t": text(), "n": Numbers(width=16)})]
)
def test_the_host_reads_nothing_back_from_the_device(make):
    """A tensor on the meta device has no values: whatever reads one raises, as it would wait for a GPU."""
    conditioner = make().to("meta")
    elsewhere = Draws(run_key(0), torch.arange(2, device="meta"), host=torch.arange(2))
    got = condition(conditioner, COLUMNS, 2, elsewhere)
    fields = [getattr(got, name) for name in conditioner.provides]
    assert all(field.device.type == "meta" and len(field) == 2 for field in fields)
    if conditioner.drop_prob:
        with pytest.raises(NotImplementedError):  # the guard sees a wait: here the index is on the device alone
            condition(conditioner, COLUMNS, 2, Draws(run_key(0), elsewhere.index))


def test_without_dropout_nothing_is_drawn():
    condition(text(drop_prob=0.0), COLUMNS, 2, None)
    nowhere = Draws(run_key(0), torch.arange(2, device="meta"))
    assert condition(text(drop_prob=0.0), COLUMNS, 2, nowhere).tokens.shape == (2, 8, 16)


def test_encoding_is_one_graph():
    part = text()
    ids, counts = torch.randint(0, 49408, (2, 16)), torch.tensor([3, 16])
    whole = torch.compile(part.encode, fullgraph=True, backend="eager")(ids, counts)
    torch.testing.assert_close(whole.tokens, part.encode(ids, counts).tokens)


def test_nothing_composed_is_no_condition():
    nothing = Compose({})
    assert nothing.reads == () and nothing.provides == frozenset() and not list(nothing.parameters())
    assert condition(nothing, {"caption": ["x"]}, 1, draws(1)) == Conditioning()


@pytest.mark.parametrize(
    "options,words",
    [
        ({"join": "sum"}, "join must be"),
        ({"tokens": ["txt"]}, "no part"),
        ({"tokens": ["size"]}, "provides no tokens"),
        ({"tokens": ["text"], "vector": []}, "nothing of the part 'class'"),
        ({"width": 77}, "width is 77, but the parts together give 16"),
        ({"keep": ["class"]}, "drop_prob above 0"),
    ],
)
def test_what_cannot_be_joined_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        Compose({"text": text(), "class": label(), "size": Size()}, **options)


def test_tokens_of_different_widths_cannot_stand_one_after_the_other():
    with pytest.raises(ValueError, match="text 16, class 128"):
        Compose({"text": text(), "class": ClassLabel()})
    with pytest.raises(ValueError, match="composed itself"):
        Compose({"a": Compose({"text": text()})})
