"""How long training stands still for a checkpoint, and how much memory that takes.

    python -m benchmarks.saving [gigabytes=1.0] [rounds=5] [folder=FOLDER]

A state of weights, averages and AdamW's two moments is saved by the store, as `train.py` does, once while the loop
waits (checkpoint.async_save=false) and once beside it (true); each in a process of its own. The time is that until
training could go on; the memory is the growth of the process' peak. commit: until the checkpoint is whole on the disk.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv[1:]}:
    sys.exit(print(__doc__))  # before torch is imported

import json
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._options import read_options, run_main
from ldm.checkpoints.background import Writer
from ldm.checkpoints.store import Store

ARMS = {"waiting": False, "beside": True}
OPTIONS = {"gigabytes": 1.0, "rounds": 5, "folder": "", "child": ""}
LAYERS = 64


def child(options: dict[str, Any]) -> None:
    numel = int(options["gigabytes"] * 2**30 / 16 / LAYERS)
    names = [f"layers.{i}.weight" for i in range(LAYERS)]
    groups = [{name: torch.randn(numel) for name in names} for _ in range(4)]
    moments = {i: {"exp_avg": groups[2][n], "exp_avg_sq": groups[3][n]} for i, n in enumerate(names)}
    state = {
        "tensors": {"model": groups[0], "ema": groups[1]},
        "trees": {"optim": {"state": moments, "param_groups": [{"lr": 1e-4}]}},
        "documents": {"state": {"train_step": 0}, "config": {}},
    }
    store = Store(Path(options["folder"]) / options["child"], keep_last=2)
    store.claim()
    writer = Writer(store, background=ARMS[options["child"]])
    before, stood, committed = peak(), [], []
    for step in range(1, options["rounds"] + 1):
        began = time.perf_counter()
        writer.save(step, **state)
        stood.append(time.perf_counter() - began)
        writer.join()
        committed.append(time.perf_counter() - began)
        if writer.result.error is not None:
            raise writer.result.error
    print(json.dumps([statistics.median(stood), max(stood), statistics.median(committed), peak() - before]))


def peak() -> float:
    """GiB"""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(arguments: Sequence[str]) -> None:
    options = read_options(arguments, OPTIONS)
    if options["child"]:
        return child(options)
    with tempfile.TemporaryDirectory(prefix="ldm-saving-", dir=options["folder"] or None) as folder:
        print(f"a state of {options['gigabytes']:g} GiB, {options['rounds']} saves; medians")
        print(f"{'':<10}{'stands still':>14}{'longest':>10}{'commit':>10}{'memory':>12}")
        for arm in ARMS:
            words = [f"gigabytes={options['gigabytes']}", f"rounds={options['rounds']}", f"folder={folder}"]
            command = [sys.executable, "-m", "benchmarks.saving", *words, f"child={arm}"]
            said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            stood, longest, commit, memory = json.loads(said)
            print(f"{arm:<10}{stood:12.2f} s{longest:8.2f} s{commit:8.2f} s{memory:8.2f} GiB", flush=True)


if __name__ == "__main__":
    run_main(main)
