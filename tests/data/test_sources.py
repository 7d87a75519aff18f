"""Folders as people have them: sidecars, metadata tables, classes, kohya's repeats, several sets; and what is said."""

import contextlib
import json
import os
import re

import pytest

from ldm.data import metadata
from ldm.data.captions import Captions
from ldm.data.datamodule import DataModule
from ldm.data.decode import BadSample
from ldm.data.loader import Stream
from ldm.data.pipeline import PassPlan, stages
from ldm.data.shards import Dataset, open_dataset
from ldm.data.splits import check_data
from ldm.data.transforms import Transform
from ldm.errors import LdmError
from tests.data.making import picture, sample, write_shards, write_tar


def fill(folder, files):
    for number, (name, content) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            picture(number) if content is None else content.encode() if isinstance(content, str) else content
        )
    return folder


def texts(path, columns=None, caption="auto", **options):
    """(key -> caption, key -> columns) of every sample, through the whole pipeline."""
    data = open_dataset(path if isinstance(path, list) else str(path), caption=caption, **options)
    plan = PassPlan(data.num_samples, data.num_samples)
    (batch,) = Stream(stages(data, plan, Transform(8), captions=Captions(caption), columns=columns))
    found = dict(zip(batch.keys, batch.captions, strict=True))
    found = {key: caption for (key, caption), valid in zip(found.items(), batch.valid, strict=True) if valid}
    return (
        found
        if columns is None
        else (found, {k: dict(zip(batch.keys, v, strict=True)) for k, v in batch.columns.items()})
    )


@contextlib.contextmanager
def denied(home, folder, mode=0):
    """Within `home`, as somebody who may not look into `folder`; root may look anywhere, so it becomes nobody."""
    before, user = os.getcwd(), os.geteuid()
    home.chmod(0o777)
    folder.chmod(mode)
    os.chdir(home)
    try:
        os.seteuid(user or 65534)
        yield
    finally:
        os.seteuid(user)
        os.chdir(before)
        folder.chmod(0o755)


def refusal(path, **options):
    with pytest.raises(LdmError) as refused:
        open_dataset(path if isinstance(path, list) else str(path), **options)
    assert refused.value.exit_code == 2 and "\n" not in refused.value.line()
    return refused.value.line()


# ---- metadata tables


ROWS = [
    {"file_name": "a.png", "text": "first", "score": 3, "tags": ["x", "y"]},
    {"file_name": "sub/b.png", "text": "second", "score": 4.5},
]


def test_metadata_jsonl(tmp_path):
    fill(tmp_path, {"a.png": None, "sub/b.png": None, "metadata.jsonl": "\n".join(map(json.dumps, ROWS))})
    captions, columns = texts(tmp_path, {"s": "score"})
    assert captions == {"a": "first", "sub/b": "second"}
    assert columns == {"s": {"a": 3, "sub/b": 4.5}}
    assert texts(tmp_path, caption="{text} of {score}")["sub/b"] == "second of 4.5"
    again = open_dataset(str(tmp_path))  # from the saved index
    assert json.loads(again.read(again.keys.index("a"))["json"]) == {
        k: v for k, v in ROWS[0].items() if k != "file_name"
    }
    assert not again.problems and not again.remarks
    before = again.manifest_hash
    fill(tmp_path, {"metadata.jsonl": json.dumps(ROWS[0])})
    changed = open_dataset(str(tmp_path))
    assert changed.keys == ["a"] and changed.manifest_hash != before and changed.problems == {"caption_missing": 1}


def test_metadata_csv(tmp_path):
    table = '\ufefffile_name,caption,score,code,share,empty\na.png,"one, two",3,007x,0.5,\nb.png,77,4,12,1,\n'
    fill(tmp_path, {"a.png": None, "b.png": None, "metadata.csv": table})
    captions, columns = texts(tmp_path, {"s": "score", "c": "code", "f": "share"})
    assert captions == {"a": "one, two", "b": "77"}
    assert columns == {"s": {"a": 3, "b": 4}, "c": {"a": "007x", "b": "12"}, "f": {"a": 0.5, "b": 1.0}}
    assert "'empty'" in refusal(tmp_path, caption="{empty} {score}")


@pytest.mark.parametrize("values", [("2020_01", "7"), ("00501", "10001"), ("1234567890123456789", "5"), ("nan", "1")])
def test_what_only_looks_like_a_number_stays_text(tmp_path, values):
    table = "file_name,caption,n\na.png,x,{}\nb.png,y,{}\n".format(*values)
    fill(tmp_path, {"a.png": None, "b.png": None, "metadata.csv": table})
    assert texts(tmp_path, {"n": "n"})[1]["n"] == dict(zip("ab", values, strict=True))


def test_of_tables_in_several_folders_the_order_is_that_of_their_names(tmp_path):
    """Two tables that name one picture: on every machine, and whatever the hashing of strings, the same captions."""
    rows = {place: json.dumps({"file_name": name, "text": place}) for place, name in (("", "x/a.png"), ("x", "a.png"))}
    fill(tmp_path, {"x/a.png": None, "metadata.jsonl": rows[""], "x/metadata.jsonl": rows["x"]})
    names = ["metadata.jsonl", "x/metadata.jsonl", "x/a.png"]
    for files in (names, names[::-1]):
        assert metadata.rows_below(tmp_path, files, lambda *_: None)["x/a.png"]["text"] == ["", "x"]


def test_a_table_in_a_folder_below_names_its_own_pictures(tmp_path):
    row = {"file_name": "./p.png", "text": "here"}
    fill(tmp_path, {"x/p.png": None, "y/p.png": None, "x/metadata.jsonl": json.dumps(row), "y/p.txt": "there"})
    assert texts(tmp_path) == {"x/p": "here", "y/p": "there"}


def test_a_sidecar_goes_before_the_table_and_a_json_beside_the_picture_too(tmp_path):
    table = json.dumps({"file_name": "a.png", "text": "table", "n": 1, "m": 1})
    fill(tmp_path, {"a.png": None, "a.txt": "sidecar", "a.json": '{"n": 2}', "metadata.jsonl": table})
    assert texts(tmp_path) == {"a": "sidecar"} and texts(tmp_path, caption="metadata") == {"a": "table"}
    assert texts(tmp_path, caption="{n} {m}") == {"a": "2 1"}


@pytest.mark.parametrize("own", ["{}", '{"n": ', "", "[1]", "[" * 100_000, '{"n": 2, "x": "' + "x" * 2**20 + '"}'])
def test_a_json_beside_the_picture_takes_nothing_from_the_table(tmp_path, own):
    table = json.dumps({"file_name": "d/a.png", "text": "table", "n": 1})
    fill(tmp_path, {"d/a.png": None, "d/a.json": own, "metadata.jsonl": table})
    assert texts(tmp_path, {"n": "n", "c": "class"}) == ({"d/a": "table"}, {"n": {"d/a": 1}, "c": {"d/a": "d"}})
    remarks = [p for p in open_dataset(str(tmp_path)).examples if p.kind == "metadata"]
    assert [p.key for p in remarks] == ([] if own == "{}" else ["d/a.json"])
    assert all("cannot be read: " in p.reason for p in remarks)


def test_a_json_that_cannot_be_read_is_remarked_where_nothing_else_is_known(tmp_path):
    fill(tmp_path / "f", {"a.png": None, "a.txt": "x", "a.json": '{"n": ', "b.png": None, "b.txt": "y"})
    (tmp_path / "f/b.json").write_text('{"n": 5}')
    write_tar(tmp_path / "s.tar", [(p.name, p.read_bytes()) for p in sorted((tmp_path / "f").iterdir())])
    for source in ("f", "s.tar"):
        data = open_dataset(str(tmp_path / source), columns={"n": "n"})
        assert data.num_samples == 2 and data.problems == {"metadata": 1}
        assert texts(tmp_path / source, {"n": "n"})[0] == {"b": "y"}  # the other lacks the column


# ---- what cannot be read


def test_a_file_that_cannot_be_read_is_a_bad_sample_and_the_others_go_on(tmp_path):
    names = ("gone", "eio", "text", "table")
    fill(tmp_path, {f"{name}.{s}": c for name in ("good", *names) for s, c in (("png", None), ("txt", "x"))})
    faults = {"gone.png": tmp_path / "nowhere", "eio.png": "/proc/self/mem", "text.txt": "/proc/self/mem"}
    for name, target in {**faults, "table.json": "/proc/self/mem"}.items():
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(target)
    fill(tmp_path, {"metadata.jsonl": json.dumps({"file_name": "table.png", "n": 1})})
    assert (tmp_path / "eio.png").is_file(), "needs /proc"
    data = open_dataset(str(tmp_path))
    assert data.keys == ["good"] and data.problems == {"fetch": 4}
    reasons = {p.key: p.reason for p in data.examples}
    assert reasons["gone"] == "gone.png: No such file or directory"
    assert {reasons[key] for key in ("eio", "text", "table")} == {
        f"{name}: Input/output error" for name in ("eio.png", "text.txt", "table.json")
    }
    (tmp_path / "nowhere").write_bytes(picture(1))  # mended: no date in the folder changes
    assert "gone" in open_dataset(str(tmp_path)).keys
    with pytest.raises(LdmError) as refused:  # they count
        DataModule(str(tmp_path)).open()
    assert refused.value.exit_code == 3 and "60.0 % bad samples" in refused.value.line()


def test_a_folder_that_may_not_be_read(tmp_path):
    fill(tmp_path, {"a.png": None, "a.txt": "a", "shut/b.png": None, "shut/b.txt": "b"})
    shut = tmp_path / "shut"
    assert open_dataset(str(tmp_path)).num_samples == 2  # and what Python imports late is there
    with denied(tmp_path, shut):
        data = open_dataset(".", index_dir="index")
        assert data.keys == ["a"] and [(p.kind, p.key) for p in data.examples] == [("fetch", "shut")]
        assert "shut cannot be read: Permission denied" in refusal("shut")
        assert "shut/b.png cannot be looked at: Permission denied" in refusal("shut/b.png")
    with denied(tmp_path, shut, mode=0o111):  # may be entered, not listed
        assert "there is no shut/x.tar; data.path; shut: Permission denied" in refusal("shut/x.tar")
    assert "File name too long" in refusal("x" * 300)
    assert sorted(open_dataset(str(tmp_path)).keys) == ["a", "shut/b"]


def test_a_table_that_cannot_be_read_is_refused(tmp_path):
    fill(tmp_path, {"a.png": None, "a.txt": "x"})
    (tmp_path / "metadata.jsonl").symlink_to(tmp_path / "nowhere")
    assert "metadata.jsonl cannot be read: No such file" in refusal(tmp_path)


def test_several_rows_of_one_picture_are_several_captions(tmp_path):
    rows = [{"file_name": "a.png", "caption": c} for c in ("one", "two", "three")]
    fill(tmp_path, {"a.png": None, "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    data = open_dataset(str(tmp_path))
    chosen = Captions(caption_choice="random")
    assert [chosen("a", None, data.read(0)["json"], pick) for pick in range(3)] == ["one", "two", "three"]
    assert texts(tmp_path) == {"a": "one"}


def test_a_row_without_text_does_not_hide_the_next(tmp_path):
    fill(tmp_path, {"a.png": None, "metadata.csv": "file_name,text,n\na.png,,1\na.png,hello,2\n"})
    assert texts(tmp_path) == {"a": "hello"}


def test_rows_that_cannot_be_used_are_remarked(tmp_path):
    lines = [
        json.dumps({"file_name": "a.png", "text": "good"}),
        '{"file_name": ',
        "[1]",
        json.dumps({"image": "a.png"}),
        json.dumps({"file_name": "../../etc/passwd", "text": "x"}),
        json.dumps({"file_name": "/etc/passwd", "text": "x"}),
        json.dumps({"file_name": 5}),
        json.dumps({"file_name": "a.txt", "text": "x"}),
        "[" * 100_000,
        '{"text": "' + "x" * 2**20 + '"}',
    ]
    fill(tmp_path, {"a.png": None, "metadata.jsonl": "\n".join(lines), "metadata.csv": "file_name,text\na.png,other"})
    fill(tmp_path, {"a.txt": "own"})
    data = open_dataset(str(tmp_path))
    assert data.keys == ["a"] and data.problems == {"metadata": 11}
    reasons = [p.reason for p in data.examples]
    assert any("line 2 cannot be read" in r for r in reasons) and any(
        "line 4 has no file_name; it has: image" in r for r in reasons
    )
    assert any("there is no '../../etc/passwd' here" in r for r in reasons)
    assert any("line 8: 'a.txt' is no picture (.jpg" in r for r in reasons)
    fill(tmp_path, {"metadata.csv": "image,text\na.png,x\n"})
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "a.txt").unlink()
    assert "line 2 has no file_name; it has: image, text" in refusal(tmp_path)
    fill(tmp_path, {"metadata.csv": b"file_name,text\na.png,caf\xe9\n"})
    assert "metadata.csv: nothing is read after line" in refusal(tmp_path)


def test_shards_whose_json_has_the_caption(tmp_path):
    members = [("a.png", picture()), ("a.json", b'{"caption": "of the json"}'), *sample(1), ("c.png", picture(2))]
    write_tar(tmp_path / "a.tar", members)
    assert texts(tmp_path) == {"a": "of the json", "s00001": "caption 1"}
    assert texts(tmp_path, caption="sidecar") == {"s00001": "caption 1"}
    assert texts(tmp_path, on_missing_caption="empty")["c"] == ""


# ---- classes, names, templates


def test_class_folders(tmp_path):
    fill(tmp_path, {"fox/1.png": None, "fox/2.png": None, "wild dog/1.png": None, "top.png": None})
    line = refusal(tmp_path)
    assert "4 pictures have no caption" in line and "data.caption={class} gives" in line
    captions, columns = texts(tmp_path, {"c": "class"}, caption="a photo of a {class}")
    assert captions == {"fox/1": "a photo of a fox", "fox/2": "a photo of a fox", "wild dog/1": "a photo of a wild dog"}
    assert columns["c"]["fox/1"] == "fox"  # "top" lies in no folder: a bad sample
    assert texts(tmp_path, caption="filename") == {"top": "top"}


def test_captions_from_file_names(tmp_path):
    fill(tmp_path, {"red_fox-01.png": None, "0001.png": None, "a/blue-dog.png": None})
    line = refusal(tmp_path)
    assert "data.caption=filename gives" in line
    data = open_dataset(str(tmp_path), caption="filename")
    assert data.problems == {"caption_missing": 1}
    assert texts(tmp_path, caption="filename") == {"red_fox-01": "red fox", "a/blue-dog": "blue dog"}
    assert texts(tmp_path, caption="a logo of {filename}")["red_fox-01"] == "a logo of red fox"


def test_a_template_with_the_file_s_name_needs_words_in_it(tmp_path):
    """As with caption=filename; a field `filename` of the JSON stands for them."""
    fill(tmp_path, {"0001.png": None, "0002.png": None})
    for caption in ("filename", "{filename}", "a logo of {filename}"):
        line = refusal(tmp_path, caption=caption)
        assert "2 pictures have no caption" in line and "looked for words in the file's name;" in line
    fill(tmp_path, {"fox.png": None, "0003.png": None, "0003.json": '{"filename": "stored"}', "0002.json": "{}"})
    data = open_dataset(str(tmp_path), caption="a logo of {filename}")
    assert sorted(data.keys) == ["0003", "fox"] and data.problems == {"caption_missing": 2}
    assert texts(tmp_path, caption="a logo of {filename}") == {"0003": "a logo of stored", "fox": "a logo of fox"}
    with pytest.raises(BadSample, match="filename"):
        Captions("{filename}")("0001", None, None)
    empty = Captions("a logo of {filename}", on_missing_caption="empty")
    assert empty("0001", None, None) == "" and empty("fox", None, None) == "a logo of fox"
    assert open_dataset(str(tmp_path), caption="{filename}", on_missing_caption="empty").num_samples == 4


def test_fields_that_were_looked_for_at_a_bad_moment_are_looked_for_again(tmp_path, monkeypatch):
    fill(tmp_path, {"a.png": None, "a.json": '{"t": "A"}', "b.png": None, "b.json": '{"x": 1}'})
    open_dataset(str(tmp_path), on_missing_caption="empty")

    def fails(*_):
        raise BadSample("fetch", "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(Dataset, "read", fails)
        data = open_dataset(str(tmp_path), caption="{t}")
    assert data.num_samples == 2  # reading them will say why
    del data
    assert open_dataset(str(tmp_path), caption="{t}").keys == ["a"]


def test_a_template_with_a_field_that_nobody_has_is_refused_at_once(tmp_path):
    fill(tmp_path, {"a.png": None, "metadata.jsonl": json.dumps({"file_name": "a.png", "title": "T"})})
    line = refusal(tmp_path, caption="a logo of {titel}")
    assert "no sample has the field 'titel'" in line and "did you mean 'title'" in line and "data.caption" in line
    assert texts(tmp_path, caption="a logo of {title}") == {"a": "a logo of T"}
    assert "no sample has a JSON" in refusal(write_shards(tmp_path / "s", [2]), caption="{title}")


def test_a_column_that_no_sample_has_is_refused_at_once(tmp_path):
    fill(
        tmp_path, {"a.png": None, "metadata.jsonl": json.dumps({"file_name": "a.png", "text": "T", "shape": {"w": 1}})}
    )
    node = {"_target_": "ldm.data.datamodule.DataModule", "path": str(tmp_path)}
    with pytest.raises(LdmError, match=r"no sample has the field 'shap\.w'; data\.columns; .*did you mean 'shape'"):
        check_data(node | {"columns": {"s": "shap.w"}})
    check_data(node | {"columns": {"s": "shape.w", "z": "@size"}})
    with pytest.raises(LdmError, match=r"data\.columns"):
        DataModule(str(tmp_path), columns={"s": "shap.w"}).open()


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_a_template_whose_field_some_samples_lack(tmp_path, form):
    """skip leaves them out, empty keeps them without text, error refuses: as with a caption that is not there."""
    trees = {"a": {"t": "A", "by": {"n": 1}}, "b": {"t": None, "by": {"n": 1}}, "c": {"by": {"n": 2}}, "d": {"t": "D"}}
    trees |= {"e": {"t": ["E", "F"], "by": {"n": "me"}}, "f": {"t": {"x": 1}, "by": {"n": 1}}, "h": {"t": " "}}
    path = fill(tmp_path / "folder", {f"{k}.png": None for k in [*trees, "g"]})
    fill(path, {f"{k}.json": json.dumps(tree) for k, tree in trees.items()})
    if form == "tar":
        members = [(p.name, p.read_bytes()) for p in sorted(path.iterdir())]
        path = write_tar(tmp_path / "a.tar", members)
    template = "{t} by {by.n}"
    for _ in range(2):  # the second time from the saved index
        data = open_dataset(str(path), caption=template)
        assert sorted(data.keys) == ["a", "e"] and data.problems == {"caption_missing": 6}
    assert "6 pictures" in data.remarks[0] and "a text or number at t, by.n in the sample's JSON" in data.remarks[0]
    assert texts(path, caption=template) == {"a": "A by 1", "e": "E, F by me"}
    assert sorted(open_dataset(str(path), caption="by {by.n}").keys) == ["a", "b", "c", "e", "f"]  # another template
    assert texts(path, caption="{by.n} {filename}")["c"] == "2 c"
    dm = DataModule(str(path), image_size=8, caption=template, on_missing_caption="empty", caption_prefix="p ")
    (batch,) = dm.open().configure(seed=0, batch_size=1).encode_dataloader("train", 8)
    assert batch.valid.all() and dm.num_train == 8 and not dm.problems
    stream = iter(dm.configure(seed=0, batch_size=8, num_workers=0).train_dataloader())
    batch = next(stream)
    found = dict(zip(batch.keys, batch.captions, strict=True))
    assert found == dict.fromkeys("bcdfgh", "p") | {"a": "p A by 1", "e": "p E, F by me"} and not dm.ledger.counts
    line = refusal(path, caption=template, on_missing_caption="error")
    assert "6 pictures have no caption" in line and "looked for a text or number at t, by.n" in line


def test_pictures_are_encoded_whatever_their_captions_are(tmp_path):
    fill(tmp_path, {"a.png": None, "a.txt": "x", "b.png": None, "b.txt": "y", "c.png": None, "c.txt": "z"})
    dm = DataModule(str(tmp_path), image_size=8).open().configure(seed=0, batch_size=1)
    fill(tmp_path, {"b.txt": b"changed since the index was made", "c.txt": b"\xff"})
    (batch,) = dm.encode_dataloader("train", 8)
    assert batch.valid.all() and batch.captions == [""] * 3
    fill(tmp_path, {"b.png": b"changed"})
    (batch,) = dm.encode_dataloader("train", 8)
    assert dict(zip(batch.keys, batch.valid.tolist(), strict=True)) == {"a": True, "b": False, "c": True}


# ---- kohya's folders and several sets


def test_kohyas_folders(tmp_path, capsys):
    fill(
        tmp_path,
        {"10_red fox/1.png": None, "10_red fox/2.png": None, "10_red fox/2.txt": "its own", "3_dog/1.png": None},
    )
    fill(tmp_path, {"4_x/cat/1.png": None, "4_x/cat/1.txt": "a cat"})  # not of one level with them
    data = open_dataset(str(tmp_path))
    assert dict(zip(data.keys, data.repeats.tolist(), strict=True)) == {
        "10_red fox/1": 10,
        "10_red fox/2": 10,
        "3_dog/1": 3,
        "4_x/cat/1": 1,
    }
    said = "10_red fox: 10 x 2 pictures, 3_dog: 3 x 1 pictures"
    assert data.remarks == [f"repeats from the names of folders ({said}); data.repeats=1 turns them off"]
    assert texts(tmp_path) == {
        "10_red fox/1": "red fox",
        "10_red fox/2": "its own",
        "3_dog/1": "dog",
        "4_x/cat/1": "a cat",
    }
    once = open_dataset(str(tmp_path), repeats=1)
    assert once.repeats.tolist() == [1] * 4 and not once.remarks
    assert open_dataset(str(tmp_path), caption="sidecar").problems == {"caption_missing": 2}
    node = {"_target_": "ldm.data.datamodule.DataModule", "path": str(tmp_path)}
    check_data(node)
    assert "data: repeats from the names of folders" in capsys.readouterr().err


@pytest.mark.parametrize(
    "folders",
    [
        ["1_airplane", "2_car", "3_bird"],
        ["0_airplane", "1_car"],
        ["01_cats", "02_dogs", "10_foxes"],
        ["10_fox", "007_cat"],
        ["2024_holiday"],
        ["10_fox", "1001_nights"],
        ["7_eleven", "nike"],
        ["x/5_a", "x/6_b", "x/7_c"],
    ],
)
def test_numbers_of_folders_that_are_no_repeats(tmp_path, folders):
    fill(tmp_path, {f"{folder}/1.png": None for folder in folders})
    names = {f"{folder}/1": folder.rpartition("/")[2] for folder in folders}
    assert texts(tmp_path, caption="{class}") == names
    data = open_dataset(str(tmp_path), caption="{class}")
    assert data.repeats.tolist() == [1] * len(folders)
    listed = ", ".join(sorted(f for f, n in zip(folders, names.values(), strict=True) if n[0].isdecimal()))
    assert data.remarks == [f"numbers of folders are taken for names, not for repeats ({listed}); see docs/data.md"]
    assert f"{len(folders)} pictures have no caption" in refusal(tmp_path)


@pytest.mark.parametrize(
    "folders", [["10_fox"], ["1_a", "2_b"], ["1_a", "1_b", "1_c"], ["2_a", "4_b", "1000_c"], ["1_a", "2_b", "2_c"]]
)
def test_numbers_of_folders_that_are_repeats(tmp_path, folders):
    fill(tmp_path, {f"{folder}/1.png": None for folder in folders})
    data = open_dataset(str(tmp_path))
    repeats = dict(zip(data.keys, data.repeats.tolist(), strict=True))
    assert repeats == {f"{folder}/1": int(folder.split("_")[0]) for folder in folders}
    assert texts(tmp_path) == {f"{folder}/1": folder.split("_")[1] for folder in folders}


def test_what_is_said_escapes_control_characters(tmp_path, capsys):
    fill(tmp_path, {"10_\x1b[2J\nred/1.png": None, "10_\x1b[2J\nred/2.png": None})
    check_data({"_target_": "ldm.data.datamodule.DataModule", "path": str(tmp_path)})
    lines = [line for line in capsys.readouterr().err.split("\n") if "repeats from" in line]
    assert len(lines) == 1 and r"10_\x1b[2J\nred: 10 x 2 pictures" in lines[0] and "\x1b" not in lines[0]


def test_an_epoch_has_a_limit(tmp_path, monkeypatch):
    path = write_shards(tmp_path / "s", [3])
    monkeypatch.setattr("ldm.data.mixture._MAX_USES", 20)
    line = refusal(path, repeats=7)
    assert "an epoch would use 21 pictures" in line and "; 20; " in line and "data.repeats" in line
    assert open_dataset(str(path), repeats=6).repeats.sum() == 18


def epoch_of(path, **options):
    """Keys of the first epoch and the module."""
    dm = DataModule(path, image_size=8, lanes=1, **options).open().configure(seed=0, batch_size=1)
    batches = iter(dm.train_dataloader())
    return sorted(next(batches).keys[0] for _ in range(dm._run["order"].num_samples)), dm


def test_several_sets_with_repeats(tmp_path):
    shards, folder = write_shards(tmp_path / "shards", [3, 2]), fill(tmp_path / "f", {"a.png": None, "a.txt": "of a"})
    keys, dm = epoch_of([str(shards), str(folder)], repeats=[1, 4])
    assert keys == ["a"] * 4 + [f"s{n:05d}" for n in range(5)]
    assert dm.num_train == 6 and dm.order_fingerprint["num_train"] == 6
    assert epoch_of([str(shards), str(folder)])[0] == ["a"] + [f"s{n:05d}" for n in range(5)]
    assert epoch_of(str(folder), repeats=3)[0] == ["a"] * 3
    one, _ = epoch_of([str(shards), str(folder)], repeats=[2, 1], max_train_samples=3)
    assert len(set(one)) == 3 and all(one.count(key) == (1 if key == "a" else 2) for key in one)


@pytest.mark.parametrize("repeats", [[1], [1, 2, 3], 0, [1, -1], [1, "2"], [1, True], 10**9])
def test_wrong_repeats(tmp_path, repeats):
    sets = [str(write_shards(tmp_path / name, [1])) for name in "ab"]
    assert "data.repeats" in refusal(sets, repeats=repeats) and open_dataset(sets, repeats=[1, 2]).num_samples == 2


def test_a_set_that_is_named_twice(tmp_path, monkeypatch):
    write_shards(tmp_path / "a", [2, 1])
    fill(tmp_path / "p", {"a.png": None, "a.txt": "x", "in/b.png": None, "in/b.txt": "y"})
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    for other in ("a", "./a", "a/", "link", "p/../a", str(tmp_path / "a"), "a/*-000001.tar", "a/train-000001.tar"):
        line = refusal(["a", other], repeats=[1, 5])
        assert f"'a' and {other!r} name the same data" in line and "name each set once" in line
        once = open_dataset(["a", other], repeats=2)  # one number for all: nothing is lost
        assert once.num_samples == 3 and once.repeats.tolist() == [2] * 3
        assert open_dataset(["a", other]).num_samples == 3
    assert open_dataset(["a/train-000000.tar", "a/train-000001.tar"], repeats=[1, 5]).repeats.tolist() == [1, 1, 5]
    for both in (["p", "p/in"], ["p/in", "./p"]):
        assert "p/in' lies within '" in refusal(both)
    assert open_dataset("p").num_samples == 2 and open_dataset("p/in").num_samples == 1


def test_a_pattern_keeps_training_and_validation_apart_as_a_folder_does(tmp_path, monkeypatch):
    write_shards(tmp_path / "s", [3, 2])
    write_shards(tmp_path / "s", [4], prefix="val")
    fill(tmp_path / "f", {"a.png": None, "a.txt": "x"})
    monkeypatch.chdir(tmp_path)

    def sizes(path, **options):
        dm = DataModule(path, image_size=8, **options).open()
        return dm.num_train, dm.num_val

    for path in ("s", "s/*.tar", "s/*-00000[01].tar", "?/*.tar", "{s,s}/*.tar", ["s/*.tar"]):
        assert sizes(path) == (5, 4), path
    assert sizes("*") == sizes(["s", "f"]) == sizes("{s,f}") == (6, 4)
    assert sizes("s/{train,val}-00000{0,0}.tar") == sizes("s/{train,val}-*0.tar") == (7, 0)  # spelled out
    assert sizes("s/val-*.tar") == sizes("s/val-000000.tar") == (4, 0)
    assert sizes("s/train-*.tar", val_path="s/val-*.tar") == sizes("s/train-*.tar", val_path="s/*.tar") == (5, 4)
    assert sizes("s/*.tar", val_path="f") == (5, 1)
    assert open_dataset("s/*.tar").num_samples == 9  # without a split, as prepare and inspect read
    (tmp_path / "s/train-000000.tar").unlink()
    (tmp_path / "s/train-000001.tar").unlink()
    for path, words in {"s": "only val-*", "s/*.tar": "found no train-*", "s/x*.tar": "there is no s/x"}.items():
        with pytest.raises(LdmError, match=re.escape(words)):
            sizes(path)


def test_validation_shards_of_several_sets(tmp_path):
    for name in "ab":
        write_shards(tmp_path / name, [3])
    write_shards(tmp_path / "b", [2], prefix="val")
    alone = write_tar(tmp_path / "alone.tar", sample(9))
    dm = DataModule([str(tmp_path / "a"), str(tmp_path / "b"), str(alone), f"{tmp_path}/a/train-*.tar"], image_size=8)
    assert (dm.open().num_train, dm.num_val) == (7, 2)


# ---- what is said


def test_a_folder_without_captions(tmp_path, capsys):
    fill(tmp_path, {"shop/red_fox-1.png": None, "shop/0002.png": None, "notes.md": "x"})
    line = refusal(tmp_path)
    assert line.startswith("error[DATA]: 2 pictures have no caption; data.path: ")
    for words in (
        "shop/red_fox-1",
        "looked for KEY.txt or KEY.caption",
        "metadata.jsonl or metadata.csv",
        "data.caption={class} gives 'shop'",
        "data.on_missing_caption=empty",
    ):
        assert words in line
    assert "KEY.txt" in refusal(tmp_path, caption="sidecar") and "metadata" not in refusal(tmp_path, caption="sidecar")
    fill(tmp_path, {"shop/0002.txt": "here"})
    data = open_dataset(str(tmp_path))
    assert data.num_samples == 1 and data.remarks[0].startswith(
        "without a caption and left out: 1 pictures (looked for"
    )
    assert open_dataset(str(tmp_path), on_missing_caption="empty").remarks == []
    assert "shop/red_fox-1" in refusal(tmp_path, on_missing_caption="error")


def test_a_missing_path_names_what_is_near_and_nothing_else(tmp_path):
    (tmp_path / "my_logos").mkdir()
    (tmp_path / "private").mkdir()
    assert "did you mean 'my_logos'?" in refusal(tmp_path / "my_lgos")
    line = refusal(tmp_path / "zebra")
    assert "set data.path to a folder of pictures or of tar shards" in line
    assert "private" not in line and "my_logos" not in line


def test_a_folder_without_pictures(tmp_path):
    fill(tmp_path, {"a.gif": b"GIF89a", "b.gif": b"GIF89a", "a.txt": "a", "metadata.jsonl": "{}"})
    (tmp_path / "bare").mkdir()
    line = refusal(tmp_path / "bare")
    assert "no usable sample" in line and "found: nothing;" in line
    assert os.listdir(tmp_path / "bare") == []  # no index of nothing is left there
    line = refusal(tmp_path)
    assert "no usable sample" in line and "2 files with .gif" in line and "KEY.jpg" in line and "data.path" in line


def test_wrong_settings_come_before_torch():
    node = {"_target_": "ldm.data.datamodule.DataModule", "path": "nowhere"}
    for key, value in {"caption": "filname", "caption_choice": "x", "keep_tokens": -1}.items():
        with pytest.raises(LdmError, match=rf"data\.{key}"):
            check_data({**node, key: value})
