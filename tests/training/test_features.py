"""The contrast of pictures and captions: CLIP's loss, who counts as a wrong answer, what is reported."""

import pytest
import torch
import torch.nn.functional as F

from ldm.cli import compose
from ldm.errors import LdmError
from ldm.random import normal
from ldm.training.contrastive import Pairs, caption_ids, contrastive_terms
from ldm.training.features_module import FeaturesModule
from ldm.training.fingerprint import settings_of
from ldm.training.stage_module import StageSettings
from ldm.types import Batch
from ldm.validate import validate
from tests.models.test_features import pictures, tiny

CAPTIONS = ["a red star", "a blue ring", "a green heart", "a pink disc", "a black cross"]


def pairs(captions=CAPTIONS):
    images, texts = (F.normalize(normal(torch.arange(len(captions)) + start, (4,)), dim=1) for start in (0, 99))
    return Pairs(images, texts, caption_ids(captions))


def test_the_loss_is_clips():
    from open_clip.loss import ClipLoss

    scale = torch.tensor(7.0)
    own = pairs()
    expected = ClipLoss()(own.images, own.texts, scale)
    terms = contrastive_terms(own, own, scale)
    torch.testing.assert_close(terms["loss"].mean(), expected, rtol=1e-6, atol=0)
    logits = own.images @ own.texts.T
    assert terms["caption_found"].tolist() == (logits.argmax(1) == torch.arange(5)).float().tolist()
    assert terms["picture_found"].tolist() == (logits.argmax(0) == torch.arange(5)).float().tolist()
    assert 0 < terms["caption_found"].sum() + terms["picture_found"].sum() < 10  # or the lines above say little


def test_a_part_that_chooses_from_the_whole_gives_its_rows():
    """What a rank computes: its own rows, the pool of all."""
    whole, scale = pairs(), torch.tensor(7.0)
    expected = contrastive_terms(whole, whole, scale)
    own = Pairs(*(x[2:4] for x in whole))
    for name, values in contrastive_terms(own, whole, scale, first=2).items():
        torch.testing.assert_close(values, expected[name][2:4], msg=name)
    alone = contrastive_terms(own, own, scale)
    assert not torch.allclose(alone["loss"], expected["loss"][2:4], rtol=0.01)  # negative control


def test_equal_captions_are_no_wrong_answers():
    """Of two pictures with one caption each may be taken for the other's; without the twin nothing changes."""
    twice = [*CAPTIONS[:4], CAPTIONS[0]]
    own, scale = pairs(twice), torch.tensor(7.0)
    terms = contrastive_terms(own, own, scale)
    without = contrastive_terms(*[Pairs(*(x[:4] for x in own))] * 2, scale)
    torch.testing.assert_close(terms["loss"][0], without["loss"][0])
    counted = contrastive_terms(*[own._replace(ids=torch.arange(5))] * 2, scale)
    assert counted["loss"][0] > terms["loss"][0] * 1.01  # negative control
    torch.testing.assert_close(counted["loss"][1], terms["loss"][1])  # a third caption still has both against it
    assert contrastive_terms(*[pairs(["same"] * 5)] * 2, scale)["loss"].tolist() == [0.0] * 5


def test_ids_of_captions_are_equal_where_captions_are():
    ids = caption_ids(["a", "b", "a", "", "ä"])
    assert ids.dtype == torch.int64 and ids[0] == ids[2] and len(set(ids.tolist())) == 4
    assert ids.tolist() == caption_ids(["a", "b", "a", "", "ä"]).tolist()


def module():
    torch.manual_seed(0)
    settings = StageSettings(1, 3, torch.optim.SGD, lambda step: 1.0, None)
    return FeaturesModule(settings, tiny(), {})


def batch(count, valid):
    images = pictures(count)
    return Batch(torch.arange(count), ["k"] * count, images, None, CAPTIONS[:count], {}, torch.tensor(valid))


def test_padding_is_nobodys_wrong_answer():
    trained = module()
    padded = trained.validation_terms(batch(4, [True, True, True, False]))
    plain = trained.validation_terms(batch(3, [True] * 3))
    for name, values in plain.items():
        torch.testing.assert_close(padded[name][:3], values, rtol=1e-4, atol=1e-5, msg=name)
    counted = trained.validation_terms(batch(4, [True] * 4))
    assert (counted["loss"][:3] > padded["loss"][:3] + 1e-3).all()  # negative control


def test_training_reports_loss_hits_and_scale():
    terms = module().loss(batch(3, [True] * 3), None)
    assert set(terms) == {"loss", "caption_found", "picture_found", "scale"}
    assert all(values.shape == (3,) for values in terms.values())


def test_what_the_stage_depends_on_and_what_it_refuses():
    cfg = compose("train", ["experiment=features_toy"])
    validate(cfg)
    for key, value, text in (("accumulate", 2, "fewer wrong answers"), ("batch_size", 1, "at least 2")):
        stage = {**cfg["stage"], "features": {**cfg["stage"]["features"], key: value}}
        with pytest.raises(LdmError, match=text) as refused:
            validate({**cfg, "stage": stage})
        assert refused.value.exit_code == 2 and f"stage.features.{key}={value}" in refused.value.line()
    settings = settings_of(cfg, "features")
    assert settings["model.features.image.channels"] == [16, 32, 64, 128] and "data.caption_prefix" in settings
    assert not any(key.startswith(("model.network", "model.autoencoder", "scheduler")) for key in settings)
