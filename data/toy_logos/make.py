"""Procedural logos with captions: one or two plain marks on a plain ground, written as webdataset shards.

    python data/toy_logos/make.py [--out data/toy_logos/shards] [--num-samples 8000] [--size 64] [--seed 0]

The set asks whether a model composes or remembers: for each of the 90 pairs (mark colour, ground colour) one of
the ten shapes is held out. Such combinations never occur in training, and validation pictures hold nothing else.
Everything is a pure function of the seed and a picture's number. Figures and layout of files: README.md here.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

T = TypeVar("T")
Point = tuple[float, float]
Part = tuple[int, list[Point]]  # 1 paints and 0 erases the polygon
Combination = tuple[str, str, str]  # shape, mark colour, ground colour

VERSION = 1  # of the pictures and captions: raise it whenever either changes
OVERSAMPLE = 8  # side of the grid of samples in one pixel
BORDER_WIDTH = 0.045  # of the picture's side

COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 137, 14),
    "yellow": (255, 224, 60),
    "green": (34, 150, 70),
    "cyan": (70, 205, 225),
    "blue": (32, 84, 206),
    "purple": (128, 44, 164),
    "pink": (255, 150, 196),
    "black": (22, 22, 26),
    "white": (250, 250, 248),
}


# ---- shapes: polygons in a frame where x points right, y down, and a mark reaches from about -1 to 1


def _arc(radius: float, x: float = 0.0) -> list[Point]:
    angles = [2 * math.pi * i / 96 for i in range(96)]
    return [(x + radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _box(half: float) -> list[Point]:
    return [(-half, -half), (half, -half), (half, half), (-half, half)]


def _spikes(count: int, *radii: float, y: float = 0.0) -> list[Point]:
    """Corners at equal angles whose distances cycle through `radii`; the first corner points up."""
    step = 2 * math.pi / (count * len(radii))
    corners = enumerate(radii * count)
    return [(r * math.sin(i * step), y - r * math.cos(i * step)) for i, r in corners]


def _heart() -> list[Point]:
    turns = [2 * math.pi * i / 96 for i in range(96)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.1,
        )
        for t in turns
    ]


_ARM = 0.34
_CROSS = [(_ARM, 1.0), (_ARM, _ARM), (1.0, _ARM), (1.0, -_ARM), (_ARM, -_ARM), (_ARM, -1.0)]
_ARROW = [(-1.0, -0.27), (0.05, -0.27), (0.05, -0.78), (1.0, 0.0), (0.05, 0.78), (0.05, 0.27), (-1.0, 0.27)]

SHAPES: dict[str, list[Part]] = {
    "disc": [(1, _arc(0.88))],
    "ring": [(1, _arc(0.95)), (0, _arc(0.56))],
    "square": [(1, _box(0.8))],
    "triangle": [(1, _spikes(3, 1.15, y=0.25))],
    "star": [(1, _spikes(5, 1.1, 0.48, y=0.08))],
    "hexagon": [(1, _spikes(6, 1.06))],  # taller than the disc by a fifth: at 64 px the corners must show
    "cross": [(1, _CROSS + [(-x, -y) for x, y in _CROSS])],
    "heart": [(1, _heart())],
    "crescent": [(1, _arc(0.95, x=0.18)), (0, _arc(0.78, x=0.64))],
    "arrow": [(1, _ARROW)],
}
_FRAME: list[Part] = [(1, _box(1.1)), (0, _box(1 - 2 * BORDER_WIDTH))]

# Shapes that can hold another: its radius, and how far below the centre it sits, in units of the outer radius.
ROOMS: dict[str, Point] = {
    "disc": (0.50, 0.0),
    "ring": (0.44, 0.0),
    "square": (0.52, 0.0),
    "triangle": (0.40, 0.28),
    "star": (0.40, 0.08),
    "hexagon": (0.52, 0.0),
    "cross": (0.42, 0.0),
    "heart": (0.44, -0.08),
}
PAIR_LAYOUTS = ("left_right", "above_below", "inside")
LAYOUTS = ("single", *PAIR_LAYOUTS)


@dataclass(frozen=True)
class Mark:
    """One shape in one colour. x, y, radius: fractions of the picture's side.  angle: degrees, clockwise."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Logo:
    """marks: one, or two in the order left and right, above and below, inner and outer.  border: a colour or None."""

    marks: tuple[Mark, ...]
    ground: str
    layout: str
    border: str | None = None

    def combinations(self) -> list[Combination]:
        """(shape, mark colour, ground colour) of each mark."""
        return [(m.shape, m.colour, self.ground) for m in self.marks]

    def seen(self) -> set[Combination]:
        """`combinations`, and for a mark inside another also the pair as the eye sees it, on the outer colour."""
        inner = [(self.marks[0].shape, self.marks[0].colour, self.marks[1].colour)] if self.layout == "inside" else []
        return {*self.combinations(), *inner}


# ---- draws and the hold-out


class Draws:
    """Random choices that depend on the key alone: raw Philox words, which no numpy version changes."""

    def __init__(self, *key: object) -> None:
        digest = hashlib.sha256(repr(("toy_logos", VERSION, *key)).encode()).digest()
        self._raw = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * (self._raw() >> 11) * 2.0**-53

    def chance(self, probability: float) -> bool:
        return self.uniform(0, 1) < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[self._raw() % len(options)]


def is_held_out(combination: Combination) -> bool:
    """One shape for every pair of colours. 1, 2 and 1 + 2 share no factor with 10: nine per shape, mark and ground."""
    shape, mark, ground = combination
    names = list(COLOURS)
    return list(SHAPES).index(shape) == (names.index(mark) + 2 * names.index(ground)) % len(SHAPES)


HELD_OUT: list[Combination] = [
    (shape, mark, ground)
    for shape in SHAPES
    for mark in COLOURS
    for ground in COLOURS
    if mark != ground and is_held_out((shape, mark, ground))
]


def compose(draws: Draws, layout: str, marks: Sequence[tuple[str, str]], ground: str, border: str | None) -> Logo:
    """Places marks, given as (shape, colour), with a little jitter of position, size and angle."""

    def mark(index: int, x: float, y: float, radius: float, shift: float = 0.015, scale: float = 0.06) -> Mark:
        dx, dy = draws.uniform(-shift, shift), draws.uniform(-shift, shift)
        return Mark(*marks[index], x + dx, y + dy, radius * draws.uniform(1 - scale, 1 + scale), draws.uniform(-4, 4))

    if layout == "single":
        placed = (mark(0, 0.5, 0.5, 0.36, shift=0.025),)
    elif layout == "left_right":
        placed = (mark(0, 0.265, 0.5, 0.205), mark(1, 0.735, 0.5, 0.205))
    elif layout == "above_below":
        placed = (mark(0, 0.5, 0.265, 0.205), mark(1, 0.5, 0.735, 0.205))
    else:
        outer = mark(1, 0.5, 0.5, 0.38)
        room, below = ROOMS[outer.shape]
        inner = mark(0, outer.x, outer.y + below * outer.radius, room * outer.radius, shift=0.005, scale=0.03)
        placed = (inner, outer)
    return Logo(placed, ground, layout, border)


def training_logo(index: int, seed: int = 0) -> Logo:
    """Any logo without a held-out combination; 60 % have one mark."""
    draws = Draws(seed, "train", index)
    while True:
        layout = "single" if draws.chance(0.6) else draws.pick(PAIR_LAYOUTS)
        logo = _any_logo(draws, layout)
        if not any(map(is_held_out, logo.seen())):
            return logo


def free_logo(index: int, layout: str, seed: int = 0) -> Logo:
    """Any logo of the given layout, held out or not: for judges, never for training a model that is judged."""
    return _any_logo(Draws(seed, "free", layout, index), layout)


def _any_logo(draws: Draws, layout: str) -> Logo:
    ground = draws.pick(list(COLOURS))
    first = draws.pick([c for c in COLOURS if c != ground])
    marks = [(draws.pick(list(SHAPES)), first)]
    if layout != "single":
        shape = draws.pick(list(ROOMS if layout == "inside" else SHAPES))
        marks.append((shape, draws.pick([c for c in COLOURS if c not in (ground, first)])))
    return compose(draws, layout, marks, ground, _border(draws, marks))


def held_out_logo(index: int, num_marks: int, seed: int = 0, with_border: bool = True) -> Logo:
    """A logo of which every mark is a held-out combination; 90 indices in a row have each as their first mark once."""
    draws = Draws(seed, "held out", num_marks, index)
    shape, colour, ground = HELD_OUT[index % len(HELD_OUT)]
    layout, marks = "single", [(shape, colour)]
    if num_marks == 2:
        layout = PAIR_LAYOUTS[(index + index // len(HELD_OUT)) % len(PAIR_LAYOUTS)]
        fits = ROOMS if layout == "inside" else SHAPES
        marks.append(draws.pick([(s, c) for s, c, g in HELD_OUT if g == ground and c != colour and s in fits]))
    border = _border(draws, marks)
    return compose(draws, layout, marks, ground, border if with_border else None)


def _border(draws: Draws, marks: Sequence[tuple[str, str]]) -> str | None:
    """One picture in seven has a border in the colour of its first mark."""
    return marks[0][1] if draws.chance(1 / 7) else None


# ---- pictures


def coverage(logo: Logo, size: int) -> np.ndarray:
    """Share of each pixel that each layer shows: ground, first mark, second mark, border.

    Returns [4, size, size] float32 that sums to 1 over the layers; absent layers are 0.
    """
    layers = np.zeros((4, size, size), np.float32)
    layers[0] = 1
    order = (2, 1) if logo.layout == "inside" else (1, 2)
    painted = [(i, SHAPES[logo.marks[i - 1].shape], logo.marks[i - 1]) for i in order if i <= len(logo.marks)]
    if logo.border:
        painted.append((3, _FRAME, Mark("frame", logo.border, 0.5, 0.5, 0.5, 0.0)))
    for layer, parts, place in painted:
        mask = _mask(parts, place, size)
        layers *= 1 - mask
        layers[layer] += mask
    return layers


def _mask(parts: list[Part], place: Mark, size: int) -> np.ndarray:
    side = size * OVERSAMPLE
    sin, cos = math.sin(math.radians(place.angle)), math.cos(math.radians(place.angle))
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    for paint, points in parts:
        placed = [
            (
                side * (place.x + place.radius * (cos * x - sin * y)),
                side * (place.y + place.radius * (sin * x + cos * y)),
            )
            for x, y in points
        ]
        draw.polygon(placed, fill=255 * paint)
    return np.asarray(canvas.reduce(OVERSAMPLE), np.float32) / 255


def render(logo: Logo, size: int = 64) -> Image.Image:
    """The picture, RGB, anti-aliased."""
    colours = [logo.ground, *(m.colour for m in logo.marks)]
    colours += [logo.ground] * (3 - len(colours)) + [logo.border or logo.ground]
    palette = np.array([COLOURS[c] for c in colours], np.float32)
    # Layer by layer: a matrix product may round differently from one machine to the next.
    pixels = sum(share[..., None] * colour for share, colour in zip(coverage(logo, size), palette, strict=True))
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


# ---- captions

RELATIONS = {
    "single": ("{a}",),
    "left_right": (
        "{a} to the left of {b}",
        "{b} to the right of {a}",
        "{a} left of {b}",
        "{a} on the left and {b} on the right",
    ),
    "above_below": (
        "{a} above {b}",
        "{b} below {a}",
        "{a} over {b}",
        "{a} at the top and {b} at the bottom",
    ),
    "inside": ("{a} inside {b}", "{a} within {b}", "{b} with {a} inside", "{b} around {a}"),
}
SCENES = (
    "{subject} on {a_ground} background",
    "{subject} on {a_ground} ground",
    "{subject} on {ground}",
    "flat logo: {subject} on {ground}",
    "a logo with {subject} on {a_ground} background",
    "a simple icon, {subject} against {ground}",
    "{ground} background, {subject}",
    "on {a_ground} ground, {subject}",
)
SCENES_WITHOUT_GROUND = ("{subject}", "flat logo: {subject}", "a logo with {subject}", "a simple icon, {subject}")
BORDERS = (", with {a_border} border", ", framed in {border}", ", {border} border")


def caption(logo: Logo, draws: Draws, leave_out_prob: float = 0.0) -> str:
    """A sentence that names every attribute; with `leave_out_prob` the ground or a mark's colour goes unsaid."""
    unsaid = draws.pick(["ground", *range(len(logo.marks))]) if draws.chance(leave_out_prob) else None
    names = [_a(m.shape if i == unsaid else f"{m.colour} {m.shape}") for i, m in enumerate(logo.marks)]
    subject = draws.pick(RELATIONS[logo.layout]).format(a=names[0], b=names[-1])
    scene = draws.pick(SCENES_WITHOUT_GROUND if unsaid == "ground" else SCENES)
    text = scene.format(subject=subject, ground=logo.ground, a_ground=_a(logo.ground))
    if logo.border:
        text += draws.pick(BORDERS).format(border=logo.border, a_border=_a(logo.border))
    return text


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# ---- shards


def _sample(split: str, index: int, size: int, seed: int) -> dict[str, object]:
    """One sample in img2dataset's layout: key.png, key.txt, key.json."""
    if split == "train":
        logo = training_logo(index, seed)
    else:
        logo = held_out_logo(index, num_marks=2 if index % 5 in (1, 3) else 1, seed=seed)
    text = caption(logo, Draws(seed, split, "caption", index), leave_out_prob=0.12 if split == "train" else 0.0)
    key = f"{split}{index:08d}"
    attributes = {
        "key": key,
        "caption": text,
        "status": "success",
        "width": size,
        "height": size,
        "original_width": size,
        "original_height": size,
        "marks": [{"shape": m.shape, "colour": m.colour} for m in logo.marks],
        "ground": logo.ground,
        "layout": logo.layout,
        "border": logo.border,
    }
    png = io.BytesIO()
    render(logo, size).save(png, "PNG")
    return {"__key__": key, "png": png.getvalue(), "txt": text.encode(), "json": json.dumps(attributes).encode()}


def shard_sizes(num_samples: int, num_shards: int, seed: int) -> list[int]:
    """Uneven numbers of samples, at least one each, that sum to `num_samples`."""
    draws = Draws(seed, "shards", num_samples, num_shards)
    weights = np.array([draws.uniform(0.5, 1.5) for _ in range(num_shards)])
    ends = np.rint(np.cumsum(weights) / weights.sum() * (num_samples - num_shards)).astype(int)
    return [int(n) + 1 for n in np.diff(ends, prepend=0)]


def _write_split(folder: Path, split: str, sizes: Sequence[int], size: int, seed: int) -> Iterator[None]:
    """Writes the shards of one split and yields after every sample."""
    import webdataset

    with (
        ExitStack() as files,
        webdataset.ShardWriter(
            f"{folder}/{split}-%06d.tar",
            maxcount=max(sizes) + 1,  # never reached: we cut the shards
            verbose=0,
            opener=lambda path: files.enter_context(open(path, "wb")),
            encoder=False,
            mtime=0,  # so that equal seeds give equal bytes
        ) as writer,
    ):
        index = 0
        for shard, count in enumerate(sizes):
            if shard:
                writer.next_stream()
            for _ in range(count):
                writer.write(_sample(split, index, size, seed))
                index += 1
                yield


def write_set(
    out: Path,
    num_samples: int = 8000,
    num_val: int = 400,
    num_shards: int = 12,
    size: int = 64,
    seed: int = 0,
) -> bool:
    """Writes train-*.tar, val-*.tar and, last, recipe.json into `out`; False if they are there already.

    The set grows in `<out>-part` and is moved when whole, so `out` never holds half a set.
    Raises ValueError for sizes that make no set, FileExistsError if `out` holds files that this did not make.
    """
    if not (1 <= num_shards <= num_samples and num_val >= 2 and size >= 16):
        raise ValueError(
            f"expected 1 <= num_shards <= num_samples, num_val >= 2 and size >= 16; "
            f"got {num_shards=}, {num_samples=}, {num_val=}, {size=}"
        )
    made_with = {
        "generator": "toy_logos",
        "version": VERSION,
        "num_samples": num_samples,
        "num_val": num_val,
        "num_shards": num_shards,
        "size": size,
        "seed": seed,
    }
    out = Path(out)
    if is_complete(out, made_with):
        print(f"toy logos: {num_samples} + {num_val} samples are in {out} already")
        return False
    if out.exists() and any(out.iterdir()) and not (out / "recipe.json").is_file():
        raise FileExistsError(f"{out} holds files that were not made here; choose another folder with --out")

    part = out.with_name(out.name + "-part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    start, done = time.monotonic(), 0
    for split, count, shards in (("train", num_samples, num_shards), ("val", num_val, 2)):
        for _ in _write_split(part, split, shard_sizes(count, shards, seed), size, seed):
            done += 1
            if done % 1000 == 0:
                print(f"\rtoy logos: {done} of {num_samples + num_val}", end="", flush=True)
    files = {p.name: p.stat().st_size for p in sorted(part.glob("*.tar"))}
    (part / "recipe.json").write_text(json.dumps({**made_with, "files": files}, indent=2) + "\n")

    if out.exists():
        shutil.rmtree(out)
    part.replace(out)
    print(
        f"\rtoy logos: {num_samples} training and {num_val} held-out samples of {size} px, "
        f"{len(files)} shards in {out}, {time.monotonic() - start:.0f} s"
    )
    return True


def is_complete(out: Path, made_with: dict[str, object]) -> bool:
    """Whether `out` holds a set of this recipe with every shard at its recorded size."""
    try:
        recipe = json.loads((out / "recipe.json").read_text())
        files = recipe.pop("files")
        return recipe == made_with and all((out / n).stat().st_size == size for n, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "shards")
    parser.add_argument("--num-samples", type=int, default=8000, help="training samples")
    parser.add_argument("--num-val", type=int, default=400, help="validation samples, held-out combinations only")
    parser.add_argument("--num-shards", type=int, default=12, help="training shards, of uneven size")
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    try:
        write_set(**vars(parser.parse_args(argv)))
    except (ValueError, FileExistsError) as problem:
        parser.exit(2, f"error[DATA]: {problem}\n")
    except OSError as problem:
        hint = "free space, or choose another folder with --out"
        parser.exit(2, f"error[DISK]: cannot write: {problem.strerror}; {problem.filename}; {hint}\n")


if __name__ == "__main__":
    main()
