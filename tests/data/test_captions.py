"""Which text a sample gets: sources, several captions, tags, templates; nothing in a text is executed."""

import json
from collections import Counter

import pytest

from ldm.config import compose
from ldm.data.captions import Captions, captions_in, words_of
from ldm.data.decode import BadSample
from ldm.errors import LdmError

TREE = {
    "title": "Grunt",
    "colours": ["red", "blue"],
    "size": {"w": 3, "h": 2.5},
    "marks": [{"shape": "ring"}],
    "ok": True,
}


def text(key="red_fox-01", txt=None, tree=None, pick=0, order=0, **settings):
    data = None if tree is None else json.dumps(tree).encode()
    return Captions(**settings)(key, txt, data, pick, order)


def test_sources():
    both = {"txt": b"of the file", "tree": {"text": "of the table", "caption": "second"}}
    assert text(**both) == text(**both, caption="sidecar") == "of the file"
    assert text(**both, caption="metadata") == text(tree=both["tree"]) == "of the table"
    assert text(**both, caption="filename") == "red fox"
    assert text(**both, caption="a photo of sks dog") == "a photo of sks dog"
    assert text(tree={"text": " ", "caption": "second"}) == "second"
    assert text() == text(txt=b" \n") == text(tree={"text": None}) == text(tree=[1]) == ""
    assert text(txt=b"x", tree=both["tree"], caption_prefix="logo of ", caption_suffix=", flat") == "logo of x, flat"


def test_which_members_are_read():
    assert Captions().members == ("txt", "json") and Captions("sidecar").members == ("txt",)
    assert Captions("filename").members == Captions("a dog").members == () and Captions("{a}").members == ("json",)
    assert Captions("a {title} by {by.name}, {title}").fields == ("title", "by.name")


@pytest.mark.parametrize(
    "name,words",
    [
        ("red_fox-01", "red fox"),
        ("a/b/Red Fox (2)", "Red Fox"),
        ("it's.red+blue", "it's red blue"),
        ("3_birds", "3 birds"),
        ("0001", ""),
        ("2024-01-02", ""),
        ("fuchs_日本", "fuchs 日本"),
    ],
)
def test_words_of_a_file_name(name, words):
    assert words_of(name) == words


def test_templates():
    assert text(tree=TREE, caption="a logo of {title}, {colours}") == "a logo of Grunt, red, blue"
    assert text(tree=TREE, caption="{size.w}x{size.h} {marks.0.shape} {ok} {filename}") == "3x2.5 ring True red fox"
    for path in ("titel", "size", "marks.1.shape", "marks.x", "title.x", "none", "empty", "blank", "mixed"):
        tree = TREE | {"none": None, "empty": [], "blank": " ", "mixed": ["a", None]}
        with pytest.raises(BadSample, match=path) as bad:
            text(tree=tree, caption=f"a {{{path}}}")
        assert bad.value.kind == "caption_missing"
    with pytest.raises(BadSample, match="title"):
        text(caption="a {title}")


@pytest.mark.parametrize(
    "field", ["x.__class__", "x!r", "x:>9", "x[0]", "", "0.__init__", " x", "_x", "x..y", "{x}", "x."]
)
def test_a_template_is_plain_fields_only(field):
    with pytest.raises(LdmError, match=r"data\.caption"):
        Captions(f"a {{{field}}}")
    Captions("a {x}")  # the control


@pytest.mark.parametrize("text", ["a {", "a }", "a {x}}", "a {{x}}", "a {x", "a x}"])
def test_lone_braces_are_refused(text):
    with pytest.raises(LdmError, match="no field"):
        Captions(text)


@pytest.mark.parametrize(
    "template", ["a logo of {title}, {colours}", "{class}", 'it\'s {x}, "q"', "a\\' {x}\\", "filename"]
)
def test_a_template_arrives_verbatim_from_the_command_line(template):
    words = ["experiment=demo", f"data.caption={template}", "data.caption_prefix='{x} '"]
    data = compose("train", words)["data"]
    assert (data["caption"], data["caption_prefix"]) == (template, "{x} ")


def test_what_a_value_contains_is_never_a_template():
    evil = "{title} {x.__class__} {0} %s ${oc.env:HOME} $(id) \\1 \\g<0>"
    assert text(tree={"title": evil, "x": 1}, caption="a {title}") == f"a {evil}"
    assert text(txt=evil.encode()) == evil


def test_values_are_cleaned_like_captions():
    assert text(tree={"a": "x\x00\x1b[1m\n y", "b": "\ud800"}, caption="{a} {b}") == "x [1m y ?"
    assert text(tree={"text": "\ufeffa\nb"}) == "a b"
    with pytest.raises(BadSample, match="UTF-8"):
        text(txt=b"\xff")
    assert len(text(tree={"text": "x" * 100_000})) == 8192


@pytest.mark.parametrize("data", [b"{", b"[" * 100_000, b'{"text": 1}', b"\xff", b'"text"', b"null"])
def test_json_that_holds_no_caption(data):
    assert Captions()("k", None, data) == ""


def test_unknown_settings_name_the_nearest():
    with pytest.raises(LdmError, match="did you mean 'filename'"):
        Captions("filname")
    for settings in ({"caption_choice": "last"}, {"keep_tokens": -1}, {"caption_separator": ""}, {"caption": None}):
        with pytest.raises(LdmError, match=rf"data\.{next(iter(settings))}"):
            Captions(**settings)


# ---- several captions


def test_several_captions():
    lines = b"\xef\xbb\xbfone\r\n\n two \nthree\n"
    assert text(txt=lines) == "one two three"
    several = [text(txt=lines, caption_lines=True, caption_choice="random", pick=pick) for pick in (0, 1, 2, 3, 2**62)]
    assert several == ["one", "two", "three", "one", ["one", "two", "three"][2**62 % 3]]
    assert captions_in({"captions": ["a", "", 3, "b"]}) == ["a", "b"]
    assert [text(tree={"text": ["a", "b"]}, pick=pick) for pick in (0, 1)] == ["a", "b"]


def test_without_chance_takes_the_first_and_leaves_the_tags():
    chance = Captions(caption_lines=True, caption_choice="cycle", shuffle_caption=True, caption_prefix="p ")
    assert chance.without_chance() == Captions(caption_lines=True, caption_prefix="p ")


# ---- tags


def test_tags_are_shuffled_behind_the_kept_ones():
    tags = [f"t{n}" for n in range(12)]
    settings = {"txt": " ,".join(tags).encode(), "shuffle_caption": True, "keep_tokens": 2}
    results = [text(**settings, order=order).split(", ") for order in range(200)]
    assert all(sorted(result) == sorted(tags) and result[:2] == ["t0", "t1"] for result in results)
    assert results[:5] == [text(**settings, order=order).split(", ") for order in range(5)]
    assert len({tuple(result) for result in results}) == 200
    places = Counter(result.index("t2") for result in results)  # 10 places, 20 each expected, standard deviation 4
    assert len(places) == 10 and max(places.values()) < 45
    unshuffled = text(**{**settings, "shuffle_caption": False})
    assert unshuffled == settings["txt"].decode()


def test_other_separators_and_few_tags():
    assert sorted(text(txt=b"a; b,c ;;d", shuffle_caption=True, caption_separator=";").split("; ")) == ["a", "b,c", "d"]
    found = {
        text(txt=b"red and blue and tall", shuffle_caption=True, caption_separator=" and ", order=n) for n in range(9)
    }
    assert all(sorted(tags.split(" and ")) == ["blue", "red", "tall"] for tags in found) and len(found) > 2
    assert sorted(text(txt=b"a | b", shuffle_caption=True, caption_separator=" | ")) == sorted("a | b")
    assert text(txt=b"b  a", shuffle_caption=True, caption_separator=" ", keep_tokens=2) == "b a"
    assert text(txt=b"one", shuffle_caption=True, keep_tokens=5) == "one"
    assert text(shuffle_caption=True) == ""
    shuffled = text(txt=b"a,b", shuffle_caption=True, caption_prefix="x, ", caption_suffix=", y", order=3)
    assert shuffled in ("x, a, b, y", "x, b, a, y")  # prefix and suffix stay where they are
