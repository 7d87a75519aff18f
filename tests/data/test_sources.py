"""Folders as people have them: sidecars, metadata tables, classes, kohya's repeats, several sets; and what is said."""

import json

import pytest

from ldm.data import metadata
from ldm.data.captions import Captions
from ldm.data.datamodule import DataModule
from ldm.data.loader import Stream
from ldm.data.pipeline import PassPlan, stages
from ldm.data.shards import open_dataset
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
    fill(tmp_path, {"a.json": '{"n": '})  # a broken one stays what it is: nothing is invented beside it
    assert texts(tmp_path) == {"a": "sidecar"}
    assert texts(tmp_path, {"n": "n"})[0] == {}


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
        "[" * 100_000,
        '{"text": "' + "x" * 2**20 + '"}',
    ]
    fill(tmp_path, {"a.png": None, "metadata.jsonl": "\n".join(lines), "metadata.csv": "file_name,text\na.png,other"})
    data = open_dataset(str(tmp_path))
    assert data.keys == ["a"] and data.problems == {"metadata": 10}
    reasons = [p.reason for p in data.examples]
    assert any("line 2 cannot be read" in r for r in reasons) and any(
        "line 4 has no file_name; it has: image" in r for r in reasons
    )
    assert any("there is no '../../etc/passwd' here" in r for r in reasons)
    fill(tmp_path, {"metadata.csv": "image,text\na.png,x\n"})
    (tmp_path / "metadata.jsonl").unlink()
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


def test_a_template_with_a_field_that_nobody_has_is_refused_at_once(tmp_path):
    fill(tmp_path, {"a.png": None, "metadata.jsonl": json.dumps({"file_name": "a.png", "title": "T"})})
    line = refusal(tmp_path, caption="a logo of {titel}")
    assert "no sample has the field 'titel'" in line and "did you mean 'title'" in line and "data.caption" in line
    assert texts(tmp_path, caption="a logo of {title}") == {"a": "a logo of T"}
    assert "no sample has a JSON" in refusal(write_shards(tmp_path / "s", [2]), caption="{title}")


# ---- kohya's folders and several sets


def test_kohyas_folders(tmp_path, capsys):
    fill(
        tmp_path,
        {"10_red fox/1.png": None, "10_red fox/2.png": None, "10_red fox/2.txt": "its own", "3_dog/1.png": None},
    )
    fill(tmp_path, {"007_cat/1.png": None, "007_cat/1.txt": "a cat"})
    data = open_dataset(str(tmp_path))
    assert dict(zip(data.keys, data.repeats.tolist(), strict=True)) == {
        "10_red fox/1": 10,
        "10_red fox/2": 10,
        "3_dog/1": 3,
        "007_cat/1": 1,  # numbered, not repeated
    }
    said = "10_red fox: 10 x 2 pictures, 3_dog: 3 x 1 pictures"
    assert data.remarks == [f"repeats from the names of folders ({said}); data.repeats=1 turns them off"]
    assert texts(tmp_path) == {
        "10_red fox/1": "red fox",
        "10_red fox/2": "its own",
        "3_dog/1": "dog",
        "007_cat/1": "a cat",
    }
    once = open_dataset(str(tmp_path), repeats=1)
    assert once.repeats.tolist() == [1] * 4 and not once.remarks
    assert open_dataset(str(tmp_path), caption="sidecar").problems == {"caption_missing": 2}
    node = {"_target_": "ldm.data.datamodule.DataModule", "path": str(tmp_path)}
    check_data(node)
    assert "data: repeats from the names of folders" in capsys.readouterr().err


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


@pytest.mark.parametrize("repeats", [[1], [1, 2, 3], 0, [1, -1], [1, 1.5], [1, True], 10**9])
def test_wrong_repeats(tmp_path, repeats):
    sets = [str(write_shards(tmp_path / name, [1])) for name in "ab"]
    assert "data.repeats" in refusal(sets, repeats=repeats) and open_dataset(sets, repeats=[1, 2]).num_samples == 2


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


def test_a_folder_without_pictures(tmp_path):
    fill(tmp_path, {"a.gif": b"GIF89a", "b.gif": b"GIF89a", "a.txt": "a", "metadata.jsonl": "{}"})
    line = refusal(tmp_path)
    assert "no usable sample" in line and "2 files with .gif" in line and "KEY.jpg" in line and "data.path" in line


def test_wrong_settings_come_before_torch():
    node = {"_target_": "ldm.data.datamodule.DataModule", "path": "nowhere"}
    for key, value in {"caption": "filname", "caption_choice": "x", "keep_tokens": -1}.items():
        with pytest.raises(LdmError, match=rf"data\.{key}"):
            check_data({**node, key: value})
