"""How much later the first step comes after a resume than after a fresh start.

    python -m benchmarks.resuming [rounds=5] [batch=16]

The command of `benchmarks.engine`, the demo's denoiser on cached latents, is started as a fresh run and as one that
continues at step 2, in turns; each time it is ended when its first new step is written. The times are from the start
of the command to that step.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv[1:]}:
    sys.exit(print(__doc__))  # before torch is imported

import contextlib
import io
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import engine
from benchmarks._options import read_options, run_main

TRAIN = Path(__file__).parents[1] / "train.py"
OPTIONS = {"rounds": 5, "batch": 16}
SAVED = 2


def seconds_to_step(words: list[str], metrics: Path, lines: int) -> float:
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, str(TRAIN), *words], stdout=subprocess.DEVNULL) as process:
        while not metrics.exists() or metrics.read_text().count("\n") < lines:
            assert process.poll() is None, "the command ended"
            time.sleep(0.005)
        taken = time.perf_counter() - began
        process.kill()
    return taken


def main(arguments: Sequence[str]) -> None:
    given = read_options(arguments, OPTIONS)
    options: dict[str, Any] = {**engine.OPTIONS, "batch": given["batch"]}
    fresh, resumed = [], []
    with tempfile.TemporaryDirectory(prefix="ldm-resuming-") as folder:
        options["folder"] = folder
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            engine.prepare(options)
        words = [*engine.words_of(options, "mine"), f"stage.diffusion.save_every={SAVED}"]
        run = Path(folder) / "runs" / "mine"
        metrics = run / "diffusion" / "metrics.jsonl"
        checkpoint = run / "diffusion" / "ckpt" / f"step-{SAVED:09d}"
        for _ in range(given["rounds"]):
            shutil.rmtree(run, ignore_errors=True)
            fresh.append(seconds_to_step(words, metrics, 1))
            shutil.rmtree(run)
            seconds_to_step(words, metrics, SAVED + 1)
            assert checkpoint.is_dir(), "nothing was saved"
            metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:SAVED]))
            resumed.append(seconds_to_step(words, metrics, SAVED + 1))
        size = sum(f.stat().st_size for f in checkpoint.iterdir())
    later = [b - a for a, b in zip(fresh, resumed, strict=True)]
    print(f"a checkpoint of {size / 1e6:.0f} MB, {given['rounds']} rounds; medians, and the largest difference")
    print(f"fresh {statistics.median(fresh):.2f} s, resumed {statistics.median(resumed):.2f} s: "
          f"{statistics.median(later):+.2f} s, at most {max(later):+.2f} s")  # fmt: skip


if __name__ == "__main__":
    run_main(main)
