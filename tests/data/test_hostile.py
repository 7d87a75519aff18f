"""Every case of the hostile set comes out as its manifest expects: decoded, skipped and counted, or refused."""

import json
import resource

import pytest

from ldm.data.loader import Stream
from ldm.data.pipeline import PassPlan, stages
from ldm.data.shards import open_dataset
from ldm.data.transforms import Transform
from ldm.errors import LdmError
from tests.data.making import SHARED, shared

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
    path, options = str(SHARED / "hostile" / case["file"]), {"index_dir": str(tmp_path)}
    if case["case"] in REFUSED:
        with pytest.raises(LdmError, match=REFUSED[case["case"]]) as refused:
            open_dataset(path, **options)
        assert refused.value.exit_code == 2 and case["file"] in refused.value.line()
        return
    if "truncated" in case["file"] and case["file"].startswith("tar"):
        with pytest.raises(LdmError, match="truncated at byte 25800"):
            open_dataset(path, **options)
        options["on_truncated"] = "use"
    data = open_dataset(path, **options)
    (batch,) = Stream(stages(data, PassPlan(data.num_samples, 100), Transform(32)))
    came = {key for key, valid in zip(batch.keys, batch.valid, strict=True) if valid}
    came_captions = dict(zip(batch.keys, batch.captions, strict=True))
    expected = {"photo.v1.2"} if case["case"] == "key-with-dots" else set(case["bad_keys"])
    assert set(case["good_keys"]) <= came
    if case["expect"] == "decode":
        assert expected <= came
        row = batch.keys.index("bad")
        assert came_captions["bad"] and batch.images[row].std() > 0
        if "size" in case:
            i = data.keys.index("bad")
            assert [int(data.widths[i]), int(data.heights[i])] == case["size"]
        assert came_captions["bad"] == case.get("caption", came_captions["bad"])
    if case["expect"] == "skip":
        assert not set(case["bad_keys"]) & came
        assert data.num_rejected + (~batch.valid).sum() >= 1
    left_out = expected - came
    assert data.num_rejected + int((~batch.valid).sum()) >= len(left_out)  # nothing vanishes uncounted
    assert not set(case.get("must_skip", ())) & came and set(case.get("must_decode", ())) <= came


def test_cmyk_is_not_inverted(tmp_path):
    """good000 is the same logo in RGB."""
    data = open_dataset(str(shared("hostile") / "jpeg-cmyk.tar"), index_dir=str(tmp_path))
    (batch,) = Stream(stages(data, PassPlan(3, 3), Transform(64)))
    good, bad = (batch.images[batch.keys.index(key)] for key in ("good000", "bad"))
    assert (good - bad).abs().mean() < 0.1  # of a range of 2
    assert (good + bad).abs().mean() > 0.5  # the control: an inverted picture is far


def test_memory_stays_bounded():
    """All cases above ran in this process: the 2.7 GB bomb and the 80 MB text chunk were never inflated."""
    shared("hostile")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2.5 * 2**20  # KiB; torch itself takes 0.5 GB
