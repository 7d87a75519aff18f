"""One training step of our UNet beside diffusers' UNet2DConditionModel: same weights, same batch, one run.

    python -m benchmarks.denoiser_step [device=auto] [size=auto] [batch=0] [rounds=8] [precision=auto] [compile=false]

A step is forward, backward, gradient norm clipped at 1, and a fused AdamW. The arms take turns within every round, so
that a machine whose speed drifts slows both; figures are medians over the rounds, and the ratio is the median of the
rounds' ratios.
device: auto, cpu or cuda.   size: reduced (the true architecture of SD 2.1 at a fifth of its width, 32x32 latents),
    sd21-256 or sd21-512 (its full size at these pictures); auto: reduced on the CPU, sd21-512 on a GPU.
batch: images of a step, 0 = 4 on the CPU, 32 on a GPU.   precision: 32 or bf16; auto: bf16 on a GPU, 32 on the CPU.
compile: torch.compile for both arms.

Needs `pip install "ldm[interop]"`.  MFU: counted FLOPs of forward and backward (matrix products, convolutions and
attention; torch.utils.flop_counter) over the speed of a large matrix product measured in the same run.
Memory: peak allocated on a GPU; on the CPU the growth of a fresh process' peak while it takes two steps.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv[1:]}:
    sys.exit(print(__doc__))  # before torch is imported

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks._options import read_options, run_main
from ldm.errors import LdmError, check
from ldm.models.unet.unet import UNet
from ldm.types import Conditioning

ARMS = ("ours", "diffusers")
LATENTS = {"reduced": 32, "sd21-256": 32, "sd21-512": 64}
OPTIONS = {
    "device": "auto",
    "size": "auto",
    "batch": 0,
    "rounds": 8,
    "precision": "auto",
    "compile": False,
    "child": "",
}
Step = Callable[[], Tensor]


def network(arm: str, size: str, device: torch.device) -> nn.Module:
    """Our UNet or diffusers' in the shape of SD 2.1."""
    widths, head_dim, context = [320, 640, 1280, 1280], 64, 1024
    if size == "reduced":
        widths, head_dim, context = [64, 128, 256, 256], 32, 256
    torch.manual_seed(0)
    if arm == "ours":
        return UNet(4, 4, widths, 2, [1, 1, 1, 0], 1, context, head_dim=head_dim).to(device).train()
    try:
        from diffusers import UNet2DConditionModel
    except ImportError:
        raise LdmError("INSTALL", "diffusers is not installed", next='pip install "ldm[interop]"') from None
    shape = {"block_out_channels": widths, "attention_head_dim": [width // head_dim for width in widths]}
    return (
        UNet2DConditionModel(
            sample_size=LATENTS[size], cross_attention_dim=context, use_linear_projection=True, **shape
        )
        .to(device)
        .train()
    )


def training_step(arm: str, model: nn.Module, size: str, batch: int, precision: str) -> Step:
    """A function that takes one optimizer step on a fixed batch and returns the loss."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)
    side = LATENTS[size]
    context = 256 if size == "reduced" else 1024

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x, target = normal(batch, 4, side, side), normal(batch, 4, side, side)
    time_, tokens = torch.arange(batch, device=device) * 37.0 % 1000, normal(batch, 77, context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def cast() -> AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    def step() -> Tensor:
        with cast():
            if arm == "ours":
                prediction = model(x, time_, Conditioning(tokens=tokens))
            else:
                prediction = model(x, time_, tokens, return_dict=False)[0]
            loss = (prediction.float() - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, device work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matmul_speed(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product: the yardstick of MFU."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    a @ a
    return 2 * side**3 / min(timed(lambda: a @ a, device) for _ in range(5))


def count_flops(step: Step) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_memory(arm: str, options: dict[str, object], device: torch.device, step: Step) -> float:
    """GiB; see the module."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**30
    words = [f"{key}={value}" for key, value in options.items() if key != "child"]
    command = [sys.executable, "-m", "benchmarks.denoiser_step", *words, f"child={arm}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(json.loads(said.splitlines()[-1])["peak_gib"])


def peak_rss_gib() -> float:
    """Highest resident memory of this process so far (Linux; getrusage would inherit the parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    raise OSError("no VmHWM in /proc/self/status")


def measure_child(arm: str, size: str, batch: int, precision: str) -> None:
    """In a fresh process: how far two steps raise its peak."""
    model = network(arm, size, torch.device("cpu"))
    before = peak_rss_gib()
    step = training_step(arm, model, size, batch, precision)
    step(), step()
    print(json.dumps({"peak_gib": peak_rss_gib() - before}))


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    device = torch.device(str(options["device"]))
    size, batch, precision = str(options["size"]), int(options["batch"]), str(options["precision"])  # type: ignore[call-overload]
    if options["child"]:
        return measure_child(str(options["child"]), size, batch, precision)

    arms = {name: network(name, size, device) for name in ARMS}
    arms["diffusers"].load_state_dict(arms["ours"].state_dict())
    reference = {name: training_step(name, arms[name], size, batch, precision) for name in ARMS}
    first = {name: float(reference[name]()) for name in ARMS}
    check(
        abs(first["ours"] - first["diffusers"]) < (2e-2 if precision == "bf16" else 1e-5) * first["diffusers"],
        "NUMBERS",
        "the arms do not compute the same loss from the same weights and batch",
        limit=f"{first}",
    )
    flops = {name: count_flops(reference[name]) for name in ARMS}
    memory = {name: peak_memory(name, options, device, reference[name]) for name in ARMS}
    if options["compile"]:
        for model in arms.values():
            model.compile()
    for name in ARMS:  # warm-up
        timed(reference[name], device), timed(reference[name], device)
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for turn in range(int(options["rounds"])):  # type: ignore[call-overload]
        for name in ARMS if turn % 2 == 0 else ARMS[::-1]:
            seconds[name].append(timed(reference[name], device))
    peak = matmul_speed(device, precision)

    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; torch {torch.__version__}; {size}, batch {batch}, {precision}, compile {options['compile']}")
    print(f"{'':>10} {'images/s':>9} {'ms/step':>9} {'TFLOP/img':>10} {'MFU':>6} {'peak GiB':>9}")
    for name in ARMS:
        s = statistics.median(seconds[name])
        work = flops[name] / batch / 1e12
        print(
            f"{name:>10} {batch / s:>9.2f} {1e3 * s:>9.1f} {work:>10.4f} {flops[name] / s / peak:>6.1%}"
            f" {memory[name]:>9.2f}"
        )
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["diffusers"], strict=True)]
    print(
        f"ours is {statistics.median(ratios):.2f} x diffusers ({min(ratios):.2f} to {max(ratios):.2f} over the rounds)"
    )


def parse(arguments: Sequence[str]) -> dict[str, object]:
    options: dict[str, object] = read_options(arguments, OPTIONS)
    if options["device"] == "auto":
        options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = options["device"] == "cuda"
    if options["size"] == "auto":
        options["size"] = "sd21-512" if gpu else "reduced"
    if options["precision"] == "auto":
        options["precision"] = "bf16" if gpu else "32"
    options["batch"] = options["batch"] or (32 if gpu else 4)
    for key, allowed in (("size", LATENTS), ("precision", ("32", "bf16")), ("device", ("cpu", "cuda"))):
        check(options[key] in allowed, "CONFIG", f"{key} must be one of {', '.join(allowed)}, not {options[key]!r}")
    check(int(options["rounds"]) >= 1, "CONFIG", "no rounds to measure", where="rounds")  # type: ignore[call-overload]
    return options


if __name__ == "__main__":
    run_main(main)
