"""Files and texts of a sampling command, checked before the model is loaded."""

import os

import pytest
from PIL import Image

from ldm.errors import LdmError
from ldm.sampling.request import check_writable, read_picture, read_prompts


@pytest.mark.parametrize("folder", ["/proc/foo", "/proc/foo/bar", "FILE", "FILE/below", "x" * 300])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, folder):
    (tmp_path / "FILE").write_text("mine")
    with pytest.raises(LdmError, match=r"^error\[DISK\]: the pictures cannot be written: .*output_dir=") as refused:
        check_writable(tmp_path / folder)
    assert refused.value.exit_code == 2
    assert os.listdir(tmp_path) == ["FILE"]


def test_trying_leaves_nothing_behind(tmp_path):
    (tmp_path / "there").mkdir()
    check_writable(tmp_path / "there")
    check_writable(tmp_path / "a" / "b")
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]


def test_a_bad_picture_is_described_in_words(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    (tmp_path / "empty.png").write_bytes(b"")
    assert read_picture(tmp_path / "good.png").image.size == (8, 8)
    for name in ("bad.png", "empty.png", "none.png"):
        with pytest.raises(LdmError) as refused:
            read_picture(tmp_path / name)
        line = refused.value.line()
        assert f"image={tmp_path}/{name}" in line and "give a JPEG, PNG or WebP" in line
        assert "('" not in line


def test_prompts_of_a_file(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffa ring\n\n  a star \n", encoding="utf-8")
    assert read_prompts({"prompt": None, "prompts_file": str(tmp_path / "p.txt")}) == ["a ring", "a star"]
    assert read_prompts({"prompt": None, "prompts_file": None}) is None
    (tmp_path / "q.txt").write_bytes(b"a r\xffng")
    (tmp_path / "r.txt").write_bytes(b"\n")
    for name, words in (("q.txt", "not UTF-8, at byte 3"), ("r.txt", "holds no prompt"), ("s.txt", "No such file")):
        with pytest.raises(LdmError, match=words):
            read_prompts({"prompt": None, "prompts_file": str(tmp_path / name)})
    with pytest.raises(LdmError, match="give either"):
        read_prompts({"prompt": "x", "prompts_file": "p.txt"})
