"""`python -m ldm export RUN OUT --format diffusers|compvis`: a run of ours in the layouts of Stable Diffusion.

diffusers: OUT is a folder for `DiffusionPipeline.from_pretrained`. compvis: OUT is one `.safetensors` file, and
OUT without its suffix and with `-config` a folder of settings that `from_single_file(..., config=...)` needs offline.
What a layout cannot express is refused by name before anything is written.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.formats import clip, compvis, diffusers, keymap
from ldm.checkpoints.formats.compvis import SCALES, SD_SCALE
from ldm.checkpoints.formats.description import kind_of
from ldm.checkpoints.formats.schedules import (
    call_of,
    read_prediction_node,
    read_schedule_node,
    scheduler_config,
    what_differs,
)
from ldm.checkpoints.formats.settings import unet_config, vae_config
from ldm.checkpoints.formats.statistics import fold_statistics, scaling_factor
from ldm.checkpoints.run import find_run, has_stage
from ldm.errors import LdmError
from ldm.model import open_stage
from ldm.tools.export_autoencoder import (
    Tensors,
    arguments,
    cast,
    check_file,
    export_autoencoder,
    mapped,
    renamed,
    write_file,
    write_folder,
)
from ldm.tools.interchange import (
    AUTOENCODER,
    CONDITIONER,
    HF_TEXT,
    NETWORK,
    PARTS,
    TEXT,
    UNET,
    export_options,
    refuse_existing,
    with_defaults,
)


def main(argv: Sequence[str]) -> int:
    options = export_options(argv)
    began = time.monotonic()
    dtype = getattr(torch, options.dtype) if options.dtype is not None else None
    if options.parts == ("vae",):
        export_autoencoder(options.run, options.out, options.format, dtype)
        print(f"{options.out} in {time.monotonic() - began:.1f} s")
        return 0
    model = read_run(options.run, options.weights, options.parts)
    if dtype is not None:
        model = model.cast(dtype)
    written = {"diffusers": write_diffusers, "compvis": write_compvis}[options.format](model, options.out)
    print(f"{', '.join(map(str, written))} in {time.monotonic() - began:.1f} s")
    if model.text is not None:
        print(f"to draw with a pipeline as with sample.py: pipe(prompt, {call_of(model.sampler)})")
        if other := what_differs(model.sampler, model.schedule["num_timesteps"], model.prediction):
            print(f"it will be another picture than sample.py's: {'; '.join(other)}")
    return 0


@dataclass(frozen=True)
class Exported:
    """A run, ready to be written: settings with all defaults, tensors under our names of each module.

    text: arguments of the text tower and its class, or None.   scale: the one number that the latents are multiplied
    by; None where channels differ, which `folded` mends.
    """

    network: dict[str, Any]
    autoencoder: dict[str, Any]
    text: Text | None
    schedule: dict[str, Any]
    zero_snr: bool
    prediction: str
    sampler: dict[str, Any]
    image_size: int
    unet: Tensors
    vae: Tensors
    mean: Tensor
    std: Tensor
    parts: tuple[str, ...]

    @property
    def kind(self) -> str:
        return kind_of(self.network, "model.network")

    @property
    def sample_size(self) -> int:
        return self.image_size // 2 ** (len(self.autoencoder["block_channels"]) - 1)

    def cast(self, dtype: torch.dtype) -> Exported:
        text = self.text and Text(**{**self.text.__dict__, "tensors": cast(self.text.tensors, dtype)})
        return Exported(**{**self.__dict__, "unet": cast(self.unet, dtype), "vae": cast(self.vae, dtype), "text": text})

    def scaled(self, wanted: float | None = None) -> tuple[Tensors, dict[str, Any], float]:
        """The autoencoder's weights and arguments, and the factor of its latents: `wanted` where one is wanted.

        Statistics that one factor cannot say are worked into the convolutions around the latents.
        """
        found = scaling_factor(self.mean, self.std)
        if found is not None and wanted in (None, found):
            return self.vae, self.autoencoder, found
        scale = wanted or SCALES.get(self.kind, SD_SCALE)
        folded = fold_statistics(self.vae, self.mean, self.std, scale)
        return folded, {**self.autoencoder, "quant_conv": True}, scale


@dataclass(frozen=True)
class Text:
    """A CLIP text tower: its settings as transformers writes them, the tensors up to the layer that is used, and the
    whole tower where open_clip's layout keeps it.   native: in open_clip's names, not transformers'.
    """

    config: dict[str, Any]
    pad_id: int
    tensors: Tensors
    keep: tuple[str, ...]
    native: bool

    def used(self) -> Tensors:
        return {name: self.tensors[name] for name in self.keep}

    def for_transformers(self, text_model: str = "text_model.") -> Tensors:
        """The used part in transformers' names below `text_model`."""
        if self.native:
            return keymap.to_theirs(clip.map_transformers(self.keep, text_model=text_model), self.used())
        return {text_model + name.removeprefix("tower."): tensor for name, tensor in self.used().items()}


# ---- reading the run


def read_run(path: Path, weights: str = "ema", parts: Sequence[str] = PARTS) -> Exported:
    """The parts of a run. Raises LdmError naming the part that Stable Diffusion's layouts do not have."""
    run = find_run(path)
    if has_stage(run, "autoencoder") and not has_stage(run, "diffusion"):
        hint = "export the autoencoder alone: --parts vae"
        raise LdmError("EXPORT", "the run has an autoencoder and no denoiser", where=str(run), next=hint)
    diffusion, latents = open_stage(run, "diffusion"), open_stage(run, "autoencoder")
    config = diffusion.document("config")
    if "autoencoder" in config:
        raise LdmError("EXPORT", "the run works on pixels: it has no autoencoder", where=str(run))
    denoiser = with_defaults(config["denoiser"])["args"]
    network = arguments(denoiser["network"], UNET, "model.network")
    autoencoder = arguments(latents.document("config")["autoencoder"], AUTOENCODER, "model.autoencoder")
    tensors, vae = mapped(diffusion, weights), mapped(latents, "ema")
    text = None
    if "text" in parts:
        if network["vector_size"] is not None:
            raise LdmError(
                "EXPORT", f"model.network takes a vector of {network['vector_size']} numbers, which no pipeline with "
                "one text encoder gives", where="model.network.vector_size", next=_ALONE,
            )  # fmt: skip
        text = _read_text(config["conditioner"], _below(tensors, CONDITIONER))
        schedule, zero_snr = read_schedule_node(denoiser["schedule"])
        prediction = read_prediction_node(denoiser["prediction"])
    else:  # the networks alone: what they are used with is not written
        schedule, zero_snr, prediction = {}, False, ""
    return Exported(
        network=network,
        autoencoder=autoencoder,
        text=text,
        schedule=schedule,
        zero_snr=zero_snr,
        prediction=prediction,
        sampler=sampling_of(config.get("sampler")),
        image_size=config["image_size"],
        unet=_below(tensors, NETWORK),
        vae={name: value for name, value in vae.items() if not name.startswith("statistics.")},
        mean=vae["statistics.mean"],
        std=vae["statistics.std"],
        parts=tuple(parts),
    )


def sampling_of(node: Mapping[str, Any] | None) -> dict[str, Any]:
    """All arguments of `Sampling`; a run without a sampler of its own takes DDIM."""
    args = {key: value for key, value in (node or {}).items() if key != "_target_"}
    args.setdefault("function", {"_target_": "ldm.diffusion.samplers.ddim.sample_ddim"})
    return with_defaults({"class": "ldm.sampling.tasks.Sampling", "args": args})["args"]


_ALONE = "export the networks alone: --parts unet,vae"


def _below(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _read_text(node: Mapping[str, Any], tensors: Tensors) -> Text:
    """Raises LdmError unless it is a plain CLIP tower that is used as SD1 and SD2 use it."""
    name = node["class"].rpartition(".")[2]
    if node["class"] not in (TEXT, HF_TEXT):
        raise LdmError(
            "EXPORT", f"Stable Diffusion's layouts have no text encoder like {name}", where="model.conditioner",
            limit="OpenClipText, HFClipText", next=_ALONE,
        )  # fmt: skip
    args = with_defaults(node)["args"]
    if args["pad_id"] not in clip.PAD_TOKENS:
        raise _no_tower(f"pad_id={args['pad_id']}")
    if node["class"] == HF_TEXT:
        layers = args["config"]["num_hidden_layers"] - args["clip_skip"]
        keep = tuple(k for k in tensors if not _is_later(k, "tower.encoder.layers.", layers))
        config = {**args["config"], "num_hidden_layers": layers, "architectures": ["CLIPTextModel"]}
        return Text({**config, "model_type": "clip_text_model"}, args["pad_id"], tensors, keep, native=False)
    from ldm.models.conditioner.open_clip import describe_tower

    model = describe_tower(args["config"])
    if not args["final_norm"]:
        raise _no_tower("final_norm=false")
    unusual = [
        key for key in ("no_causal_mask", "act_kwargs", "norm_kwargs", "embed_cls") if model["text_cfg"].get(key)
    ]
    if unusual:
        raise _no_tower(f"{unusual[0]}={model['text_cfg'][unusual[0]]}")
    total = model["text_cfg"]["layers"]
    layers = total + args["layer"] + 1
    keep = tuple(
        k for k in tensors if not _is_later(k, "tower.transformer.resblocks.", layers) and k != "tower.text_projection"
    )
    config = clip.config_for_transformers(args, model, layers)
    return Text(config, args["pad_id"], tensors, keep, native=True)


def _no_tower(what: str) -> LdmError:
    return LdmError(
        "EXPORT", f"Stable Diffusion's layouts have no text tower with {what}", where="model.conditioner", next=_ALONE
    )


def _is_later(name: str, blocks: str, layers: int) -> bool:
    return name.startswith(blocks) and int(name[len(blocks) :].split(".")[0]) >= layers


# ---- diffusers


def write_diffusers(model: Exported, out: Path) -> list[Path]:
    """The folder of a pipeline, or of the parts alone."""
    contents = diffusers_files(model)
    write_folder(out, contents)
    return [out]


def diffusers_files(model: Exported) -> dict[str, Any]:
    """Relative path -> JSON value, text, or tensors."""
    contents = dict(settings_files(model))
    if "unet" in model.parts:
        contents["unet/diffusion_pytorch_model.safetensors"] = renamed(model.unet, diffusers.map_unet)
    if "vae" in model.parts:
        contents["vae/diffusion_pytorch_model.safetensors"] = renamed(model.scaled()[0], diffusers.map_vae)
    if model.text is not None:
        contents["text_encoder/model.safetensors"] = model.text.for_transformers()
    return contents


def settings_files(model: Exported, scale: float | None = None) -> dict[str, Any]:
    """Everything of the folder but the weights."""
    contents: dict[str, Any] = {}
    if "unet" in model.parts:
        contents["unet/config.json"] = unet_config(model.network, model.sample_size)
    if "vae" in model.parts:
        _, autoencoder, factor = model.scaled(scale)
        contents["vae/config.json"] = vae_config(autoencoder, factor, model.image_size)
    if model.text is not None:
        contents["text_encoder/config.json"] = model.text.config
        length = model.text.config["max_position_embeddings"]
        for name, value in clip.tokenizer_files(model.text.pad_id, length).items():
            contents[f"tokenizer/{name}"] = value
        contents["scheduler/scheduler_config.json"] = scheduler_config(
            model.schedule, model.zero_snr, model.prediction, model.sampler
        )
        contents["model_index.json"] = diffusers.pipeline_index()
    return contents


# ---- CompVis


def write_compvis(model: Exported, out: Path) -> list[Path]:
    """The single file, and with a text encoder the folder of settings."""
    settings = out.with_name(f"{out.stem}-config")
    check_file(out)
    if model.text is not None:
        refuse_existing(settings)
    scale = SCALES.get(model.kind, SD_SCALE)
    tensors = compvis_tensors(model, scale)
    metadata = {"format": "pt"}
    contents = settings_files(model, scale)
    if model.text is not None:
        metadata = compvis.describe_file(model.kind, model.prediction, model.image_size)
        write_folder(settings, contents)

    try:
        write_file(out, tensors, metadata)
    except BaseException:
        if model.text is not None:
            shutil.rmtree(settings, ignore_errors=True)
        raise
    return [out, settings] if model.text is not None else [out]


def compvis_tensors(model: Exported, scale: float) -> Tensors:
    """All tensors under the names of the single file. Raises LdmError for what its readers would take for something
    else, because the file says names and shapes only.
    """
    network, vae = model.network, model.autoencoder
    heads = ("head_dim", 64) if network["linear_projection"] else ("num_heads", 8)
    assumed = [("model.network", network, *heads), ("model.network", network, "norm_groups", 32)]
    assumed += [("model.autoencoder", vae, "norm_groups", 32), ("model.autoencoder", vae, "patch_size", 1)]
    for where, args, key, value in assumed:
        if args[key] != value:
            raise LdmError(
                "EXPORT", f"the single file cannot say {key}={args[key]}: its readers take {value}",
                where=f"{where}.{key}", next="--format diffusers",
            )  # fmt: skip
    unet_config(network, model.sample_size)  # the same limits hold
    tensors: Tensors = {}
    if "unet" in model.parts:
        tensors |= renamed(model.unet, compvis.map_unet)
    if "vae" in model.parts:
        tensors |= renamed(model.scaled(scale)[0], compvis.map_vae)
    if model.text is not None:
        tensors |= _compvis_text(model.text)
        tensors |= compvis.constants(model.schedule, model.zero_snr)
    return tensors


def _compvis_text(text: Text) -> Tensors:
    """SD1's layout for a tower with quick_gelu, SD2's for one with gelu: each has the padding of its family."""
    config = text.config
    first = config["hidden_act"] == "quick_gelu"
    expected = {"pad_id": 49407 if first else 0, "num_attention_heads": max(1, config["hidden_size"] // 64)}
    for key, value in expected.items():
        found = text.pad_id if key == "pad_id" else config[key]
        if found != value:
            raise LdmError(
                "EXPORT", f"the single file cannot say {key}={found}: its readers take {value}",
                where="model.conditioner", next="--format diffusers",
            )  # fmt: skip
    if first:
        return text.for_transformers(f"{compvis.TEXT_HF}text_model.")
    if not text.native:
        raise _no_tower("gelu in transformers' names")
    whole_tower = "tower.text_projection" in text.tensors and len(text.keep) < len(text.tensors)
    penultimate = config["num_hidden_layers"] + 1 == _count_blocks(text.tensors)
    tensors = text.tensors if whole_tower and penultimate else text.used()
    return renamed(tensors, compvis.map_text_open_clip)


def _count_blocks(names: Iterable[str]) -> int:
    return len({name.split(".")[3] for name in names if name.startswith("tower.transformer.resblocks.")})
