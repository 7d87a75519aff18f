"""A whole latent diffusion model: autoencoder, conditioner and denoiser, loaded from a run and used as one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import build
from ldm.checkpoints.run import find_run
from ldm.checkpoints.store import Checkpoint, Store
from ldm.diffusion.denoiser import Denoiser
from ldm.errors import LdmError
from ldm.models.autoencoder.kl import AutoencoderKL
from ldm.types import Conditioning


class LatentDiffusion(nn.Module):
    """Pictures <-> latents (autoencoder), prompts -> conditioning (conditioner), noise -> latents (denoiser).

    image_size: side in pixels of the training pictures, the default of sampling.
    sampler: the run's sampling settings as plain values, or None.
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        conditioner: nn.Module,
        denoiser: Denoiser,
        *,
        image_size: int,
        sampler: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder, self.conditioner, self.denoiser = autoencoder, conditioner, denoiser
        self.image_size, self.sampler = image_size, sampler
        self.source: dict[str, Any] = {}

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] in [-1, 1] to standardised latents [B, C, h, w]: the posterior's mean, or a draw."""
        return self.autoencoder.encode(images, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Standardised latents to pictures in [-1, 1].

        Decoding is in float32 whatever the surroundings: half precision overflows in some autoencoders.
        """
        with torch.autocast(latents.device.type, enabled=False):
            return self.autoencoder.decode(latents.float()).clamp(-1, 1)

    def condition(self, prompts: list[str]) -> Conditioning:
        """Only the fields that the network consumes."""
        return restrict(self.conditioner(prompts), self.denoiser)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of a picture's latents. Raises LdmError if the size does not fit the autoencoder."""
        f = self.autoencoder.downsampling
        for name, value in (("height", height), ("width", width)):
            if value < f or value % f:
                raise LdmError(
                    "SIZE",
                    f"{name} {value} does not fit the autoencoder",
                    where=name,
                    limit=f"multiples of {f}",
                    next=f"try {name}={max(f, round(value / f) * f)}",
                )
        return self.autoencoder.latent_channels, height // f, width // f

    @classmethod
    def load(cls, path: str | Path | None = None, *, weights: str = "ema", device: Any = "cpu") -> LatentDiffusion:
        """From a run folder (default: the run last trained).

        weights: of the denoiser, "ema" (the average, which samples best) or "raw". The autoencoder is always the one
            that the latents were made with.
        Raises LdmError when a stage is missing or its checkpoint is damaged, or when the denoiser was trained on the
        latents of another autoencoder.
        """
        run = find_run(path)
        checkpoint = open_stage(run, "diffusion")
        autoencoder = load_autoencoder(open_stage(run, "autoencoder"))
        config, state = checkpoint.document("config"), checkpoint.document("state")
        check_latent_id(autoencoder, state.get("latent_id"), checkpoint.path)
        model = cls(
            autoencoder,
            build.build_saved(config["conditioner"], where="config.json: conditioner"),
            build.build_saved(config["denoiser"], where="config.json: denoiser"),
            image_size=config["image_size"],
            sampler=config.get("sampler"),
        )
        load_weights(model, read_weights(checkpoint, weights), checkpoint.path, ignore="autoencoder.")
        model.source = {"run": run.name, "step": checkpoint.step, "weights": weights}
        return model.eval().requires_grad_(False).to(device)


def restrict(cond: Conditioning, denoiser: Denoiser) -> Conditioning:
    """Drops what the network does not consume, so that one conditioner serves several networks."""
    consumes = getattr(denoiser.network, "consumes", None)
    if consumes is None:
        return cond
    fields = {name: getattr(cond, name) for name in consumes}
    return Conditioning(**fields)


def open_stage(run: Path, stage: str) -> Checkpoint:
    """The newest valid checkpoint of a stage."""
    checkpoint = Store(run / stage / "ckpt").newest()
    if checkpoint is None:
        raise LdmError(
            "NO-CHECKPOINT",
            f"the stage {stage!r} of this run has no checkpoint",
            where=str(run / stage),
            next=f"train it: python train.py name={run.name} stages=[{stage}]",
        )
    return checkpoint


def load_autoencoder(checkpoint: Checkpoint) -> AutoencoderKL:
    """The autoencoder of a checkpoint of its stage, averaged weights, with its latent statistics."""
    autoencoder = build.build_saved(checkpoint.document("config")["autoencoder"], where="config.json: autoencoder")
    load_weights(autoencoder, read_weights(checkpoint, "ema"), checkpoint.path)
    return autoencoder.eval().requires_grad_(False)


def read_weights(checkpoint: Checkpoint, weights: str) -> dict[str, Tensor]:
    """Raw weights and buffers, overlaid by the averaged ones for weights="ema" where the stage keeps an average."""
    if weights not in ("ema", "raw"):
        raise LdmError("CONFIG", f"weights must be 'ema' or 'raw', not {weights!r}", where="weights")
    tensors = checkpoint.tensors("model")
    averaged = weights == "ema" and "ema.safetensors" in checkpoint.manifest["files"]
    return {**tensors, **checkpoint.tensors("ema")} if averaged else tensors


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], where: Path, *, ignore: str | None = None) -> None:
    """Strict loading with a sentence: every name and shape must fit, but for names that start with `ignore`."""
    expected = {k: v for k, v in module.state_dict().items() if ignore is None or not k.startswith(ignore)}
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    shapes = [
        f"{k} is {tuple(tensors[k].shape)}, the model has {tuple(v.shape)}"
        for k, v in expected.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    if missing or unexpected or shapes:
        words = [f"missing {name}" for name in missing[:1]] + [f"unexpected {name}" for name in unexpected[:1]]
        raise LdmError(
            "SHAPE",
            f"the checkpoint does not fit the model: {', '.join(words + shapes[:1])}",
            where=str(where),
            limit=f"{len(missing)} missing, {len(unexpected)} unexpected, {len(shapes)} of another shape",
            next="use the model configuration that it was trained with, or begin a new run with init_from=",
        )
    module.load_state_dict({**module.state_dict(), **tensors})


def check_latent_id(autoencoder: AutoencoderKL, recorded: str | None, where: Path) -> None:
    """A denoiser belongs to the latents that it was trained on."""
    actual = autoencoder.latent_id()
    if recorded is not None and recorded != actual:
        raise LdmError(
            "LATENT-ID",
            "the denoiser was trained on the latents of another autoencoder",
            where=str(where),
            limit=f"trained on {recorded[:12]}, found {actual[:12]}",
            next="restore that autoencoder, or train the diffusion stage anew",
        )
