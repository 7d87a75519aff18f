"""An autoencoder alone: a folder of diffusers' AutoencoderKL, or one file in CompVis' names, with or without the
`first_stage_model.` of a whole model before them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints.formats import compvis, diffusers, keymap
from ldm.checkpoints.formats.compvis import SCALES, SD_SCALE, UNET, VAE
from ldm.checkpoints.formats.description import XL, Part
from ldm.checkpoints.formats.reading import read_file, read_json, read_part
from ldm.checkpoints.formats.settings import read_vae_config
from ldm.errors import LdmError

SCALING, SHIFT = "scaling_factor", "shift_factor"
"""As diffusers names them in config.json, and our files in their metadata."""


@dataclass(frozen=True)
class ForeignAutoencoder:
    """An autoencoder that was found.

    args: of `AutoencoderKL`.   mean, std: of the raw latents, one number or one for each channel.
    notes: what should be said.
    """

    kind: str
    args: dict[str, Any]
    part: Part
    mean: float | list[float]
    std: float | list[float]
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Factors:
    """One number for all channels: standardised = (raw - shift) * scaling.   None: it is not said."""

    scaling: float | None = None
    shift: float | None = None

    def __bool__(self) -> bool:
        return self.values != (None, None)

    def over(self, found: Factors, where: str) -> Factors:
        """Both words as one; refused where they differ."""
        for name in ("scaling", "shift"):
            ours, theirs = getattr(self, name), getattr(found, name)
            if None not in (ours, theirs) and not math.isclose(ours, theirs, rel_tol=1e-6):
                raise LdmError(
                    "FORMAT", f"it says {name}_factor {theirs:g}, not {ours:g}", where=where,
                    next=f"leave --{name}-factor out",
                )  # fmt: skip
        return Factors(*(b if a is None else a for a, b in zip(self.values, found.values, strict=True)))

    @property
    def values(self) -> tuple[float | None, float | None]:
        return self.scaling, self.shift


def read(path: Path, said: Factors) -> ForeignAutoencoder | None:
    """What a folder or file holds; None where it is no autoencoder alone. Raises LdmError FORMAT."""
    if path.is_dir():
        alone = (path / "config.json").is_file() and not (path / "model_index.json").exists()
        return _read_folder(path, said) if alone else None
    tensors, metadata = read_file(path)
    if any(name.startswith(UNET) for name in tensors):
        return None
    home = next((home for home in (VAE, "") if any(name.startswith(f"{home}encoder.") for name in tensors)), None)
    return None if home is None else _read_file(path, tensors, metadata, home, said)


def _read_folder(folder: Path, said: Factors) -> ForeignAutoencoder:
    where = f"{folder}/config.json"
    config = read_json(folder / "config.json")
    if (kind := config.get("_class_name")) != "AutoencoderKL":
        raise LdmError(
            "FORMAT", f"is a {kind}, no autoencoder of Stable Diffusion", where=where, limit="AutoencoderKL",
            next="a whole model is imported by the folder that holds its model_index.json",
        )  # fmt: skip
    each = config.get("latents_mean") and config.get("latents_std")
    if said and each:
        raise LdmError("FORMAT", "it says mean and deviation of each channel", where=where, next="leave factors out")
    found = Factors(*(config.get(key) if _is_number(config.get(key)) else None for key in (SCALING, SHIFT)))
    factors = said.over(found, where)
    given = {key: value for key, value in zip((SCALING, SHIFT), factors.values, strict=True) if value is not None}
    args, mean, std = read_vae_config({**config, **given}, where)
    notes = [] if SCALING in {**config, **given} else [f"no scaling_factor: {SD_SCALE}, as diffusers takes it"]
    tensors, file = read_part(folder)
    if ".bin" in file.name or ".fp16" in file.name:
        notes.append(f"read from {file.name}")
    part = Part({diffusers.modern_name(name): tensor for name, tensor in tensors.items()}, diffusers.map_vae)
    return ForeignAutoencoder("autoencoder, folder of diffusers", args, part, mean, std, tuple(notes))


def _is_number(value: Any) -> bool:
    """What is none is left to the reader of the settings, which refuses it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], home: str, said: Factors
) -> ForeignAutoencoder:
    where = str(path)
    if any(name.startswith(f"{home}encoder.down_blocks.") for name in tensors):
        beside = path.parent / "config.json"
        hint = f"import the folder: {path.parent}" if beside.is_file() else "import the folder that holds config.json"
        raise LdmError("FORMAT", "has diffusers' names, and its settings stand beside it", where=where, next=hint)
    inner = {name: value for name, value in tensors.items() if not compvis.is_constant(name, home)}
    shapes = {name: tuple(value.shape) for name, value in inner.items()}
    strange = {name: shape for name, shape in shapes.items() if not name.startswith(home)}
    keymap.check_shapes({}, strange, where)
    args = compvis.describe_vae(shapes, where, home)
    factors = said.over(_factors_in(tensors, metadata, where), where)
    if factors.scaling is None:
        if args["latent_channels"] == 4:
            limit = "the autoencoders of Stable Diffusion 1, 2 and XL have equal shapes"
            hint = f"give --scaling-factor {SD_SCALE} (Stable Diffusion 1 and 2) or {SCALES[XL]} (XL)"
        else:
            limit = f"its latents have {args['latent_channels']} channels"
            hint = f"give --scaling-factor, and --shift-factor; its model's config.json names {SCALING} and {SHIFT}"
        raise LdmError(
            "FORMAT", "nothing in the file says how its latents are scaled", where=where, limit=limit, next=hint
        )
    averaged = any(name.startswith((f"{home}model_ema.", "model_ema.")) for name in tensors)
    return ForeignAutoencoder(
        kind="autoencoder, one file",
        args=args,
        part=Part(inner, partial(compvis.map_vae, prefix=home)),
        mean=factors.shift or 0.0,
        std=1 / factors.scaling,
        notes=("its averaged weights (model_ema) are not read",) if averaged else (),
    )


def _factors_in(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> Factors:
    """What the file itself says: our own files in their metadata, files of training in a tensor."""
    if SCALING not in metadata:
        return Factors(compvis.scale_in(tensors, where))
    words = [metadata[SCALING], metadata.get(SHIFT, "0")]
    try:
        scaling, shift = map(float, words)
    except ValueError:
        scaling = shift = math.nan
    if not 0 < scaling < math.inf or not math.isfinite(shift):
        raise LdmError("FORMAT", f"its {SCALING} and {SHIFT} are {words}", where=where, limit="finite numbers")
    return Factors(scaling, shift)
