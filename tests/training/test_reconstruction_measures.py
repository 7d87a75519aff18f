"""What a validation says of the held-out set as a whole: its formulas, and two ranks against one."""

import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from ldm.reconstruction.measures import FeatureMoments, codebook_use, frechet_distance
from ldm.training.reconstruction_measures import SetMeasures, picture_measures
from tests.integration.tiny import ROOT


class Means(nn.Module):
    """Stands for a perceptual network: features are channel means."""

    label = "means"

    def embed(self, images):
        return images.mean((2, 3))


def batches(count=24):
    draw = torch.manual_seed(0)
    images = torch.rand(count, 3, 12, 12, generator=draw) * 2 - 1
    reconstruction = images + 0.1 * torch.randn(images.shape, generator=draw)
    code = {
        "latents": torch.randn(count, 2, 3, 3, generator=draw) * torch.tensor([1.0, 4.0]).view(2, 1, 1),
        "codes": torch.randint(0, 16, (count, 3, 3), generator=draw),
    }
    return reconstruction, images, code


def measured(reconstruction, images, code, *, share=slice(None), stored=None, measures=None):
    measures = measures or SetMeasures(2, 20, Means())
    images, reconstruction = images[share], reconstruction[share]
    for i in range(0, len(images), 5):
        rows = slice(i, i + 5)
        part = {name: value[share][rows] for name, value in code.items()}
        valid = torch.ones(len(images[rows]), dtype=torch.bool)
        measures.add(reconstruction[rows], images[rows], part, valid)
    return measures.results(stored)


def test_measures_of_a_set_are_their_formulas():
    reconstruction, images, code = batches()
    found = measured(reconstruction, images, code)
    std = code["latents"].double().std((0, 2, 3), correction=0)
    assert found["latent_std"] == pytest.approx(float(std.square().mean().sqrt()), rel=1e-12)
    use = codebook_use(torch.bincount(code["codes"].flatten(), minlength=20))
    assert use["codes_used"] == 0.8 and {k: found[k] for k in use} == use
    a, b = FeatureMoments(), FeatureMoments()
    a.add(images.mean((2, 3)))
    b.add(reconstruction.clamp(-1, 1).mean((2, 3)))
    assert found["fd_means"] == pytest.approx(frechet_distance(a, b), rel=1e-6)
    assert "latent_drift" not in found  # there is nothing to compare with yet


def test_moments_of_a_kl_code_are_the_posteriors_means():
    measures = SetMeasures(2)
    moments = torch.cat([torch.randn(4, 2, 3, 3), torch.full((4, 2, 3, 3), 100.0)], dim=1)
    measures.add(torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 8), {"moments": moments}, torch.ones(4).bool())
    found = measures.results()
    expected = moments[:, :2].double().var((0, 2, 3), correction=0).mean().sqrt()
    assert found == {"latent_std": pytest.approx(float(expected), rel=1e-12)}


def test_what_is_not_valid_does_not_count():
    reconstruction, images, code = batches(6)
    measures = SetMeasures(2, 20, Means())
    spoilt = reconstruction.clone(), images.clone(), {k: v.clone() for k, v in code.items()}
    for tensor in (spoilt[0], spoilt[1], spoilt[2]["latents"]):
        tensor[4:] = torch.nan
    spoilt[2]["codes"][4:] = 19
    measures.add(*spoilt, torch.tensor([True] * 4 + [False] * 2))
    assert measures.results() == measured(reconstruction, images, code, share=slice(4))


def test_drift_is_against_the_validation_before_or_what_is_stored():
    reconstruction, images, code = batches()
    measures = SetMeasures(2, 20, Means())
    first = measured(reconstruction, images, code, measures=measures)
    wider = {**code, "latents": code["latents"] * torch.tensor([1.0, 0.5]).view(2, 1, 1)}
    second = measured(reconstruction, images, wider, measures=measures)
    assert "latent_drift" not in first and second["latent_drift"] == pytest.approx(math.log(2), rel=1e-6)
    again = measured(reconstruction, images, wider, measures=measures)
    assert again["latent_drift"] < 1e-12 and again["fd_means"] == first["fd_means"]  # pictures are embedded once
    stored = torch.tensor([1.0, 4.0])
    expected = (wider["latents"].double().std((0, 2, 3), correction=0) / stored).log().abs().max()
    found = measured(reconstruction, images, wider, measures=measures, stored=stored)
    assert found["latent_drift"] == pytest.approx(float(expected), rel=1e-6)


def test_what_is_no_number_is_no_reference():
    """The reference is a part of checkpoints, which hold plain JSON."""
    reconstruction, images, code = batches()
    measures = SetMeasures(2, 20)
    measured(reconstruction, images, code, measures=measures)
    before = measures.last_std
    found = measured(reconstruction, images, code | {"latents": code["latents"] * torch.nan}, measures=measures)
    assert math.isnan(found["latent_std"]) and measures.last_std == before


def test_small_pictures_have_no_ssim():
    pair = torch.zeros(2, 3, 16, 10), torch.zeros(2, 3, 16, 10)
    assert picture_measures(*pair).keys() == {"psnr"}
    pair = torch.zeros(2, 3, 16, 11), torch.zeros(2, 3, 16, 11)
    assert picture_measures(*pair).keys() == {"psnr", "ssim"}


def test_no_picture_no_measures():
    assert SetMeasures(2, 20, Means()).results() == {}


_RANK = """
import json, sys
import torch.distributed as dist
from tests.training.test_reconstruction_measures import batches, measured
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
found = measured(*batches(), share=slice(rank, None, 2))
if rank == 0:
    print(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_measure_what_one_measures(tmp_path):
    """Halves of the set; only the order of the float64 sums differs."""
    words = [sys.executable, "-c", _RANK]
    place = f"file://{tmp_path}/meeting"
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*words, str(rank), place], **options) for rank in range(2)]
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert not any(rank.returncode for rank in ranks), said
    two, one = json.loads(said[0][0].splitlines()[-1]), measured(*batches())
    assert two.keys() == one.keys() and len(one) == 4
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-12, abs=1e-12), name
    assert measured(*batches(), share=slice(0, None, 2))["latent_std"] != one["latent_std"]  # a half is not enough
