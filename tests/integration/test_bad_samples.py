"""Bad samples by the real command: counted, named, replaced, shown, and the end of the run when there are too many."""

import json
import re
import shutil

import pytest

from ldm.checkpoints.store import Store
from tests.data.making import picture, write_tar
from tests.integration.tiny import command, metrics, overrides

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def spoilt(shards, tmp_path_factory):
    """The toy logos, 20 pictures whose pixels end half-way, 10 whose captions no text encoder reads to the end."""
    folder = tmp_path_factory.mktemp("spoilt") / "shards"
    shutil.copytree(shards, folder, ignore=shutil.ignore_patterns(".ldm-index"))
    broken = picture(0, (40, 40))
    members = [m for n in range(20) for m in ((f"b{n:02}.png", broken[: len(broken) // 2]), (f"b{n:02}.txt", b"half"))]
    write_tar(folder / "train-broken.tar", members)
    members = [m for n in range(10) for m in ((f"l{n:02}.png", picture(n, (16, 16))), (f"l{n:02}.txt", b"fox " * 100))]
    write_tar(folder / "train-long.tar", members)
    return folder


def test_too_many_end_the_run_and_a_larger_budget_goes_on(spoilt, tmp_path):
    """The run that was stopped and resumed, and one on two devices: the same bad samples at the same steps."""
    stage = tmp_path / "tiny" / "autoencoder"
    code, output = command(overrides(spoilt, tmp_path, "data.lanes=1", "data.max_bad_fraction=0.002"))  # of 10 000
    assert code == 3, output
    line = output.strip().splitlines()[-1]
    assert re.match(
        r"error\[DATA-BUDGET\]: \d+\.\d % bad samples; mostly decode in train-broken\.tar; limit 0\.2 %; ", line
    )
    assert str(stage / "bad_samples.jsonl") in line and "data.max_bad_fraction" in line
    assert Store(stage / "ckpt").steps()[0] == 4
    saved = Store(stage / "ckpt").steps()[-1]
    rows = [json.loads(text) for text in (stage / "bad_samples.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and {(row["kind"], row["shard"]) for row in rows} == {("decode", "train-broken.tar")}
    assert len({row["key"] for row in rows}) == 10 and all("truncated" in row["reason"].lower() for row in rows)

    code, output = command(overrides(spoilt, tmp_path, "data.lanes=1", "data.max_bad_fraction=1"))
    assert code == 0 and f"continuing at step {saved}" in output, output
    two = ("data.lanes=1", "data.max_bad_fraction=1", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    code, many = command(overrides(spoilt, tmp_path / "two", *two))
    assert code == 0, many
    for name in ("autoencoder", "diffusion"):
        one, other = metrics(tmp_path / "tiny", name), metrics(tmp_path / "two" / "tiny", name)
        for key in ("data/bad_samples", "data/captions_cut"):
            assert [row[key] for row in one] == [row[key] for row in other], key
        met = int(one[-1]["data/bad_samples"])
        assert met > 20
        for runs, words in ((tmp_path, output), (tmp_path / "two", many)):
            counts = Store(runs / "tiny" / name / "ckpt").newest().document("state")["bad_samples"]["counts"]
            assert counts == {"decode": met}
            assert f"{name}: bad samples: {met} met in training and replaced ({met} decode); named in" in words
            assert f"bad samples {met}" in words  # the bar, which is lines here
    cut = sum(int(row["data/captions_cut"]) for row in metrics(tmp_path / "tiny", "diffusion"))
    assert cut > 0 and f"{cut} captions were longer than the text encoder reads" in output
    assert not any(row["data/captions_cut"] for row in metrics(tmp_path / "tiny", "autoencoder"))
