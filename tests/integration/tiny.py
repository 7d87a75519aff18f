"""A whole run at toy size: sixteen pixels, a few thousand parameters, seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.store import Checkpoint, Store
from ldm.cli import compose

ROOT = Path(__file__).parents[2]

MODEL = [
    "data.image_size=16",
    "model.autoencoder.block_channels=[8,8]",
    "model.autoencoder.latent_channels=4",
    "model.autoencoder.patch_size=2",
    "model.autoencoder.norm_groups=4",
    "model.network.block_channels=[16]",
    "model.network.head_dim=8",
    "model.network.norm_groups=4",
    "model.conditioner.width=16",
    "model.conditioner.depth=1",
    "model.conditioner.num_heads=2",
    "model.conditioner.embedding_size=4",
]

_ADVERSARIAL = "stage.autoencoder.objective.adversarial"
GAN = [  # a discriminator that starts in the middle, and everything else that the autoencoder's objective has
    "adversarial=patchgan",
    f"{_ADVERSARIAL}.start_step=3",
    f"{_ADVERSARIAL}.ramp_steps=4",
    f"{_ADVERSARIAL}.discriminator.width=8",
    f"{_ADVERSARIAL}.discriminator.layers=1",
    f"{_ADVERSARIAL}.discriminator.norm_groups=4",
    "stage.autoencoder.objective.learn_logvar=true",
    "stage.autoencoder.objective.kl_warmup_steps=5",
]


def overrides(data: Path, runs: Path, *more: str, steps: int = 12, save_every: int = 4) -> list[str]:
    """Command-line words of a tiny run. Later words win."""
    stages = []
    for stage in ("autoencoder", "diffusion"):
        stages += [
            f"stage.{stage}.max_steps={steps}",
            f"stage.{stage}.batch_size=8",
            f"stage.{stage}.save_every={save_every}",
            f"stage.{stage}.validate_every={save_every}",
            f"stage.{stage}.sample_every=null",
            f"stage.{stage}.precision=32",
            f"stage.{stage}.lr_schedule.warmup_steps=2",
        ]
    words = [f"data.path={data}", f"output_dir={runs}", "name=tiny", "logger.mode=disabled", "checkpoint.keep_last=50"]
    return [*words, *MODEL, *stages, "stage.diffusion.sample_prompts=[]", *more]


def config(data: Path, runs: Path, *more: str, **sizes: int) -> dict[str, Any]:
    return compose("train", overrides(data, runs, *more, **sizes))


def start(words: list[str], script: str = "train.py", **env: str) -> subprocess.Popen[str]:
    """The real command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled", **env}
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *words],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def command(words: list[str], script: str = "train.py", timeout: float = 240, **env: str) -> tuple[int, str]:
    """Exit code and everything that the command printed."""
    process = start(words, script, **env)
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def metrics(run: Path, stage: str) -> list[dict[str, Any]]:
    path = run / stage / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def reach(process: subprocess.Popen[str], run: Path, stage: str, step: int, timeout: float = 150) -> None:
    """Waits until a running command has written so many steps."""
    deadline = time.monotonic() + timeout
    while len(metrics(run, stage)) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.005)


def children(pid: int, holding: str = "") -> list[int]:
    """The processes that a process has started, oldest first. holding: a word of their command line."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if holding.encode() in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def history(run: Path, stage: str) -> list[dict[str, Any]]:
    """The metrics of each step without what depends on the clock and the machine."""
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in metrics(run, stage)]


def contents(checkpoint: Checkpoint) -> dict[str, Any]:
    """All state of a checkpoint as one flat mapping of tensors and values."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                walk(f"{prefix}/{key}", child)
        elif isinstance(value, list | tuple):
            for index, child in enumerate(value):
                walk(f"{prefix}/{index}", child)
        else:
            flat[prefix] = value

    files = checkpoint.manifest["files"]
    for name in (file.removesuffix(".safetensors") for file in files if file.endswith(".safetensors")):
        walk(name, checkpoint.tree(name) if f"{name}.json" in files else checkpoint.tensors(name))
    state = checkpoint.document("state")
    walk("state", {k: v for k, v in state.items() if k not in ("environment", "versions")})
    return flat


def first_difference(a: Checkpoint, b: Checkpoint, *, tolerance: float | None = None) -> str | None:
    """The first value in which two checkpoints differ, in words, or None. tolerance: relative, for tensors."""
    left, right = contents(a), contents(b)
    for name in sorted(left.keys() | right.keys()):
        x, y = left.get(name, "absent"), right.get(name, "absent")
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            same = torch.equal(x, y)
            if not same and tolerance is not None and x.shape == y.shape:
                same = torch.allclose(x.double(), y.double(), rtol=tolerance, atol=tolerance)
            if not same:
                worst = float((x.double() - y.double()).abs().max()) if x.shape == y.shape else float("nan")
                return f"step {a.step}: {name} differs by up to {worst:g}"
        elif x != y:
            return f"step {a.step}: {name} is {x!r} and {y!r}"
    return None


def compare_runs(a: Path, b: Path, stage: str) -> list[str]:
    """Every checkpoint of a stage that either run has, compared."""
    left, right = Store(a / stage / "ckpt"), Store(b / stage / "ckpt")
    if left.steps() != right.steps():
        return [f"steps {left.steps()} and {right.steps()}"]
    found = (first_difference(left.load(s), right.load(s)) for s in left.steps())
    return [words for words in found if words]
