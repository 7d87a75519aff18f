"""Captions + frozen text encoders -> the embeddings of a cache; and the encoders of a model that read them there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ldm.build import with_defaults
from ldm.data.cache import DTYPES, CachedText, row_sums, text_hash
from ldm.data.captions import Captions
from ldm.data.decode import BadSample
from ldm.data.shards import Dataset
from ldm.errors import LdmError
from ldm.models.conditioner.compose import Compose
from ldm.precompute.cache import Record, Settings, cut_rows
from ldm.types import Conditioner, Conditioning

_FIELDS = ("tokens", "mask", "vector")
_NOT_OF_THE_RESULT = ("weights", "sha256", "drop_prob", "trained")  # of an encoder's arguments
ALONE = "text"  # the name of a conditioner that is no part of a `Compose`


def text_encoders(conditioner: nn.Module) -> dict[str, nn.Module]:
    """The parts that read the caption and nothing else, by name.

    Raises LdmError, `CACHE`, if there is none, or one that is trained along or whose length follows the batch.
    """
    parts = dict(conditioner.parts.named_children()) if isinstance(conditioner, Compose) else {ALONE: conditioner}
    found = {name: part for name, part in parts.items() if cast(Conditioner, part).reads == ("caption",)}
    where = "model.conditioner"
    if not found:
        raise LdmError("CACHE", "the model reads no text", where=where, next="write the cache without text=true")
    for name, part in found.items():
        if any(parameter.requires_grad for parameter in part.parameters()):
            what = f"the text encoder {name!r} is trained along, so its embeddings change"
            raise LdmError("CACHE", what, where=where, next="write the cache without text=true, or trained=false")
        if "tokens" in cast(Conditioner, part).provides and cast(Conditioner, part).length is None:
            what = f"the text encoder {name!r} gives as many tokens as its batch needs"
            raise LdmError("CACHE", what, where=where, next="set trim=false")
    return found


def encoder_ids(conditioner: nn.Module, node: Mapping[str, Any], trusted: tuple[str, ...] = ()) -> dict[str, str]:
    """sha256 of what determines each text encoder's result: its class, its arguments, its weights.

    node: the conditioner as checkpoints describe it, {"class", "args"}.
    """
    found = {}
    for name, part in text_encoders(conditioner).items():
        own = with_defaults(node["args"]["parts"][name] if isinstance(conditioner, Compose) else node, trusted)
        args = {key: value for key, value in own["args"].items() if key not in _NOT_OF_THE_RESULT}
        digest = hashlib.sha256(json.dumps({"class": own["class"], "args": args}, sort_keys=True).encode())
        for key, value in sorted(part.state_dict().items()):
            digest.update(f"{key}:{tuple(value.shape)}".encode())
            digest.update(value.float().cpu().contiguous().numpy().tobytes())
        found[name] = digest.hexdigest()
    return found


def texts_of(dataset: Dataset, captions: Captions) -> Iterator[str]:
    """Every text that training may give a sample, those of samples without a readable one left out."""
    if captions.shuffle_caption:
        what = "shuffled tags cannot be cached: every use of a caption is another text"
        raise LdmError("CACHE", what, where="data.shuffle_caption=true", next="write the cache without text=true")
    fields = captions.members
    for sample in range(dataset.num_samples):
        key = dataset.keys[sample]
        try:
            raw = dataset.read(sample, fields)
            txt, data = raw.get("txt"), raw.get("json")
            several = captions.caption_choice != "first"
            for pick in range(max(1, len(captions.all_of(key, txt, data))) if several else 1):
                yield captions(key, txt, data, pick)
        except BadSample:  # training will find it bad, too
            continue


@dataclass(frozen=True)
class TextPiece:
    """Some texts. encoders: by name."""

    name: str
    texts: Sequence[str]
    encoders: Mapping[str, nn.Module]
    dtype: str
    batch_size: int

    @property
    def count(self) -> int:
        return len(self.texts)

    @property
    def fingerprint(self) -> bytes:
        return "".join(f"{text}\0" for text in self.texts).encode("utf-8", "surrogatepass")

    @torch.no_grad()
    def write(self) -> tuple[dict[str, Tensor], Record]:
        parts: dict[str, list[Tensor]] = {}
        for first in range(0, self.count, self.batch_size):
            texts = list(self.texts[first : first + self.batch_size])
            for name, encoder in self.encoders.items():
                given: Conditioning = encoder(texts)
                for field in _FIELDS:
                    if (value := getattr(given, field)) is not None:
                        value = value.to(DTYPES[self.dtype]) if value.is_floating_point() else value
                        if not bool(value.isfinite().all()):
                            what = f"the text encoder {name!r} gives embeddings that are not finite"
                            raise LdmError("LATENTS", what, next="dtype=bfloat16 or float32")
                        parts.setdefault(f"{name}.{field}", []).append(value.cpu())
        tensors = {name: torch.cat(values) for name, values in parts.items()}
        sums = {f"{name}.sums": row_sums(table) for name, table in tensors.items()}
        hashes = torch.tensor([text_hash(text) for text in self.texts], dtype=torch.int64)
        return {**tensors, **sums, "hashes": hashes}, {"kind": "text", "count": self.count}


def text_pieces(encoders: Mapping[str, nn.Module], texts: Sequence[str], settings: Settings) -> Iterator[TextPiece]:
    """texts: each once, see `unique`."""
    row_bytes = sum(prod(shape) for shape in shapes_of(encoders).values()) * DTYPES[settings.dtype].itemsize
    for number, rows in enumerate(cut_rows(np.arange(len(texts)), row_bytes, settings.piece_mb)):
        name = f"text-{number:06d}.safetensors"
        yield TextPiece(name, [texts[i] for i in rows.tolist()], encoders, settings.dtype, settings.batch_size)


@torch.no_grad()
def shapes_of(encoders: Mapping[str, nn.Module]) -> dict[str, list[int]]:
    """The shape of a row of every field that the encoders give."""
    found: dict[str, list[int]] = {}
    for name, encoder in encoders.items():
        given: Conditioning = encoder([""])
        values = {field: getattr(given, field) for field in _FIELDS}
        found |= {f"{name}.{key}": list(value.shape[1:]) for key, value in values.items() if value is not None}
    return found


def unique(texts: Iterator[str]) -> list[str]:
    """Each text once, and the empty one of the null condition, in the order of their hashes."""
    by_hash = {text_hash(""): ""}
    for text in texts:
        if by_hash.setdefault(text_hash(text), text) != text:  # about one set of texts in ten million million
            raise LdmError("CACHE", "two texts have the same hash", where=repr(text), next="change one of them")
    return [by_hash[key] for key in sorted(by_hash)]


def remembered(encoders: Mapping[str, nn.Module], text: CachedText) -> dict[nn.Module, Callable[[Any], Conditioning]]:
    """For `LatentDiffusion.instead`: encoders that look texts up, and compute what is not there (a sample's prompt)."""

    def look_up(name: str, encoder: nn.Module) -> Callable[[list[str]], Conditioning]:
        def call(texts: list[str]) -> Conditioning:
            found = text.find(name, texts)
            if found is None:
                return encoder(texts)
            device = next(encoder.parameters()).device
            if device.type == "cuda":
                found = found.pin_memory()  # see `to_device`
            return found.to(device, torch.float32, non_blocking=True)

        return call

    return {encoder: look_up(name, encoder) for name, encoder in encoders.items()}
