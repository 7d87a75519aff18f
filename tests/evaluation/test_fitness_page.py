"""The page stands alone, is well-formed, shows names without obeying them, and is the same for the same report."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from ldm.evaluation import fitness_plots
from ldm.evaluation.fitness import Candidate, choose, measure, show
from ldm.evaluation.fitness_page import MARK, Report, comparison, page
from ldm.evaluation.fitness_verdict import LIMITS, judge
from ldm.evaluation.html import Html, el, join
from tests.evaluation.making import Fake, Shrinks, batches, images_of

NASTY = "\"><script>alert(1)</script>&amp;\u202e'\x1b[31m"
VOID = {"meta", "img"}


def report_of(*autoencoders, pictures=2, key=NASTY):
    images = images_of(6, 32)
    candidates = [
        Candidate(f"{type(a).__name__}-{i}", a.eval(), f"init_from=runs/{i}", {"checkpoint": "step 7"})
        for i, a in enumerate(autoencoders)
    ]
    stream = [replace(b, keys=[key + k for k in b.keys]) for b in batches(images)]
    originals, fitness = measure(candidates, stream, len(images))
    verdicts = [judge(c, f, originals, f"data=folder data.path='{key}'") for c, f in zip(candidates, fitness)]
    rows = [row for part in choose(fitness, pictures) for row in part]
    shown = [s for i in rows for s in show(candidates, [replace(b, keys=[key]) for b in batches(images[[i]])])]
    return Report(candidates, fitness, verdicts, originals, shown[:pictures], shown[pictures:], [("data", key)], "none")


@pytest.fixture(scope="module", autouse=True)
def quick_ssim():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.evaluation.fitness.ssim", lambda a, b: torch.ones(len(a)))
        yield


@pytest.fixture(scope="module")
def one():
    return page(report_of(Shrinks(4.0)))


@pytest.fixture(scope="module")
def three():
    return page(report_of(Shrinks(4.0), Fake(), Shrinks(2.0)))


class Balance(HTMLParser):
    """Every element is closed, in order; what was met is kept."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        assert tag not in VOID
        self.open.append(tag)
        self.elements.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def tags(self):
        return [tag for tag, _ in self.elements]


def parsed(text):
    reader = Balance()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.mark.parametrize("name", ["one", "three"])
def test_the_page_is_well_formed_and_needs_nothing_else(name, request):
    text = request.getfixturevalue(name)
    found = parsed(text)
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(found.tags)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|@font-face", re.sub(r"base64,[\w+/=]*", "", text), re.I)
    attributes = [pair for _, found in found.elements for pair in found.items()]
    assert not [key for key, _ in attributes if key.startswith("on")]
    sources = [value for key, value in attributes if key in ("src", "href", "srcset", "xlink:href")]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert MARK in text[:1024]


def test_names_are_shown_and_not_obeyed(one):
    found = parsed(one)
    assert "<script" not in one and "\u202e" not in one and "\x1b" not in one
    assert any("\"><script>alert(1)</script>&amp;\ufffd'\ufffd[31m" in text for text in found.text)


def test_the_same_report_gives_the_same_page(one):
    assert page(report_of(Shrinks(4.0))) == one


def test_the_verdict_comes_first_and_every_limit_has_its_reason(one):
    found = parsed(one)
    words = " ".join(found.text)
    assert found.tags.index("h1") < found.tags.index("h2")
    assert words.index("Not for these pictures") < words.index("Why") < words.index("What to do next")
    for limit in LIMITS:
        assert limit.why in words
    for published in ("27.5", "24.2", "KL-f4", "OpenImages"):
        assert published in words
    assert "stage.autoencoder.train=all" in words and "one factor for all" in words


def test_several_stand_side_by_side_and_the_best_is_named(three):
    report = report_of(Shrinks(4.0), Fake(), Shrinks(2.0))
    assert report.best == 1
    assert "The best of 3 autoencoders, Fake-1" in " ".join(parsed(three).text)
    rows = {name: (values, top) for name, values, top in comparison(report)}
    assert rows["Fine detail and small text"] == (["4.0 px", "under 1.25 px", "2.0 px"], 1)
    assert rows["SSIM, typical"] == (["1.000"] * 3, None)  # tied
    assert three.count("<img") == 2 * (2 + 3 * 3) + 2 * 4  # original and kinds, three of each; then pairs


def test_every_measure_is_told_with_its_spread_and_its_name():
    report = report_of(Shrinks(2.0), pictures=0)
    fitness = replace(report.fitness[0], perceptual={"net-1": np.arange(6.0)}, frechet={"net-1": 12.5})
    words = " ".join(parsed(page(replace(report, fitness=[fitness]))).text)
    psnr = [np.median(fitness.psnr), np.percentile(fitness.psnr, 5), fitness.psnr.mean()]
    assert "PSNR, dB " + " ".join(f"{v:.2f}" for v in psnr) in words
    assert "SSIM 1.000 1.000 1.000" in words
    assert "perceptual_net-1 2.5000 4.7500 2.5000" in words and "fd_net-1 12.5" in words
    assert "LPIPS" not in words and "FID" not in words


def test_pictures_are_bounded_in_size():
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    assert len(fitness_plots.picture(noise, "noise")) < 2**18 + 2**10  # the worst there is: 192 kB and base64


def test_difference_and_error_map_say_what_they_say():
    original = np.full((2, 3, 3), 100, dtype=np.uint8)
    made = original.copy()
    made[0, 0] = 110
    made[0, 1] = [90, 100, 100]
    made[1] = 255
    assert fitness_plots.difference(original, original).tolist() == [[[128] * 3] * 3] * 2
    assert fitness_plots.difference(made, original)[0, 0].tolist() == [168] * 3
    assert fitness_plots.difference(made, original)[0, 1].tolist() == [88, 128, 128]
    kinds = np.array([[0, 1, 2], [0, 1, 2]], dtype=np.uint8)
    errors = fitness_plots.error_map(made, original, kinds)
    assert errors[0, 2].tolist() == [0, 0, 0]
    assert [tuple(e) for e in errors[1]] == list(fitness_plots.COLOURS)


def test_gauges_place_the_limits_at_thirds():
    for limit in LIMITS:
        places = [fitness_plots.place_of(limit, v) for v in (limit.usable, limit.good)]
        assert places == pytest.approx([1 / 3, 2 / 3])
        assert 0.02 <= fitness_plots.place_of(limit, -1e9) < 1 and 0 < fitness_plots.place_of(limit, 1e9) <= 0.98


def test_elements_escape_text_and_attributes_and_nothing_twice():
    assert el("p", "a<b", el("b", "&"), None, [1, 2]) == "<p>a&lt;b<b>&amp;</b>12</p>"
    assert el("img", cls="x", alt='"<') == '<img class="x" alt="&quot;&lt;"/>'
    assert join("<", Html("<i>")) == "&lt;<i>"
    assert el("p", "a\nb\x07\ud800") == "<p>a\nb\ufffd\ufffd</p>"
