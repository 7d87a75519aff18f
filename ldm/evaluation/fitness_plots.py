"""Small drawings of the fitness page: pictures as data URIs, histograms, gauges and matrices as SVG."""

from __future__ import annotations

import base64
import io
import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.evaluation.html import Html, el

if TYPE_CHECKING:
    from ldm.evaluation.fitness_verdict import Limit

COLOURS = ((76, 141, 255), (22, 184, 166), (255, 138, 61))
"""Of `regions.KINDS`: plain areas, edges, fine detail; the page's style sheet has the same."""
GAIN = 4
FULL = 64.0
"""Levels of error at which a colour of the error map is full."""


def difference(made: NDArray[np.uint8], original: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W, 3]: made less original, GAIN times, around a middle grey."""
    signed = made.astype(np.int32) - original.astype(np.int32)
    return np.clip(128 + GAIN * signed, 0, 255).astype(np.uint8)


def error_map(made: NDArray[np.uint8], original: NDArray[np.uint8], kinds: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W, 3]: the colour says which kind of region, its brightness how large the error, root mean square over
    channels; black is none and full is FULL levels.
    """
    error = np.sqrt(((made.astype(np.float64) - original) ** 2).mean(-1))
    strength = (error / FULL).clip(0, 1) ** 0.6  # small errors stay visible
    return (np.array(COLOURS, dtype=np.float64)[kinds] * strength[..., None]).round().astype(np.uint8)


def kind_map(original: NDArray[np.uint8], kinds: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W, 3]: the picture in grey, tinted by the kind of region."""
    grey = original.astype(np.float64).mean(-1, keepdims=True)
    tint = np.array(COLOURS, dtype=np.float64)[kinds]
    return (0.45 * grey + 0.55 * tint).round().astype(np.uint8)


def picture(pixels: NDArray[np.uint8], alt: str) -> Html:
    """An image element that holds the [H, W, 3] picture as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    height, width = pixels.shape[:2]
    crisp = "crisp" if width < 200 else None  # enlarged on the page
    return el("img", cls=crisp, src=f"data:image/png;base64,{data}", width=width, height=height, alt=alt)


def histogram(shares: NDArray[np.float64], edges: NDArray[np.float64]) -> Html:
    """Shares of values in the bins, and the unit normal's as a line."""
    width, height = 132, 40
    middles, wide = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    normal = (np.exp(-(middles**2) / 2) / math.sqrt(2 * math.pi) * wide).tolist()
    top = max(float(shares.max(initial=0)), max(normal)) or 1.0
    step = width / len(shares)
    bars = [
        el("rect", x=f"{i * step:.2f}", y=f"{height - height * s / top:.2f}", width=f"{step:.2f}",
           height=f"{height * s / top:.2f}")
        for i, s in enumerate(shares.tolist())
        if s > 0
    ]  # fmt: skip
    points = " ".join(f"{(i + 0.5) * step:.2f},{height - height * p / top:.2f}" for i, p in enumerate(normal))
    line = el("polyline", points=points)
    return el("svg", bars, line, cls="histogram", viewBox=f"0 0 {width} {height}", width=width, height=height,
              role="img", aria_label="histogram of standardised values beside the normal")  # fmt: skip


def matrix(correlation: NDArray[np.float64]) -> Html:
    """A square per pair of channels: orange above 0, blue below, stronger the larger."""
    count = len(correlation)
    side = max(6, min(28, 280 // count))
    cells = []
    for row in range(count):
        for column in range(count):
            r = float(correlation[row, column])
            if not math.isfinite(r):
                continue
            kind = "above" if r > 0 else "below"
            title = el("title", f"channels {row + 1} and {column + 1}: {r:+.2f}")
            box = {"x": column * side, "y": row * side, "width": side - 1, "height": side - 1}
            opacity = f"{min(1.0, abs(r)):.2f}"
            cells.append(el("g", title, el("rect", cls=kind, fill_opacity=opacity, **box)))
    size = count * side
    return el("svg", cells, cls="matrix", viewBox=f"0 0 {size} {size}", width=size, height=size, role="img",
              aria_label="correlation between channels")  # fmt: skip


def gauge(limit: Limit, value: float) -> Html:
    """Where a figure stands between unfit, usable and good, left to right."""
    place = 100 * place_of(limit, value)
    mark = el("i", style=f"left:{place:.1f}%")
    return el("span", el("b"), el("b"), el("b"), mark, cls="gauge", aria_hidden="true")


def place_of(limit: Limit, value: float) -> float:
    """0.02 to 0.98: a third at the limit of what is usable, two thirds at the limit of what is good."""
    share = (value - limit.usable) / (limit.good - limit.usable)
    return min(0.98, max(0.02, (1 + share) / 3))
