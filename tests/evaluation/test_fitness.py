"""Measures equal their formulas, harm is found where it was done, and what cannot be measured is refused by name."""

import numpy as np
import pytest
import torch

from ldm.errors import LdmError
from ldm.evaluation.fitness import Candidate, check_size, choose, encoded_and_decoded, finest, largest, measure, show
from ldm.evaluation.fitness_verdict import DRIFT, LIMITS, drifted, judge, silent
from ldm.evaluation.regions import regions
from ldm.models.autoencoder.kl import AutoencoderKL
from ldm.models.autoencoder.vq import AutoencoderVQ
from ldm.reconstruction.measures import ssim
from tests.evaluation.making import Breaks, Brightens, Fake, Shrinks, batches, images_of

IMAGES = images_of(12)


@pytest.fixture(autouse=True)
def quick_ssim(request, monkeypatch):
    """SSIM is tested where it is written, and takes nine tenths of the time here."""
    if "true_ssim" not in request.fixturenames:
        monkeypatch.setattr("ldm.evaluation.fitness.ssim", lambda a, b: torch.ones(len(a)))


@pytest.fixture
def true_ssim():
    return ssim


def candidate(autoencoder, name="fake"):
    return Candidate(name, autoencoder.eval(), f"init_from=runs/{name}")


def measured(autoencoder, images=IMAGES, **options):
    originals, [fitness] = measure([candidate(autoencoder)], batches(images, **options), len(images))
    return originals, fitness


def verdict_of(autoencoder):
    originals, fitness = measured(autoencoder)
    return judge(candidate(autoencoder), fitness, originals, "data=folder data.path=logos")


def test_figures_equal_their_formulas_over_all_pictures_at_once():
    originals, fitness = measured(Shrinks(3.0), at_once=5)
    output = Shrinks(3.0).harm(IMAGES)
    error = (127.5 * (output - IMAGES).double()).square().mean(1)
    assert fitness.psnr == pytest.approx((10 * (255**2 / error.mean((1, 2))).log10()).numpy(), abs=1e-4)
    kinds = regions(IMAGES)
    for k in range(3):
        assert fitness.error[k] == pytest.approx(float(error[kinds == k].mean()), rel=1e-6)
        assert originals.area[k] == pytest.approx(float((kinds == k).double().mean()))
    assert originals.shrunk_error[3.0] == pytest.approx(fitness.error, rel=1e-5)
    assert originals.shrunk_psnr[3.0] == pytest.approx(fitness.psnr, abs=1e-4)
    assert originals.slots.tolist() == list(range(12)) and originals.keys[3] == "p003"


def test_ssim_is_that_of_the_measures(true_ssim):
    _, fitness = measured(Shrinks(3.0), IMAGES[:2])
    assert fitness.ssim == pytest.approx(true_ssim(Shrinks(3.0).harm(IMAGES[:2]), IMAGES[:2]).numpy(), abs=1e-5)


def test_blur_harms_detail_most_and_plain_areas_least():
    _, fitness = measured(Shrinks(3.0))
    flat, edges, detail = fitness.error
    assert detail > edges > flat


@pytest.mark.parametrize("factor, low, high", [(1.5, 1.499, 1.501), (4.0, 3.999, 4.001), (2.5, 2.001, 2.999)])
def test_the_finest_structure_of_shrinking_is_its_factor(factor, low, high):
    originals, fitness = measured(Shrinks(factor))
    for kind in ("edges", "detail"):
        assert low < finest(fitness, originals, kind) < high


def test_nothing_lost_is_good_and_everything_lost_is_not():
    originals, fitness = measured(Fake())
    assert fitness.psnr.min() >= 100 and fitness.colour.max() == 0 and fitness.beyond == 0
    assert finest(fitness, originals, "detail") == 1
    assert verdict_of(Fake()).level == "good"
    originals, black = measured(Brightens(-400))
    assert finest(black, originals, "detail") == 8
    assert black.worst_beyond > 250 and black.beyond > 0.9
    assert {f.level for f in verdict_of(Brightens(-400)).findings} == {"unfit"}


def test_a_shift_of_brightness_fails_by_areas_and_colours_alone():
    levels = {f.key: f.level for f in verdict_of(Brightens(9)).findings}
    assert levels["flat"] == "unfit" and levels["colour"] == "usable"
    assert levels["psnr"] == levels["detail"] == levels["edges"] == "good"


def test_lost_text_fails_by_detail_and_asks_for_another_autoencoder():
    found = verdict_of(Shrinks(5.0))
    assert {f.key for f in found.findings if f.level == "unfit"} >= {"detail", "edges"}
    commands = [command for _, command in found.steps if command]
    assert all("init_from=runs/fake" in c and "data.path=logos" in c and "image_size=48" in c for c in commands)
    assert any("channels" in text and "image_size=96" in text for text, _ in found.steps)


def test_limits_separate_three_levels():
    for limit in LIMITS:
        between = (limit.good + limit.usable) / 2
        worse = limit.usable + (limit.usable - limit.good)
        assert [limit.level(v) for v in (limit.good, between, limit.usable, worse)] == [
            "good", "usable", "usable", "unfit"
        ]  # fmt: skip


def test_stored_statistics_that_do_not_fit_are_noticed():
    fits = Fake()
    pooled = fits.moments(IMAGES)
    fits.statistics.mean.copy_(pooled.mean((0, 2, 3)))
    fits.statistics.std.copy_(pooled.std((0, 2, 3)))
    fits.statistics.count.fill_(12)
    assert drifted(measured(fits)[1].latents) == []
    fits.statistics.std[1] *= 1 + 1.1 * DRIFT
    fits.statistics.std[2] /= 1 + 1.1 * DRIFT
    found = measured(fits)[1].latents
    assert drifted(found) == [1, 2]
    assert found.raw_std == pytest.approx(pooled.std((0, 2, 3), correction=0).numpy(), rel=1e-5)
    assert any("do not fit" in note.text and "channels 2 and 3" in note.text for note in verdict_of(fits).notes)
    fits.statistics.std.copy_(pooled.std((0, 2, 3)))
    fits.statistics.mean[0] -= 1.1 * DRIFT * fits.statistics.std[0]
    assert drifted(measured(fits)[1].latents) == [0]


def test_a_model_of_one_factor_is_judged_by_all_channels_together():
    """Stable Diffusion's factor fits no channel exactly, and its denoisers live with that."""
    known = Fake()
    pooled = known.moments(IMAGES)
    known.statistics.std.fill_(float(pooled.std()))
    known.statistics.mean.fill_(0.3)  # FLUX and SD3 have a shift, one too
    latents = measured(known)[1].latents
    assert latents.one_factor and latents.overall == pytest.approx(1, rel=1e-3) and drifted(latents) == []
    assert [note.level for note in verdict_of(known).notes] == ["good"]
    known.statistics.std.mul_(1 + 1.1 * DRIFT)
    found = verdict_of(known)
    assert "One factor" in found.notes[0].text and found.notes[0].level == "usable"
    assert not any("nothing need be changed" in text for text, _ in found.steps)
    known.statistics.count.fill_(12)  # measured statistics must fit each channel
    assert not measured(known)[1].latents.one_factor


def test_what_is_not_finished_is_finished_first_and_an_older_step_is_none_to_begin_from():
    originals, fitness = measured(Fake())
    unfinished = Candidate("fake", Fake(), "init_from=runs/fake", finished=False, has_statistics=False)
    found = judge(unfinished, fitness, originals, "data=folder data.path=logos")
    assert "no latent statistics" in found.notes[0].text
    assert [text[:16] for text, _ in found.steps] == ["Finish its stage"] and not found.steps[0][1]
    older = judge(Candidate("fake", Fake(), ""), fitness, originals, "data=folder data.path=logos")
    assert "newest" in older.steps[0][0] and not any(command for _, command in older.steps)


def test_the_decoder_alone_comes_first_even_if_the_scale_does_not_fit():
    harmed = Shrinks(5.0)
    harmed.statistics.std.fill_(9.0)
    steps = verdict_of(harmed).steps
    assert ["train=decoder" in command for _, command in steps if command] == [True, False]
    assert "measures the scale anew" in steps[1][0]


def test_a_channel_of_noise_alone_is_silent():
    torch.manual_seed(0)
    model = AutoencoderKL(3, 4, [8, 8], 1, 2, norm_groups=4).eval()
    with torch.no_grad():
        model.quant_conv.weight.zero_()[:4] += 0.3 * torch.randn(4, 8, 1, 1)
        model.quant_conv.bias[4:] = torch.tensor([-9.0, 9.0, -9.0, -9.0])  # log-variances
    _, fitness = measured(model)
    assert silent(fitness.latents) == [1]
    assert fitness.latents.signal[0] > 0.9


def test_a_codebook_has_no_posterior_and_its_use_is_counted():
    torch.manual_seed(0)
    model = AutoencoderVQ(3, 4, 16, [8, 8], 1, 2, norm_groups=4).eval()
    _, fitness = measured(model)
    with torch.no_grad():
        codes = model.quantize.nearest(model.moments(IMAGES))
    assert fitness.latents.signal is None
    assert fitness.codes["codes_used"] == len(codes.unique()) / 16


def test_what_cannot_be_read_is_counted_and_changes_nothing_else():
    originals, fitness = measured(Shrinks(2.0), bad=(3, 4, 5, 6, 7))
    kept = [0, 1, 2, 8, 9, 10, 11]
    assert originals.num_bad == 5 and originals.slots.tolist() == kept
    assert fitness.psnr == pytest.approx(measured(Shrinks(2.0))[1].psnr[kept], abs=1e-6)
    with pytest.raises(LdmError, match="none of 2 pictures"):
        measured(Fake(), IMAGES[:2], bad=(0, 1))
    with pytest.raises(LdmError, match="there are no pictures"):
        measured(Fake(), IMAGES[:0])


@pytest.mark.parametrize("where", ["latents", "pictures"])
def test_values_that_are_not_finite_are_refused_with_the_picture(where):
    with pytest.raises(LdmError, match=rf"LATENTS.*{where} that are not finite; fake; of the picture 'p002'"):
        measured(Breaks(2, where))


def test_pictures_must_fit_every_candidate():
    with pytest.raises(LdmError, match=r"SIZE.*48x48.*seven; multiples of 7.*image_size=49"):
        check_size(candidate(Fake(7), "seven"), (48, 48))
    check_size(candidate(Fake(8)), (48, 48))
    with pytest.raises(LdmError, match="image_size=16"):
        check_size(candidate(Fake(2)), (8, 8))


def test_constant_and_saturated_pictures_are_told():
    images = torch.cat([IMAGES[:2], torch.full((1, 3, 48, 48), 0.2), torch.ones(1, 3, 48, 48)])
    originals, _ = measured(Fake(), images)
    assert (originals.deviation < 1).tolist() == [False, False, True, True]
    assert (originals.saturated > 0.5).tolist() == [False, False, False, True]


def test_a_network_gives_perceptual_figures_under_its_own_name():
    class Network:
        label = "features-0123"

        def __call__(self, a, b):
            return (a - b).abs().flatten(1).mean(1)

        def embed(self, images):
            return images.mean((2, 3))

    options = {"features": Network()}
    _, [fitness] = measure([candidate(Brightens(0))], batches(IMAGES), 12, **options)
    assert fitness.perceptual["features-0123"].tolist() == [0] * 12
    assert fitness.frechet["features-0123"] == pytest.approx(0, abs=1e-9)
    _, [fitness] = measure([candidate(Brightens(-2.55))], batches(IMAGES.clamp(-0.9, 1)), 12, **options)
    assert fitness.perceptual["features-0123"] == pytest.approx(np.full(12, 0.02), rel=1e-4)
    assert fitness.frechet["features-0123"] == pytest.approx(3 * 0.02**2, rel=1e-3)  # means alone differ


def test_the_worst_are_those_of_lowest_psnr_and_the_typical_lie_in_the_middle():
    _, fitness = measure([candidate(Shrinks(3.0)), candidate(Shrinks(4.0))], batches(IMAGES), 12)
    mean = (fitness[0].psnr + fitness[1].psnr) / 2
    worst, typical = choose(fitness, 3)
    order = np.argsort(mean).tolist()
    assert worst == order[:3] and typical == order[5:8]
    assert choose(fitness, 12) == (order, []) and choose(fitness, 0) == ([], [])
    few = [type(f)(**{**vars(f), "psnr": f.psnr[:3]}) for f in fitness]
    worst, typical = choose(few, 2)
    assert sorted(worst + typical) == [0, 1, 2]


def test_shown_pictures_are_whole_or_the_part_with_the_largest_error(monkeypatch):
    found = show([candidate(Shrinks(3.0))], batches(IMAGES[:2]))
    assert [s.key for s in found] == ["p000", "p001"] and not found[0].part
    assert found[0].original.tolist() == ((IMAGES[0] + 1) * 127.5).round().byte().permute(1, 2, 0).tolist()
    assert found[0].psnr[0] == pytest.approx(measured(Shrinks(3.0))[1].psnr[0], abs=1e-3)
    monkeypatch.setattr("ldm.evaluation.fitness.WINDOW", 20)
    part = show([candidate(Shrinks(3.0))], batches(IMAGES[:2]))[0]
    assert part.part and part.original.shape == part.made[0].shape == (20, 20, 3) and part.kinds.shape == (20, 20)


def test_the_largest_part_equals_a_search():
    torch.manual_seed(1)
    error = torch.rand(9, 13)
    (rows, columns), part = largest(error, 4)
    sums = {(i, j): float(error[i : i + 4, j : j + 4].sum()) for i in range(6) for j in range(10)}
    assert part and (rows.start, columns.start) == max(sums, key=sums.get)
    assert largest(error[:4, :4], 4) == ((slice(0, 4), slice(0, 4)), False)


def test_reconstructions_are_those_of_the_mean_of_the_posterior():
    torch.manual_seed(0)
    model = AutoencoderKL(3, 4, [8, 8], 1, 2, norm_groups=4).eval()
    model.statistics.std.copy_(torch.tensor([0.5, 1.0, 2.0, 3.0]))
    with torch.no_grad():
        latents, noise, output = encoded_and_decoded(candidate(model), IMAGES[:2], ["a", "b"])
        assert torch.equal(latents, model.encode(IMAGES[:2]))
        assert torch.allclose(output, model(IMAGES[:2])[0], atol=1e-5)
        logvar = model.moments(IMAGES[:2]).chunk(2, 1)[1]
    assert torch.allclose(noise[:, 2], logvar[:, 2].exp() / 4)
