"""The towers of the contrastive stage: shapes, independence of the batch, what is refused."""

import math

import pytest
import torch
import yaml

from ldm.build import build
from ldm.models.conditioner.text_transformer import TextTransformer
from ldm.models.features import Contrastive, ImageTower
from ldm.random import uniform
from tests.conftest import CONFIGS

TEXT = {"width": 16, "depth": 1, "num_heads": 2, "embedding_size": 4}


def tiny(**text):
    return Contrastive(ImageTower([4, 8, 8], norm_groups=2), TextTransformer(**TEXT, **{"drop_prob": 0.0, **text}), 6)


def pictures(count=3, side=16):
    return uniform(torch.arange(count), (3, side, side)) * 2 - 1


def test_maps_halve_and_do_not_depend_on_the_rest_of_the_batch():
    tower, images = ImageTower([4, 8, 8], norm_groups=2), pictures(3, 18)
    maps = tower(images)
    assert [tuple(m.shape) for m in maps] == [(3, 4, 18, 18), (3, 8, 9, 9), (3, 8, 5, 5)]
    for whole, alone in zip(maps, tower(images[1:2]), strict=True):
        torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-5)  # convolutions of other batch sizes
    tower.train()
    assert torch.equal(tower(images)[-1], maps[-1])
    assert tower.min_size == 4 and tower(pictures(1, 4))[-1].shape[-1] == 1


def test_embeddings_are_unit_vectors_and_every_parameter_learns():
    model = tiny()
    images, texts = model(pictures(), ["a red star", "a blue ring", ""])
    for vectors in (images, texts):
        assert vectors.shape == (3, 6) and vectors.dtype == torch.float32
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    (model.scale() * images @ texts.T).logsumexp(1).mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_the_scale_begins_at_clips_and_stops_at_100():
    model = tiny()
    assert math.isclose(model.scale().item(), 1 / 0.07, rel_tol=1e-5)
    model.log_scale.data.fill_(5.0)  # exp(5) = 148
    model.limit_scale()
    assert math.isclose(model.scale().item(), 100, rel_tol=1e-5)
    model.scale().backward()
    assert float(model.log_scale.grad) > 0  # and it can come back


def test_text_towers_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match=r"drop_prob must be 0, not 0\.1"):
        tiny(drop_prob=0.1)
    from ldm.models.conditioner.class_label import ClassLabel

    with pytest.raises(ValueError, match="caption alone"):
        Contrastive(ImageTower([4], norm_groups=2), ClassLabel("shape", 3, 8, 0.0))


@pytest.mark.parametrize("name, image, text", [("toy", 0.36, 3.6), ("small", 12.0, 6.4)])
def test_presets_have_the_size_that_they_say(name, image, text):
    with torch.device("meta"):
        model = build(yaml.safe_load((CONFIGS / "model" / "features" / f"{name}.yaml").read_text()))
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.image, model.text)]
    assert counts == pytest.approx([image, text], rel=0.03)
