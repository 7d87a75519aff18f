"""The toy set: equal seeds give equal bytes, the hold-out is balanced and kept, and shards are whole or absent."""

import io
import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.toy_logos import make
from data.toy_logos.make import COLOURS, HELD_OUT, SHAPES, Draws, caption, held_out_logo, render, training_logo

SMALL = {"num_samples": 60, "num_val": 20, "num_shards": 4}


def test_draws_are_frozen():
    """Known answers: a change of these changes every data set that was ever made."""
    draws = Draws("known", 1)
    assert [draws.pick(range(1000)) for _ in range(4)] == [387, 443, 857, 878]
    assert caption(training_logo(0), Draws("caption", 0)) == "a green disc on a black ground"


def test_hold_out_is_balanced():
    assert len(HELD_OUT) == 90
    for part in range(3):
        assert set(Counter(c[part] for c in HELD_OUT).values()) == {9}
    assert set(Counter((mark, ground) for _, mark, ground in HELD_OUT).values()) == {1}
    assert max(Counter((shape, mark) for shape, mark, _ in HELD_OUT).values()) <= 2  # seven grounds or more are left


def test_training_never_shows_a_held_out_combination():
    logos = [training_logo(i) for i in range(3000)]
    seen = set().union(*(logo.seen() for logo in logos))
    assert not seen & set(HELD_OUT)
    assert {"single", "left_right", "above_below", "inside"} == {logo.layout for logo in logos}
    assert 0.57 < np.mean([len(logo.marks) == 1 for logo in logos]) < 0.63  # of 60 %, within three standard errors
    assert {(m.shape, m.colour) for logo in logos for m in logo.marks} == set(itertools.product(SHAPES, COLOURS))


def test_without_the_rule_held_out_combinations_occur(monkeypatch):
    monkeypatch.setattr(make, "is_held_out", lambda combination: False)
    seen = set().union(*(training_logo(i).seen() for i in range(1000)))
    assert len(seen & set(HELD_OUT)) > 45


@pytest.mark.parametrize("num_marks", [1, 2])
def test_validation_holds_nothing_else(num_marks):
    logos = [held_out_logo(i, num_marks) for i in range(90)]
    assert all(set(logo.combinations()) <= set(HELD_OUT) for logo in logos)
    assert {logo.combinations()[0] for logo in logos} == set(HELD_OUT)


def test_colours_of_one_picture_differ_and_are_far_apart():
    for logo in [training_logo(i) for i in range(500)] + [held_out_logo(i, 2) for i in range(180)]:
        colours = [logo.ground, *(m.colour for m in logo.marks)]
        assert len(set(colours)) == len(colours)
        assert logo.border != logo.ground
    assert min(math.dist(a, b) for a, b in itertools.combinations(COLOURS.values(), 2)) > 90


def test_complete_captions_name_everything():
    logos = [held_out_logo(i, 1 + i % 2) for i in range(300)]
    for i, logo in enumerate(logos):
        words = Counter(caption(logo, Draws(i)).replace(",", "").split())
        named = Counter([logo.ground, logo.border, *(w for m in logo.marks for w in (m.shape, m.colour))])
        del named[None]
        assert named <= words, caption(logo, Draws(i))


def test_captions_vary_and_some_leave_something_out():
    logo = held_out_logo(0, 2, with_border=False)
    assert len({caption(logo, Draws(i)) for i in range(300)}) > 20
    texts = [caption(logo, Draws(i), leave_out_prob=1.0).split() for i in range(50)]
    colours = [logo.ground, *(m.colour for m in logo.marks)]
    assert all(any(colour not in words for colour in colours) for words in texts)


@pytest.mark.parametrize("size", [16, 64, 100, 256])
def test_pictures_are_antialiased_at_any_size(size):
    logo = replace(training_logo(0), border=None)
    image = np.asarray(render(logo, size))
    assert image.shape == (size, size, 3)
    plain = [COLOURS[logo.ground], *(COLOURS[m.colour] for m in logo.marks)]
    flat = np.any([(image == colour).all(-1) for colour in plain], axis=0)
    blends = (~flat).sum()
    assert 0.5 * size < blends < 12 * size, "edges blend, and nothing else does"
    small = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BOX), float)
    assert np.abs(small - np.asarray(render(logo, 16), float)).mean() < 3, "the same picture at every size"


def test_layers_share_every_pixel():
    for logo in [training_logo(i) for i in range(20)]:
        layers = make.coverage(logo, 48)
        assert layers.min() >= 0
        np.testing.assert_allclose(layers.sum(0), 1, atol=1e-6)  # float32, four terms
        assert all(layers[1 + i].sum() > 40 for i in range(len(logo.marks)))


def test_shapes_are_told_apart_by_many_pixels():
    masks = {s: make._mask(p, make.Mark(s, "red", 0.5, 0.5, 0.36, 0.0), 64) for s, p in SHAPES.items()}
    for a, b in itertools.combinations(SHAPES, 2):
        assert np.abs(masks[a] - masks[b]).sum() > 120, (a, b)


def test_shards_in_the_layout_of_img2dataset(tmp_path):
    assert make.write_set(tmp_path / "set", **SMALL)
    shards = sorted(map(str, (tmp_path / "set").glob("train-*.tar")))
    assert [s[-9:] for s in shards] == [f"{i:05d}.tar" for i in range(4)]
    counts = [len(list(webdataset.WebDataset(s, shardshuffle=False))) for s in shards]
    assert sum(counts) == 60
    assert len(set(counts)) > 1, "uneven on purpose"

    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len({s["__key__"] for s in samples}) == 60
    for sample in samples:
        assert {"png", "txt", "json"} <= set(sample)
        attributes = json.loads(sample["json"])
        assert attributes["caption"] == sample["txt"].decode()
        assert attributes["key"] == sample["__key__"]
        assert Image.open(io.BytesIO(sample["png"])).size == (attributes["width"], attributes["height"]) == (64, 64)

    val = webdataset.WebDataset(sorted(map(str, (tmp_path / "set").glob("val-*.tar"))), shardshuffle=False)
    attributes = [json.loads(s["json"]) for s in val]
    assert len(attributes) == 20
    assert all((m["shape"], m["colour"], a["ground"]) in HELD_OUT for a in attributes for m in a["marks"])


@pytest.mark.parametrize("num_samples,num_shards", [(12, 12), (13, 12), (8000, 12), (5, 1)])
def test_shard_sizes_sum_up(num_samples, num_shards):
    sizes = make.shard_sizes(num_samples, num_shards, seed=0)
    assert len(sizes) == num_shards and sum(sizes) == num_samples and min(sizes) >= 1


def _bytes(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_equal_seeds_give_equal_bytes_and_others_do_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make.write_set(tmp_path / name, **SMALL, seed=seed)
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")
    assert _bytes(tmp_path / "a") != _bytes(tmp_path / "c")


def test_a_whole_set_is_left_alone_and_another_recipe_replaces_it(tmp_path, capsys):
    out = tmp_path / "set"
    make.write_set(out, **SMALL)
    times = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    capsys.readouterr()
    assert not make.write_set(out, **SMALL)
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert times == {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert make.write_set(out, **{**SMALL, "num_shards": 2})
    assert len(list(out.glob("train-*.tar"))) == 2


def test_an_interrupted_or_damaged_set_is_made_again(tmp_path, monkeypatch):
    out, whole = tmp_path / "set", tmp_path / "whole"
    make.write_set(whole, **SMALL)
    with monkeypatch.context() as patch:
        render_one, calls = make.render, itertools.count()

        def interrupted(*args):
            if next(calls) == 30:
                raise KeyboardInterrupt
            return render_one(*args)

        patch.setattr(make, "render", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make.write_set(out, **SMALL)
    assert not out.exists(), "half a set is never seen"
    assert make.write_set(out, **SMALL)
    assert _bytes(out) == _bytes(whole)

    (out / "train-000002.tar").write_bytes(b"cut short")
    assert make.write_set(out, **SMALL)
    assert _bytes(out) == _bytes(whole)
    assert {p.name for p in tmp_path.iterdir()} == {"set", "whole"}


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="not made here"):
        make.write_set(tmp_path, **SMALL)
    assert (tmp_path / "train-000000.tar").read_bytes() == b"precious"


@pytest.mark.parametrize("out", ["/proc/x", "/dev/null"])
def test_a_place_that_cannot_be_written_is_one_line(out, capsys):
    with pytest.raises(SystemExit) as left:
        make.main(["--out", out])
    assert left.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error[DISK]: cannot write: ") and len(line.splitlines()) == 1 and "--out" in line


def test_as_a_script(tmp_path):
    command = [sys.executable, make.__file__, "--out", str(tmp_path / "set"), "--num-samples", "20", "--num-val", "4"]
    done = subprocess.run([*command, "--size", "32"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "20 training and 4 held-out samples of 32 px" in done.stdout
    refused = subprocess.run([*command, "--num-shards", "21"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.startswith("error[DATA]:")
