"""The words and codes of failures."""

import pickle
import re
from pathlib import Path

import pytest

from ldm.errors import LdmError, LdmErrors, check, nearest, pick, raise_all


def test_line_has_the_promised_order():
    error = LdmError("DISK", "not saved", where="runs/a", limit="need 4, have 1", next="free space", exit_code=75)
    assert str(error) == "error[DISK]: not saved; runs/a; need 4, have 1; free space"


@pytest.mark.parametrize("text", ["a\nerror[OK]: b", "a\rb", "a\x1b[2Jb", "a\u2028b", "a\x00b"])
def test_text_of_a_user_cannot_fake_a_second_line(text):
    line = LdmError("DATA", text, where=text).line()
    assert len(line.splitlines()) == 1
    assert line.isprintable()


def test_ordinary_text_stays_as_it_is():
    assert "münchen 東京 🦊" in LdmError("DATA", "münchen 東京 🦊").line()


def test_several_problems_make_several_lines():
    errors = [LdmError("CONFIG", "a", exit_code=3), LdmError("CONFIG", "b")]
    with pytest.raises(LdmErrors) as caught:
        raise_all(errors)
    assert str(caught.value) == "error[CONFIG]: a\nerror[CONFIG]: b"
    assert caught.value.exit_code == 3
    with pytest.raises(LdmError, match=r"^error\[CONFIG\]: a$"):
        raise_all(errors[:1])
    raise_all([])


@pytest.mark.parametrize("error", [LdmError("A", "b", next="c", exit_code=4), LdmErrors([LdmError("A", "b")] * 2)])
def test_crosses_process_borders(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.exit_code) == (str(error), error.exit_code)


def test_nearest_name_or_what_exists():
    assert nearest("batchsize", ["batch_size", "seed"]) == "did you mean 'batch_size'?"
    assert nearest("xyz", ["a", "b"]) == "known: a, b"
    assert nearest("xyz", []) == "known: none"


def test_check_and_pick():
    check(True, "DATA", "never")
    with pytest.raises(LdmError, match="twice; here"):
        check(False, "DATA", "twice", where="here")
    assert pick({"euler": 1}, "euler", kind="sampler") == 1
    with pytest.raises(LdmError, match="unknown sampler 'eular'; did you mean 'euler'"):
        pick({"euler": 1}, "eular", kind="sampler")


def test_every_code_is_documented():
    root = Path(__file__).parents[1]
    documented = set(re.findall(r"^\| `([A-Z-]+)` \|", (root / "docs" / "errors.md").read_text(), re.MULTILINE))
    pattern = r'(?:LdmError|super\(\)\.__init__|errors\.check)\(\s*"([A-Z][A-Z-]+)"'
    used = {code for path in (root / "ldm").rglob("*.py") for code in re.findall(pattern, path.read_text())}
    assert len(used) > 10
    assert used - documented == set()
