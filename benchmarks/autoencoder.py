"""How well our trainer trains an autoencoder, on held-out pictures of a data set of yours.

    python -m benchmarks.autoencoder data=PATH [steps=600] [seeds=3] [size=64] [batch=16] [lr=0.002] [out=FOLDER]
    python -m benchmarks.autoencoder data=PATH features=RUN judge=RUN [weight=...] [perceptual=...] [out=FOLDER]

The first form sets `train.py` (L1, KL, averaged weights) beside a plain loop around diffusers' AutoencoderKL: the same
shape, pictures in the same order, loss, optimizer and learning rate, the last weights, as its example script keeps.
Needs `pip install "ldm[interop]"`.
The second sets L1 alone beside L1 with a perceptual distance and a discriminator, both by `train.py`, and lets a judge
look that no loss used: `features` is the run whose tower the loss uses, `judge` another, of another seed and data set
(`python train.py experiment=features_toy seed=1 data=shards data.path=OTHER`). perceptual, weight: of the two terms.
A run that is finished in `out` is not trained again. start: the share of the steps before the discriminator's first.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv[1:]}:
    sys.exit(print(__doc__))  # before torch is imported

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks._options import read_options, run_main
from ldm.build import build
from ldm.checkpoints.run import open_stage
from ldm.config import compose
from ldm.data.datamodule import DataModule
from ldm.distances import trained_features
from ldm.errors import LdmError, check
from ldm.model import load_autoencoder
from ldm.models.autoencoder.kl import AutoencoderKL
from ldm.reconstruction.measures import psnr, ssim
from ldm.reconstruction.objective import kl_divergence
from ldm.training.fit import train
from ldm.training.lr_schedule import Cosine

SHAPE = {"block_channels": [16, 32, 64], "latent_channels": 4, "layers_per_block": 1, "norm_groups": 8}
KL_WEIGHT, WARMUP = 1e-6, 50
OPTIONS = {
    "data": "",
    "steps": 600,
    "seeds": 3,
    "size": 64,
    "batch": 16,
    "lr": 2e-3,
    "features": "",
    "judge": "",
    "perceptual": 5.0,
    "weight": 0.5,
    "start": 0.3,
    "out": "",
}
Reconstruct = Callable[[Tensor], Tensor]


def words_of(options: dict, name: str, seed: int, *more: str) -> list[str]:
    """What `train.py` is called with."""
    shape = [f"model.autoencoder.{key}={value}".replace(" ", "") for key, value in SHAPE.items()]
    stage = {
        "max_steps": options["steps"],
        "batch_size": options["batch"],
        "save_every": options["steps"],
        "validate_every": "null",
        "sample_every": "null",
        "precision": 32,
        "optimizer.lr": options["lr"],
        "lr_schedule.warmup_steps": WARMUP,
        "objective.kl_weight": KL_WEIGHT,
    }
    folder = Path(options["data"])
    kind = "shards" if folder.is_file() or any(folder.glob("*.tar")) else "folder"
    return [
        *("model/autoencoder=kl_sd", "model.autoencoder.quant_conv=true", *shape, "stages=[autoencoder]"),
        *(f"data={kind}", f"data.path={options['data']}", f"data.image_size={options['size']}", "data.crop=pad"),
        *(f"data.index_dir={options['out']}/index", f"output_dir={options['out']}", f"name={name}", f"seed={seed}"),
        *(f"stage.autoencoder.{key}={value}" for key, value in stage.items()),
        *("logger.mode=disabled", *more),
    ]


def ours(options: dict, name: str, seed: int, *more: str) -> Reconstruct:
    cfg = compose("train", words_of(options, name, seed, *more))
    with contextlib.redirect_stdout(io.StringIO()):
        train(cfg)
    autoencoder = load_autoencoder(open_stage(Path(options["out"]) / name, "autoencoder"))
    return lambda images: autoencoder(images)[0]


def opened(options: dict, seed: int) -> DataModule:
    cfg = compose("train", words_of(options, "none", seed))
    data: DataModule = build(cfg["data"], where="data").open()
    data.configure(seed=seed, batch_size=options["batch"])
    return data


def plain_loop(options: dict, seed: int) -> Reconstruct:
    try:
        from diffusers import AutoencoderKL as Theirs
    except ImportError:
        raise LdmError("INSTALL", "diffusers is not installed", next='pip install "ldm[interop]"') from None
    torch.manual_seed(seed)
    model = Theirs(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=SHAPE["block_channels"],
        latent_channels=SHAPE["latent_channels"],
        layers_per_block=SHAPE["layers_per_block"],
        norm_num_groups=SHAPE["norm_groups"],
        sample_size=options["size"],
    )
    reference = AutoencoderKL(**SHAPE, quant_conv=True)  # type: ignore[arg-type]
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, reference)]
    check(sizes[0] == sizes[1], "NUMBERS", "the arms differ in shape", limit=f"{sizes}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=options["lr"], betas=(0.9, 0.99), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, Cosine(options["steps"], WARMUP))
    for step, batch in enumerate(opened(options, seed).train_dataloader()):
        if step == options["steps"]:
            break
        posterior = model.encode(batch.images).latent_dist
        reconstruction = model.decode(posterior.sample()).sample
        loss = (reconstruction - batch.images).abs().mean() + KL_WEIGHT * kl_divergence(posterior.parameters).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    model.eval()
    return lambda images: model.decode(model.encode(images).latent_dist.mode()).sample


@torch.no_grad()
def measured(reconstruct: Reconstruct, options: dict, judges: dict[str, nn.Module]) -> dict[str, float]:
    """Means over the held-out pictures."""
    found: dict[str, list[Tensor]] = {}
    for batch in opened(options, 0).val_dataloader(32):
        images = batch.images[batch.valid]
        pictures = reconstruct(images).clamp(-1, 1)
        values = {"PSNR": psnr(pictures, images), "SSIM": ssim(pictures, images)}
        for name, judge in judges.items():
            values[name] = judge(pictures, images)
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: float(torch.cat(values).mean()) for name, values in found.items()}


def parity(options: dict) -> None:
    rows: dict[str, list[float]] = {"ours": [], "plain loop": []}
    for seed in range(options["seeds"]):
        for arm, values in rows.items():
            began = time.monotonic()
            reconstruct = ours(options, f"l1-{seed}", seed) if arm == "ours" else plain_loop(options, seed)
            found = measured(reconstruct, options, {})
            values.append(found["PSNR"])
            print(
                f"seed {seed}  {arm:<12} {found['PSNR']:.2f} dB  SSIM {found['SSIM']:.4f}  "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
    for arm, values in rows.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{arm:<12} {statistics.mean(values):.2f} dB, standard deviation {spread:.2f} over {len(values)} seeds")


def judged(options: dict) -> None:
    judges = {"features": trained_features(options["features"]), "judge": trained_features(options["judge"])}
    check(
        judges["features"].label != judges["judge"].label,
        "CONFIG",
        "the judge is the network of the loss",
        where="judge",
    )
    torch.manual_seed(0)
    objective = "stage.autoencoder.objective"
    small = {"width": 32, "layers": 2, "norm_groups": 32} if options["size"] < 128 else {}
    full = [
        *("perceptual=features", f"{objective}.perceptual.run={options['features']}", "adversarial=patchgan"),
        f"{objective}.perceptual_weight={options['perceptual']}",
        f"{objective}.adversarial.weight={options['weight']}",
        f"{objective}.adversarial.start_step={int(options['start'] * options['steps'])}",
        f"{objective}.adversarial.ramp_steps={int(0.1 * options['steps'])}",
        *(f"{objective}.adversarial.discriminator.{key}={value}" for key, value in small.items()),
    ]
    name = f"full-{options['perceptual']:g}-{options['weight']:g}".replace(".", "_")
    results = {}
    for seed in range(options["seeds"]):
        for arm, run, more in (("L1", f"l1-{seed}", []), ("all terms", f"{name}-{seed}", full)):
            began = time.monotonic()
            found = measured(ours(options, run, seed, *more), options, judges)
            results.setdefault(arm, []).append(found)
            said = "  ".join(f"{key} {value:.4g}" for key, value in found.items())
            print(f"seed {seed}  {arm:<10} {said}  {time.monotonic() - began:.0f} s", flush=True)
    mean = {arm: {k: statistics.mean(row[k] for row in rows) for k in rows[0]} for arm, rows in results.items()}
    fewer = 1 - mean["all terms"]["judge"] / mean["L1"]["judge"]
    print(
        f"the judge ({judges['judge'].label}) sees {fewer:.0%} less distance with all terms, "
        f"at {mean['L1']['PSNR'] - mean['all terms']['PSNR']:+.2f} dB less PSNR"
    )


def main(arguments: Sequence[str]) -> None:
    options = read_options(arguments, OPTIONS)
    check(bool(options["data"]), "CONFIG", "no pictures to train on", where="data", next="data=PATH")
    check(
        bool(options["features"]) == bool(options["judge"]), "CONFIG", "features and judge go together", where="judge"
    )
    options["out"] = options["out"] or tempfile.mkdtemp(prefix="ldm-autoencoder-")
    print(f"{options['data']}: {options['steps']} steps of {options['batch']} pictures of {options['size']} pixels")
    if options["judge"]:
        judged(options)
    else:
        parity(options)


if __name__ == "__main__":
    run_main(main)
