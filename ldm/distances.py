"""Perceptual distances whose weights lie in files: what a `perceptual` node of a configuration names.

LPIPS is Zhang et al. 2018, arXiv:1801.03924. Nothing is downloaded, and nothing is replaced by something else: a file
that is missing is an error that says where it was looked for.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ldm.build import build_saved
from ldm.checkpoints.files import sha256_of
from ldm.checkpoints.formats.reading import read_file
from ldm.checkpoints.run import find_run, open_stage
from ldm.errors import LdmError
from ldm.model import load_weights, read_weights
from ldm.reconstruction.perceptual import FeatureDistance, weights_sha256
from ldm.reconstruction.vgg16 import VGG16

VGG16_FILE = "vgg16-397923af.pth"  # torchvision's VGG16_Weights.IMAGENET1K_V1; the digits begin the file's sha256
HEADS_FILE = "functional/image/lpips_models/vgg.pth"  # in the package torchmetrics: LPIPS's own, version 0.1
_NODE = "stage.autoencoder.objective.perceptual"
_OTHERS = f"perceptual=features {_NODE}.run=RUN (a run of experiment=features_toy), or perceptual=none"


def vgg16(weights: str | None = None, heads: str | None = "lpips", bf16: bool = False) -> FeatureDistance:
    """Distance in the features of VGG16, trained on ImageNet.

    weights: a file of torchvision's VGG16; None or "IMAGENET1K_V1" = the one in the cache of torch.hub.
    heads: weights of the channels: "lpips" = LPIPS's own, which torchmetrics brings along; a file in their layout; or
        None = 1 everywhere.   bf16: see `FeatureDistance`.
    The label is "lpips-vgg16", without heads "vgg16"; with files that are not the original ones eight digits of the
    sha256 of what they hold follow.
    Raises LdmError, `WEIGHTS`, for a file that is missing, and what reading a file raises.
    """
    network = VGG16()
    file = _find_vgg16(weights)
    kept = {name: value for name, value in read_file(file)[0].items() if name in network.state_dict()}
    load_weights(network, kept, file)
    distance = FeatureDistance(
        network, "vgg16" if heads is None else "lpips-vgg16", None if heads is None else _read_heads(heads), bf16
    )
    original = heads in (None, "lpips") and sha256_of(file).startswith(VGG16_FILE[6:14])
    return distance if original else _with_digits(distance)


def trained_features(run: str, bf16: bool = False) -> FeatureDistance:
    """Distance in the features of an image tower that this project trained, averaged weights.

    run: a run folder with a stage `features`.   bf16: see `FeatureDistance`.
    The label is "features-" and eight digits of the sha256 of the weights.
    Raises LdmError if there is no such run, or if it has no such stage.
    """
    checkpoint = open_stage(find_run(run, where=f"{_NODE}.run"), "features")
    network = build_saved(checkpoint.document("config")["features"]["args"]["image"], where="config.json: features")
    tensors = read_weights(checkpoint, "ema")
    own = {name.removeprefix("image."): value for name, value in tensors.items() if name.startswith("image.")}
    load_weights(network, own, checkpoint.path)
    return _with_digits(FeatureDistance(network, "features", bf16=bf16))


def _with_digits(distance: FeatureDistance) -> FeatureDistance:
    distance.label += f"-{weights_sha256(distance)[:8]}"
    return distance


def _find_vgg16(weights: str | None) -> Path:
    hub = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_FILE
    file = hub if weights in (None, "IMAGENET1K_V1") else Path(str(weights))
    if not file.is_file():
        raise _missing(
            f"the perceptual distance needs the weights of VGG16, {file.name}",
            file,
            f"put torchvision's {VGG16_FILE} at {hub} (TORCH_HOME moves that), or name it: {_NODE}.weights=FILE",
        )
    return file


def _read_heads(heads: str) -> list[Tensor]:
    """One [C] for each layer of VGG16."""
    import torchmetrics  # a second of work, only for those who ask

    file = Path(torchmetrics.__file__).parent / HEADS_FILE if heads == "lpips" else Path(heads)
    if not file.is_file():
        raise _missing(
            f"the perceptual distance needs the channel weights of LPIPS, {file.name}",
            file,
            f"install torchmetrics, name a file with {_NODE}.heads=FILE, or go without them: perceptual=vgg16",
        )
    found = read_file(file)[0]
    layers = [f"lin{k}.model.1.weight" for k in range(5)]
    shapes = {name: tuple(found[name].shape) for name in layers if name in found}
    wanted = {name: (1, width, 1, 1) for name, width in zip(layers, (64, 128, 256, 512, 512), strict=True)}
    if shapes != wanted:
        raise LdmError(
            "FORMAT", "holds no channel weights of LPIPS for VGG16", where=str(file), limit=f"expected {wanted}"
        )
    return [found[name].flatten() for name in layers]


def _missing(what: str, file: Path, hint: str) -> LdmError:
    return LdmError("WEIGHTS", what, where=f"looked for {file}", next=f"{hint}; or choose {_OTHERS}")
