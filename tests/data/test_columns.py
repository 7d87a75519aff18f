"""Further members of a sample: other pictures, masks and arrays as columns, cut like the sample's own picture."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.bad_samples import BadSamples
from ldm.data.columns import checked, kind_of
from ldm.data.datamodule import DataModule
from ldm.data.decode import MAX_ARRAY, BadSample, decode_array, decode_columns, decode_mask
from ldm.data.loader import Stream
from ldm.data.moments import MomentTables
from ldm.data.order import Order
from ldm.data.pipeline import PassPlan, TrainPlan, stages
from ldm.data.shards import open_dataset
from ldm.data.splits import check_data
from ldm.data.transforms import Transform
from ldm.errors import LdmError
from tests.data.making import encoded, picture, sample, write_tar


def npy(values, **options):
    file = io.BytesIO()
    np.save(file, np.asarray(values), **options)
    return file.getvalue()


def grey(values):
    return encoded(Image.fromarray(np.asarray(values, dtype=np.uint8)))


def with_members(folder, count=8, size=(12, 8), **members):
    """A tar of samples, each with what `members` make of its number: depth_png=picture gives KEY.depth.png."""
    content = []
    for n in range(count):
        content += sample(n, size)
        for name, make in members.items():
            data = make(n)
            if data is not None:
                content.append((f"s{n:05d}.{name.replace('_', '.')}", data))
    return write_tar(folder / "a.tar", content)


def one_batch(path, columns, transform=None, **options):
    data = open_dataset(str(path), columns=columns)
    plan = PassPlan(data.num_samples, data.num_samples)
    (batch,) = Stream(stages(data, plan, transform or Transform(8), columns=checked(columns), **options))
    return batch


def training(path, columns, transform, batch_size=8, **options):
    data = open_dataset(str(path), columns=columns)
    plan = TrainPlan(Order(data.shard_lengths, data.sizes, seed=0, batch_size=batch_size))
    return iter(Stream(stages(data, plan, transform, columns=checked(columns), **options), ledger=BadSamples()))


# ---- geometry


@pytest.mark.parametrize("crop", ["center", "random", "pad"])
@pytest.mark.parametrize("size", [(12, 8), (8, 12), (8, 8)])
def test_another_picture_is_cut_and_mirrored_as_the_sample_s_own(tmp_path, crop, size):
    """Of the same bytes the same pixels, bit for bit; with other draws they would not be."""
    path = with_members(tmp_path, size=size, twin_png=lambda n: picture(n, size))
    transform = Transform(8, crop=crop, flip_prob=0.5, key=7)
    batches = training(path, {"twin": ".twin.png"}, transform)
    found = [next(batches) for _ in range(3)]
    assert all(torch.equal(b.columns["twin"], b.images) for b in found)
    mirrored = [transform.draws(b.slots)[:, 2] < 0.5 for b in found]
    assert 4 < np.concatenate(mirrored).sum() < 20
    control = next(training(path, {}, Transform(8, crop=crop, flip_prob=0.5, key=8)))
    assert not torch.equal(control.images, found[0].images)


def smooth(size, scale=1):
    """A picture of slow waves, whose halves are nearly its every second pixel."""
    x, y = np.meshgrid((np.arange(size[0]) + 0.5) * scale, (np.arange(size[1]) + 0.5) * scale)
    waves = [127 + 100 * np.sin(x / a) * np.cos(y / b) for a, b in ((11, 17), (23, 9), (15, 31))]
    return encoded(Image.fromarray(np.stack(waves, axis=-1).round().astype(np.uint8)))


@pytest.mark.parametrize("crop", ["random", "pad"])
def test_a_smaller_picture_is_cut_in_the_same_place(tmp_path, crop):
    content = []
    for n in range(4):
        content += [(f"{n}.png", smooth((96, 64))), (f"{n}.txt", b"x"), (f"{n}.low.png", smooth((48, 32), scale=2))]
    path = write_tar(tmp_path / "a.tar", content)
    batches = training(path, {"low": ".low.png"}, Transform(32, crop=crop, flip_prob=0.5, key=1), batch_size=4)
    for _ in range(3):
        batch = next(batches)
        assert (batch.columns["low"] - batch.images).abs().mean() < 0.02
        assert (batch.columns["low"].flip(3) - batch.images).abs().mean() > 0.1  # the control


def test_a_mask_is_the_mean_over_areas(tmp_path):
    values = np.random.default_rng(0).integers(0, 2, (8, 16, 24)) * 255
    path = with_members(tmp_path, size=(24, 16), mask_png=lambda n: grey(values[n]))
    batch = one_batch(path, {"mask": ".mask.png"})
    mask = batch.columns["mask"]
    middle = torch.from_numpy(values[:, :, 4:20]).float() / 255
    expected = middle.unflatten(1, (8, 2)).unflatten(3, (8, 2)).mean((2, 4))
    assert mask.shape == (8, 1, 8, 8) and mask.dtype == torch.float32
    assert (mask[:, 0] - expected).abs().max() <= 1 / 255  # two passes of 8 bits
    bicubic = one_batch(path, {"grey": ".mask.png"}).columns["grey"]
    assert bicubic.shape == (8, 3, 8, 8) and (bicubic[:, 0] / 2 + 0.5 - expected).abs().max() > 0.05  # the control


def test_beside_a_padded_picture_a_mask_is_zero(tmp_path):
    path = with_members(tmp_path, count=1, size=(16, 8), mask_png=lambda n: grey(np.full((8, 16), 255)))
    batch = one_batch(path, {"mask": ".mask.png", "inpaint_mask": ".mask.png"}, Transform(16, crop="pad"))
    expected = torch.zeros(16, 16)
    expected[4:12] = 1
    assert torch.equal(batch.columns["mask"][0, 0], expected)
    assert torch.equal(batch.columns["inpaint_mask"], batch.columns["mask"])


def test_masks_of_every_mode():
    """Luminance, transparent parts 0; a colour profile does not move a mask's values."""
    from tests.data.making import profile

    half = Image.fromarray(np.array([[255, 255], [0, 64]], dtype=np.uint8))
    clear = Image.merge("LA", [Image.new("L", (2, 2), 255), half])
    wide = Image.fromarray((np.array([[65535, 65535], [0, 64 * 257]])).astype(np.uint16))
    assert all(
        np.array_equal(np.asarray(decode_mask(data)), np.asarray(half))
        for data in (
            encoded(half),
            encoded(half.convert("RGB")),
            encoded(half.convert("RGB").quantize(4)),
            encoded(clear),
            encoded(wide),
            encoded(half, icc_profile=profile("linear", grey=True)),
        )
    )
    assert np.asarray(decode_mask(encoded(Image.new("1", (2, 2), 1)))).tolist() == [[255, 255], [255, 255]]


@pytest.mark.parametrize(
    "size,shape,off",
    [
        ((96, 64), (96, 64), 4),
        ((48, 32), (96, 64), 4),
        ((47, 32), (96, 64), 4),
        ((31, 21), (96, 64), 4),
        ((2000, 1500), (85, 64), 120),  # the picture made smaller, its width rounded down
        ((1500, 2000), (64, 85), 120),
        ((1001, 667), (96, 64), 60),
    ],
)
def test_only_rounding_may_change_the_aspect_ratio(size, shape, off):
    transform, draw = Transform(16), np.full(3, 0.5, dtype=np.float32)
    assert transform.further(Image.new("L", size), shape, draw).shape == (16, 16)
    for wrong in ((size[0] - off, size[1]), (size[1], size[0])):
        with pytest.raises(BadSample, match=f"not of the shape of the picture, {shape[0]}x{shape[1]}") as caught:
            transform.further(Image.new("L", wrong), shape, draw)
        assert caught.value.kind == "size_policy"


def test_a_bucket_s_size_is_that_of_the_columns_too():
    transform, draw = Transform(16, crop="random", key=2), np.array([0.3, 0.8, 0.9], dtype=np.float32)
    image = Image.open(io.BytesIO(picture(3, (90, 60))))
    assert np.array_equal(transform.further(image, image.size, draw, (24, 8)), transform(image, draw, (24, 8)))


# ---- arrays


def test_arrays_and_lists_of_numbers_become_tensors(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(8, 5))
    path = with_members(
        tmp_path,
        emb_npy=lambda n: npy(vectors[n]),
        tok_npy=lambda n: npy(np.asfortranarray(vectors[: n % 2 + 1].astype(np.float16))),
        npy=lambda n: npy(np.arange(n, n + 2, dtype=np.uint8)),
        json=lambda n: json.dumps({"v": vectors[n].tolist(), "n": n, "u": [1] * (n + 1), "w": "x"}).encode(),
    )
    columns = {"emb": ".emb.npy", "tok": ".tok.npy", "own": ".npy", "v": "v", "n": "n", "u": "u", "w": "w"}
    found = one_batch(path, columns).columns
    expected = torch.from_numpy(vectors).float()
    assert torch.equal(found["emb"], expected) and torch.equal(found["v"], expected)
    assert found["own"].tolist() == [[n, n + 1] for n in range(8)] and found["own"].dtype == torch.float32
    assert [tuple(t.shape) for t in found["tok"]] == [(n % 2 + 1, 5) for n in range(8)]  # a list: not of one shape
    assert torch.equal(found["tok"][1], torch.from_numpy(vectors[:2].astype(np.float16)).float())
    assert [u.tolist() for u in found["u"]] == [[1.0] * (n + 1) for n in range(8)]
    assert found["n"] == list(range(8)) and found["w"] == ["x"] * 8


BAD_ARRAYS = {
    "objects": npy(np.array([{}], dtype=object), allow_pickle=True),
    "nan": npy([np.nan]),
    "beyond float32": npy([1e300]),
    "empty file": b"",
    "cut": npy(np.arange(9.0))[:-1],
    "too long": npy(np.arange(9.0)) + b"x",
    "no dimension": npy(1.0),
    "four dimensions": npy(np.zeros((1, 1, 1, 1))),
    "no numbers": npy(np.zeros((0, 3))),
    "text": npy(["a"]),
    "complex": npy([1j]),
    "a lie about its length": npy(np.arange(2.0)).replace(b"(2,)", b"(999999999999,)"),
    "a negative length": npy(np.arange(2.0)).replace(b"(2,)", b"(-2,)"),
    "nested": b"\x93NUMPY\x01\x00" + (900).to_bytes(2, "little") + b"(" * 900,
    "code": npy(np.arange(2.0)).replace(b"'<f8'", b"exit()"),
    "large": npy(np.zeros(MAX_ARRAY // 4, dtype=np.float32)),
    "records": npy(np.zeros(2, dtype=[("a", "f4")])),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_are_none(tmp_path, case):
    with pytest.raises(BadSample):
        decode_array(BAD_ARRAYS[case])
    path = with_members(tmp_path, count=4, emb_npy=lambda n: BAD_ARRAYS[case] if n == 1 else npy([1.0, n]))
    batch = one_batch(path, {"emb": ".emb.npy"})
    assert batch.valid.tolist() == [True, False, True, True]
    assert batch.columns["emb"].tolist() == [[1, 0], [0, 0], [1, 2], [1, 3]]


@pytest.mark.parametrize(
    "value", ["[1, NaN]", "[]", '[1, "2"]', "[true]", "[[1]]", "{}", "null", "[1e39]", f"[{10**400}]"]
)
def test_lists_that_are_no_vector(value):
    with pytest.raises(BadSample) as caught:
        decode_columns(f'{{"v": {value}}}'.encode(), {"c": "v"})
    assert caught.value.kind == "column_missing" and "'v'" in caught.value.reason


# ---- what is not there


def test_a_sample_without_the_member_is_bad_and_replaced(tmp_path):
    lacking = {2: None, 4: b"<html>", 5: grey(np.zeros((8, 8))), 6: picture(0, (12, 8))[:90]}
    path = with_members(tmp_path, count=8, mask_png=lambda n: lacking.get(n, grey(np.full((8, 12), 255))))
    data = open_dataset(str(path), columns={"mask": ".mask.png"})
    assert data.num_samples == 8 and data.problems == {"unusable_member": 1}  # a web page; the cut one shows later
    ledger = BadSamples(max_fraction=1.0)
    plan = TrainPlan(Order(data.shard_lengths, data.sizes, seed=0, batch_size=4))
    stream = iter(Stream(stages(data, plan, Transform(8), columns={"mask": ".mask.png"}), ledger=ledger))
    for _ in range(2):
        batch = next(stream)
        assert batch.valid.all() and bool((batch.columns["mask"] == 1).all())
        assert not {f"s{n:05d}" for n in lacking} & set(batch.keys)
    assert set(ledger.counts) == {"column_missing", "size_policy", "decode"}
    without = next(training(path, {}, Transform(8)))
    assert without.valid.all() and len(set(without.keys)) == 8  # they are good samples where no mask is wanted
    strict = one_batch(path, {"mask": ".mask.png", "edges": ".mask.png"})
    assert strict.valid.tolist() == [n not in lacking for n in range(8)]
    assert strict.columns["mask"][2].abs().max() == 0 and strict.columns["edges"].shape == (8, 3, 8, 8)


def test_a_column_that_nobody_has_is_refused_at_once(tmp_path):
    path = with_members(tmp_path, mask_png=lambda n: grey(np.zeros((8, 12))))

    def refusal(**columns):
        with pytest.raises(LdmError) as caught:
            DataModule(str(path), columns=columns).open()
        assert caught.value.exit_code == 2 and "data.columns" in caught.value.line()
        return caught.value.line()

    assert "no sample has a member or file KEY.mask.jpg" in refusal(mask=".mask.jpg")
    assert "did you mean '.mask.png'" in refusal(mask=".mask.jpg")
    assert "did you mean '.mask.png'" in refusal(mask="mask.png")  # without the dot it is a field of the JSON
    for wrong in (".mask.pkl", ".mask", ".a/b.png", "..png", "@mask", "a..b", "", 5):
        assert ".mask.png" in refusal(mask=wrong)
    assert "the caption is no column" in refusal(caption=".mask.png")
    DataModule(str(path), columns={"mask": ".mask.PNG"}).open()


def test_what_a_declaration_is():
    columns = {
        "a": "x.png",
        "size": "@size",
        "edges": ".edges.JPEG",
        "mask": ".m.png",
        "face_mask": ".png",
        "e": ".npy",
    }
    found = checked(columns)
    assert found == {**columns, "edges": ".edges.jpg"} and checked(found) == found
    assert [kind_of(n, p) for n, p in found.items()] == ["field", "size", "picture", "mask", "mask", "array"]


# ---- the index


def test_members_belong_to_the_longest_key_that_is_a_sample(tmp_path):
    """a.b has a caption of its own, a.c has not; a.b.mask is the mask of a.b, a.c.soft of a; KEY.png beside KEY.jpg."""
    content = [("a.c.soft.png", picture(1)), ("a.b.mask.png", picture(2)), ("x.npy", npy([1.0]))]
    content += [("a.jpg", picture(3, form="JPEG")), ("a.txt", b"a"), ("a.png", picture(4)), ("a.c.png", picture(5))]
    content += [("a.b.png", picture(6)), ("a.b.txt", b"b"), ("d/a.mask.png", picture(7)), ("v1.2.png", picture(8))]
    content += [
        ("v1.2.txt", b"v"),
        ("v1.2.mask.jpeg", picture(9, form="JPEG")),
        ("a.b.npz", b"PK"),
        ("a.evil.pkl", b"."),
    ]
    for data in (open_dataset(str(write_tar(tmp_path / "t.tar", content))), folder_of(tmp_path / "f", content)):
        further = {}
        for i, key in enumerate(data.keys):
            index, row = data.indexes[0], int(data.row_of[i])
            further[key] = sorted(index.further_names[r["name"]] for r in index.further_rows(row))
        assert further == {"a": [".c.png", ".c.soft.png", ".png"], "a.b": [".mask.png"], "v1.2": [".mask.jpg"]}
        a = data.keys.index("a")
        assert data.read(a, ("image", ".png", ".c.soft.png")) == {
            "image": picture(3, form="JPEG"),
            ".png": picture(4),
            ".c.soft.png": picture(1),
        }
        assert data.problems["unknown_suffix"] == 3 and data.problems["second_image"] == 1
        sizes = data.indexes[0].further
        assert (sizes["width"] == 8).all() and (sizes["height"] == 8).all()


def folder_of(folder, content):
    for name, data in content:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return open_dataset(str(folder))


def test_a_tar_that_ends_between_the_members_of_a_sample(tmp_path):
    """Half a sample is never one without a caption, though its mask is complete."""
    (image, _), mask = sample(1), ("s00001.mask.png", picture(1))
    path = write_tar(tmp_path / "a.tar", [*sample(0), image, mask, ("s00001.txt", b"caption 1")])
    with tarfile.open(path) as archive:
        os.truncate(path, archive.getmembers()[-1].offset)
    for setting in ("skip", "empty"):
        data = open_dataset(str(path), on_truncated="use", on_missing_caption=setting)
        assert data.keys == ["s00000"] and data.problems == {"truncated_shard": 1}


def test_the_bytes_of_further_members_are_compared_with_the_index(tmp_path):
    path = with_members(tmp_path, count=2, mask_png=lambda n: picture(n, (12, 8)))
    data = open_dataset(str(path))
    again = open_dataset(str(path), index_dir=str(tmp_path / "index"))
    assert (again.indexes[0].further == data.indexes[0].further).all()
    content = bytearray(path.read_bytes())
    content[data.indexes[0].place(1, ".mask.png")[0] + 50] ^= 1
    path.write_bytes(content)
    assert data.read(0, (".mask.png",)) and data.read(1)
    with pytest.raises(BadSample, match="bytes differ"):
        data.read(1, (".mask.png",))


def test_a_changed_mask_is_a_changed_folder(tmp_path):
    content = [*sample(0), ("s00000.mask.png", picture(1))]
    before = folder_of(tmp_path / "f", content).indexes[0].sha256
    assert folder_of(tmp_path / "g", content).indexes[0].sha256 == before
    assert folder_of(tmp_path / "f", [("s00000.mask.png", picture(2))]).indexes[0].sha256 != before


def test_files_that_a_table_names(tmp_path):
    rows = [
        {"file_name": "a.png", "text": "a", "mask_file_name": "masks/one.png", "depth_file_name": "masks/two.jpg"},
        {"file_name": "b.png", "text": "b", "mask_file_name": "masks/one.png", "emb_file_name": "../x.npy"},
        {"file_name": "c.png", "text": "c", "mask_file_name": "c.png", "n_file_name": [1]},
        {"file_name": "masks/own.png", "text": "own"},
        {"file_name": "d.png", "text": "d", "mask_file_name": "masks/own.png"},
    ]
    content = [(f"{n}.png", picture(i)) for i, n in enumerate(("a", "b", "c", "d", "masks/own", "masks/one"))]
    content += [
        ("masks/two.jpg", picture(9, form="JPEG")),
        ("metadata.jsonl", "\n".join(map(json.dumps, rows)).encode()),
    ]
    data = folder_of(tmp_path / "f", content)
    assert sorted(data.keys) == ["a", "b", "c", "d", "masks/own"]
    read = {key: data.read(i, (".mask.png", ".depth.jpg")) for i, key in enumerate(data.keys)}
    assert read["a"] == {".mask.png": picture(5), ".depth.jpg": picture(9, form="JPEG")}
    assert read["b"] == {".mask.png": picture(5)} and read["d"] == {".mask.png": picture(4)} and not read["c"]
    assert data.problems == {"metadata": 1} and "../x.npy" in data.examples[0].reason


def test_a_file_of_the_picture_s_own_name_that_a_table_names_is_not_the_picture(tmp_path):
    rows = [
        {"file_name": "a.png", "mask_file_name": "a.jpg"},
        {"file_name": "b.png", "mask_file_name": "b.jpg"},
        {"file_name": "b.jpg", "depth_file_name": "b.png"},  # one of the two must be the picture
    ]
    content = [(f"{n}.png", picture(i)) for i, n in enumerate("ab")]
    content += [(f"{n}.jpg", picture(i + 5, form="JPEG")) for i, n in enumerate("ab")]
    content += [("a.txt", b"a"), ("b.txt", b"b"), ("metadata.jsonl", "\n".join(map(json.dumps, rows)).encode())]
    data = folder_of(tmp_path / "f", content)
    assert sorted(data.keys) == ["a", "b"] and not data.problems
    for i, key in enumerate(data.keys):
        n = "ab".index(key)
        assert data.read(i, ("image", ".mask.jpg")) == {
            "image": picture(n),
            ".mask.jpg": picture(n + 5, form="JPEG"),
        }


OWN_TEXTS = {
    "a sidecar": (("a.x.txt", b"x"),),
    "its JSON": (("a.x.json", b'{"caption": "x"}'),),
    "a row": (("metadata.jsonl", b'{"file_name": "a.x.png", "text": "x"}'),),
    "a row without text": (("metadata.csv", b"file_name,title\na.x.png,x"),),
    "nothing": (),
    "a JSON without a caption": (("a.x.json", b'{"mask_of": "a"}'),),
    "a JSON that is none": (("a.x.json", b"{"),),
    "a row of another": (("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}'),),
}


@pytest.mark.parametrize(
    "case,form",
    [(case, form) for case in OWN_TEXTS for form in ("folder", "tar") if form == "folder" or "row" not in case],
)
def test_a_picture_with_words_of_its_own_is_no_further_member(tmp_path, case, form):
    content = [("a.png", picture(1)), ("a.txt", b"a"), ("a.x.png", picture(2)), *OWN_TEXTS[case]]
    if form == "folder":
        folder_of(tmp_path / "d", content)
    else:
        write_tar(tmp_path / "d", content).rename(tmp_path / "d.tar")
    data = open_dataset(str(tmp_path / ("d" if form == "folder" else "d.tar")), on_missing_caption="empty")
    if list(OWN_TEXTS).index(case) < 4:
        assert sorted(data.keys) == ["a", "a.x"] and not data.indexes[0].further_names and not data.remarks
    else:
        assert data.keys == ["a"] and data.indexes[0].further_names == [".x.png"]


def test_pictures_that_are_no_samples_are_counted_at_the_start(tmp_path, capfd):
    content = [("logo.png", picture(1)), ("logo.old.png", picture(2)), ("fox.png", picture(3))]
    content += [("fox.jpg", picture(4, form="JPEG")), ("fox.emb.npy", npy([1.0])), ("fox.old.png", picture(5))]
    folder_of(tmp_path / "f", [*content, ("fox.txt", b"x"), ("logo.txt", b"x")])
    node = {"_target_": "ldm.data.datamodule.DataModule", "path": str(tmp_path / "f"), "caption": "filename"}
    capfd.readouterr()
    check_data(node)
    (line,) = capfd.readouterr().err.splitlines()
    assert "2 pictures are further members of others and no sample, for example .old.png of " in line
    assert "data.columns.NAME=.old.png" in line and (".old.txt)" in line)
    check_data({**node, "columns": {"before": ".old.png"}})
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("failing", ["a.mask.png", "a.mask.json"])
def test_what_was_read_at_a_bad_moment_is_read_again(tmp_path, monkeypatch, failing):
    content = [(f"{n}.{s}", d) for n in "ab" for s, d in (("png", picture(1)), ("txt", b"x"), ("mask.png", picture(2)))]
    folder_of(tmp_path / "f", content)
    (tmp_path / "f" / "a.mask.json").write_text('{"n": 1}')
    read_bytes = Path.read_bytes

    def flaky(path):
        if path.name == failing:
            raise OSError(5, "Input/output error")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", flaky)
    data = open_dataset(str(tmp_path / "f"))
    assert data.num_samples == 2 and "Input/output error" in data.examples[0].reason
    assert data.indexes[0].further_rows(data.keys.index("a")).size == 0
    monkeypatch.undo()
    again = open_dataset(str(tmp_path / "f"))  # also in this process
    assert not again.problems and all(again.read(i, (".mask.png",)) for i in range(2))
    del data, again
    assert not open_dataset(str(tmp_path / "f")).problems


NO_NAMES = ["/../../evil", "a/b", "..", "", "x" * 200, "new\nline", "nul\0", "a\\..\\b"]


def test_a_column_of_a_table_that_is_no_name_is_remarked(tmp_path):
    rows = [{"file_name": "a.png", "text": "a", "mask_file_name": "m.png"}]
    rows += [{"file_name": f"{n}.png", "text": "x", f"{name}_file_name": "m.png"} for n, name in enumerate(NO_NAMES)]
    content = [(f"{n}.png", picture(1)) for n in ("a", "m", *range(len(NO_NAMES)))]
    data = folder_of(tmp_path / "f", [*content, ("metadata.jsonl", "\n".join(map(json.dumps, rows)).encode())])
    assert data.indexes[0].further_names == [".mask.png"]
    assert data.problems == {"metadata": len(NO_NAMES)} and data.num_samples == 1 + len(NO_NAMES)
    assert {p.key for p in data.examples} == {f"{name}_file_name"[:100] for name in NO_NAMES}


def test_a_member_whose_name_is_none_is_remarked(tmp_path):
    """Also of a tar: no name that leads elsewhere, or that is endless, is ever written again."""
    content = [*sample(0), ("s00000.a\\..\\b.png", picture(1)), ("s00000." + "x" * 300 + ".png", picture(1))]
    content.append(("s00000.ok.png", picture(2)))
    data = open_dataset(str(write_tar(tmp_path / "a.tar", content, tarfile.PAX_FORMAT)))
    assert data.problems == {"unusable_member": 2} and data.indexes[0].further_names == [".ok.png"]


# ---- moments


def test_masks_beside_moments(tmp_path):
    """No picture is read, the mask is: cut as the picture was when it was encoded."""
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 12), dtype=np.uint8)
    path = with_members(tmp_path, mask_png=lambda n: grey(values[n]))
    pixels = one_batch(path, {"mask": ".mask.png"})
    moments = one_batch(path, {"mask": ".mask.png"}, moments=MomentTables.of(torch.zeros(8, 8, 1, 1)))
    assert moments.images is None and torch.equal(moments.columns["mask"], pixels.columns["mask"])
    data = open_dataset(str(path))
    pipeline = stages(
        data,
        PassPlan(8, 8),
        Transform(8),
        moments=MomentTables.of(torch.zeros(8, 8, 1, 1)),
        columns={"mask": ".mask.png"},
    )
    assert pipeline.stage(0).fields == ("txt", ".mask.png")
