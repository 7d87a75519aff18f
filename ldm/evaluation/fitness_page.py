"""The fitness report as one page: pictures inside, no script, nothing from elsewhere; light and dark, any width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ldm import __version__
from ldm.evaluation.fitness import CONSTANT, SATURATED, SHRINKS, WINDOW, Candidate, Fitness, Originals, Shown, finest
from ldm.evaluation.fitness_plots import FULL, GAIN, difference, error_map, gauge, histogram, kind_map, matrix, picture
from ldm.evaluation.fitness_style import STYLE
from ldm.evaluation.fitness_verdict import (
    LIMITS,
    PUBLISHED,
    Limit,
    Verdict,
    best,
    figures_of,
    off_mean,
    off_std,
    silent,
)
from ldm.evaluation.html import Html, el, join
from ldm.evaluation.latents import EDGES, LatentReport
from ldm.evaluation.regions import DETAIL, FLAT, KINDS

GENERATOR = "python -m ldm inspect-autoencoder"
MARK = f'<meta name="generator" content="{GENERATOR}"/>'
"""In every page, near its beginning: such a file may be replaced by another."""
NAMES = {"flat": "Plain areas", "edges": "Edges, soft texture", "detail": "Fine detail, small text"}


@dataclass(frozen=True)
class Report:
    """All that the page shows; candidates, fitness and verdicts in the same order.

    data: what the pictures are, (name, words).   features: the network of the perceptual figures, or why there is none.
    left_out: how many samples of the whole data set the index could not use, by kind.
    """

    candidates: Sequence[Candidate]
    fitness: Sequence[Fitness]
    verdicts: Sequence[Verdict]
    originals: Originals
    worst: Sequence[Shown] = ()
    typical: Sequence[Shown] = ()
    data: Sequence[tuple[str, str]] = ()
    features: str = ""
    cautions: Sequence[str] = field(default_factory=tuple)
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def best(self) -> int:
        return best(list(self.verdicts), list(self.fitness))


def page(report: Report) -> str:
    """The HTML document. The same report gives the same text."""
    chosen, several = report.best, len(report.candidates) > 1
    body = [
        _head(report),
        _comparison(report) if several else None,
        _reasons(report, chosen),
        _steps(report, chosen),
        _ladder(report),
        _measures(report),
        _kinds(report),
        _pictures(report),
        _latents(report),
        _originals(report),
        _method(report),
        el("footer", f"{GENERATOR}, ldm {__version__}"),
    ]
    title = f"{report.verdicts[chosen].headline}: {report.candidates[chosen].name}"
    head = join(
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Html(MARK),
        el("title", title),
        el("style", Html(STYLE)),
    )
    return f"<!DOCTYPE html>\n{el('html', el('head', head), el('body', el('main', body)), lang='en')}\n"


# ---- the verdict


def _head(report: Report) -> Html:
    chosen = report.best
    verdict, candidate = report.verdicts[chosen], report.candidates[chosen]
    several = len(report.candidates) > 1
    above = f"The best of {len(report.candidates)} autoencoders, {candidate.name}" if several else candidate.name
    facts = [
        ("latents", f"f{candidate.downsampling}, {candidate.latent_channels} channels"),
        ("compression", f"{candidate.compression:.0f} : 1"),
        *candidate.about.items(),
        *report.data,
    ]
    return el(
        "header",
        el("div",
           el("p", above, cls="eyebrow"),
           el("h1", verdict.headline),
           el("p", verdict.summary, cls="say"),
           cls=f"verdict {verdict.level}"),
        el("ul", [el("li", name, " ", el("b", words)) for name, words in facts], cls="facts"),
        [el("p", caution, cls="soft") for caution in report.cautions],
    )  # fmt: skip


def _reasons(report: Report, index: int) -> Html:
    verdict, name = report.verdicts[index], report.candidates[index].name
    by_key = {limit.key: limit for limit in LIMITS}
    rows = []
    for finding in verdict.findings:
        limit = by_key[finding.key]
        assert finding.value is not None
        small = f"good {_bound(limit, limit.good)}, usable {_bound(limit, limit.usable)}"
        rows.append(
            el("div",
               el("span", finding.level, cls=f"pill {finding.level}"),
               el("div", el("b", _capital(limit.name)), el("span", finding.text, cls="soft why"), cls="sentence"),
               el("span", figure(limit, finding.value), cls="figure num"),
               el("span", small, cls="limits soft"),
               gauge(limit, finding.value))
        )  # fmt: skip
    several = len(report.candidates) > 1
    return join(el("h2", f"Why: {name}" if several else "Why"), el("div", rows, cls="reasons"))


def _steps(report: Report, index: int) -> Html:
    items = [el("li", text, el("pre", command) if command else None) for text, command in report.verdicts[index].steps]
    return join(el("h2", "What to do next"), el("ol", items, cls="steps"))


def figure(limit: Limit, value: float) -> str:
    """A judged figure with its unit."""
    if not math.isfinite(value):
        return "none"
    if limit.unit == "px" and (value <= 1 or value >= SHRINKS[-1]):
        return f"under {SHRINKS[0]:g} px" if value <= 1 else f"{SHRINKS[-1]:g} px or more"
    return f"{value:.{limit.digits}f} {limit.unit}"


def _bound(limit: Limit, value: float) -> str:
    return f"{'from' if limit.rising else 'to'} {value:.3g}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---- side by side


def comparison(report: Report) -> list[tuple[str, list[str], int | None]]:
    """(measure, its figure for every candidate, which of them is best or None), for the page and the terminal."""
    rows: list[tuple[str, list[str], int | None]] = []
    figures = [figures_of(f, report.originals) for f in report.fitness]

    def add(name: str, values: list[float], form: Any, *, rising: bool = False) -> None:
        known = [v for v in values if math.isfinite(v)]
        top = (max if rising else min)(known) if known and len(values) > 1 else None
        tied = sum(v == top for v in values) > 1
        rows.append((name, [form(v) for v in values], None if top is None or tied else values.index(top)))

    for limit in LIMITS:
        values = [found[limit.key] for found in figures]
        add(_capital(limit.name), values, lambda v, limit=limit: figure(limit, v), rising=limit.rising)
    add("SSIM, typical", [float(np.median(f.ssim)) for f in report.fitness], "{:.3f}".format, rising=True)
    for label in report.fitness[0].perceptual:
        values = [float(np.median(f.perceptual[label])) for f in report.fitness]
        add(f"perceptual_{label}, typical", values, "{:.4f}".format)
    for label in report.fitness[0].frechet:
        add(f"fd_{label}", [f.frechet[label] for f in report.fitness], "{:.4g}".format)
    if any(f.codes for f in report.fitness):
        used = [f"{100 * f.codes['codes_used']:.0f} %" if f.codes else "none" for f in report.fitness]
        rows.append(("Codes used", used, None))
    shape = [f"f{c.downsampling}, {c.latent_channels}" for c in report.candidates]
    rows.append(("Downsampling, channels", shape, None))
    rows.append(("Values, picture to latents", [f"{c.compression:.0f} : 1" for c in report.candidates], None))
    return rows


def _comparison(report: Report) -> Html:
    names = [el("th", c.name, cls="name") for c in report.candidates]
    pills = [el("td", el("span", v.level, cls=f"pill {v.level}")) for v in report.verdicts]
    rows = [el("tr", el("td", "Verdict"), pills)]
    for name, values, top in comparison(report):
        cells = [el("td", value, cls="best" if i == top else None) for i, value in enumerate(values)]
        rows.append(el("tr", el("td", name), cells))
    table = el("table", el("thead", el("tr", el("th", ""), names)), el("tbody", rows))
    return join(el("h2", "Side by side"), el("div", table, cls="scroll"))


def _ladder(report: Report) -> Html:
    """Every candidate's PSNR beside published ones and beside shrinking, on one scale."""
    originals = report.originals
    shrinks = [(s, float(np.median(originals.shrunk_psnr[s]))) for s in SHRINKS if s >= 1.5]
    spans = [np.percentile(f.psnr, (5, 25, 50, 75, 95)).tolist() for f in report.fitness]
    shown = [v for span in spans for v in span] + [p.psnr for p in PUBLISHED] + [min(v, 60.0) for _, v in shrinks]
    low, high = math.floor(min(shown) - 1), math.ceil(min(max(shown), 60) + 1)

    def at(value: float) -> float:
        return 100 * (min(max(value, low), high) - low) / (high - low)

    def row(label: Any, value: float, *marks: Html, cls: str | None = None) -> Html:
        dot = el("i", cls="dot", style=f"left:{at(value):.1f}%")
        track = el("div", *marks, dot, cls="track")
        return el("div", el("div", label, cls="label"), track, el("div", f"{value:.1f} dB", cls="value num"), cls=cls)

    rows = []
    for candidate, (p5, p25, median, p75, p95) in zip(report.candidates, spans, strict=True):
        marks = [
            el("i", cls=name, style=f"left:{at(a):.1f}%;width:{at(b) - at(a):.1f}%")
            for name, a, b in (("range", p5, p95), ("half", p25, p75))
        ]
        rows.append(row(candidate.name, median, *marks, cls="ours"))
    rows.append(el("div", "Published, on photographs of 256 pixels", cls="group"))
    for known in sorted(PUBLISHED, key=lambda p: p.psnr):
        rows.append(row([known.name, el("small", known.data)], known.psnr))
    rows.append(el("div", "Your pictures, shrunk and enlarged again", cls="group"))
    for s, value in sorted(shrinks, key=lambda pair: pair[1]):
        rows.append(row(f"to 1/{s:g} of their side", value))
    lead = (
        "PSNR in dB: the dot is the median, the bar reaches from the 5th to the 95th percentile with its middle half "
        "darker. Published figures are of other pictures; plain ones come out higher, so compare with shrinking too."
    )
    return join(el("h2", "Beside known autoencoders, and beside shrinking"), el("p", lead, cls="lead"),
                el("div", rows, cls="ladder"))  # fmt: skip


def measures(fitness: Fitness) -> list[tuple[str, list[str]]]:
    """(measure, [median, worst twentieth, mean]) over the pictures; of a set's distance the one figure."""
    rows = []
    perceptual = [(f"perceptual_{label}", values, 95, "{:.4f}") for label, values in fitness.perceptual.items()]
    for name, values, worst, form in [
        ("PSNR, dB", fitness.psnr, 5, "{:.2f}"),
        ("SSIM", fitness.ssim, 5, "{:.3f}"),
        ("colour shift, dE", fitness.colour, 95, "{:.2f}"),
        *perceptual,
    ]:
        figures = [np.median(values), np.percentile(values, worst), np.mean(values)]
        rows.append((name, [form.format(float(v)) for v in figures]))
    return rows + [(f"fd_{label}", [f"{value:.4g}", "", ""]) for label, value in fitness.frechet.items()]


def _measures(report: Report) -> Html:
    several, rows = len(report.candidates) > 1, []
    per_candidate = [measures(fitness) for fitness in report.fitness]
    for same in zip(*per_candidate, strict=True):
        for candidate, (name, values) in zip(report.candidates, same, strict=True):
            owner = el("td", candidate.name, cls="wraps") if several else None
            rows.append(el("tr", el("td", name), owner, [el("td", value) for value in values]))
    heads = ["", *["autoencoder"] * several, "median", "worst twentieth", "mean"]
    table = el("table", el("thead", el("tr", [el("th", head) for head in heads])), el("tbody", rows))
    network = f"Perceptual and Fréchet distances: {report.features}"
    return join(el("h2", "All measures"), el("div", table, cls="scroll"), el("p", network, cls="soft"))


# ---- where the error lies


def _kinds(report: Report) -> Html:
    cards = []
    for number, kind in enumerate(KINDS):
        limit = next(limit for limit in LIMITS if limit.key == kind)
        rows = []
        for candidate, fitness in zip(report.candidates, report.fitness, strict=True):
            error = el("td", _number(fitness.level_error(kind), "{:.1f}"))
            kept = el("td", figure(limit, finest(fitness, report.originals, kind))) if limit.unit == "px" else None
            rows.append(el("tr", el("td", candidate.name, cls="wraps"), error, kept))
        heads = [el("th", words) for words in ("", "error, levels", "finest kept")[: 3 if limit.unit == "px" else 2]]
        area = f"{100 * float(report.originals.area[number]):.0f} % of the pixels"
        table = el("table", el("thead", el("tr", heads)), el("tbody", rows))
        cards.append(el("div", el("p", NAMES[kind], cls="name"), el("p", area, cls="area"), table, cls=f"kind {kind}"))
    lead = "Root mean squared error of 255 levels, and the size of the finest structure that is kept."
    return join(el("h2", "Where the error lies"), el("p", lead, cls="lead"), el("div", cards, cls="kinds"))


def _pictures(report: Report) -> Html:
    several = len(report.candidates) > 1
    legend = el("p", [el("span", NAMES[k], style=f"--c:var(--{k})") for k in KINDS], cls="legend")
    lead = (
        f"Difference: reconstruction less original, times {GAIN}, around grey. Error map: the colour is the kind of "
        f"region, the brightness the error, full at {FULL:.0f} levels."
    )
    part = f" Of larger pictures, the part of {WINDOW} pixels with the largest error." if _parts(report) else ""
    rows = [_shown(shown, rank, report) for rank, shown in enumerate(report.worst, start=1)]
    found = [el("h2", "The worst pictures"), el("p", lead + part, cls="lead"), legend, rows]
    if report.typical:
        found += [
            el("h2", "Typical pictures"),
            el("p", "From the middle of all: the original, then " + ("each reconstruction in the order of the table."
               if several else "the reconstruction."), cls="lead"),
            el("div", [_pair(shown) for shown in report.typical], cls=f"typical{' many' * several}"),
        ]  # fmt: skip
    return join(found)


def _parts(report: Report) -> bool:
    return any(shown.part for shown in [*report.worst, *report.typical])


def _shown(shown: Shown, rank: int, report: Report) -> Html:
    names = [c.name for c in report.candidates]
    head = el("p", el("b", f"{rank}. "), shown.key, cls="key")

    def cell(pixels: Any, words: str) -> Html:
        return el("figure", picture(pixels, words), el("figcaption", words))

    first = cell(shown.original, "original")
    made = [f"{value:.1f} dB" for value in shown.psnr]
    if len(names) == 1:
        cells = [
            first,
            cell(shown.made[0], f"reconstruction, {made[0]}"),
            cell(difference(shown.made[0], shown.original), f"difference x {GAIN}"),
            cell(error_map(shown.made[0], shown.original, shown.kinds), "error map"),
        ]
        return el("div", head, el("div", cells, cls="cells one", style="--n:4"), cls="shown")
    cells = [first, *(cell(p, f"{n}, {m}") for p, n, m in zip(shown.made, names, made, strict=True))]
    cells += [cell(kind_map(shown.original, shown.kinds), "kinds of regions"),
              *(cell(error_map(p, shown.original, shown.kinds), f"error map, {n}")
                       for p, n in zip(shown.made, names, strict=True))]  # fmt: skip
    cells += [el("figure"), *(cell(difference(p, shown.original), f"difference x {GAIN}, {n}")
                              for p, n in zip(shown.made, names, strict=True))]  # fmt: skip
    return el("div", head, el("div", cells, cls="cells many", style=f"--n:{1 + len(names)}"), cls="shown")


def _pair(shown: Shown) -> Html:
    images = [picture(shown.original, "original"), *(picture(p, "reconstruction") for p in shown.made)]
    words = ", ".join(f"{value:.1f} dB" for value in shown.psnr)
    pair = el("div", images, cls="pair", style=f"--n:{len(images)}")
    return el("figure", pair, el("figcaption", f"{shown.key}: {words}"))


# ---- latents


def _latents(report: Report) -> Html:
    lead = (
        "Per channel, the raw latents on these pictures and, in grey, the statistics that the checkpoint stores. The "
        "histogram is of the latents as a denoiser meets them, (z - stored mean) / stored deviation, from -4 to 4; "
        "the line is the unit normal. W1 and KS are distances from a normal of the same mean and deviation, drift is "
        "the KL divergence that the stored statistics leave."
    )
    parts: list[Any] = [el("h2", "Latents"), el("p", lead, cls="lead")]
    for candidate, fitness, verdict in zip(report.candidates, report.fitness, report.verdicts, strict=True):
        if len(report.candidates) > 1:
            parts.append(el("h3", candidate.name))
        words = " ".join(note.text for note in verdict.notes)
        worst = max((note.level for note in verdict.notes), key=("good", "usable").index)
        parts.append(el("p", words, cls=f"text {worst}"))
        if fitness.codes:
            used, alike = 100 * fitness.codes["codes_used"], fitness.codes["perplexity"]
            parts.append(el("p", f"{used:.1f} % of the codebook's codes occur on these pictures; they are as many as "
                            f"{alike:.0f} equally frequent ones.", cls="soft"))  # fmt: skip
        parts.append(el("div", _channels(fitness), cls="scroll"))
        parts.append(_scale(candidate, fitness))
    return join(parts)


def _channels(fitness: Fitness) -> Html:
    latents = fitness.latents
    far, wide, dead = off_mean(latents), off_std(latents), silent(latents)
    head = ["channel", "distribution", "mean", "stored", "deviation", "stored", "skewness", "excess kurtosis", "W1",
            "KS", "drift, nats"] + ["signal"] * (latents.signal is not None)  # fmt: skip
    rows = []
    for c in range(len(latents.mean)):
        cells = [
            el("td", c + 1),
            el("td", histogram(latents.histogram[c], EDGES)),
            el("td", f"{latents.raw_mean[c]:+.3f}", cls="off" if far[c] else None),
            el("td", el("span", f"{latents.stored_mean[c]:+.3f}", cls="was")),
            el("td", f"{latents.raw_std[c]:.3f}", cls="off" if wide[c] else None),
            el("td", el("span", f"{latents.stored_std[c]:.3f}", cls="was")),
            *(el("td", _number(values[c], form)) for values, form in (
                (latents.skewness, "{:+.2f}"), (latents.kurtosis, "{:+.2f}"), (latents.wasserstein, "{:.3f}"),
                (latents.kolmogorov, "{:.3f}"), (latents.drift, "{:.3f}"))),
        ]  # fmt: skip
        if latents.signal is not None:
            cells.append(el("td", f"{100 * latents.signal[c]:.0f} %", cls="off" if c in dead else None))
        rows.append(el("tr", cells))
    return el("table", el("thead", el("tr", [el("th", name) for name in head])), el("tbody", rows))


def _number(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "none"


def _scale(candidate: Candidate, fitness: Fitness) -> Html:
    latents, count = fitness.latents, len(fitness.psnr)
    stored = "a known model's factor" if candidate.has_statistics else "nothing yet: they were not measured"
    stored = f"{latents.stored_count:,} pictures" if latents.stored_count else stored
    few = "" if count >= 1000 else f" These are {count} pictures: a rough estimate."
    text = el(
        "div",
        el("h3", "Recommended scale"),
        el("p", f"Measured on these pictures; the stored statistics come from {stored}.{few}", cls="soft"),
        el("pre", recommended(latents)),
    )
    correlation = el(
        "div",
        el("h3", "Correlation"),
        matrix(latents.correlation),
        el("p", f"{len(latents.mean)} channels tell as much as {latents.effective_channels:.1f} uncorrelated ones.",
           cls="soft"),
    )  # fmt: skip
    return el("div", text, correlation, cls="two")


def recommended(latents: LatentReport) -> str:
    """Lines that can be copied."""
    mean = ", ".join(f"{v:.4f}" for v in latents.raw_mean)
    std = ", ".join(f"{v:.4f}" for v in latents.raw_std)
    factor = f"{1 / latents.raw_scale:.5f}" if latents.raw_scale > 0 else "none"
    return f"one factor for all   {factor}\nmean per channel     [{mean}]\nstd per channel      [{std}]"


# ---- the pictures, and how


def _originals(report: Report) -> Html:
    originals = report.originals
    count = len(originals.keys)
    constant, saturated = originals.deviation < CONSTANT, originals.saturated > SATURATED
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(report.left_out.items()))
    left_out = f"Of the whole data, {sum(report.left_out.values()):,} more were left out beforehand ({kinds})."
    items = [
        f"{count:,} pictures of {originals.size[1]}x{originals.size[0]} pixels were encoded and decoded; "
        f"{originals.num_bad:,} could not be read.",
        *[left_out] * bool(report.left_out),
        f"{100 * constant.mean():.1f} % are constant (values deviate by less than {CONSTANT:g} level). "
        + ("They teach an autoencoder nothing: leave them out." if constant.any() else ""),
        f"{100 * saturated.mean():.1f} % are saturated (more than {100 * SATURATED:.0f} % of the values are 0 or 255), "
        "which is usual for pictures on black or white.",
    ]
    for candidate, fitness in zip(report.candidates, report.fitness, strict=True):
        name = f"{candidate.name}: " if len(report.candidates) > 1 else ""
        far = f", by {fitness.worst_beyond:.0f} levels at most" if fitness.beyond else ""
        share = f"{100 * fitness.beyond:.2f} % of the decoded values"
        items.append(f"{name}{share} lay beyond black or white{far}, and were clipped.")
    return join(el("h2", "The pictures"), el("ul", [el("li", text) for text in items]))


def _method(report: Report) -> Html:
    limits = [
        (_capital(x.name), f"good {_bound(x, x.good)} {x.unit}, usable {_bound(x, x.usable)} {x.unit}: {x.why}.")
        for x in LIMITS
    ]
    measures = [
        ("Reconstruction", "Decoded from the posterior's mean, without noise, in float32, clipped to 0..255. Weights "
         "are the averaged ones where the stage keeps an average."),
        ("PSNR, SSIM", "Per picture; SSIM after Wang et al. 2004, window of 11 pixels."),
        ("Perceptual and Fréchet distance", report.features),
        ("Kinds of regions", f"From the structure tensor of the original's luminance (Harris and Stephens 1988), a "
         f"Gaussian window of 1.5 pixels, with eigenvalues l1 >= l2: plain where sqrt(l1) < {FLAT:g} levels a pixel, "
         f"fine detail where sqrt(l2) >= {DETAIL:g}, that is strong gradients in more than one direction within seven "
         "pixels as in small letters; edges are the rest."),
        ("Finest structure kept", "The factor by which the originals could be shrunk and enlarged again (bicubic, "
         "antialiased) with the same mean squared error in that kind of region: what is finer than so many pixels is "
         "lost."),
        ("Colours", "Mean CIE 1976 difference dE*ab of blocks of 8 x 8 pixels, averaged in linear light."),
        ("Distance from a normal", "W1 is the area between the quantile functions, KS the largest difference of the "
         "distribution functions, of each channel shifted and scaled to mean 0 and deviation 1; 0 for a normal. Drift "
         "is (m^2 + s^2 - 1 - ln s^2) / 2 with the mean m and deviation s of the standardised latents."),
        ("Signal", "Share of a channel's variance that is not the posterior's own noise."),
        ("Recommended scale", "One factor is 1 / deviation of all raw values together, as in Stable Diffusion's "
         "scaling_factor; mean and deviation per channel are what this project stores."),
        ("Which pictures are shown", "The lowest PSNR, mean over the autoencoders, and those around the median."),
    ]  # fmt: skip
    words = [join(el("dt", name), el("dd", text)) for name, text in [*limits, *measures]]
    worst = "The verdict is the worst of these figures."
    return el("details", el("summary", "Limits, their sources, and how this was measured"), el("p", worst),
              el("dl", words))  # fmt: skip
