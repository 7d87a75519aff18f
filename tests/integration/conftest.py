from pathlib import Path

import pytest

from data.toy_logos.make import write_set


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """61 training and 20 held-out logos of 16 pixels in 5 + 2 uneven shards."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_set(folder, num_samples=61, num_val=20, num_shards=5, size=16)
    return folder


@pytest.fixture(scope="session")
def finished(shards, tmp_path_factory) -> Path:
    """The folder of a finished tiny run, both stages. Read it, do not change it."""
    from ldm.training.fit import train
    from tests.integration.tiny import config

    runs = tmp_path_factory.mktemp("runs")
    train(config(shards, runs))
    return runs / "tiny"
