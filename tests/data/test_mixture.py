"""Shares of several sets in an epoch."""

from itertools import islice

import numpy as np
import pytest

from ldm.data.datamodule import DataModule
from ldm.data.shards import open_dataset
from ldm.errors import LdmError
from tests.data.making import write_shards


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sets of 12 and 4 pictures."""
    root = tmp_path_factory.mktemp("sets")
    return [str(write_shards(root / name, lengths)) for name, lengths in (("large", [7, 5]), ("small", [4]))]


def test_every_set_has_its_share_and_every_sample_is_used(sets):
    data = open_dataset(sets, weights=[1, 2])
    uses = [data.repeats[data.shard_of < 2], data.repeats[data.shard_of == 2]]
    assert set(uses[0]) == {1.0} and uses[1].sum() == pytest.approx(2 * uses[0].sum())
    assert "33.3%, 1 x" in data.remarks[0] and "66.7%, 6 x" in data.remarks[0] and "36 pictures" in data.remarks[0]
    scarce = open_dataset(sets, weights=[9, 1])  # the small one is used once, and the large one more often
    assert set(scarce.repeats[scarce.shard_of == 2]) == {1.0} and scarce.repeats.sum() == pytest.approx(40)
    assert (open_dataset(sets, weights=[3, 1]).repeats == 1).all()


def test_a_stream_has_the_shares_in_every_epoch(sets):
    data = DataModule(sets, image_size=8, weights=[2, 1.5]).open()  # 12 and 9 uses: two and a quarter of each
    data.configure(seed=0, batch_size=7)
    keys = [[], [], [], []]
    for step, batch in enumerate(islice(data.train_dataloader(), 12)):
        keys[step // 3] += batch.slots.tolist()
    order = data._run["order"]
    counts = np.array(
        [np.bincount(np.concatenate([order.ids(3 * e + s) for s in range(3)]), minlength=16) for e in range(4)]
    )
    assert (counts[:, :12] == 1).all() and (counts[:, 12:].sum(1) == 9).all()
    assert (counts[:, 12:].sum(0) == 9).all()  # after four epochs the quarters came round
    assert [len(k) for k in keys] == [21] * 4 and data.order_fingerprint["uses"]
    assert "uses" not in DataModule(sets, image_size=8).order_fingerprint


def test_half_a_set(sets):
    data = open_dataset(sets, repeats=[0.5, 1])
    assert data.repeats.sum() == 10


@pytest.mark.parametrize(
    "options, text",
    [
        ({"weights": [1]}, "one number above 0 for each item"),
        ({"weights": [1, 0]}, "above 0"),
        ({"weights": [1, "2"]}, "above 0"),
        ({"weights": 2}, "above 0"),
        ({"weights": [1, 2], "repeats": [1, 2]}, "say two things"),
        ({"weights": [1, 1e9]}, "above 0"),
        ({"weights": [1e-9, 1e5]}, "would use"),
        ({"repeats": [0, 1]}, "above 0"),
        ({"repeats": [True, 1]}, "above 0"),
        ({"repeats": [float("nan"), 1]}, "above 0"),
    ],
)
def test_wrong_shares(sets, options, text):
    with pytest.raises(LdmError, match=text):
        open_dataset(sets, **options)


def test_one_set_has_no_share(sets):
    with pytest.raises(LdmError, match="at least two"):
        open_dataset(sets[0], weights=[1])
    with pytest.raises(LdmError, match=r"twice|again|same"):
        open_dataset([sets[0], sets[0]], weights=[1, 2])
