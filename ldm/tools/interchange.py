"""What import and export share: the classes that both layouts know, and files that appear whole or not at all."""

from __future__ import annotations

import argparse
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
