"""Training with a masked loss, from masks beside the pictures to the weights."""

import numpy as np
import pytest
from PIL import Image

from ldm.training.fit import train
from tests.data.making import encoded, picture
from tests.integration.test_pixels import config
from tests.integration.tiny import metrics

MASKED = ["data=folder", "data.columns.mask=.mask.png", "scheduler.masked=true", "stage.diffusion.validate_every=null"]


def pictures(folder, value):
    """Sixteen of them, each with a mask of one value."""
    folder.mkdir()
    for n in range(16):
        (folder / f"{n}.png").write_bytes(picture(n, (16, 16)))
        (folder / f"{n}.txt").write_text("x")
        (folder / f"{n}.mask.png").write_bytes(encoded(Image.fromarray(np.full((16, 16), value, dtype=np.uint8))))
    return folder


def losses(data, runs, *words):
    path = f"data.path={data}"
    train(config("ddpm_pixels", data, runs, *MASKED, path, "stage.diffusion.max_steps=2", *words))
    return [row["train/loss"] for row in metrics(runs / "tiny", "diffusion") if "train/loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["stage.diffusion.cache_latents_mb=0", "stage.diffusion.cache_latents_mb=512"])
def test_masks_weight_the_loss(tmp_path, way):
    """Full masks change nothing, empty ones leave nothing; with pictures read on the way or encoded before."""
    full, empty = pictures(tmp_path / "full", 255), pictures(tmp_path / "empty", 0)
    plain = losses(full, tmp_path / "a", way, "scheduler.masked=false")
    assert losses(full, tmp_path / "b", way) == plain and min(plain) > 0
    assert losses(empty, tmp_path / "c", way) == [0, 0]
    assert losses(empty, tmp_path / "d", way, "scheduler.unmasked_weight=1") == plain
