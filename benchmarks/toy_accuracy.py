"""Does a model of toy logos compose? Pictures of held-out combinations, judged attribute by attribute.

    python -m benchmarks.toy_accuracy [run=runs/LATEST] [seeds=3] [steps=25] [guidance_scale=3.0]

Colours are measured from pixels; shape and layout by a small network, the judge, that is trained here on pictures
of its own and must first score 98 % on real pictures of held-out combinations. Beside the generated pictures stand
real ones, their reconstructions by the autoencoder, and the control: the same pictures against shuffled captions.

Pictures are uint8 arrays [N, H, W, 3] throughout; rates are fractions.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv[1:]}:
    sys.exit(print(__doc__))  # before torch is imported

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from benchmarks._options import read_options, run_main
from data.toy_logos.make import (
    COLOURS,
    LAYOUTS,
    SHAPES,
    Draws,
    Logo,
    caption,
    coverage,
    free_logo,
    held_out_logo,
    render,
)
from ldm.checkpoints.run import find_run
from ldm.errors import check

Generate = Callable[[list[str], list[int]], np.ndarray]
"""(prompts, seeds of the pictures) -> pictures."""
Reconstruct = Callable[[np.ndarray], np.ndarray]
"""pictures -> what the autoencoder makes of them."""
Rates = dict[str, float]

NUM_ONE, NUM_TWO = 270, 180  # three times and twice all 90 held-out combinations, each as a first mark
GOALS: dict[str, dict[str, Rates]] = {  # by experiment
    "demo": {
        "one": {"ground": 0.95, "mark colour": 0.95, "shape": 0.70},  # and 0.85 hoped for
        "two": {"layout": 0.90, "both colours": 0.80},
    },
    "demo_long": {"one": {"shape": 0.92}, "two": {"wholly right": 0.40}},
}


# ---- the judge

JUDGE_VERSION = 1  # raise it whenever network or training change
JUDGE_SIZE = 64
JUDGE_FLOOR = 0.98


class Judge(nn.Module):
    """Layout, shape of the first mark and shape of the second, as logits, from pictures [B, 3, 64, 64] in [0, 1]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()

        def block(i: int, o: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

        self.features = nn.Sequential(
            nn.PixelUnshuffle(2),
            block(12, width, 1),
            block(width, 2 * width, 2),
            block(2 * width, 2 * width, 1),
            block(2 * width, 4 * width, 2),
            block(4 * width, 2 * width, 1),
            nn.Flatten(),  # where a shape stands says whether it is the first or the second: no pooling
            nn.Dropout(0.2),
        )
        self.heads = nn.Linear(2 * width * 64, len(LAYOUTS) + 2 * len(SHAPES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.heads(self.features(images - 0.5)).split([len(LAYOUTS), len(SHAPES), len(SHAPES)], dim=1)


def train_judge(num_logos: int = 6000, num_steps: int = 1200, batch_size: int = 48, seed: int = 0) -> Judge:
    """Learns from freely composed logos, recoloured, blurred and noised at every step.

    Held-out combinations are among them on purpose: a judge that never saw them would mistake them for the
    model's errors. None of these pictures is scored or shown to the model.
    """
    logos = [free_logo(i, LAYOUTS[i % len(LAYOUTS)], seed) for i in range(num_logos)]
    layers = torch.from_numpy(np.stack([np.rint(coverage(logo, JUDGE_SIZE) * 255).astype(np.uint8) for logo in logos]))
    labels = torch.tensor([_labels(logo) for logo in logos])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge().train()
        optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.02)
        lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=num_steps, pct_start=0.15)
        for step in range(num_steps):
            rows = torch.randint(num_logos, (batch_size,))
            layout, first, second = judge(_disguise(layers[rows].float() / 255))
            expected = labels[rows]
            loss = F.cross_entropy(layout, expected[:, 0]) + F.cross_entropy(first, expected[:, 1])
            loss = loss + F.cross_entropy(second, expected[:, 2], ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lr_schedule.step()
            if step % 100 == 0:
                print(f"\rjudge: step {step} of {num_steps}, loss {loss.item():.3f} ", end="", flush=True)
    print()
    return judge.eval()


def _labels(logo: Logo) -> tuple[int, int, int]:
    shapes = [list(SHAPES).index(m.shape) for m in logo.marks] + [-1]
    return LAYOUTS.index(logo.layout), shapes[0], shapes[1]


def _disguise(layers: Tensor) -> Tensor:
    """Layers [B, 4, H, W] to pictures [B, 3, H, W] in random colours of the palette, soft and noisy."""
    palette = torch.tensor(list(COLOURS.values())) / 255
    b = len(layers)
    colours = palette[torch.rand(b, len(palette)).argsort(dim=1)[:, :3]]  # three different ones: ground and marks
    colours = torch.cat([colours, colours[:, 1:2]], dim=1) + 0.06 * torch.randn(b, 4, 3)
    images = torch.einsum("blhw,blc->bchw", layers, colours)
    radius = torch.arange(-3, 4.0)
    kernel = torch.exp(-0.5 * (radius / (0.1 + 1.4 * torch.rand(()) ** 2)) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, 7)
    images = F.conv2d(F.conv2d(images, kernel, padding="same", groups=3), kernel.mT, padding="same", groups=3)
    return images + 0.08 * torch.rand(b, 1, 1, 1) * torch.randn_like(images)


def load_judge(folder: Path = Path("runs/judge")) -> Judge:
    """The trained judge, from `folder` or trained now (a minute or two on two cores) and kept there."""
    from safetensors.torch import load_file, save_file

    samples = [render(free_logo(i, layout, seed=1), JUDGE_SIZE).tobytes() for i in range(20) for layout in LAYOUTS]
    fingerprint = hashlib.sha256(b"".join(samples) + str(JUDGE_VERSION).encode()).hexdigest()[:16]
    path = folder / f"judge-{fingerprint}.safetensors"
    if path.is_file():
        judge = Judge()
        judge.load_state_dict(load_file(path))
        return judge.eval()
    judge = train_judge()
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(judge.state_dict(), part)
    part.replace(path)
    return judge


def require_able(scores: Mapping[str, Rates]) -> None:
    """Refuses a judge that misreads real pictures of held-out combinations. scores: by `measure`."""
    got = {
        "one mark, shape": scores["one"]["shape"],
        "two marks, shapes": scores["two"]["shapes"],
        "layout": scores["two"]["layout"],
    }
    low = {name: rate for name, rate in got.items() if rate < JUDGE_FLOOR}
    check(
        not low,
        "JUDGE",
        "the judge misreads real pictures",
        limit=f"at least {JUDGE_FLOOR:.0%}, got " + ", ".join(f"{name} {rate:.1%}" for name, rate in low.items()),
        next="delete runs/judge to train another; if that one fails too, raise num_steps of train_judge",
    )


# ---- measuring


_AROUND = ((0, 1), (0, -1), (1, 0), (-1, 0))


def read_colours(image: np.ndarray, layout: str) -> tuple[str, tuple[str, ...]]:
    """Names of the ground's and the marks' colours in one picture [H, W, 3], marks in the layout's order.

    Fewer marks than the layout has if fewer colours show. Ground: the commonest named colour near the four corners,
    inside of where a border runs. Marks: the commonest other colours inside the border, counted where a pixel and
    its neighbours agree, for edges blend two colours into a third; two are ordered by their mean x, mean y or mean
    distance from the centre.
    """
    names = list(COLOURS)
    palette = np.array(list(COLOURS.values()), np.float32)
    near = np.linalg.norm(image[:, :, None].astype(np.float32) - palette, axis=-1).argmin(-1)  # [H, W]

    size = len(near)
    lo, hi = round(0.07 * size), round(0.17 * size)
    ends = np.r_[lo:hi, size - hi : size - lo]
    ground = int(np.bincount(near[np.ix_(ends, ends)].ravel()).argmax())

    inside = near[lo : size - lo, lo : size - lo]
    core = inside[1:-1, 1:-1]
    agree = sum(core == inside[1 + dy : len(inside) - 1 + dy, 1 + dx : len(inside) - 1 + dx] for dy, dx in _AROUND) == 4
    counts = np.bincount(core[agree & (core != ground)], minlength=len(names))
    marks = [int(i) for i in counts.argsort()[::-1][: 1 if layout == "single" else 2] if counts[i] > 0]

    y, x = np.mgrid[: len(core), : len(core)] - (len(core) - 1) / 2
    order = {"single": x, "left_right": x, "above_below": y, "inside": np.hypot(x, y)}[layout]
    marks.sort(key=lambda i: order[agree & (core == i)].mean())
    return names[ground], tuple(names[i] for i in marks)


@torch.no_grad()
def read_shapes(images: np.ndarray, judge: Judge) -> np.ndarray:
    """Indices of layout, first and second shape: [N, 3]. Pictures of any size are brought to the judge's."""
    rows = []
    for some in np.array_split(images, max(1, len(images) // 64)):
        x = torch.from_numpy(np.ascontiguousarray(some)).permute(0, 3, 1, 2).float() / 255
        if x.shape[-2:] != (JUDGE_SIZE, JUDGE_SIZE):
            x = F.interpolate(x, (JUDGE_SIZE, JUDGE_SIZE), mode="bilinear", antialias=True)
        rows.append(torch.stack([logits.argmax(1) for logits in judge(x)], dim=1))
    return torch.cat(rows).numpy()


def verdicts(images: np.ndarray, logos: Sequence[Logo], judge: Judge) -> dict[str, np.ndarray]:
    """Whether each picture shows what its logo asks for, by attribute: arrays [N] of bool.

    All logos have one mark, or all have two. `shapes` is a fraction of two marks; the rest are claims.
    """
    seen = [read_colours(image, logo.layout) for image, logo in zip(images, logos, strict=True)]
    grounds, marks = zip(*seen, strict=True)
    asked = np.array([_labels(logo) for logo in logos])
    read = read_shapes(images, judge)
    ground = np.array([got == logo.ground for got, logo in zip(grounds, logos, strict=True)])
    colours = np.array([got == tuple(m.colour for m in logo.marks) for got, logo in zip(marks, logos, strict=True)])
    layout, first, second = (read == asked).T
    if len(logos[0].marks) == 1:
        return {"ground": ground, "mark colour": colours, "shape": first, "all": ground & colours & first & layout}
    return {
        "ground": ground,
        "layout": layout,
        "both colours": colours,
        "shapes": (first.astype(float) + second) / 2,
        "both shapes": first & second,
        "wholly right": ground & layout & colours & first & second,
    }


def measure(images: np.ndarray, logos: Sequence[Logo], judge: Judge) -> dict[str, Rates]:
    """Rates of what is right, for pictures of one mark ("one"), of two ("two") and by shape of single marks."""
    rates: dict[str, Rates] = {}
    for group, num_marks in (("one", 1), ("two", 2)):
        rows = [i for i, logo in enumerate(logos) if len(logo.marks) == num_marks]
        if not rows:
            continue
        right = verdicts(images[rows], [logos[i] for i in rows], judge)
        rates[group] = {name: float(values.mean()) for name, values in right.items()}
        if group == "one":
            shapes = np.array([logos[i].marks[0].shape for i in rows])
            rates["shape of one"] = {s: float(right["shape"][shapes == s].mean()) for s in SHAPES if s in shapes}
    return rates


def shuffled(logos: Sequence[Logo], seed: int = 0) -> list[Logo]:
    """The control's captions: within one and within two marks, every picture gets the logo of another."""
    draws = Draws(seed, "control")
    result = list(logos)
    for num_marks in (1, 2):
        rows = [i for i, logo in enumerate(logos) if len(logo.marks) == num_marks]
        ring = sorted(rows, key=lambda _: draws.uniform(0, 1))
        for here, there in zip(ring, ring[1:] + ring[:1], strict=True):
            result[here] = logos[there]
    return result


def benchmark_logos(num_one: int = NUM_ONE, num_two: int = NUM_TWO, seed: int = 0) -> tuple[list[Logo], list[str]]:
    """Held-out logos without borders, balanced over combinations and layouts, and captions that name everything."""
    counts = ((1, num_one), (2, num_two))
    logos = [held_out_logo(i, marks, seed, with_border=False) for marks, count in counts for i in range(count)]
    return logos, [caption(logo, Draws(seed, "benchmark", i)) for i, logo in enumerate(logos)]


def pictures(logos: Sequence[Logo], size: int = JUDGE_SIZE) -> np.ndarray:
    return np.stack([np.asarray(render(logo, size)) for logo in logos])


def psnr(images: np.ndarray, others: np.ndarray) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB."""
    squares = ((images.astype(np.float64) - others) ** 2).mean(axis=(1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(squares, 1e-3))).mean())


# ---- the benchmark


@dataclass(frozen=True)
class Report:
    """columns: rates by column, group and attribute.  psnr: dB of reconstructions by group.
    error: standard errors of the column "mean", as if the seeds' pictures were independent.
    """

    columns: dict[str, dict[str, Rates]]
    error: dict[str, Rates]
    psnr: Rates


def run_benchmark(
    generate: Generate,
    reconstruct: Reconstruct,
    judge: Judge,
    seeds: Sequence[int] = (0, 1, 2),
    num_one: int = NUM_ONE,
    num_two: int = NUM_TWO,
) -> tuple[Report, np.ndarray]:
    """Judges real, reconstructed and generated pictures, and the control; also returns the first seed's pictures.

    Raises LdmError if the judge misreads real pictures.
    """
    logos, prompts = benchmark_logos(num_one, num_two)
    real = pictures(logos)
    columns = {"real": measure(real, logos, judge)}
    require_able(columns["real"])
    copies = reconstruct(real)
    columns["reconstruction"] = measure(copies, logos, judge)

    first = None
    for seed in seeds:
        start = time.monotonic()
        images = generate(prompts, [seed * len(prompts) + i for i in range(len(prompts))])
        print(f"seed {seed}: {len(images)} pictures in {time.monotonic() - start:.0f} s")
        columns[f"seed {seed}"] = measure(images, logos, judge)
        first = images if first is None else first
    columns["mean"] = _mean([columns[f"seed {seed}"] for seed in seeds])
    columns["control"] = measure(first, shuffled(logos), judge)

    counts = {"one": num_one, "two": num_two}
    error = {
        group: {
            name: math.sqrt(p * (1 - p) / (counts[group] * len(seeds))) for name, p in columns["mean"][group].items()
        }
        for group in counts
    }
    quality = {"one": psnr(real[:num_one], copies[:num_one]), "two": psnr(real[num_one:], copies[num_one:])}
    return Report(columns, error, quality), first


def _mean(several: Sequence[dict[str, Rates]]) -> dict[str, Rates]:
    return {
        group: {name: float(np.mean([rates[group][name] for rates in several])) for name in several[0][group]}
        for group in several[0]
    }


def table(report: Report) -> str:
    """The report for a terminal: a line per attribute, a column per kind of picture, in per cent."""
    titles = {"one": "one mark", "two": "two marks", "shape of one": "shape, one mark"}
    lines = []
    for group, title in titles.items():
        lines.append(f"{title:<16}" + "".join(f"{name:>15}" for name in (*report.columns, *GOALS)))
        for name in report.columns["real"][group]:
            cells = [f"{100 * rates[group][name]:.1f}" for rates in report.columns.values()]
            if group in report.error:
                cells[list(report.columns).index("mean")] += f" +- {100 * report.error[group][name]:.1f}"
            floors = [goals.get(group, {}).get(name) for goals in GOALS.values()]
            cells += [f">= {100 * floor:.0f}" if floor else "" for floor in floors]
            lines.append(f"  {name:<14}" + "".join(f"{cell:>15}" for cell in cells))
    lines.append(f"reconstruction: one mark {report.psnr['one']:.1f} dB, two marks {report.psnr['two']:.1f} dB")
    return "\n".join(lines)


def contact_sheet(images: np.ndarray, prompts: Sequence[str], columns: int = 8, side: int = 128) -> Image.Image:
    """Pictures in a grid with their prompts below."""
    font, text_height, gap = ImageFont.load_default(size=10), 42, 8
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + text_height + gap) + gap), (235, 235, 235))
    draw = ImageDraw.Draw(sheet)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * (side + text_height + gap)
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
        draw.multiline_text(
            (x, y + side + 2), "\n".join(_wrap(prompt, draw, font, side)), (30, 30, 30), font, spacing=1
        )
    return sheet


def _wrap(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and draw.textlength(longer, font) > width:
            yield line
            longer = word
        line = longer
    yield line


# ---- the model: the only place that knows how a run makes pictures


def open_run(path: Path, steps: int, guidance_scale: float) -> tuple[Generate, Reconstruct]:
    """The two functions that the benchmark needs, from a run's folder."""
    from ldm.build import build
    from ldm.model import LatentDiffusion
    from ldm.sampling.tasks import text_to_image

    model = LatentDiffusion.load(path)
    sampling = build({**(model.sampler or {}), "steps": steps, "guidance_scale": guidance_scale}, where="sampler")

    def to_pixels(x: Tensor) -> np.ndarray:
        return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    def generate(prompts: list[str], seeds: list[int]) -> np.ndarray:
        batches = [slice(i, i + 64) for i in range(0, len(prompts), 64)]
        return np.concatenate([to_pixels(text_to_image(model, prompts[b], seeds[b], sampling)) for b in batches])

    def reconstruct(images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            return np.concatenate([to_pixels(model.decode(model.encode(some))) for some in x.split(64)])

    return generate, reconstruct


def main(arguments: Sequence[str]) -> None:
    options = read_options(arguments, {"run": "", "seeds": 3, "steps": 25, "guidance_scale": 3.0})
    check(options["seeds"] >= 1, "CONFIG", "no seeds to sample with", where="seeds", next="give seeds=1 or more")
    run = find_run(options["run"] or None)

    generate, reconstruct = open_run(run, options["steps"], options["guidance_scale"])
    report, images = run_benchmark(generate, reconstruct, load_judge(), range(options["seeds"]))
    print(table(report))

    _, prompts = benchmark_logos()
    shown = [*range(0, NUM_ONE, NUM_ONE // 32)][:32] + [*range(NUM_ONE, NUM_ONE + NUM_TWO, NUM_TWO // 24)][:24]
    contact_sheet(images[shown], [prompts[i] for i in shown]).save(run / "toy_accuracy.png")
    (run / "toy_accuracy.json").write_text(json.dumps({**options, "run": str(run), **vars(report)}, indent=2) + "\n")
    print(f"written: {run / 'toy_accuracy.json'}, {run / 'toy_accuracy.png'}")


if __name__ == "__main__":
    run_main(main)
