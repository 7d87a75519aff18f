"""The distances and penalties of the autoencoder's objective against their formulas."""

import math

import pytest
import torch

from ldm.reconstruction.objective import ReconstructionObjective

MOMENTS = {"moments": torch.tensor([1.0, -1.0, math.log(4.0), 0.0]).view(1, 4, 1, 1)}


def terms(step=None, **options):
    images, reconstruction = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5)
    return ReconstructionObjective(**options).terms(reconstruction, images, MOMENTS, step)


@pytest.mark.parametrize("pixel,expected", [("l1", 0.5), ("l2", 0.25), ("charbonnier", math.sqrt(0.25 + 1e-6))])
def test_pixel_distances(pixel, expected):
    assert terms(pixel=pixel)["pixel"].item() == pytest.approx(expected)


def test_kl_of_a_normal_and_its_warmup():
    kl = (0.5 * (1 + 4 - 1 - math.log(4)) + 0.5 * (1 + 1 - 1 - 0)) / 2
    assert terms()["kl"].item() == pytest.approx(kl)
    for step, share in ((0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0), (None, 1.0)):
        loss = terms(step, kl_weight=0.1, kl_warmup_steps=4)["loss"].item()
        assert loss == pytest.approx(0.5 + share * 0.1 * kl)


def test_a_quantised_code_has_two_penalties_and_no_kl():
    code = {"codebook": torch.tensor([2.0]), "commitment": torch.tensor([4.0])}
    found = ReconstructionObjective(codebook_weight=0.5).terms(torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), code)
    assert found["loss"].item() == pytest.approx(1.0 + 0.5 * 2 + 0.25 * 4) and "kl" not in found


def test_learnt_log_variance_is_least_at_the_distance():
    """d + logvar is least where exp(logvar) is the distance: the learnt number weighs itself."""
    objective = ReconstructionObjective(kl_weight=0.0, learn_logvar=True)
    images, reconstruction = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.2)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        objective.terms(reconstruction, images, MOMENTS)["loss"].mean().backward()
        optimizer.step()
    assert objective.logvar.exp().item() == pytest.approx(0.2, rel=1e-2)


def test_what_a_checkpoint_keeps():
    perceptual = torch.nn.Linear(2, 2)
    assert ReconstructionObjective(perceptual=perceptual).trained_state() == {}
    assert list(ReconstructionObjective(perceptual=perceptual, learn_logvar=True).trained_state()) == ["logvar"]


@pytest.mark.parametrize("options", [{"pixel": "l3"}, {"kl_weight": -1.0}, {"perceptual_weight": float("nan")}])
def test_wrong_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ReconstructionObjective(**options)
