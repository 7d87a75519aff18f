"""What import and export share: their options, the classes that both layouts know, and files that appear whole or not
at all. Never imports torch: help and wrong options do not wait for it.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ldm.build import with_defaults as with_defaults
from ldm.checkpoints import files
from ldm.errors import LdmError

UNET = "ldm.models.unet.unet.UNet"
AUTOENCODER = "ldm.models.autoencoder.kl.AutoencoderKL"
TEXT = "ldm.models.conditioner.open_clip.OpenClipText"
HF_TEXT = "ldm.models.conditioner.hf_clip.HFClipText"
NETWORK, CONDITIONER = "denoiser.network.", "conditioner."
"""Where a checkpoint of the diffusion stage keeps them."""

PARTS = ("unet", "vae", "text")
PREDICTIONS = ("epsilon", "v", "x0")
DTYPES = ("float32", "float16", "bfloat16")
_IMPORT = """Stable Diffusion, or its autoencoder alone, becomes a run of ours. PATH: a folder of diffusers, or a single
file of CompVis' layout. OUT: the run folder, which must not exist."""
_EXPORT = """A run of ours in the layouts of Stable Diffusion. diffusers: OUT is a folder for
DiffusionPipeline.from_pretrained. compvis: OUT is one .safetensors file, and OUT without its suffix and with -config a
folder of settings that from_single_file(..., config=...) needs offline. --parts vae: the autoencoder alone, a folder
for AutoencoderKL.from_pretrained or one file."""


def import_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m ldm import", description=_IMPORT, allow_abbrev=False)
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--prediction", choices=PREDICTIONS, help="for a file that does not say")
    alone = "of the latents, for an autoencoder alone that does not say"
    parser.add_argument("--scaling-factor", type=float, metavar="NUMBER", help=f"factor {alone}")
    parser.add_argument("--shift-factor", type=float, metavar="NUMBER", help=f"mean {alone}")
    options = parse(parser, argv)
    scaling, shift = options.scaling_factor, options.shift_factor
    if scaling is not None and not 0 < scaling < math.inf:
        raise LdmError("CONFIG", f"--scaling-factor {scaling:g}", limit="a positive number")
    if shift is not None and not math.isfinite(shift):
        raise LdmError("CONFIG", f"--shift-factor {shift:g}", limit="a number")
    return options


def export_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m ldm export", description=_EXPORT, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--format", choices=("diffusers", "compvis"), required=True)
    parser.add_argument("--parts", default=",".join(PARTS), help="which of unet,vae,text")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of the denoiser")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="default: as the run holds them")
    options = parse(parser, argv)
    options.parts = tuple(options.parts.split(","))
    if not set(options.parts) <= set(PARTS):
        what = f"--parts {','.join(options.parts)}"
        raise LdmError("CONFIG", what, limit="one or more of unet,vae,text, with commas")
    return options


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The options, with a wrong one refused in our words and the usage behind it."""

    def refuse(message: str) -> None:
        raise LdmError("CONFIG", message, next=" ".join(parser.format_usage().split()))

    parser.error = refuse  # type: ignore[method-assign,assignment]
    return parser.parse_args(argv)


def refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise LdmError("EXISTS", "there is something at this place already", where=str(out), next="choose another name")


def whole(out: Path, fill: Callable[[Path], None]) -> None:
    """`fill(folder)` makes `folder / out.name`, which then moves to `out` at once; on failure nothing is left."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = files.temporary(out)
    temporary.mkdir()
    try:
        fill(temporary)
        refuse_existing(out)
        os.rename(temporary / out.name, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    files.sync_folder(out.parent)
