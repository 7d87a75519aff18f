"""What the training engine costs: four loops around one and the same training step of the demo's denoiser.

    python -m benchmarks.engine [rounds=24] [steps=20] [batch=16] [precision=32] [size=64]

bare loop         backward, clipping, AdamW, averaged weights, learning rate; nothing else
Lightning bare    the same as a LightningModule with automatic optimisation, Lightning's clipping, averages in a hook
ours, bare        our module and its `OptimizerStep` under Lightning, no callbacks
ours, complete    the run that `train.py` makes: logs, metrics, progress, alarms, checkpoints and signals; no save,
                  validation or picture falls due in what is measured

All read the same latents of toy logos from a cache, in the same order. Each loop is a process of its own; they take
turns, `steps` steps each; a table gives medians over the rounds, and of the differences within a round with their
quartiles.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv[1:]}:
    sys.exit(print(__doc__))  # before torch is imported

import contextlib
import io
import logging
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import pytorch_lightning as pl
import torch

from benchmarks._options import read_options, run_main
from data.toy_logos.make import write_set
from ldm.build import build
from ldm.config import compose
from ldm.data.cache import Cache
from ldm.data.datamodule import DataModule
from ldm.errors import check
from ldm.random import Draws, run_key
from ldm.tools.cache import cache
from ldm.tools.cache_options import Options as CacheOptions
from ldm.training import run_stage
from ldm.training.assemble import build_module
from ldm.training.diffusion_module import DiffusionModule
from ldm.training.fit import train
from ldm.training.place import Place
from ldm.types import Batch

ARMS = ("bare loop", "Lightning bare", "ours, bare", "ours, complete")
OPTIONS = {"rounds": 24, "steps": 20, "batch": 16, "precision": "32", "size": 64, "child": "", "folder": ""}


def words_of(options: dict[str, Any], name: str) -> list[str]:
    folder, stage = options["folder"], "stage.diffusion"
    return [
        *(f"data.path={folder}/shards", f"data.image_size={options['size']}", f"data.cache={folder}/cache"),
        *(f"output_dir={folder}/runs", f"name={name}", "logger.mode=disabled", "stages=[diffusion]"),
        *(f"init_from={folder}/runs/first", f"{stage}.max_steps=1000000", f"{stage}.batch_size={options['batch']}"),
        *(f"{stage}.{key}=null" for key in ("validate_every", "sample_every")),
        *(f"{stage}.save_every=1000000", f"{stage}.precision={options['precision']}"),
    ]


def prepare(options: dict[str, Any]) -> None:
    """Toy logos, an autoencoder that has seen two steps, and a cache of its latents."""
    folder = Path(options["folder"])
    write_set(folder / "shards", num_samples=2000, num_val=20, num_shards=5, size=options["size"])
    first = ["stages=[autoencoder]", "stage.autoencoder.max_steps=2", "stage.autoencoder.lr_schedule.warmup_steps=1"]
    drop = (f"data.cache={folder}/cache", f"init_from={folder}/runs/first", "stages=[diffusion]")
    train(compose("train", [*(w for w in words_of(options, "first") if w not in drop), *first]))
    cache(folder / "cache", CacheOptions(run=str(folder / "runs" / "first")))


class Turn:
    """Runs steps when the parent says so: a line in, `steps` steps, their seconds out."""

    def __init__(self, steps: int, out: TextIO) -> None:
        self.steps, self.out, self.left = steps, out, 0
        self.began = 0.0

    def __call__(self) -> None:
        """Called after every step."""
        if self.left == 0:
            answer = f"{time.perf_counter() - self.began:.6f}" if self.began else "ready"
            print(answer, file=self.out, flush=True)
            if sys.stdin.readline() != "go\n":
                raise KeyboardInterrupt
            self.left, self.began = self.steps, time.perf_counter()
        self.left -= 1


class Turns(pl.Callback):
    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def on_train_batch_end(self, *_: object) -> None:
        self.turn()


def opened(options: dict[str, Any], cfg: dict[str, Any]) -> tuple[DiffusionModule, DataModule]:
    data: DataModule = build(cfg["data"], where="data").open()
    data.configure(seed=0, batch_size=options["batch"])
    folder = Path(options["folder"]) / "runs" / "first"
    module = build_module(cfg, (), "diffusion", folder, options["precision"])
    assert isinstance(module, DiffusionModule)
    module.use_cache(Cache.open(cfg["data"]["cache"]), data)
    return module, data


def bare_step(module: DiffusionModule) -> tuple[Callable[[Batch], torch.Tensor], Any, Any, list, list]:
    """(loss of a batch, optimizer, schedule of its learning rate, weights, averages)."""
    weights = [p for p in module.trained().parameters() if p.requires_grad]
    key = run_key(0)

    def loss(batch: Batch) -> torch.Tensor:
        return module.loss(batch, Draws(key, batch.slots, host=batch.slots))["loss"].mean()

    optimizer = module.settings.optimizer(weights)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, module.settings.lr_schedule)
    return loss, optimizer, schedule, weights, [p.detach().clone() for p in weights]


def run_bare(module: DiffusionModule, data: DataModule, turn: Turn, precision: str) -> None:
    loss, optimizer, schedule, weights, averages = bare_step(module)
    module.trained().train()
    for batch in data.train_dataloader():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32"):
            value = loss(batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        torch._foreach_lerp_(averages, [p.detach() for p in weights], 1e-3)
        turn()


class Plain(pl.LightningModule):
    def __init__(self, module: DiffusionModule) -> None:
        super().__init__()
        self.trained = module.trained()
        self.compute, self.made, self.schedule, self.weights, self.averages = bare_step(module)

    def configure_optimizers(self) -> Any:
        return {"optimizer": self.made, "lr_scheduler": {"scheduler": self.schedule, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return self.compute(batch)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **_: object) -> None:
        """What Lightning does by itself, but for a fused optimizer in mixed precision, which it refuses."""
        torch.nn.utils.clip_grad_norm_(self.weights, gradient_clip_val)

    def on_train_batch_end(self, *_: object) -> None:
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.weights], 1e-3)


def child(options: dict[str, Any], turn: Turn) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    cfg = compose("train", words_of(options, "complete"))
    arm, precision = options["child"], options["precision"]
    make_trainer = run_stage.make_trainer
    if arm == "ours, complete":

        def with_turns(node: Any, precision: str, callbacks: list, *rest: Any) -> pl.Trainer:
            return make_trainer(node, precision, [*callbacks, Turns(turn)], *rest)

        run_stage.make_trainer = with_turns
        return train(cfg)
    module, data = opened(options, cfg)
    if arm == "bare loop":
        return run_bare(module, data, turn, precision)
    if arm == "ours, bare":
        trainer = make_trainer(cfg["trainer"], precision, [Turns(turn)], Path(options["folder"]), Place())
        return trainer.fit(module, datamodule=data)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        precision="32-true" if precision == "32" else precision,
        gradient_clip_val=1.0,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=[Turns(turn)],
    )
    trainer.fit(Plain(module), train_dataloaders=data.train_dataloader())


def turns(options: dict[str, Any]) -> dict[str, list[float]]:
    """Milliseconds a step of each arm, one figure a round; the first round is not counted."""
    words = [f"{key}={value}" for key, value in options.items() if key != "child"]
    command = [sys.executable, "-m", "benchmarks.engine", *words]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with contextlib.ExitStack() as stack:
        workers = {a: stack.enter_context(subprocess.Popen([*command, f"child={a}"], **pipes)) for a in ARMS}
        stack.callback(lambda: [worker.kill() for worker in workers.values()])
        for worker in workers.values():
            assert worker.stdout.readline() == "ready\n", "an arm did not start"
        for number in range(options["rounds"] + 1):
            for arm in ARMS[number % 2 :] + ARMS[: number % 2]:
                workers[arm].stdin.write("go\n")
                workers[arm].stdin.flush()
                seconds = float(workers[arm].stdout.readline())
                if number:
                    found[arm].append(1000 * seconds / options["steps"])
    return found


def main(arguments: Sequence[str]) -> None:
    options = read_options(arguments, OPTIONS)
    if options["child"]:
        turn = Turn(options["steps"], sys.stdout)
        with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(KeyboardInterrupt):
            return child(options, turn)
    check(options["rounds"] >= 2, "CONFIG", f"rounds={options['rounds']} is refused", limit="at least 2")
    with tempfile.TemporaryDirectory(prefix="ldm-engine-") as folder:
        options["folder"] = folder
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            prepare(options)
        found = turns(options)
    print(f"CPU, {torch.get_num_threads()} threads; torch {torch.__version__}; batch {options['batch']}, "
          f"precision {options['precision']}; {options['rounds']} rounds of {options['steps']} steps")  # fmt: skip
    print(f"{'':<16}{'ms/step':>10}{'over the bare loop':>36}{'over Lightning bare':>36}")
    for arm in ARMS:
        cells = [_over(found[arm], found[other]) if arm != other else "-" for other in ARMS[:2]]
        print(f"{arm:<16}{statistics.median(found[arm]):10.1f}" + "".join(f"{cell:>36}" for cell in cells))


def _over(arm: Sequence[float], other: Sequence[float]) -> str:
    """Median of the differences within a round, in brackets the quartiles, and the median of the ratios."""
    by = [a - b for a, b in zip(arm, other, strict=True)]
    low, middle, high = statistics.quantiles(by, n=4)
    share = statistics.median(a / b - 1 for a, b in zip(arm, other, strict=True))
    return f"{middle:+.1f} ms ({low:+.1f} to {high:+.1f}) {share:+.1%}"


if __name__ == "__main__":
    run_main(main)
