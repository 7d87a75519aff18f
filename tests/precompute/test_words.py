"""`python -m ldm cache`: other data than the run's, in the words of train.py."""

from copy import deepcopy
from pathlib import Path

import pytest

from ldm.config import compose
from ldm.errors import LdmError
from ldm.tools.cache import _data_node

RUN = Path("runs/mine")
OLD = {"_target_": "ldm.data.datamodule.DataModule", "path": "here", "bucket": None}  # of a run before there were more


def composed(*words):
    return compose("train", ["experiment=null", "name=cache", "data=folder", "data.path=here", *words])["data"]


@pytest.fixture(scope="module")
def recorded():
    return {"data": composed()}


@pytest.mark.parametrize(
    "words",
    [
        ["data.val_fraction=1e-2", "data.caption={class}", "data.bucket.enable_bucket=true", "data.path=[a,'b c']"],
        ["data.caption=50% off: a {title}", "data.background='#ffffff'", "data.index_dir=${oc.env:LDM_NOT_SET,/tmp/x}"],
        ["data.caption='a {title}'", "data.bucket={enable_bucket: true, bucket_reso_steps: 8}"],
    ],
)
def test_words_mean_what_they_mean_to_train_py(recorded, words):
    before, wanted = deepcopy(recorded["data"]), composed(*words)
    keys = {word.partition("=")[0].split(".")[1] for word in words}
    assert {key for key, value in wanted.items() if value != before[key]} == keys
    assert _data_node(recorded, words, RUN) == {**wanted, "cache": None, "columns": {}}
    assert recorded["data"] == before
    assert _data_node({"data": OLD}, words, RUN).keys() == {*OLD, *keys, "cache", "columns"}


@pytest.mark.parametrize(
    "word, text",
    [
        ("data.image_sze=3", "did you mean 'data.image_size'"),
        ("data.path.x=1", "unknown key 'data.path.x'"),
        ("data.bucket.enable_bukcet=true", "enable_bucket"),
        ("data.bucket=5", "mapping"),
        ("data.path=a,b", "names several values"),
        ("data.path=[a", "cannot read 'data.path=[a'"),
        ("data.background=#fff", "quote the value"),
        ("data.crop", "write key=value"),
        ("data.index_dir=${oc.env:HOME}", "only variables LDM_*"),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_what_train_py_refuses_is_refused(recorded, word, text, old):
    from ldm.build import build

    with pytest.raises(LdmError) as refused:
        build(_data_node({"data": OLD} if old else recorded, [word], RUN), where="data")
    assert text in refused.value.line() and refused.value.exit_code == 2 and refused.value.line().count("error[") == 1
