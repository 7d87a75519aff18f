"""`python -m ldm prepare`: what is in the shards, that nothing leaks or is lost, and what survives a kill."""

import csv
import errno
import hashlib
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm.tools.prepare as prepare_module
from ldm.__main__ import VERBS
from ldm.cli import handled
from ldm.data.captions import Captions
from ldm.data.shards import open_dataset
from ldm.errors import LdmError
from ldm.tools.prepare import Options, main, prepare
from tests.data.making import write_shards
from tests.tools.making import encoded, mosaic, write_folder

ROOT = Path(__file__).parents[2]


def run(source, out, **options):
    return prepare(str(source), out, Options(**{"workers": 1, **options}))


def members(tar):
    with tarfile.open(tar) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive.getmembers()}


def samples(out, split=""):
    """path -> (what prepare says, picture, caption) of everything in the shards."""
    found = {}
    for tar in sorted(out.glob(f"{split}*.tar")):
        files = members(tar)
        for name in (n for n in files if n.endswith(".json")):
            key = name.removesuffix(".json")
            [picture] = [files[f"{key}.{s}"] for s in ("jpg", "png", "webp") if f"{key}.{s}" in files]
            own = json.loads(files[name])
            about = own["prepare"]
            assert about["key"] == key
            assert about["path"] not in found
            found[about["path"]] = about | {"own": own}, picture, files.get(f"{key}.txt")
    return found


def shards(out):
    return {p.name: p.read_bytes() for p in sorted(out.glob("*.tar"))}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- what is written


def test_original_bytes_captions_and_facts(tmp_path):
    folder = write_folder(tmp_path / "in", 12)
    own = {"title": "three", "width": 1, "path": "/mine", "key": "k", "sha256": 0, "caption": {"x": 1}}
    (folder / "p003.json").write_text(json.dumps(own | {"score": math.nan}))
    (folder / "deep").mkdir()
    (folder / "deep" / "x.y.jpeg").write_bytes(encoded(mosaic(50), "JPEG"))
    (folder / "deep" / "x.y.caption").write_text("über alles\nsecond line")
    report = run(folder, tmp_path / "out", val_fraction=0.2)
    found = samples(tmp_path / "out")
    assert len(found) == 13
    for path, (about, picture, txt) in found.items():
        source = folder / path
        assert picture == source.read_bytes()
        assert about["sha256"] == hashlib.sha256(picture).hexdigest()
        assert txt == next(p for s in ("txt", "caption") if (p := source.with_suffix(f".{s}")).exists()).read_bytes()
        assert (about["width"], about["height"]) == (48, 40)
    assert found["p003.png"][0]["own"] == own | {"score": None, "prepare": found["p003.png"][0]["own"]["prepare"]}
    assert found["deep/x.y.jpeg"][0]["caption"] == "über alles second line"
    assert report["train"] + report["val"] == 13
    assert report["val"] == len(samples(tmp_path / "out", "val")) > 0
    assert report["shards"] == {
        name: {
            "samples": len(members(tmp_path / "out" / name)) // 3,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        for name, data in shards(tmp_path / "out").items()
    }
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "duplicates.jsonl", "prepare_report.json", "skipped.jsonl", "train-000000.tar", "val-000000.tar"
    ]  # fmt: skip


def test_opens_with_webdataset_and_with_us(tmp_path):
    import webdataset

    run(write_folder(tmp_path / "in", 20), tmp_path / "out", val_fraction=0.1, shard_samples=7)
    urls = sorted(map(str, (tmp_path / "out").glob("train-*.tar")))
    assert len(urls) == 3
    theirs = {s["__key__"]: s for s in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)}
    dataset = open_dataset(str(tmp_path / "out"), split="train", index_dir=str(tmp_path / "index"))
    assert not dataset.problems
    assert set(dataset.keys) == set(theirs)
    for number, key in enumerate(dataset.keys):
        ours = dataset.read(number)
        assert (ours["image"], ours["txt"], ours["json"]) == tuple(theirs[key][s] for s in ("png", "txt", "json"))
    assert max(dataset.shard_lengths) - min(dataset.shard_lengths) <= 1


def test_the_same_bytes_for_any_number_of_workers_and_any_history_of_the_folder(tmp_path):
    one, other = write_folder(tmp_path / "a", 300), tmp_path / "b"
    other.mkdir()
    for path in sorted(one.iterdir(), reverse=True):  # other times, other order in the directory
        (other / path.name).write_bytes(path.read_bytes())
    run(one, tmp_path / "out1", workers=1, shard_samples=75)
    run(other, tmp_path / "out2", workers=2, shard_samples=75)
    assert len(shards(tmp_path / "out1")) == 5
    assert shards(tmp_path / "out1") == shards(tmp_path / "out2")
    for name in ("skipped.jsonl", "duplicates.jsonl"):
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()


def test_shards_are_even_and_as_large_as_asked(tmp_path):
    run(write_folder(tmp_path / "in", 60), tmp_path / "out", shard_mb=0.1, val_fraction=0)
    sizes = [len(data) for data in shards(tmp_path / "out").values()]
    assert len(sizes) > 2
    assert max(sizes) < 0.1e6 + 20_000
    assert max(sizes) - min(sizes) < 20_000


@pytest.mark.parametrize("form, suffix", [("jpg", "JPEG"), ("webp", "WEBP"), ("png", "PNG"), ("original", None)])
def test_resize_and_format(tmp_path, form, suffix):
    folder = write_folder(tmp_path / "in", 3)
    (folder / "big.jpg").write_bytes(encoded(mosaic(9, (400, 200)), "JPEG"))
    (folder / "big.txt").write_text("big")
    clear = mosaic(10, (200, 200)).convert("RGBA")
    clear.putalpha(0)
    (folder / "clear.png").write_bytes(encoded(clear))
    (folder / "clear.txt").write_text("clear")
    run(folder, tmp_path / "out", size=100, format=form, background="#ff0000", val_fraction=0)
    found = samples(tmp_path / "out")
    sizes = {path: Image.open(io.BytesIO(picture)).size for path, (_, picture, _) in found.items()}
    assert sizes == {"big.jpg": (200, 100), "clear.png": (100, 100)} | {f"p{n:03d}.png": (48, 40) for n in range(3)}
    about = found["big.jpg"][0]
    assert [about[k] for k in ("width", "height", "original_width", "original_height")] == [200, 100, 400, 200]
    formats = {Image.open(io.BytesIO(picture)).format for _, picture, _ in found.values()}
    assert formats == ({suffix} if suffix else {"JPEG", "PNG"})
    assert abs(Image.open(io.BytesIO(found["clear.png"][1])).convert("RGB").getpixel((50, 50))[0] - 255) < 4
    if form in ("png", "original"):  # nothing to do, so nothing is done
        assert found["p000.png"][1] == (folder / "p000.png").read_bytes()
    assert not open_dataset(str(tmp_path / "out"), index_dir=str(tmp_path / "index")).problems


def test_shards_are_a_source_too(tmp_path):
    write_shards(tmp_path / "in", [3, 4])
    run(tmp_path / "in", tmp_path / "out", index_dir=str(tmp_path / "i"), val_fraction=0)
    found = samples(tmp_path / "out")
    assert {about["caption"] for about, _, _ in found.values()} == {f"caption {n}" for n in range(7)}
    assert set(found) == {f"train-00000{int(n > 2)}.tar/s0000{n}" for n in range(7)}


# ---- tables


def write_table(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_table_with_columns_of_its_own(tmp_path, suffix):
    write_folder(tmp_path / "in" / "pics", 4)
    rows = [{"img": f"pics/p{n:03d}.png", "words": f"the {n}th, with a comma", "score": n} for n in range(4)]
    table = write_table(tmp_path / "in" / f"list.{suffix}", rows)
    run(table, tmp_path / "out", image_column="img", caption_column="words", val_fraction=0)
    found = samples(tmp_path / "out")
    assert set(found) == {row["img"] for row in rows}
    about, _, txt = found["pics/p002.png"]
    assert (about["caption"], about["own"]["score"], txt) == ("the 2th, with a comma", 2, b"the 2th, with a comma")


def test_the_rows_of_a_table_that_cannot_be_used_are_named(tmp_path):
    write_folder(tmp_path / "in", 2)
    (tmp_path / "secret.png").write_bytes(encoded(mosaic(3)))
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")
    rows = [
        {"file_name": "p000.png", "text": "fine"},
        {"file_name": "../secret.png", "text": "leads out"},
        {"file_name": str(tmp_path / "secret.png"), "text": "leads out"},
        {"file_name": "link.png", "text": "leads out"},
        {"file_name": "gone.png", "text": "gone"},
        {"file_name": "a\0b.png", "text": "no name"},
        {"file_name": "p001.png", "text": "  "},
        {"text": "no picture"},
    ]
    table = write_table(tmp_path / "in" / "list.jsonl", rows)
    with open(table, "a") as file:
        file.write("{ broken\n")
    report = run(table, tmp_path / "out")
    expected = {"outside": 3, "image_missing": 2, "fetch": 1, "caption_missing": 1, "row": 1}
    assert report["skipped"] == expected
    assert set(samples(tmp_path / "out")) == {"p000.png"}
    assert len(lines(tmp_path / "out" / "skipped.jsonl")) == 8
    report = run(table, tmp_path / "out2", root=str(tmp_path))
    assert "gone.png" in {row["path"] for row in lines(tmp_path / "out2" / "skipped.jsonl")}


# ---- bad samples


def test_every_bad_file_is_counted_and_named(tmp_path):
    folder = write_folder(tmp_path / "in", 15)
    for n in range(12):  # more than any list of examples holds
        (folder / f"torn{n:02d}.jpg").write_bytes(encoded(mosaic(n), "JPEG")[:-200])
        (folder / f"torn{n:02d}.txt").write_text("torn")
    (folder / "page.png").write_text("<!doctype html>")
    (folder / "mute.png").write_bytes(encoded(mosaic(99)))
    (folder / "latin.png").write_bytes(encoded(mosaic(98)))
    (folder / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (folder / "p000.jpg").write_bytes(encoded(mosaic(97), "JPEG"))  # a second picture of p000
    report = run(folder, tmp_path / "out")
    assert report["skipped"] == {"caption_encoding": 1, "caption_missing": 1, "decode": 13, "second_image": 1}
    rows = {row["path"]: row["kind"] for row in lines(tmp_path / "out" / "skipped.jsonl")}
    assert len(rows) == 16
    assert {rows[name] for name in (f"torn{n:02d}.jpg" for n in range(12))} == {"decode"}
    assert (rows["mute.png"], rows["latin.png"]) == ("caption_missing", "caption_encoding")
    assert len(samples(tmp_path / "out")) == 15
    report = run(folder, tmp_path / "out2", on_missing_caption="empty")
    assert report["skipped"].get("caption_missing", 0) == 0
    assert samples(tmp_path / "out2")["mute.png"][2] == b""


def test_nothing_usable_is_refused(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(encoded(mosaic(1), "JPEG")[:-200])
    (folder / "a.txt").write_text("a")
    with pytest.raises(LdmError, match=r"error\[DATA\]: .*a.jpg") as caught:
        run(folder, tmp_path / "out")
    assert caught.value.exit_code == 2
    assert not list((tmp_path / "out").glob("*.tar"))


# ---- duplicates and the split


def with_copies(folder):
    """30 pictures; of 10 of them a copy under another name, of 10 a smaller JPEG."""
    size = (96, 80)
    write_folder(folder, 30, size=size)
    for n in range(10):
        (folder / f"copy{n}.webp").write_bytes(encoded(mosaic(n, size), "WEBP", lossless=True))
        (folder / f"copy{n}.txt").write_text("copy")
        small = mosaic(10 + n, size).resize((48, 40), Image.Resampling.LANCZOS)
        (folder / f"small{n}.jpg").write_bytes(encoded(small, "JPEG", quality=80))
        (folder / f"small{n}.txt").write_text("small")
    return folder


def originals(paths):
    """The numbers of the pictures behind names of `with_copies`."""
    return {int(p[1:4]) if p[0] == "p" else int(p[4]) if p[0] == "c" else 10 + int(p[5]) for p in paths}


def test_copies_never_lie_on_both_sides(tmp_path):
    folder = with_copies(tmp_path / "in")
    sides = []
    for fraction in (0.1, 0.3, 0.5):
        out = tmp_path / f"out{fraction}"
        report = run(folder, out, val_fraction=fraction)
        train, val = set(samples(out, "train")), set(samples(out, "val"))
        assert (len(train), len(val)) == (report["train"], report["val"])
        assert train | val == {p.name for p in folder.glob("*.*") if p.suffix in (".png", ".jpg", ".webp")}
        assert not originals(train) & originals(val)
        sides.append(val)
        counts = {kind: report["duplicates"][kind]["groups"] for kind in ("exact", "near")}
        assert counts == {"exact": 10, "near": 10}
    assert sides[0] < sides[1] < sides[2]  # a larger share holds the smaller one
    by_name = {p for p in sides[1] if p[0] == "p"}
    assert originals(by_name) & originals(sides[1] - by_name)  # copies are there to be torn apart


def test_drop_leaves_one_of_each(tmp_path):
    folder = with_copies(tmp_path / "in")
    report = run(folder, tmp_path / "exact", drop="exact")
    assert report["train"] + report["val"] == 40
    assert report["skipped"] == {"duplicate": 10}
    report = run(folder, tmp_path / "near", drop="near")
    found = samples(tmp_path / "near")
    assert report["skipped"] == {"duplicate": 10, "near_duplicate": 10}
    assert originals(found) == set(range(30))
    assert not [path for path in found if path.startswith("small")]  # of nearly equal ones the largest stays


def test_the_split_is_by_content_and_never_empty(tmp_path):
    folder = write_folder(tmp_path / "in", 12)
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for n in range(12):
        (renamed / f"z{50 - n}.png").write_bytes((folder / f"p{n:03d}.png").read_bytes())
        (renamed / f"z{50 - n}.txt").write_text("z")
    pictures = []
    for source in (folder, renamed):
        report = run(source, tmp_path / f"out-{source.name}", val_fraction=0.01)
        assert (report["train"], report["val"]) == (11, 1)
        pictures.append([about["sha256"] for about, _, _ in samples(tmp_path / f"out-{source.name}", "val").values()])
    assert pictures[0] == pictures[1]
    report = run(folder, tmp_path / "none", val_fraction=0)
    assert (report["train"], report["val"]) == (12, 0)


# ---- again, after a kill, over other files


def test_a_second_run_changes_nothing(tmp_path, capsys):
    folder, out = write_folder(tmp_path / "in", 5), tmp_path / "out"
    run(folder, out)
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.iterdir()}
    run(folder, out)
    assert "holds this already" in capsys.readouterr().out
    assert before == {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.iterdir()}


def test_what_is_finished_is_kept_after_a_stop(tmp_path, monkeypatch):
    folder, out = write_folder(tmp_path / "in", 40), tmp_path / "out"
    run(folder, tmp_path / "whole", shard_samples=10)
    write, written = prepare_module.write_shard, []

    def stops_at_the_third(state, job):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(job.name)
        return write(state, job)

    monkeypatch.setattr(prepare_module, "write_shard", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, shard_samples=10)
    kept = {name: (out / name).stat().st_ino for name in written}
    assert sorted(shards(out)) == sorted(written)
    monkeypatch.setattr(prepare_module, "write_shard", write)
    monkeypatch.setattr(prepare_module, "scan_all", lambda scan, tasks, workers: iter([None] * len(tasks)))
    run(folder, out, shard_samples=10)  # the first pass is not done again: scan_all would break it
    assert {name: (out / name).stat().st_ino for name in written} == kept
    assert shards(out) == shards(tmp_path / "whole")
    assert not (out / ".prepare").exists()


def test_a_shard_that_was_damaged_since_is_written_again(tmp_path):
    folder, out = write_folder(tmp_path / "in", 5), tmp_path / "out"
    run(folder, out)
    whole = shards(out)
    (out / "train-000000.tar").write_bytes(b"cut")
    with pytest.raises(LdmError, match=r"EXISTS.*gone or changed: train-000000\.tar; .*overwrite=true"):
        run(folder, out)
    run(folder, out, overwrite=True)
    assert shards(out) == whole
    (out / "val-000000.tar").unlink()
    with pytest.raises(LdmError, match=r"EXISTS.*gone or changed: val-000000\.tar; .*overwrite=true"):
        run(folder, out)
    with pytest.raises(LdmError, match=r"EXISTS.*of other options"):
        run(folder, out, val_fraction=0.5)
    (out / "prepare_report.json").write_text('{"shards": [')  # cut
    with pytest.raises(LdmError, match=r"EXISTS"):
        run(folder, out, overwrite=True)  # whose shards these are is not known any more


def test_nothing_is_overwritten_unasked(tmp_path):
    folder, out = write_folder(tmp_path / "in", 5), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(LdmError, match=r"EXISTS.*thesis.tex.*overwrite=true"):
        run(folder, out)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    run(folder, out, overwrite=True, shard_samples=1)
    assert (out / "thesis.tex").read_text() == "years of work"
    with pytest.raises(LdmError, match="other options"):
        run(folder, out, shard_samples=5)
    run(folder, out, shard_samples=5, overwrite=True)
    assert [p.name for p in sorted(out.glob("train-*.tar"))] == ["train-000000.tar"]


def test_shards_of_others_are_never_deleted(tmp_path):
    folder, out = write_folder(tmp_path / "in", 5), tmp_path / "out"
    out.mkdir()
    (out / "val-mine.tar").write_bytes(b"mine")
    with pytest.raises(LdmError, match=r"no prepare wrote: val-mine\.tar"):
        run(folder, out, overwrite=True)
    (out / "val-mine.tar").rename(tmp_path / "val-mine.tar")
    run(folder, out, overwrite=True)
    (tmp_path / "val-mine.tar").rename(out / "val-mine.tar")
    with pytest.raises(LdmError, match="no prepare wrote"):
        run(folder, out, overwrite=True, shard_samples=1)
    assert (out / "val-mine.tar").read_bytes() == b"mine"


def test_the_caption_that_was_chosen_is_the_one_that_is_written(tmp_path):
    folder = write_folder(tmp_path / "in", 3)
    (folder / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "p{n:03}.png", "text": "new {n}"}}\n' for n in range(3))
    )
    run(folder, tmp_path / "out", caption="metadata")
    assert {txt for _, _, txt in samples(tmp_path / "out").values()} == {b"new 0", b"new 1", b"new 2"}


def captions_of(path, settings, index_dir):
    """Picture's hash -> its captions, as training reads them."""
    data = open_dataset(
        str(path), caption=settings.caption, on_missing_caption=settings.on_missing_caption, index_dir=index_dir
    )
    samples = [(key, data.read(number)) for number, key in enumerate(data.keys)]
    return {
        hashlib.sha256(raw["image"]).hexdigest(): settings.all_of(key, raw.get("txt"), raw.get("json"))
        for key, raw in samples
    }


def test_shards_give_the_captions_that_the_folder_gave(tmp_path):
    """Several captions of one picture stay several, wherever they come from and however they are read."""
    folder = tmp_path / "in"
    for n, place in enumerate(["a", "b", "c", "d", "e", "f", "g", "10_red fox/h"]):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{place}.png").write_bytes(encoded(mosaic(n)))
    (folder / "a.txt").write_text("one\ntwo\n")
    (folder / "b.json").write_text('{"captions": ["x", "y", "z"], "caption": ""}')
    (folder / "c.json").write_text('{"text": ["p", "q"], "caption": "other"}')
    (folder / "d.txt").write_text("of the text")
    (folder / "d.json").write_text('{"caption": "of the json", "text": null, "title": "T"}')
    rows = [{"file_name": "e.png", "text": t} for t in ("first", "second")] + [{"file_name": "f.png", "caption": "one"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "g.json").write_text('{"title": "G"}')
    run(folder, tmp_path / "out", val_fraction=0, on_missing_caption="empty")
    for caption in ("auto", "metadata", "sidecar", "{title}", "{class}"):
        for lines_apart in (False, True):
            settings = Captions(caption, caption_lines=lines_apart, on_missing_caption="empty")
            there = captions_of(folder, settings, str(tmp_path / "i"))
            back = captions_of(tmp_path / "out", settings, str(tmp_path / "j"))
            more = {picture: texts for picture, texts in back.items() if texts != there[picture]}
            assert there | more == back
            # a caption of the metadata stands in a .txt too, where it is the only one
            assert sorted(more.values()) == ([["one"], ["red fox"]] if caption == "sidecar" else [])
    several = captions_of(tmp_path / "out", Captions(), str(tmp_path / "j")).values()
    assert sorted(several) == [
        ["first", "second"], ["of the text"], ["one"], ["one two"], ["p", "q"], ["red fox"], ["x", "y", "z"]
    ]  # fmt: skip
    run(tmp_path / "out", tmp_path / "again", val_fraction=0, on_missing_caption="empty", index_dir=str(tmp_path / "k"))
    settings = Captions(on_missing_caption="empty")
    back = captions_of(tmp_path / "again", settings, str(tmp_path / "l"))
    assert back == captions_of(folder, settings, str(tmp_path / "i"))
    about = samples(tmp_path / "again")["train-000000.tar/000000000"][0]
    assert about["own"]["prepare"]["path"] == "train-000000.tar/000000000"  # of this one, not of the first


def test_masks_and_arrays_come_along(tmp_path):
    folder = write_folder(tmp_path / "in", 6)
    for n in range(5):
        (folder / f"p{n:03d}.mask.png").write_bytes(encoded(mosaic(100 + n).convert("L")))
    np.save(folder / "p003.emb.npy", np.arange(4, dtype=np.float32))
    (folder / "p000.jpg").write_bytes(encoded(mosaic(97), "JPEG"))  # a second form of the picture does not
    report = run(folder, tmp_path / "out", val_fraction=0, format="png")
    assert report["train"] == 6 and report["skipped"] == {"second_image": 1}
    names = members(tmp_path / "out" / "train-000000.tar")
    own = {json.loads(data)["prepare"]["path"]: name[:-5] for name, data in names.items() if name.endswith(".json")}
    assert set(own) == {"p000.jpg", *(f"p{n:03d}.png" for n in range(1, 6))}
    assert len(names) == 6 * 3 + 5 + 1
    for path, key in own.items():
        mask = (folder / path).with_suffix(".mask.png")
        assert (names.get(f"{key}.mask.png") == mask.read_bytes()) if mask.exists() else f"{key}.mask.png" not in names
    again = run(tmp_path / "out", tmp_path / "again", val_fraction=0, index_dir=str(tmp_path / "i"))
    assert again["skipped"] == {}
    names = members(tmp_path / "again" / "train-000000.tar")
    assert sum(name.endswith(".mask.png") for name in names) == 5 and sum(name.endswith(".emb.npy") for name in names)
    data = open_dataset(str(tmp_path / "again"), columns={"mask": ".mask.png"}, index_dir=str(tmp_path / "j"))
    assert data.num_samples == 6 and not data.problems


def test_long_and_foreign_names_of_members_are_written_and_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    folder = write_folder(tmp_path / "in", 1)
    names = ["x" * 110, "ünï", "y" * 90 + ".soft"]
    for name in names:
        (folder / f"p000.{name}.png").write_bytes(encoded(mosaic(1)))
    (folder / f"p000.{'z' * 210}.png").write_bytes(encoded(mosaic(1)))  # longer than a name may be
    report = run(folder, tmp_path / "out", val_fraction=0)
    assert report["train"] == 1
    data = open_dataset(str(tmp_path / "out"))
    assert sorted(data.indexes[0].further_names) == sorted(f".{name}.png" for name in names)
    assert data.read(0, (f".{names[0]}.png",)) == {f".{names[0]}.png": encoded(mosaic(1))}
    (found,) = webdataset.WebDataset(str(tmp_path / "out" / "train-000000.tar"), shardshuffle=False)
    assert {f"{name}.png" for name in names} <= set(found)


def test_a_name_from_a_table_never_leads_out_of_the_shard(tmp_path):
    folder = write_folder(tmp_path / "in", 2)
    row = {"file_name": "p000.png", "text": "x", "/../../evil_file_name": "p001.png", "mask_file_name": "p001.png"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    run(folder, tmp_path / "out", val_fraction=0)
    names = members(tmp_path / "out" / "train-000000.tar")
    assert any(name.endswith(".mask.png") for name in names) and not any("/" in name for name in names)


def test_masks_larger_than_a_picture_that_was_made_smaller(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for n, size in enumerate([(400, 300), (300, 401), (299, 400)]):
        (folder / f"{n}.png").write_bytes(encoded(mosaic(n).resize(size)))
        (folder / f"{n}.mask.png").write_bytes(encoded(mosaic(n).convert("L").resize(size)))
        (folder / f"{n}.txt").write_text(f"{n}")
    run(folder, tmp_path / "out", val_fraction=0, size=16)
    from ldm.data.decode import decode_mask
    from ldm.data.transforms import Transform

    data = open_dataset(str(tmp_path / "out"), columns={"mask": ".mask.png"})
    for i in range(3):
        mask = decode_mask(data.read(i, (".mask.png",))[".mask.png"])
        picture = (int(data.widths[i]), int(data.heights[i]))
        assert min(picture) == 16 and min(mask.size) > 290
        assert Transform(16).further(mask, picture, np.full(3, 0.5, np.float32)).shape == (16, 16)


def test_several_captions_of_a_table(tmp_path):
    write_folder(tmp_path / "in", 1)
    table = write_table(tmp_path / "in" / "list.jsonl", [{"image": "p000.png", "words": ["one", "two"], "key": 7}])
    run(table, tmp_path / "out", caption_column="words", val_fraction=0)
    assert list(captions_of(tmp_path / "out", Captions(), str(tmp_path / "i")).values()) == [["one", "two"]]
    assert samples(tmp_path / "out")["p000.png"][0]["own"]["key"] == 7


def test_a_template_that_some_lack(tmp_path):
    folder = write_folder(tmp_path / "in", 4)
    for n in range(3):
        (folder / f"p{n:03d}.json").write_text(json.dumps({"title": f"T{n}" if n else None}))
    report = run(folder, tmp_path / "skip", caption="a {title}", val_fraction=0)
    assert report["train"] == 2 and report["skipped"] == {"caption_missing": 2}
    report = run(folder, tmp_path / "empty", caption="a {title}", val_fraction=0, on_missing_caption="empty")
    assert sorted(txt for _, _, txt in samples(tmp_path / "empty").values()) == [b"", b"", b"a T1", b"a T2"]


def test_changed_data_is_another_plan(tmp_path):
    folder, out = write_folder(tmp_path / "in", 5), tmp_path / "out"
    run(folder, out)
    write_folder(folder, 1, first=20)
    with pytest.raises(LdmError, match="another source"):
        run(folder, out)


def test_two_at_once_are_refused(tmp_path, monkeypatch):
    folder, out = write_folder(tmp_path / "in", 5), tmp_path / "out"
    inner = prepare_module._run
    seen = []

    def again(*args):
        monkeypatch.setattr(prepare_module, "_run", inner)
        with pytest.raises(LdmError, match="LOCKED") as caught:
            run(folder, out)
        seen.append(caught.value.exit_code)
        return inner(*args)

    monkeypatch.setattr(prepare_module, "_run", again)
    run(folder, out)
    assert seen == [2]
    assert len(shards(out)) == 2


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(tmp_path, capsys):
    folder, out = write_folder(tmp_path / "in", 40), tmp_path / "out"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    words = [str(folder), str(out), "workers=1", "val_fraction=0", "shard_samples=20"]
    run(folder, tmp_path / "whole", shard_samples=20, val_fraction=0)
    limit = min(len(data) for data in shards(tmp_path / "whole").values()) - 2000
    assert limit > 100_000  # or the first pass would meet it
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        code = handled(lambda: main(words))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    lines_of_error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error[")]
    assert code == 75
    [line] = lines_of_error
    assert line.startswith("error[DISK]: ")
    assert "run the same command again" in line
    assert not list(out.glob("*.tar"))
    assert not list(out.glob(".tmp-*"))
    assert handled(lambda: main(words)) == 0
    assert shards(out) == shards(tmp_path / "whole")


def test_too_little_space_is_said_before_writing(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "in", 5)
    usage = prepare_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(LdmError, match=r"DISK.*do not fit.*need 0 MB") as caught:
        run(folder, tmp_path / "out")
    assert caught.value.exit_code == 2


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "in", 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(LdmError, match="DISK"):
        run(folder, tmp_path / "file")
    with pytest.raises(LdmError, match=r"CONFIG.*beside FOLDER"):
        run(folder, folder / "out")
    with pytest.raises(LdmError, match=r"CONFIG.*beside FOLDER"):
        run(folder, tmp_path)

    def refuse(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / "out"))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(LdmError, match=r"DISK.*Read-only file system.*choose another OUT") as caught:
        run(folder, tmp_path / "out", index_dir=str(tmp_path))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "expected FOLDER OUT, got nothing"),
        (["in"], "expected FOLDER OUT, got 'in'"),
        (["in", "out", "siz=3"], "did you mean 'size'"),
        (["in", "out", "--quality=0"], "1 to 100"),
        (["in", "out", "quality=high"], "a whole number"),
        (["in", "out", "format=gif"], "original, jpg, png, webp"),
        (["in", "out", "background=mauvelous"], "#rrggbb"),
        (["in", "out", "overwrite=1"], "true or false"),
        (["in", "out", "root=x"], "for a table"),
        (["in", "out", "caption=filenam"], "did you mean 'filename'"),
        (["nowhere", "out"], "there is no nowhere"),
        (["nowhere.csv", "out"], "cannot be read"),
        (["empty.csv", "out"], "no such column"),
        (["list.csv", "out"], "image_column=NAME"),
        (["list.csv", "out", "image_column=pictur"], "did you mean 'picture'"),
        (["bytes.csv", "out"], "no such column"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "in", 1)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\0\0")
    (tmp_path / "list.csv").write_text("picture,words\na.png,b\n")
    assert handled(lambda: VERBS["prepare"](words)) == 2
    [line] = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("indexed")]
    assert line.startswith("error[")
    assert said in line
    assert "data." not in line
    assert not (tmp_path / "out").exists()


def test_help_names_every_option(capsys):
    assert handled(lambda: VERBS["prepare"](["--help"])) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}=" in text for name in Options.__dataclass_fields__)


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    """SIGKILL as soon as a few more shards stand; the result equals that of an undisturbed one."""
    folder, out = write_folder(tmp_path / "in", 1500), tmp_path / "out"
    words = ["shard_samples=60", "size=30", "format=webp", f"index_dir={tmp_path / 'index'}"]
    command = [sys.executable, "-m", "ldm", "prepare", str(folder)]
    subprocess.run([*command, str(tmp_path / "whole"), *words, "workers=1"], check=True, cwd=ROOT)
    kills, finished = 0, set()
    for more in (1, 4, 4, 4):
        process = subprocess.Popen([*command, str(out), *words, "workers=2"], cwd=ROOT, start_new_session=True)
        while process.poll() is None and len(list(out.glob("*.tar"))) < len(finished) + more:
            time.sleep(0.002)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        recorded = [out / p.name.removesuffix(".json") for p in (out / ".prepare").glob("*.tar.json")]
        now = {(p.name, p.stat().st_ino) for p in recorded}
        assert finished <= now  # what was finished stays
        finished = now
    subprocess.run([*command, str(out), *words, "workers=2"], check=True, cwd=ROOT)
    assert kills >= 2
    assert shards(out) == shards(tmp_path / "whole")
    assert not list(out.glob(".*"))
