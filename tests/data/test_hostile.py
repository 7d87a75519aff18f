"""Bad input as a whole: a shard with good samples and a bad one is opened and streamed.

The same rules twice: on shards that this file makes, and on every case of the development data's hostile set as its
manifest expects. In each case the good samples come, nothing crashes, and what does not come is counted.
"""

import gzip
import io
import json
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.decode import MAX_CAPTION
from ldm.data.index import BAD_KINDS
from ldm.data.loader import Stream
from ldm.data.pipeline import PassPlan, stages
from ldm.data.shards import open_dataset
from ldm.data.transforms import Transform
from ldm.errors import LdmError
from tests.data.making import SHARED, encoded, picture, png, sample, shared, write_tar


def streamed(path, **options):
    """The dataset, and of every sample that came its pixels and caption, by key."""
    data = open_dataset(str(path), **options)
    (batch,) = Stream(stages(data, PassPlan(data.num_samples, 100), Transform(16)))
    rows = zip(batch.keys, batch.valid.tolist(), batch.images, batch.captions, strict=True)
    came = {key: (image, caption) for key, valid, image, caption in rows if valid}
    return data, came, rejected(data) + int((~batch.valid).sum())


def rejected(data):
    return sum(data.problems[kind] for kind in BAD_KINDS)


# ---- made here

PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8))
WHOLE = {form: encoded(PICTURE, form.upper()) for form in ("png", "jpeg", "webp")}
CLEAR = Image.new("P", (8, 8), 0)
CLEAR.putpalette([255, 0, 0])
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
DEEP = png((8, 8), 16, 2, [bytes(range(48))] * 8)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) run\n"


def bad(**members):
    """Members of the sample `bad`, with a caption unless there is one; `_` in a name stands for a dot."""
    named = {"txt": b"a caption", **members}
    return [(f"bad.{name.replace('_', '.')}", data) for name, data in named.items() if data is not None]


COMES = {  # members -> the caption that must come with the sample, or None where that is not the point
    "png": (bad(png=WHOLE["png"]), "a caption"),
    "jpeg": (bad(jpeg=WHOLE["jpeg"]), "a caption"),
    "webp": (bad(webp=WHOLE["webp"]), "a caption"),
    "suffix in capitals": (bad(PNG=WHOLE["png"], txt=None, TXT=b"loud"), "loud"),
    "a png called jpg": (bad(jpg=WHOLE["png"]), None),
    "cmyk": (bad(jpg=encoded(PICTURE.convert("CMYK"), "JPEG")), None),
    "16 bits": (bad(png=DEEP), None),
    "palette, transparent": (bad(png=encoded(CLEAR, transparency=0)), None),
    "soft alpha": (bad(png=encoded(PICTURE.convert("RGBA"))), None),
    "grey and alpha": (bad(png=encoded(PICTURE.convert("LA"))), None),
    "turned by EXIF": (bad(jpg=encoded(PICTURE, "JPEG", exif=ROTATED)), None),
    "one pixel": (bad(png=encoded(Image.new("RGB", (1, 1)))), None),
    "two pictures": (bad(webp=WHOLE["webp"], jpg=WHOLE["jpeg"]), None),
    "byte-order mark": (bad(png=WHOLE["png"], txt="\ufeffa fox".encode()), "a fox"),
    "a word of 100 000": (bad(png=WHOLE["png"], txt=b"x" * 100_000), "x" * MAX_CAPTION),
    "control characters": (bad(png=WHOLE["png"], txt="a\0b\x1b[31m \u202eעברית".encode()), "a b [31m \u202eעברית"),
    "text that looks like code": (bad(png=WHOLE["png"], txt=b"{0} ${HOME} $(ls) <s>"), "{0} ${HOME} $(ls) <s>"),
    "lines": (bad(png=WHOLE["png"], txt=b"one\r\ntwo\n"), "one two"),
    "json that is none": (bad(png=WHOLE["png"], json=b'{"caption": '), "a caption"),
    "json of wrong types": (bad(png=WHOLE["png"], json=b'{"width": NaN, "caption": null, "title": [1]}'), "a caption"),
    "json of 100 000 levels": (bad(png=WHOLE["png"], json=b"[" * 100_000), "a caption"),
    "code beside it": (bad(png=WHOLE["png"], pyd=b"x", pkl=b"x", pth=b"x", npz=b"x"), "a caption"),
}
SKIPPED = {  # members -> the kind under which the sample is counted
    "half a jpeg": (bad(jpg=WHOLE["jpeg"][: len(WHOLE["jpeg"]) // 2]), "decode"),
    "half a png": (bad(png=WHOLE["png"][: len(WHOLE["png"]) // 2]), "decode"),
    "half a webp": (bad(webp=WHOLE["webp"][: len(WHOLE["webp"]) // 2]), "decode"),
    "a jpeg's beginning, then noise": (bad(jpg=b"\xff\xd8\xff\xe0" + picture(3)), "decode"),
    "0 bytes": (bad(png=b""), "decode"),
    "html": (bad(jpg=b"<!doctype html><title>404</title>"), "decode"),
    "svg": (bad(png=b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "decode"),
    "eps": (bad(jpg=EPS), "decode"),
    "gif": (bad(png=encoded(PICTURE, "GIF")), "decode"),
    "30 000 x 30 000": (bad(png=png((30_000, 30_000), 8, 2, [b""])), "size_policy"),
    "1 x 60 000": (bad(png=encoded(Image.new("1", (1, 60_000)))), "size_policy"),
    "no picture": (bad(), "image_missing"),
    "unknown suffix": (bad(tiff=encoded(PICTURE, "TIFF")), "image_missing"),
    "no caption": (bad(png=WHOLE["png"], txt=None), "caption_missing"),
    "blank caption": (bad(png=WHOLE["png"], txt=b" \n\t"), "caption_missing"),
    "latin-1": (bad(png=WHOLE["png"], txt="café".encode("latin-1")), "caption_encoding"),
    "utf-16": (bad(png=WHOLE["png"], txt="fox".encode("utf-16")), "caption_encoding"),
}


def around(path: Path, members) -> Path:
    return write_tar(path, [*sample(0), *members, *sample(1)])


@pytest.mark.parametrize("case", COMES)
def test_what_can_be_used_comes(case, tmp_path):
    members, caption = COMES[case]
    data, came, not_used = streamed(around(tmp_path / "a.tar", members))
    assert set(came) == {"s00000", "bad", "s00001"} and not_used == 0
    assert caption is None or came["bad"][1] == caption
    if case == "turned by EXIF":
        assert data.image_sizes[data.keys.index("bad")].tolist() == [40, 30]


@pytest.mark.parametrize("case", SKIPPED)
def test_what_cannot_be_used_is_counted_and_named(case, tmp_path):
    members, kind = SKIPPED[case]
    data, came, not_used = streamed(around(tmp_path / "a.tar", members))
    assert set(came) == {"s00000", "s00001"} and not_used == 1
    if rejected(data):  # by the index; what only its pixels betray is reported by the stream
        assert data.problems[kind] == 1
        assert ("a.tar", "bad") in {(p.shard, p.key) for p in data.examples if p.kind == kind and p.reason}
    else:
        assert kind == "decode"


def test_members_that_are_no_files_are_counted_never_followed(tmp_path):
    path = tmp_path / "a.tar"
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    kinds = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "fifo": tarfile.FIFOTYPE, "device": tarfile.CHRTYPE}
    with tarfile.open(path, "w") as archive:
        for name, data in [*sample(0), *((f"{name}.png", picture(1)) for name in kinds)]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, kind in kinds.items():
            info = tarfile.TarInfo(f"{name}.txt")
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
    data, came, not_used = streamed(path, on_missing_caption="empty")
    assert set(came) == {"s00000"} and not_used == 4 and data.problems["member_type"] == 4


def test_shards_that_are_none_end_at_once_with_words(tmp_path):
    write_tar(tmp_path / "whole.tar", sample(0))
    whole = (tmp_path / "whole.tar").read_bytes()
    for content, words in (
        (b"", "empty file"),
        (bytes(10_240), "no usable sample"),
        (b"<!DOCTYPE html><title>404</title>" * 30, "HTML"),
        (gzip.compress(whole), "gunzip"),
        (whole[:300], "not a tar|cut inside a header"),
        (whole[:1500], "truncated at byte 1500"),
    ):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(LdmError, match=words) as refused:
            open_dataset(str(tmp_path / "a.tar"))
        assert refused.value.exit_code == 2 and "a.tar" in refused.value.line()


# ---- nothing of the data is ever run

PAYLOADS = """
import io, os, sys, tarfile, webdataset
pickled = lambda name: b"cos\\nsystem\\n(S'touch " + name.encode() + b"'\\ntR."
with tarfile.open("evil.tar", "w") as archive:
    def add(name, data):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    for suffix in ("pyd", "pkl", "pickle", "pth"):
        add(f"bad{suffix}.{suffix}", pickled(f"ran-{suffix}"))
webdataset.utils.enforce_security = False
for sample in webdataset.WebDataset("evil.tar", shardshuffle=False, handler=webdataset.ignore_and_continue).decode(
    handler=webdataset.ignore_and_continue
):
    pass
next(iter(webdataset.WebDataset("pipe:touch ran-pipe; cat evil.tar", shardshuffle=False)), None)
"""


def test_members_and_paths_that_would_run_code_are_inert(tmp_path, monkeypatch):
    """The payloads are alive: webdataset's own reader runs every one of them. Ours runs none."""
    subprocess.run([sys.executable, "-c", PAYLOADS], cwd=tmp_path, capture_output=True, check=True)
    ran = {"ran-pyd", "ran-pkl", "ran-pickle", "ran-pth", "ran-pipe"}
    assert {p.name for p in tmp_path.glob("ran-*")} == ran
    for name in ran:
        (tmp_path / name).unlink()
    monkeypatch.chdir(tmp_path)
    with tarfile.open("evil.tar") as archive:
        members = [(m.name, archive.extractfile(m).read()) for m in archive]
    with_caption = [(f"{name.split('.')[0]}.txt", b"a caption") for name, _ in members]
    data, came, not_used = streamed(write_tar(tmp_path / "a.tar", [*members, *with_caption, *sample(0)]))
    assert set(came) == {"s00000"} and data.problems["unknown_suffix"] == 4 and not_used == 4
    monkeypatch.setenv("GOPEN_REWRITE", "a.tar=pipe:touch ran-rewrite")
    monkeypatch.setenv("USE_AIS_FOR", "a")
    streamed(tmp_path / "a.tar")
    for path in ("pipe:touch ran-pipe", "a.tar::pipe:touch ran-pipe", "-exec touch ran-pipe", "$(touch ran-pipe)"):
        with pytest.raises(LdmError) as refused:
            open_dataset(path)
        assert refused.value.exit_code == 2
    assert not list(tmp_path.glob("ran-*"))


# ---- the hostile set of the development data

MANIFEST = SHARED / "hostile" / "manifest.json"
CASES = json.loads(MANIFEST.read_text())["cases"] if MANIFEST.exists() else []
REFUSED = {
    "tar-zero-bytes": "empty file",
    "tar-no-members": "no usable sample",
    "tar-is-html": "HTML",
    "tar-is-gzip": "gunzip",
}


def test_the_hostile_set_is_there():
    shared("hostile")
    assert len(CASES) == 41


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["case"])
def test_hostile(case, tmp_path):
    path, options = SHARED / "hostile" / case["file"], {"index_dir": str(tmp_path)}
    if case["case"] in REFUSED:
        with pytest.raises(LdmError, match=REFUSED[case["case"]]) as refused:
            open_dataset(str(path), **options)
        assert refused.value.exit_code == 2 and case["file"] in refused.value.line()
        return
    if case["file"].startswith("tar-truncated"):
        with pytest.raises(LdmError, match="truncated at byte 25800"):
            open_dataset(str(path), **options)
        options["on_truncated"] = "use"
    data, came, not_used = streamed(path, **options)
    expected = {"photo.v1.2"} if case["case"] == "key-with-dots" else set(case["bad_keys"])
    assert set(case["good_keys"]) <= set(came)
    if case["expect"] == "decode":
        assert expected <= set(came)
        image, caption = came["bad"]
        assert caption and image.std() > 0
        if "size" in case:
            assert data.image_sizes[data.keys.index("bad")].tolist() == case["size"]
        assert caption == case.get("caption", caption)
    if case["expect"] == "skip":
        assert not set(case["bad_keys"]) & set(came) and not_used >= 1
    assert not_used >= len(expected - set(came))  # nothing vanishes uncounted
    assert not set(case.get("must_skip", ())) & set(came) and set(case.get("must_decode", ())) <= set(came)


def test_cmyk_is_not_inverted(tmp_path):
    """good000 is the same logo in RGB."""
    _, came, _ = streamed(shared("hostile") / "jpeg-cmyk.tar", index_dir=str(tmp_path))
    good, inked = came["good000"][0], came["bad"][0]
    assert (good - inked).abs().mean() < 0.1  # of a range of 2
    assert (good + inked).abs().mean() > 0.5  # the control: an inverted picture is far


def test_memory_stays_bounded():
    """All cases above ran in this process: the 2.7 GB bomb and the 80 MB text chunk were never inflated."""
    shared("hostile")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2.5 * 2**20  # KiB; torch itself takes 0.5 GB
