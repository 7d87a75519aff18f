"""The adaptive adversarial weight in one backward, beside the usual two extra passes of autograd.

    python -m benchmarks.adaptive_weight [device=auto] [size=auto] [batch=0] [rounds=8] [precision=auto]

A step is the autoencoder's forward, distance (pixels and the features of a VGG16 with random weights), adversarial
loss, adaptive weight and all gradients of both players; no optimizer. The usual way takes `autograd.grad` of either
loss at the last layer's weight, which walks back through perceptual network and discriminator, and then walks there
again in the backward of the sum. The arms take turns within every round; figures are medians, the ratio is the median
of the rounds' ratios.
device: auto, cpu or cuda.   size: reduced (Stable Diffusion's autoencoder at a fourth of its width, 64 pixels) or sd
    (its full size, 256 pixels); auto: reduced on the CPU, sd on a GPU.   batch: 0 = 4, on a GPU 8.
precision: 32 or bf16; auto: bf16 on a GPU, 32 on the CPU.
Memory, in a fresh process for each arm: peak allocated on a GPU; on the CPU the growth of its peak by two steps.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv[1:]}:
    sys.exit(print(__doc__))  # before torch is imported

import json
import statistics
import subprocess
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from benchmarks._options import read_options, run_main
from benchmarks.denoiser_step import peak_rss_gib, timed
from ldm.errors import check
from ldm.models.autoencoder.kl import AutoencoderKL
from ldm.reconstruction.adversarial import Adversarial, inputs_of
from ldm.reconstruction.discriminator import PatchDiscriminator
from ldm.reconstruction.objective import ReconstructionObjective
from ldm.reconstruction.perceptual import FeatureDistance
from ldm.reconstruction.vgg16 import VGG16

ARMS = ("one backward", "autograd twice")
OPTIONS = {"device": "auto", "size": "auto", "batch": 0, "rounds": 8, "precision": "auto", "child": ""}
Step = Callable[[], dict[str, Tensor]]


def players(size: str, device: torch.device) -> tuple[AutoencoderKL, ReconstructionObjective]:
    torch.manual_seed(0)
    full = size == "sd"
    autoencoder = AutoencoderKL(block_channels=[128, 256, 512, 512] if full else [32, 64, 128, 128])
    objective = ReconstructionObjective(
        kl_weight=1e-6,
        perceptual=FeatureDistance(VGG16(), "random"),
        adversarial=Adversarial(PatchDiscriminator(layers=3 if full else 2, width=64 if full else 32)),
    )
    return autoencoder.to(device).train(), objective.to(device).train()


def one_backward(autoencoder: AutoencoderKL, objective: ReconstructionObjective, images: Tensor, noise: Tensor) -> None:
    layer = autoencoder.decoder.conv_out
    with inputs_of(layer) as inputs:
        reconstruction, code = autoencoder(images, noise)
    objective.training_terms(reconstruction, images, code, 0, layer=layer, inputs=inputs[0])["loss"].mean().backward()


def autograd_twice(
    autoencoder: AutoencoderKL, objective: ReconstructionObjective, images: Tensor, noise: Tensor
) -> None:
    """Esser et al. 2021, arXiv:2012.09841, eq. 7, as latent diffusion trains: the reference."""
    adversarial = objective.adversarial
    assert adversarial is not None
    reconstruction, code = autoencoder(images, noise)
    distance = objective.distance(reconstruction, images)["distance"].mean()
    adversarial.requires_grad_(False)
    against = adversarial.generator_loss(adversarial.discriminator(reconstruction).float()).mean()
    weight = autoencoder.decoder.conv_out.weight
    (a,) = torch.autograd.grad(distance, weight, retain_graph=True)
    (b,) = torch.autograd.grad(against, weight, retain_graph=True)
    ratio = (a.norm() / (b.norm() + 1e-4)).clamp(0, adversarial.max_ratio).detach()
    penalty, _ = objective.penalty(code)
    (distance + adversarial.weight * ratio * against + penalty.mean()).backward()
    adversarial.requires_grad_(True)
    both = adversarial.discriminator(torch.cat([images, reconstruction.detach().float()])).float()
    adversarial.discriminator_loss(*both.chunk(2)).mean().backward()


def make_step(arm: str, size: str, batch: int, precision: str, device: torch.device) -> Step:
    """A function that computes all gradients and returns them by name."""
    autoencoder, objective = players(size, device)
    side = 256 if size == "sd" else 64
    generator = torch.Generator().manual_seed(1)
    images = (torch.rand(batch, 3, side, side, generator=generator) * 2 - 1).to(device)
    noise = torch.randn(batch, 4, side // 8, side // 8, generator=generator).to(device)
    work = one_backward if arm == ARMS[0] else autograd_twice
    named = [*autoencoder.named_parameters(), *objective.named_parameters()]

    def step() -> dict[str, Tensor]:
        for _, p in named:
            p.grad = None
        with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
            work(autoencoder, objective, images, noise)
        return {name: p.grad for name, p in named if p.grad is not None}

    return step


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of a player's whole gradient, relative; the larger of the two players'."""
    check(ours.keys() == theirs.keys(), "NUMBERS", "the arms have gradients of different weights")
    found = []
    for of_discriminator in (False, True):
        names = [name for name in theirs if name.startswith("adversarial.") == of_discriminator]
        a, b = (torch.cat([grads[name].flatten() for name in names]) for grads in (ours, theirs))
        found.append(float((a - b).norm() / b.norm()))
    return max(found)


def peak_memory(arm: str, words: list[str]) -> float:
    """GiB, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.adaptive_weight", *words, f"child={arm}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(json.loads(said.splitlines()[-1]))


def main(arguments: Sequence[str]) -> None:
    options = read_options(arguments, OPTIONS)
    if options["device"] == "auto":
        options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = options["device"] == "cuda"
    defaults = {"size": "sd" if gpu else "reduced", "precision": "bf16" if gpu else "32"}
    options |= {key: value for key, value in defaults.items() if options[key] == "auto"}
    options["batch"] = options["batch"] or (8 if gpu else 4)
    for key, allowed in (("size", ("reduced", "sd")), ("precision", ("32", "bf16")), ("device", ("cpu", "cuda"))):
        check(options[key] in allowed, "CONFIG", f"{key} must be one of {', '.join(allowed)}, not {options[key]!r}")
    check(options["rounds"] >= 1, "CONFIG", "no rounds to measure", where="rounds")
    device = torch.device(options["device"])
    settings = (options["size"], options["batch"], options["precision"], device)
    if options["child"]:
        step = make_step(options["child"], *settings)
        before = peak_rss_gib()
        step(), step()
        peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else peak_rss_gib() - before
        return print(json.dumps(peak))

    steps = {arm: make_step(arm, *settings) for arm in ARMS}
    first = {arm: {name: g.clone() for name, g in steps[arm]().items()} for arm in ARMS}
    apart = difference(first[ARMS[0]], first[ARMS[1]])
    if options["precision"] == "32":
        check(apart < 1e-4, "NUMBERS", "the arms do not compute the same gradients", limit=f"{apart:.1e} apart")
    words = [f"{key}={value}" for key, value in options.items() if key != "child"]
    memory = {arm: peak_memory(arm, words) for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for arm in ARMS:  # warm-up
        timed(steps[arm], device)
    for turn in range(options["rounds"]):
        for arm in ARMS if turn % 2 == 0 else ARMS[::-1]:
            seconds[arm].append(timed(steps[arm], device))
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; torch {torch.__version__}; {settings[0]}, batch {settings[1]}, {settings[2]}")
    print(f"gradients at most {apart:.1e} apart")
    print(f"{'':>16} {'ms/step':>9} {'images/s':>9} {'peak GiB':>9}")
    for arm in ARMS:
        s = statistics.median(seconds[arm])
        print(f"{arm:>16} {1e3 * s:>9.1f} {settings[1] / s:>9.2f} {memory[arm]:>9.3f}")
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
    print(f"one backward is {statistics.median(ratios):.2f} x as fast ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    run_main(main)
