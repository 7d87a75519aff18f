"""A run of a few thousand parameters in every format that was ever released, so that later versions still read it.

    python -m tests.checkpoints.golden tests/checkpoints/golden/schema-1

makes one, when a schema is released; those of earlier ones are never made again.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from torch import Tensor

from data.toy_logos.make import write_set
from ldm.build import build
from ldm.config import compose
from ldm.model import LatentDiffusion
from ldm.sampling.tasks import text_to_image
from ldm.training.fit import train
from tests.integration.tiny import GAN

FOLDER = Path(__file__).parent / "golden"
_OBJECTIVE = "stage.autoencoder.objective"
_TINY = [
    *("data.image_size=16", "data.columns.shape=marks.0.shape", "logger.mode=disabled", "name=golden"),
    *("model.autoencoder.block_channels=[4]", "model.autoencoder.patch_size=4", "model.autoencoder.norm_groups=2"),
    *("model.autoencoder.latent_channels=2", "model.network.block_channels=[4]", "model.network.head_dim=4"),
    *("model.network.norm_groups=2", "model.network.vector_size=4", "model.network.context_size=0"),
    *("model.network.transformer_depth=[0]", "model.network.mid_transformer_depth=0"),
    *("model/conditioner=class_label", "model.conditioner.column=shape", "model.conditioner.width=4"),
    "model.conditioner.classes=[disc,ring,square,triangle,star,hexagon,cross,heart,crescent,arrow]",
    *(*GAN, f"{_OBJECTIVE}.adversarial.start_step=1", f"{_OBJECTIVE}.adversarial.discriminator.width=4"),
    *("stage.autoencoder.ema.lengths=[0.1]", "stage.diffusion.ema.half_life_images=[1000,2000]"),
]


def words(data: Path, runs: Path, steps: int, *more: str) -> list[str]:
    """The command that made it, and that continues it."""
    stages = []
    for stage in ("autoencoder", "diffusion"):
        stages += [f"stage.{stage}.max_steps={steps}", f"stage.{stage}.batch_size=8", f"stage.{stage}.precision=32"]
        stages += [f"stage.{stage}.lr_schedule.warmup_steps=1"]
        stages += [f"stage.{stage}.save_every=4", f"stage.{stage}.validate_every=4", f"stage.{stage}.sample_every=null"]
    return [f"data.path={data}", f"output_dir={runs}", *_TINY, *stages, "stage.diffusion.sample_prompts=[]", *more]


def make_data(folder: Path) -> Path:
    write_set(folder, num_samples=61, num_val=20, num_shards=5, size=16)
    return folder


def pictures(run: Path) -> Tensor:
    """[2, 3, 16, 16], what the run draws of two classes."""
    model = LatentDiffusion.load(run)
    sampling = build({**model.sampler, "steps": 4, "guidance_scale": 2.0})
    return text_to_image(model, ["", ""], [1, 2], sampling, columns={"shape": ["star", "ring"]})


def main(target: Path) -> None:
    if target.exists():
        sys.exit(f"{target} exists, and what was released is not made again")
    with tempfile.TemporaryDirectory() as made:
        train(compose("train", words(make_data(Path(made) / "shards"), Path(made), 4)))
        run = Path(made) / "golden"
        for stage in ("autoencoder", "diffusion"):
            shutil.copytree(run / stage / "ckpt", target / stage / "ckpt")
        shutil.copy(run / "run.json", target)
    (target / "pictures.json").write_text(json.dumps([round(v, 4) for v in pictures(target).flatten().tolist()]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
