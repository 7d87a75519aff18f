"""A whole latent diffusion model: autoencoder, conditioner and denoiser, loaded from a run and used as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import build
from ldm.checkpoints.files import sha256_of
from ldm.checkpoints.formats.keymap import check_shapes
from ldm.checkpoints.formats.reading import read_file, read_json, read_part
from ldm.checkpoints.run import find_run, open_stage
from ldm.checkpoints.store import Checkpoint
from ldm.diffusion.denoiser import Denoiser
from ldm.errors import LdmError, raise_all
from ldm.models.autoencoder.convolutional import ConvolutionalAutoencoder
from ldm.models.autoencoder.identity import Identity
from ldm.models.autoencoder.tiling import LEAST, check_tile, tiled_decode, tiled_encode
from ldm.models.conditioner.compose import Columns, condition, null_columns, parts_of
from ldm.random import Draws
from ldm.types import Conditioning

Autoencoder = ConvolutionalAutoencoder | Identity


class LatentDiffusion(nn.Module):
    """Pictures <-> latents (autoencoder), prompts -> conditioning (conditioner), noise -> latents (denoiser).

    conditioner: satisfies `ldm.types.Conditioner`.
    image_size: side in pixels of the training pictures, the default of sampling.
    sampler: the run's sampling settings as plain values, or None.
    Raises LdmError if the three do not fit together.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        conditioner: nn.Module,
        denoiser: Denoiser,
        *,
        image_size: int,
        sampler: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_fit(autoencoder, conditioner, denoiser.network)
        self.autoencoder, self.conditioner, self.denoiser = autoencoder, conditioner, denoiser
        self.image_size, self.sampler = image_size, sampler
        self.source: dict[str, Any] = {}
        self.instead: Mapping[nn.Module, Callable[..., Conditioning]] = {}  # see `condition`

    def encode(self, images: Tensor, noise: Tensor | None = None, *, tile: int | None = None) -> Tensor:
        """[B, 3, H, W] in [-1, 1] to standardised latents [B, C, h, w]: the posterior's mean, or a draw.

        tile: work on tiles of so many pixels, see `check_tile`.
        """
        if tile is not None:
            return tiled_encode(self.autoencoder, images, tile, noise=noise)
        return self.autoencoder.encode(images, noise)

    def decode(self, latents: Tensor, *, tile: int | None = None) -> Tensor:
        """Standardised latents to pictures in [-1, 1].   tile: see `encode`.

        Decoding is in float32 whatever the surroundings: half precision overflows in some autoencoders.
        """
        with torch.autocast(latents.device.type, enabled=False):
            if tile is not None:
                return tiled_decode(self.autoencoder, latents.float(), tile).clamp(-1, 1)
            return self.autoencoder.decode(latents.float()).clamp(-1, 1)

    def check_tile(self, tile: int | None) -> None:
        """Raises LdmError if the autoencoder cannot work on tiles of so many pixels. None is no tiles."""
        if tile is None:
            return
        f = self.autoencoder.downsampling
        try:
            check_tile(f, tile)
        except ValueError as error:
            nearest = max(LEAST * f, round(tile / f) * f)
            raise LdmError("SIZE", str(error), where="tile", next=f"try tile={nearest}, or null for none") from error

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns that the model is conditioned on, "caption" for text; each once."""
        return tuple(dict.fromkeys(name for part in parts_of(self.conditioner) for name in part.reads))

    def condition(self, prompts: list[str], columns: Columns | None = None, draws: Draws | None = None) -> Conditioning:
        """The conditioning of B prompts and of their columns, B values each; what is absent counts as its null.

        Only the fields that the network consumes.  draws: training's, for the dropout of conditions.
        """
        given = condition(self.conditioner, {**(columns or {}), "caption": prompts}, len(prompts), draws, self.instead)
        return restrict(given, self.denoiser)

    def has_null(self, columns: Columns) -> bool:
        """Whether `null` differs from the condition: the model reads text, or training dropped one of `columns`."""
        return "caption" in self.reads or len(null_columns(self.conditioner, columns)) < len(columns)

    def null(self, negative_prompt: str, columns: Columns, count: int) -> Conditioning:
        """What guidance compares with: the negative prompt, and the columns that training never drops."""
        kept = null_columns(self.conditioner, columns)
        if not kept:
            return self.condition([negative_prompt]).repeat(count)
        return self.condition([negative_prompt] * count, kept)

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
    def load(
        cls, path: str | Path | None = None, *, weights: str = "ema", device: Any = "cpu", trusted: tuple[str, ...] = ()
    ) -> LatentDiffusion:
        """From a run folder (default: the run last trained).

        weights: of the denoiser, "ema" (the average, which samples best) or "raw". The autoencoder is always the one
            that the latents were made with.   trusted: packages of yours that the run's parts come from.
        Raises LdmError when a stage is missing or its checkpoint is damaged, or when the denoiser was trained on the
        latents of another autoencoder.
        """
        run = find_run(path)
        checkpoint = open_stage(run, "diffusion")
        config, state = checkpoint.document("config"), checkpoint.document("state")
        autoencoder: Autoencoder
        if "autoencoder" in config:  # one without weights
            autoencoder = build.build_saved(config["autoencoder"], where="config.json: autoencoder", trusted=trusted)
        else:
            autoencoder = load_autoencoder(open_stage(run, "autoencoder"), trusted)
        check_latent_id(autoencoder, state.get("latent_id"), checkpoint.path)
        weights_read = read_weights(checkpoint, weights)
        with torch.device("meta"):
            towers = absent_towers(
                build.build_saved(config["conditioner"], where="conditioner", trusted=trusted), weights_read
            )
        if towers:  # said before anything large is built
            raise no_tower_weights(list(towers), checkpoint.path)
        model = cls(
            autoencoder,
            build.build_saved(config["conditioner"], where="config.json: conditioner", trusted=trusted),
            build.build_saved(config["denoiser"], where="config.json: denoiser", trusted=trusted),
            image_size=config["image_size"],
            sampler=config.get("sampler"),
        )
        load_weights(model, weights_read, checkpoint.path, ignore="autoencoder.")
        model.source = {
            "run": run.resolve().name,
            "step": checkpoint.step,
            "weights": weights,
            "checkpoint": checkpoint.manifest["digest"],
            "latent_id": state.get("latent_id") or autoencoder.latent_id(),
        }
        return model.eval().requires_grad_(False).to(device)


def check_fit(autoencoder: Autoencoder, conditioner: Any, network: nn.Module) -> None:
    """Refuse parts that cannot work together, all problems at once, each in a sentence that names both sides."""
    if not hasattr(network, "consumes"):  # a network from elsewhere says nothing about itself
        return
    problems = []

    def compare(key: str, wants: int | None, other: str, gives: int | None) -> None:
        if wants != gives:
            what = f"model.network takes {key}={wants}, {other}"
            problems.append(
                LdmError("CONFIG", what, where=f"model.network.{key}", next=f"set model.network.{key}={gives}")
            )

    channels = autoencoder.latent_channels
    for key in ("in_channels", "out_channels"):
        compare(key, getattr(network, key, channels), f"model.autoencoder gives {channels} channels", channels)
    consumes: frozenset[str] = network.consumes  # type: ignore[assignment]
    for name in sorted(consumes - conditioner.provides - {"mask"}):
        what = f"model.network needs the {name} of a condition, which model.conditioner does not give"
        given = ", ".join(sorted(conditioner.provides)) or "nothing"
        size = {"tokens": "context_size", "vector": "vector_size"}.get(name, f"{name}_channels")
        hint = f"choose a conditioner that gives it, or set model.network.{size}=" + (
            "0" if size.endswith("channels") else "null"
        )
        problems.append(LdmError("CONFIG", what, where="model.conditioner", limit=f"it gives {given}", next=hint))
    for name, key, gives in (
        ("tokens", "context_size", conditioner.width),
        ("vector", "vector_size", conditioner.vector_size),
    ):
        if name in consumes & conditioner.provides:
            compare(key, getattr(network, key, gives), f"model.conditioner gives {name} of width {gives}", gives)
    if conditioner.reads and not consumes & conditioner.provides:
        what = f"model.conditioner reads {', '.join(conditioner.reads)}, but model.network uses nothing of it"
        hint = "set model.network.context_size or vector_size, or choose model/conditioner=none"
        problems.append(LdmError("CONFIG", what, where="model.network", next=hint))
    raise_all(problems)


def restrict(cond: Conditioning, denoiser: Denoiser) -> Conditioning:
    """Drops what the network does not consume, so that one conditioner serves several networks."""
    consumes = getattr(denoiser.network, "consumes", None)
    if consumes is None:
        return cond
    fields = {name: getattr(cond, name) for name in consumes}
    return Conditioning(**fields)


def load_autoencoder(checkpoint: Checkpoint, trusted: tuple[str, ...] = ()) -> ConvolutionalAutoencoder:
    """The autoencoder of a checkpoint of its stage, averaged weights, with its latent statistics."""
    node = checkpoint.document("config")["autoencoder"]
    autoencoder = build.build_saved(node, where="config.json: autoencoder", trusted=trusted)
    load_weights(autoencoder, read_weights(checkpoint, "ema"), checkpoint.path)
    return autoencoder.eval().requires_grad_(False)


def read_weights(checkpoint: Checkpoint, weights: str) -> dict[str, Tensor]:
    """Raw weights and buffers, overlaid by the averaged ones for weights="ema" where the stage keeps an average."""
    if weights not in ("ema", "raw"):
        raise LdmError("CONFIG", f"weights must be 'ema' or 'raw', not {weights!r}", where="weights")
    tensors = checkpoint.tensors("model")
    averaged = weights == "ema" and "ema.safetensors" in checkpoint.manifest["files"]
    return {**tensors, **checkpoint.tensors("ema")} if averaged else tensors


def load_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], where: Path, *, ignore: str | tuple[str, ...] = ()
) -> None:
    """Strict loading with a sentence: every name and shape must fit, but for names that start with `ignore`."""
    expected = {k: tuple(v.shape) for k, v in module.state_dict().items() if not k.startswith(ignore)}
    check_shapes(
        expected,
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        str(where),
        next="use the model configuration that they were trained with, or begin a new run with init_from=",
    )
    module.load_state_dict({**module.state_dict(), **tensors})


def absent_towers(conditioner: nn.Module, tensors: Iterable[str]) -> dict[str, nn.Module]:
    """The text towers of which these weights of a model hold nothing, by their name in the model: a file of Stable
    Diffusion XL may have come without its text encoders.
    """
    names = tuple(tensors)
    towers = {
        f"conditioner.{name}".rstrip("."): part
        for name, part in conditioner.named_modules()
        if hasattr(part, "own_names")
    }
    return {name: part for name, part in towers.items() if not any(other.startswith(f"{name}.") for other in names)}


def no_tower_weights(names: Sequence[str], where: Path) -> LdmError:
    keys = " ".join(f"model.{name}.weights=FILE" for name in names)
    return LdmError(
        "WEIGHTS",
        f"the run holds no weights of its text towers: {', '.join(names)}",
        where=str(where),
        next=f"import a file or folder that holds them, or fine-tune it with open_clip's own: init_from=RUN {keys}",
    )


def load_source(model: LatentDiffusion, checkpoint: Checkpoint) -> None:
    """The weights that a new training begins from (`init_from`): the averaged ones of another run's diffusion stage,
    and for a text tower that it does not hold, the file that the tower names itself.
    """
    tensors = read_weights(checkpoint, "ema")
    towers = absent_towers(model.conditioner, tensors)
    if lost := [name for name, part in towers.items() if part.weights is None]:
        raise no_tower_weights(lost, checkpoint.path)
    for tower in towers.values():
        load_pretrained(tower)
    load_weights(model, tensors, checkpoint.path, ignore=("autoencoder.", *(f"{name}." for name in towers)))


def load_pretrained(conditioner: nn.Module) -> None:
    """Fill the text towers that name a file of weights, where a training begins from nothing else.

    Raises LdmError for a file that is missing, is not the declared one, or does not fit; then that tower is unchanged.
    """
    for part in conditioner.modules():
        if not hasattr(part, "own_names") or part.weights is None:
            continue
        path = Path(str(part.weights))
        tensors, file = read_part(path) if path.is_dir() else (read_file(path)[0], path)
        if part.sha256 is not None and (found := sha256_of(file)) != part.sha256:
            raise LdmError("WEIGHTS", "is not the declared file", where=str(file), limit=f"its sha256 is {found}")
        if path.is_dir() and hasattr(part, "check_config"):
            part.check_config(read_json(path / "config.json"), f"{path}/config.json")  # type: ignore[operator]
        load_weights(part, part.own_names(tensors), file)  # type: ignore[operator]


def check_latent_id(autoencoder: Autoencoder, recorded: str | None, where: Path) -> None:
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
