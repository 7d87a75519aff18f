"""`python -m ldm inspect`: the numbers are those of the data, the verdict names what mends, and nothing is obeyed."""

import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from ldm.__main__ import VERBS
from ldm.cli import handled
from ldm.config import compose
from ldm.data.datamodule import DataModule
from ldm.tools.inspect import Options, inspect, main
from ldm.tools.inspect_verdict import verdict
from ldm.tools.inspect_view import show
from tests.data.making import shared, write_shards, write_tar
from tests.data.test_sources import denied
from tests.tools.making import encoded, mosaic, write_folder


def report_of(path, tmp_path, **options):
    return inspect(
        str(path), Options(**{"workers": 1, "tokens": False, "index_dir": str(tmp_path / "index"), **options})
    )


def findings(report, level=None):
    return [f"{f['text']} -> {f['key']}" for f in report["verdict"]["findings"] if level in (None, f["level"])]


def said(report, width=80):
    file = io.StringIO()
    show(report, Console(file=file, width=width, highlight=False))
    return file.getvalue()


def shard(path, rows):
    """rows: key, picture, caption."""
    return write_tar(
        path, [m for k, im, text in rows for m in ((f"{k}.png", encoded(im)), (f"{k}.txt", text.encode()))]
    )


# ---- numbers


def test_counts_sizes_and_shapes(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    sizes = [(40, 40), (64, 64), (100, 200), (300, 150), (130, 129), (1000, 600)]
    for n, size in enumerate(sizes):
        (folder / f"{n}.jpg").write_bytes(encoded(mosaic(n, size), "JPEG"))
        (folder / f"{n}.txt").write_text(f"words {n}")
    clear = mosaic(9, (70, 70)).convert("RGBA")
    (folder / "clear.png").write_bytes(encoded(clear))
    report = report_of(folder, tmp_path)
    assert report["kind"] == "folder"
    assert report["samples"] == {
        "good": 7, "train": 7, "val": 0, "bytes": sum(p.stat().st_size for p in folder.iterdir() if p.suffix != ".txt")
    }  # fmt: skip
    pictures = report["pictures"]
    assert pictures["formats"] == {"jpg": 6, "png": 1}
    assert pictures["transparent"] == 1
    counts = {(b["from"], b["to"]): b["count"] for b in pictures["short_side"]["histogram"]}
    assert counts[0, 64] == 1  # 40
    assert counts[64, 128] == 3  # 64, 70, 100
    assert counts[128, 256] == 2  # 129, 150
    assert counts[512, 1024] == 1
    assert sum(counts.values()) == 7
    assert pictures["short_side"]["min"] == 40
    assert pictures["short_side"]["max"] == 600
    aspects = {b["from"]: b["count"] for b in pictures["aspect"]["histogram"]}
    assert (aspects[0.5], aspects[0.9], aspects[1.45], aspects[2.0]) == (1, 4, 1, 1)
    kept = (3 * 1 + 2 * 0.5 + 129 / 130 + 0.6) / 7  # short side by long side
    assert pictures["centre_crop_loses"] == pytest.approx(1 - kept)
    assert 0 <= pictures["buckets_lose"] < pictures["centre_crop_loses"]
    captions = report["captions"]
    assert (captions["with"], captions["without"], captions["distinct"]) == (6, 1, 6)
    assert captions["first_without"] == "clear.png"


def test_tokens_are_counted_as_the_model_reads_them(tmp_path):
    folder = write_folder(tmp_path / "in", 3)
    (folder / "p000.txt").write_text("a " * 75)  # 75 words of one token, with start and end 77
    (folder / "p001.txt").write_text("a " * 76)
    (folder / "p002.txt").write_text("a")
    tokens = report_of(folder, tmp_path, tokens=True)["captions"]["tokens"]
    assert (tokens["min"], tokens["median"], tokens["max"], tokens["limit"]) == (3, 77, 78, 77)
    assert (tokens["truncated"], tokens["first_truncated"]) == (1, "p001.png")
    assert tokens["truncated_share"] == pytest.approx(1 / 3)


def test_train_and_val_and_what_lies_in_both(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    shard(folder / "train-000000.tar", [(f"t{n}", mosaic(n, (96, 96)), f"t {n}") for n in range(6)])
    smaller = mosaic(2, (96, 96)).resize((64, 64), Image.Resampling.LANCZOS)
    shard(
        folder / "val-000000.tar",
        [("v0", mosaic(30), "v 0"), ("v1", mosaic(5, (96, 96)), "v 1"), ("v2", smaller, "v 2")],
    )
    report = report_of(folder, tmp_path)
    assert {k: report["samples"][k] for k in ("good", "train", "val")} == {"good": 9, "train": 6, "val": 3}
    duplicates = report["duplicates"]
    assert [duplicates[k]["groups"] for k in ("exact", "near", "train_val")] == [1, 1, 2]
    assert duplicates["exact"]["first"] == [["train-000000.tar/t5", "val-000000.tar/v1"]]
    assert any("both train and val" in line and "prepare" in line for line in findings(report, "mend"))


def test_bad_samples_by_kind_with_the_first_of_each(tmp_path):
    folder = write_folder(tmp_path / "in", 4)
    for n in range(3):
        (folder / f"torn{n}.jpg").write_bytes(encoded(mosaic(n), "JPEG")[:-200])
        (folder / f"torn{n}.txt").write_text("torn")
    (folder / "latin.png").write_bytes(encoded(mosaic(50)))
    (folder / "latin.txt").write_bytes(b"\xe9t\xe9")
    report = report_of(folder, tmp_path)
    assert {kind: about["count"] for kind, about in report["bad"]["kinds"].items()} == {
        "decode": 3,
        "caption_encoding": 1,
    }
    assert report["bad"]["kinds"]["decode"]["first"]["path"].startswith("torn")
    assert report["bad"]["share"] == 0.5
    assert not report["verdict"]["usable"]
    assert any("50.0 % of the samples are bad" in line for line in findings(report, "stop"))


def test_shards_that_cannot_be_used_are_named_and_the_others_counted(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    whole = shard(folder / "train-000000.tar", [(f"t{n}", mosaic(n), f"t {n}") for n in range(4)])
    (folder / "train-000001.tar").write_text("<html>")
    (folder / "train-000002.tar").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    report = report_of(folder, tmp_path)
    assert report["samples"]["good"] >= 5
    assert [Path(s["path"]).name for s in report["shards"]["unusable"]] == ["train-000001.tar"]
    assert [Path(s["path"]).name for s in report["shards"]["truncated"]] == ["train-000002.tar"]
    assert not report["verdict"]["usable"]
    assert any("data.on_truncated=use" in line for line in findings(report, "stop"))


def test_good_data_are_called_ready(tmp_path):
    report = report_of(write_folder(tmp_path / "in", 5, size=(130, 128)), tmp_path, tokens=True)
    assert report["verdict"]["usable"]
    assert not findings(report, "mend")
    assert any("data.image_size up to 128" in line for line in findings(report, "ok"))


def test_one_caption_for_all_and_none(tmp_path):
    folder = write_folder(tmp_path / "in", 25)
    for path in folder.glob("*.txt"):
        path.write_text("a logo")
    assert any("100 % of the captions are 'a logo'" in line for line in findings(report_of(folder, tmp_path), "mend"))
    for path in folder.glob("*.txt"):
        path.unlink()
    report = report_of(folder, tmp_path)
    assert any("no picture has a caption" in line for line in findings(report, "stop"))
    assert report_of(folder, tmp_path, caption="filename")["captions"]["with"] == 25


def test_second_pictures_are_remarked_as_training_does(tmp_path):
    folder = write_folder(tmp_path / "in", 6)
    for n in range(3):
        (folder / f"p{n:03d}.jpg").write_bytes(encoded(mosaic(20 + n), "JPEG"))
        (folder / f"p{n:03d}.mask.png").write_bytes(encoded(mosaic(30 + n)))
    (folder / "p005.jpeg").write_bytes(encoded(mosaic(40), "JPEG"))
    (folder / "p005.jpg").write_bytes(encoded(mosaic(41), "JPEG"))
    assert DataModule(str(folder), index_dir=str(tmp_path / "i")).open().num_train == 6  # training takes them
    report = report_of(folder, tmp_path)
    assert report["verdict"]["usable"] and report["bad"]["count"] == 0 and report["samples"]["good"] == 6
    assert report["remarks"]["kinds"]["second_image"]["count"] == 4


def test_what_cannot_be_read_is_counted_and_named(tmp_path):
    folder = write_folder(tmp_path / "in", 4)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    (folder / "eio.png").symlink_to("/proc/self/mem")
    write_folder(folder / "shut", 2)
    assert report_of(folder, tmp_path)["bad"]["count"] == 2  # and what Python imports late is there
    with denied(tmp_path, folder / "shut"):
        report = report_of("in", Path())
    assert report["bad"]["kinds"]["fetch"]["count"] == 3 == report["bad"]["count"]
    assert report["bad"]["kinds"]["fetch"]["first"] == {"path": "shut", "reason": "Permission denied"}
    assert report["samples"]["good"] == 4 and not report["verdict"]["usable"]


def test_what_is_said_of_validation_is_true(tmp_path):
    folder = write_folder(tmp_path / "in", 6)
    shards = write_shards(tmp_path / "shards", [6])
    for place, words in ((folder, "a folder is trained on whole"), (shards, "of shards training holds out 1 %")):
        assert any(words in line for line in findings(report_of(place, tmp_path), "note"))
    defaults = {kind: compose("train", [f"data={kind}", "data.path=x"])["data"] for kind in ("folder", "shards")}
    assert {kind: node["val_fraction"] for kind, node in defaults.items()} == {"folder": 0.0, "shards": 0.01}


def test_a_table(tmp_path):
    write_folder(tmp_path / "in", 3)
    table = tmp_path / "in" / "list.csv"
    table.write_text("path,prompt\np000.png,one\np001.png,two\ngone.png,three\n")
    report = report_of(table, tmp_path, caption_column="prompt")
    assert (report["kind"], report["samples"]["good"], report["captions"]["with"]) == ("table", 2, 2)
    assert report["bad"]["kinds"]["image_missing"]["first"]["path"] == "gone.png"


def test_two_workers_report_the_same(tmp_path):
    folder = write_folder(tmp_path / "in", 300)
    assert report_of(folder, tmp_path) == report_of(folder, tmp_path, workers=2)


# ---- the forms it takes


KEYS = {
    "": "format path kind shards samples pictures captions bad remarks duplicates verdict",
    "shards": "count unusable truncated",
    "samples": "good train val bytes",
    "pictures": "formats transparent short_side aspect centre_crop_loses buckets_lose",
    "captions": "with without coverage distinct most_common first_without tokens",
    "bad": "count share kinds",
    "remarks": "kinds sentences",
    "duplicates": "exact near train_val",
    "verdict": "usable findings",
}


def test_json_has_the_documented_keys_and_nothing_else_is_printed(tmp_path, capsys):
    folder = write_folder(tmp_path / "in", 3)
    words = [str(folder), "--json", "tokens=false", "workers=1", f"index_dir={tmp_path}"]
    assert handled(lambda: VERBS["inspect"](words)) == 0
    report = json.loads(capsys.readouterr().out)
    document = (Path(__file__).parents[2] / "docs" / "prepare.md").read_text()
    for part, keys in KEYS.items():
        assert " ".join(report[part] if part else report) == keys
        assert all(f"`{key}`" in document for key in keys.split()), part


def test_exit_code_2_if_training_would_refuse(tmp_path, capsys):
    folder = write_folder(tmp_path / "in", 3)
    (folder / "torn.jpg").write_bytes(encoded(mosaic(7), "JPEG")[:-200])
    (folder / "torn.txt").write_text("torn")
    assert main([str(folder), "tokens=false", "workers=1", f"index_dir={tmp_path}"]) == 2
    assert "training would refuse this" in capsys.readouterr().out


def test_names_and_captions_are_shown_never_obeyed(tmp_path):
    folder = write_folder(tmp_path / "in", 30)
    for path in folder.glob("*.txt"):
        path.write_text("[bold red]x[/bold red] \x1b[2J\u202egnp")
    (folder / "[link=x]torn\x1b[31m.jpg").write_bytes(encoded(mosaic(7), "JPEG")[:-200])
    (folder / "[link=x]torn\x1b[31m.txt").write_text("x")
    os.rename(folder / "p029.png", os.fsencode(folder / "p029") + b"\xff.png")
    text = said(report_of(folder, tmp_path), width=200)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[bold red]x[/bold red]" in text
    assert "[link=x]torn [31m.jpg" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_screen_holds_the_numbers_at_any_width(tmp_path, width):
    report = report_of(write_folder(tmp_path / "in", 12, size=(300, 280)), tmp_path)
    text = said(report, width)
    assert max(map(len, text.splitlines())) <= width
    assert "12 good" in text
    assert "ready for training" in text
    assert "256 to 512" in text


def test_the_sheet_shows_the_pictures_whole(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    for n, (colour, size) in enumerate(zip(colours, [(50, 50), (400, 100), (100, 400)], strict=True)):
        (folder / f"{n}.png").write_bytes(encoded(Image.new("RGB", size, colour)))
        (folder / f"{n}.txt").write_text(f"caption {n}")
    sheet = tmp_path / "sheet.png"
    report_of(folder, tmp_path, sheet=str(sheet))
    image = Image.open(sheet).convert("RGB")
    counts = {colour: count for count, colour in image.getcolors(1 << 20)}
    assert [counts.get(c, 0) for c in colours] == [150 * 150, 160 * 40, 160 * 40]  # enlarged in whole steps, whole
    assert image.width < 4 * 180


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "expected PATH, got nothing"),
        (["in", "sheets=a.png"], "did you mean 'sheet'"),
        (["in", "sheet=a.jpg"], "ends in .png"),
        (["in", "sheet=there.png"], "overwrite=true"),
        (["in", "sheet=no/where.png"], "cannot write the sheet"),
        (["in", "near=11"], "0 to 10"),
        (["nowhere"], "there is no nowhere"),
        (["void"], "no usable sample"),
        (["page.tar"], "page.tar"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "in", 1)
    (tmp_path / "void").mkdir()
    (tmp_path / "page.tar").write_text("<html>")
    (tmp_path / "there.png").write_text("")
    assert handled(lambda: main([*words, "tokens=false", "workers=1", "index_dir=index"])) == 2
    [line] = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("indexed")]
    assert line.startswith("error[")
    assert said in line
    assert (tmp_path / "there.png").read_text() == ""


def test_read_only_data_are_left_alone(tmp_path):
    folder = write_folder(tmp_path / "in", 3)
    before = sorted(p.name for p in folder.iterdir())
    folder.chmod(0o555)
    try:
        report = report_of(folder, tmp_path)
    finally:
        folder.chmod(0o755)
    assert report["samples"]["good"] == 3
    assert sorted(p.name for p in folder.iterdir()) == before


# ---- the development data


@pytest.mark.parametrize("name, good", [("logos-folder", 120), ("food", 161)])
def test_real_sets(tmp_path, name, good):
    report = report_of(shared(name), tmp_path)
    assert (report["samples"]["good"], report["bad"]["count"]) == (good, 0)
    assert report["verdict"]["usable"]


def test_the_hostile_set_is_survived_and_named(tmp_path):
    report = report_of(shared("hostile"), tmp_path)
    assert len(report["shards"]["unusable"]) == 3
    assert len(report["shards"]["truncated"]) == 1
    assert {"decode", "member_type", "size_policy", "caption_encoding"} <= set(report["bad"]["kinds"])
    assert not report["verdict"]["usable"]
    assert said(report)


def test_the_verdict_is_a_function_of_the_numbers(tmp_path):
    report = report_of(write_folder(tmp_path / "in", 3), tmp_path)
    assert verdict(json.loads(json.dumps(report))) == report["verdict"]
