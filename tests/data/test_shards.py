"""The index: what is found, what is left out and why, and every way a shard can be broken."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest

from ldm.data import tar
from ldm.data.decode import BadSample
from ldm.data.index import BAD_KINDS
from ldm.data.shards import open_dataset
from ldm.errors import LdmError
from tests.data.making import encoded, picture, sample, write_shards, write_tar


def opened(path, **options):
    return open_dataset(path if isinstance(path, list) else str(path), **options)


def refusal(path, **options):
    with pytest.raises(LdmError) as refused:
        opened(path, **options)
    assert refused.value.exit_code == 2
    return refused.value.line()


def test_what_the_index_holds(tmp_path):
    write_shards(tmp_path, [3, 2])
    data = opened(tmp_path)
    assert data.keys == [f"s{n:05d}" for n in range(5)]
    assert data.shard_lengths.tolist() == [3, 2]
    assert data.shard_name(4) == "train-000001.tar"
    assert data.widths.tolist() == data.heights.tolist() == [8] * 5
    assert data.sizes[3] == sum(len(content) for _, content in sample(3))
    assert data.read(3) == {"image": picture(3), "txt": b"caption 3"}
    assert data.read(3, ("txt",)) == {"txt": b"caption 3"}
    assert not data.problems


def test_the_saved_index_is_used_until_the_shard_changes(tmp_path, capfd):
    write_shards(tmp_path, [3, 2])
    first = opened(tmp_path)
    assert "indexed 2 of 2 shards" in capfd.readouterr().err
    again = opened(tmp_path)
    assert capfd.readouterr().err == ""
    assert again.keys == first.keys and again.manifest_hash == first.manifest_hash
    assert (again.indexes[0].members == first.indexes[0].members).all()
    write_tar(tmp_path / "train-000001.tar", sample(9))
    changed = opened(tmp_path)
    assert "indexed 1 of 2 shards" in capfd.readouterr().err
    assert changed.keys[3:] == ["s00009"] and changed.manifest_hash != first.manifest_hash


def test_a_damaged_saved_index_is_built_again(tmp_path, capfd):
    write_shards(tmp_path, [3])
    opened(tmp_path)
    saved = next((tmp_path / ".ldm-index").iterdir())
    for content in (b"", b"PK\x03\x04 nonsense", saved.read_bytes()[:-40]):
        saved.write_bytes(content)
        assert opened(tmp_path).num_samples == 3
    assert capfd.readouterr().err.count("indexed") == 4


def test_the_index_can_lie_elsewhere(tmp_path, monkeypatch):
    write_shards(tmp_path / "data", [2])
    opened(tmp_path / "data", index_dir=str(tmp_path / "index"))
    assert len(list((tmp_path / "index").iterdir())) == 1 and not (tmp_path / "data" / ".ldm-index").exists()
    (tmp_path / "data" / ".ldm-index").write_text("in the way of the folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert opened(tmp_path / "data").num_samples == 2
    assert len(list((tmp_path / "cache" / "ldm" / "index").iterdir())) == 1


def test_reading_compares_with_the_index(tmp_path):
    write_shards(tmp_path, [2])
    data = opened(tmp_path)
    shard = tmp_path / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[data.indexes[0].place(0, "image")[0] + 50] ^= 1
    shard.write_bytes(content)
    for action, kind in ((None, "decode"), (lambda: os.truncate(shard, 700), "truncated_shard")):
        if action:
            action()
        with pytest.raises(BadSample) as caught:
            data.read(0)
        assert caught.value.kind == kind
    fresh = pickle.loads(pickle.dumps(data))
    shard.unlink()
    with pytest.raises(BadSample) as caught:
        fresh.read(0)
    assert caught.value.kind == "fetch"


def test_handles_are_bounded_and_survive_forks(tmp_path):
    write_shards(tmp_path, [1] * 6)
    data = opened(tmp_path)
    data._handles._limit = 2
    assert [data.read(n, ("txt",))["txt"] for n in (0, 5, 1, 4, 0, 3)] == [
        b"caption %d" % n for n in (0, 5, 1, 4, 0, 3)
    ]
    assert len(data._handles._open) == 2
    child = os.fork()
    if not child:
        os._exit(0 if data.read(3) == {"image": picture(3), "txt": b"caption 3"} else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert data.read(3)["txt"] == b"caption 3"


# ---- paths


def test_splits_globs_braces_and_lists(tmp_path):
    write_shards(tmp_path, [2, 1])
    write_shards(tmp_path, [1], prefix="val")
    assert opened(tmp_path, split="train").num_samples == 3
    assert opened(tmp_path, split="val").num_samples == 1
    assert opened(tmp_path).num_samples == 4
    assert opened(tmp_path / "train-*.tar").num_samples == 3
    assert opened(tmp_path / "train-{000000..000001}.tar").num_samples == 3
    assert opened(tmp_path / "{train,val}-000000.tar").num_samples == 3
    assert opened([str(tmp_path / "val-000000.tar"), str(tmp_path / "train-000001.tar")]).num_samples == 2
    assert opened([str(tmp_path), str(tmp_path / "val-000000.tar")]).num_samples == 4  # each shard once


@pytest.mark.parametrize("name", ["a b", "a#1", "a?x=1", "a%20b", "ünï-日本", "[x]", "{1..2}", "-rf", "a;b'\"c", "p:q"])
def test_a_path_is_a_path(tmp_path, name):
    folder = write_shards(tmp_path / name, [2])
    assert opened(folder).num_samples == 2
    assert opened(folder / "train-000000.tar").read(1)["txt"] == b"caption 1"


@pytest.mark.parametrize("path", ["pipe:cat x", "http://h/a.tar", "s3://b/a.tar", "a.tar::b.tar", "file:///etc/passwd"])
def test_urls_and_commands_are_refused(path):
    assert "not a local path" in refusal(path)


def test_missing_and_empty(tmp_path):
    (tmp_path / "logos").mkdir()
    assert "did you mean 'logos'" in refusal(tmp_path / "logo")
    assert "does not exist either" in refusal(tmp_path / "x" / "y")
    line = refusal(tmp_path / "logos")
    assert "no usable sample" in line and "KEY.txt" in line and "data.path" in line
    assert "the path is empty" in refusal("")
    (tmp_path / "a.zip").write_bytes(b"PK")
    assert "not a .tar" in refusal(tmp_path / "a.zip")


def test_errors_come_without_torch_and_at_once(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<html>404</html>")
    code = (
        "import sys; import ldm.data.order; from ldm.data.shards import open_dataset; from ldm.errors import LdmError\n"
        f"try: open_dataset({str(tmp_path)!r})\n"
        "except LdmError as error: print(error.line())\n"
        "assert not {'torch', 'webdataset', 'pytorch_lightning'} & set(sys.modules)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HTML" in done.stdout
    assert time.monotonic() - began < 10  # 0.3 s on a quiet machine; torch alone takes 2 s


# ---- broken shards


def test_all_unusable_shards_in_one_report(tmp_path):
    write_shards(tmp_path, [2])
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / "b.tar").write_bytes(b"<!DOCTYPE html><html>404</html>" * 40)
    (tmp_path / "c.tar").write_bytes(b"\x1f\x8b\x08" + b"x" * 2000)
    (tmp_path / "d.tar").write_bytes(os.urandom(3000))
    line = refusal([str(tmp_path), str(tmp_path / "e-{0..1}.tar")])
    assert "6 of 7 shards cannot be used" in line and "\n" not in line
    for words in ("a.tar: empty file", "b.tar: an HTML", "c.tar: gzip", "d.tar: not a tar", "e-0.tar: missing"):
        assert words in line


def cuts(shard):
    """Byte positions in the last sample (picture, then caption): boundary, header, start and middle of a payload."""
    with tarfile.open(shard) as archive:
        image, text = archive.getmembers()[-2:]
    return {
        "boundary before the caption": (text.offset, 2),
        "in a header": (text.offset + 100, 2),
        "start of a payload": (text.offset_data, 2),
        "inside a payload": (image.offset_data + 30, 2),
        "boundary after everything": (text.offset_data + 512, 3),
        "inside the closing blocks": (text.offset_data + 1024, 3),
    }


@pytest.mark.parametrize("case", range(6))
def test_truncated_tars(tmp_path, case):
    write_shards(tmp_path, [3, 3])
    shard = tmp_path / "train-000001.tar"
    where, (byte, complete) = list(cuts(shard).items())[case]
    os.truncate(shard, byte)
    line = refusal(tmp_path)
    assert f"truncated at byte {byte}" in line and f"{complete} complete samples before it" in line, where
    data = opened(tmp_path, on_truncated="use")
    assert data.keys[3:] == ["s00003", "s00004", "s00005"][:complete]
    assert data.problems["truncated_shard"] == 3 - complete or "caption" not in where
    kept = opened(tmp_path, on_truncated="use", on_missing_caption="empty")
    assert kept.keys == data.keys  # half a sample is never one without a caption


def test_a_whole_tar_is_not_called_truncated(tmp_path):
    write_shards(tmp_path, [3])
    assert opened(tmp_path).num_samples == 3  # the control of the test above


def test_appended_archives_are_reported(tmp_path):
    one, two = write_tar(tmp_path / "a.tar", sample(0)), write_tar(tmp_path / "b.tar", sample(1))
    one.write_bytes(one.read_bytes() + two.read_bytes())
    assert opened(one).problems == {"trailing_data": 1}


def test_interleaved_members_are_grouped(tmp_path):
    (a_png, a_txt), (b_png, b_txt) = sample(0), sample(1)
    data = opened(write_tar(tmp_path / "a.tar", [a_txt, b_txt, a_png, b_png]))
    assert data.read(0) == {"image": a_png[1], "txt": b"caption 0"}
    assert data.problems["interleaved"] == 2 and "--sort=name" in data.examples[0].reason


def test_duplicates_never_pair_a_caption_with_another_picture(tmp_path):
    first, second = picture(1), picture(2)
    members = [("x.png", first), *sample(7), ("x.png", second), ("x.txt", b"of the second")]
    data = opened(write_tar(tmp_path / "a.tar", members))
    assert data.keys == ["s00007"] and data.problems == {"duplicate_key": 1, "caption_missing": 1}
    members = [("x.txt", b"of the first"), *sample(7), ("x.png", second), ("x.txt", b"of the second")]
    data = opened(write_tar(tmp_path / "b.tar", members))
    assert data.keys == ["s00007"]
    write_tar(tmp_path / "c.tar", sample(7))
    assert opened([str(tmp_path / "b.tar"), str(tmp_path / "c.tar")]).problems["duplicate_key"] == 2


def test_special_members_are_refused_and_counted(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)):
            info = tarfile.TarInfo(f"x{number}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        sparse = tarfile.TarInfo("x9.png")
        sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.realsize": "9999999999"}
        archive.addfile(sparse)
        for name, data in sample(0):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    data = opened(path)
    assert data.keys == ["s00000"] and data.problems == {"member_type": 5}


def test_names_long_dotted_and_hostile(tmp_path):
    names = ["../../etc/x", "/absolute/y", "d" * 120 + "/" + "k" * 90, "日本/ö", "photo.v1.2", "dir.v1/z"]
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        members = [(f"{n}.{s}", d) for n in names for s, d in (("PNG", picture()), ("Txt", n.encode()))]
        data = opened(write_tar(tmp_path / f"{number}.tar", members, form))
        assert data.keys == names
        assert [data.read(i)["txt"].decode() for i in range(len(names))] == names
    assert sorted(p.name for p in tmp_path.iterdir()) == [".ldm-index", "0.tar", "1.tar"]


def test_further_pictures_of_a_sample_are_no_samples(tmp_path):
    members = [*sample(0), ("s00000.depth.png", picture(5))]
    data = opened(write_tar(tmp_path / "a.tar", members), on_missing_caption="empty")
    assert data.keys == ["s00000"] and not data.problems
    assert data.read(0, (".depth.png", ".mask.png")) == {".depth.png": picture(5)}


def test_unknown_suffixes_are_never_read(tmp_path):
    evil = [(f"x.{suffix}", b"cos\nsystem\n(S'touch marker'\ntR.") for suffix in ("pyd", "pkl", "pth", "npz", "ten")]
    data = opened(write_tar(tmp_path / "a.tar", evil + sample(0)))
    assert data.keys == ["s00000"] and data.problems == {"unknown_suffix": 5}


def test_samples_that_the_index_rejects(tmp_path):
    members = [
        ("html.jpg", b"<html></html>"),
        ("html.txt", b"x"),
        ("zero.png", b""),
        ("zero.txt", b"x"),
        ("lone.txt", b"x"),
        ("latin.png", picture()),
        ("latin.txt", "é".encode("latin-1")),
        ("blank.png", picture()),
        ("blank.txt", b" \n"),
        ("long.png", encoded_long()),
        ("long.txt", b"x"),
        *sample(0),
    ]
    data = opened(write_tar(tmp_path / "a.tar", members))
    assert data.keys == ["s00000"]
    assert data.problems == {
        "decode": 2,
        "image_missing": 1,
        "caption_encoding": 1,
        "caption_missing": 1,
        "size_policy": 1,
    }
    assert sum(data.problems[kind] for kind in BAD_KINDS) == 6
    assert {e.key for e in data.examples} == {"html", "zero", "lone", "latin", "blank", "long"}
    with_blank = opened(tmp_path / "a.tar", on_missing_caption="empty")
    assert with_blank.keys == ["blank", "s00000"] and "txt" not in with_blank.read(0)
    assert "a.tar: blank" in refusal(tmp_path / "a.tar", on_missing_caption="error")


def encoded_long():
    from PIL import Image

    return encoded(Image.new("1", (1, 60000)))


@pytest.mark.parametrize("seed", range(3))
def test_mutated_headers_give_our_errors_only(tmp_path, seed):
    rng = np.random.default_rng(seed)
    clean = bytearray(write_tar(tmp_path / "a.tar", sample(0) + sample(1), tarfile.PAX_FORMAT).read_bytes())
    for _ in range(150):
        data = bytearray(clean)
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(len(data))] = rng.integers(256)
        try:
            found = list(tar.members(io.BytesIO(data), len(data)))
        except tar.Damage:
            continue
        assert all(m.offset >= 0 and m.offset + m.size <= len(data) for m in found)


# ---- folders


def test_a_folder_of_pictures(tmp_path):
    folder = tmp_path / "my pictures"
    (folder / "sub").mkdir(parents=True)
    for name, data in {
        "a.JPG": picture(1, (9, 5), "JPEG"),
        "a.txt": b"first",
        "sub/b.webp": picture(2, (4, 6), "WEBP"),
        "sub/b.caption": b"second",
        "c.png": picture(3),
        ".hidden.png": picture(4),
        "README.md": b"about",
    }.items():
        (folder / name).write_bytes(data)
    data = opened(folder)
    assert sorted(data.keys) == ["a", "sub/b"]
    at = data.keys.index("sub/b")
    assert data.read(at)["txt"] == b"second" and (data.widths[at], data.heights[at]) == (4, 6)
    assert data.problems == {"caption_missing": 1, "unknown_suffix": 1}
    assert opened(folder, on_missing_caption="empty").num_samples == 3
    (folder / "c.txt").write_bytes(b"third")
    changed = opened(folder)
    assert changed.num_samples == 3 and changed.manifest_hash != data.manifest_hash


def test_a_folder_without_captions_says_what_to_do(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    line = refusal(tmp_path)
    assert "a.txt" in line and "data.on_missing_caption=empty" in line and "1 caption_missing" in line


def test_take(tmp_path):
    write_shards(tmp_path, [3, 2])
    part = opened(tmp_path).take([1, 3])
    assert part.keys == ["s00001", "s00003"] and part.shard_lengths.tolist() == [1, 1]
    assert part.read(1)["txt"] == b"caption 3"


# ---- webdataset reads what we read, and writes what we read


def test_shards_of_webdatasets_writer(tmp_path):
    import webdataset

    webdataset.utils.enforce_security = True
    with webdataset.ShardWriter(
        str(tmp_path / "train-%06d.tar"), maxcount=3, opener=lambda p: open(p, "wb"), encoder=False, verbose=0
    ) as writer:
        for number in range(5):
            name = {"__key__": f"s{number:05d}", "json": json.dumps({"n": number}).encode()}
            writer.write({**name, "png": picture(number), "txt": f"caption {number}".encode()})
    ours = opened(tmp_path)
    theirs = [s for p in sorted(tmp_path.glob("*.tar")) for s in webdataset.WebDataset(str(p), shardshuffle=False)]
    assert ours.keys == [s["__key__"] for s in theirs] and len(theirs) == 5
    for number, other in enumerate(theirs):
        mine = ours.read(number)
        assert (mine["image"], mine["txt"], mine["json"]) == (other["png"], other["txt"], other["json"])
