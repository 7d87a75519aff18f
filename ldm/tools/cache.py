"""`python -m ldm cache OUT [run=RUN] [key=value ...]`: latents and text embeddings of a data set, written once.

The autoencoder, the text encoders and the data are those of a run; `data=...` and `data.KEY=VALUE` name other data in
the words of train.py. A rerun of the same command verifies what is there and goes on with what is not.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from ldm.build import build, build_saved, resolve, to_saved
from ldm.checkpoints.run import find_run
from ldm.checkpoints.store import Store
from ldm.config import changed, compose, trusted_targets
from ldm.data.datamodule import DataModule
from ldm.errors import TEMPORARY, LdmError
from ldm.model import (
    Autoencoder,
    absent_towers,
    load_autoencoder,
    load_pretrained,
    load_weights,
    no_tower_weights,
    open_stage,
    read_weights,
)
from ldm.precompute.cache import Folder, Piece, Record, Settings, identity, moments_pieces, write_cache
from ldm.precompute.text import encoder_ids, shapes_of, text_encoders, text_pieces, texts_of, unique
from ldm.tools.cache_options import Options, parse
from ldm.tools.disk import refusals
from ldm.tools.pool import progress
from ldm.training.assemble import fixed_autoencoder, trained_autoencoder
from ldm.training.launch import die_with_parent
from ldm.training.place import Place


def main(argv: Sequence[str]) -> int:
    parsed = parse(argv)
    if parsed is None:
        return 0
    out, options, of_data = parsed
    outer = Place.outer()
    if options.devices > 1 and outer is None:
        return _several(argv, options.devices)
    place = outer or Place()
    folder = Path(out).expanduser()
    with refusals(folder, "files"):
        cache(folder, options, of_data, place)
    return 0


def cache(out: Path, options: Options, words: Sequence[str] = (), place: Place | None = None) -> Record | None:
    """Write this process's part; returns the content of cache.json once it is whole. words: of the data."""
    place, began = place or Place(), time.monotonic()
    settings = Settings(options.dtype, options.flipped, options.batch_size, options.piece_mb)
    run, trusted = find_run(options.run), trusted_targets(words)
    record = _recorded(run)
    device = _device(options.device, place.local_rank)
    autoencoder = _autoencoder(run, record, trusted).to(device)
    data: DataModule = build(_data_node(record, words, run, trusted), where="data", trusted=trusted)
    data.open().configure(seed=0, batch_size=1, num_workers=options.workers, pin_memory=device.type == "cuda")
    pieces: list[Piece] = list(moments_pieces(data, autoencoder, settings))
    text = None
    if options.text:
        conditioner, node = _conditioner(run, record, trusted)
        encoders = text_encoders(conditioner.to(device))
        splits = ["train"] + ["val"] * bool(data.num_val)
        texts = unique(text for split in splits for text in texts_of(data.dataset(split), data.captions))
        pieces += text_pieces(encoders, texts, settings)
        text = {
            "ids": encoder_ids(conditioner, node, trusted),
            "captions": asdict(data.captions),
            "fields": shapes_of(encoders),
            "count": len(texts),
        }
        if (cut := _num_cut(encoders, texts)) and place.rank == 0:
            print(f"{cut} of {len(texts)} captions are longer than the text encoder reads and are cut")
    folder = Folder(out, identity(data, autoencoder, pieces, settings, text))
    with progress("encoding", sum(piece.count for piece in pieces[place.rank :: place.world_size])) as done:
        about, written = write_cache(folder, pieces, rank=place.rank, world_size=place.world_size, done=done)
    if about is None:
        print(f"{written} pieces written; other processes write the rest of {len(pieces)}, or the same command again")
    else:
        verb = f"wrote {written} of {len(pieces)} files" if written else "all files are there and as they were written"
        print(f"{out}: {_sentence(about)}; {verb}, {time.monotonic() - began:.0f} s")
    return about


def _sentence(about: Mapping[str, Any]) -> str:
    error, lost = about["rounding_error"], about["count"] - about["usable"]
    facts = [f"moments of {about['usable']} pictures in {about['dtype']}"]
    if about["dtype"] != "float32":
        facts.append(f"rounding changes the latents by {error['mean']:.1e} of their deviation")
    facts += ["mirror images"] * about["flipped"]
    facts += [f"{lost} pictures could not be read"] * bool(lost)
    facts += [f"{about['text']['count']} texts"] if about["text"] else []
    return ", ".join([*facts, f"{sum(entry['bytes'] for entry in about['files'].values()) / 1e6:.1f} MB"])


# ---- what a run has


def _recorded(run: Path) -> dict[str, Any]:
    """The configuration that the run was started with; empty for a folder that has none."""
    try:
        found = yaml.safe_load((run / "config.yaml").read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _data_node(
    record: Mapping[str, Any], words: Sequence[str], run: Path, trusted: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The run's `data`, changed by the words, or another group of `data`."""
    groups = [word for word in words if word.startswith("data=")]
    values = [word for word in words if word.startswith("data.")]
    recorded = record.get("data") or {}
    if groups or "_target_" not in recorded:
        if not groups:
            hint = "name them: data=folder or data=shards, data.path=..., data.image_size=..., as for train.py"
            raise LdmError("CACHE", "the run does not say which data it was trained on", where=str(run), next=hint)
        node = compose("train", ["experiment=null", "name=cache", *groups, *values])["data"]
    else:
        known = dict.fromkeys(inspect.signature(resolve(recorded["_target_"], trusted=trusted)).parameters)
        node = changed({"data": {**known, **recorded}}, values)["data"]
        set_now = {word.removeprefix("data.").partition("=")[0].partition(".")[0] for word in values}
        node = {key: value for key, value in node.items() if key in recorded or key in set_now}
    return {**node, "cache": None, "columns": {}}  # columns are no part of it


def _autoencoder(run: Path, record: Mapping[str, Any], trusted: tuple[str, ...]) -> Autoencoder:
    if Store(run / "autoencoder" / "ckpt").steps():
        return trained_autoencoder(run, trusted)
    fixed = fixed_autoencoder(record, trusted) if "model" in record else None
    return fixed or load_autoencoder(open_stage(run, "autoencoder"), trusted)


def _conditioner(run: Path, record: Mapping[str, Any], trusted: tuple[str, ...]) -> tuple[nn.Module, dict[str, Any]]:
    """The run's conditioner with the weights that training has, and its description.

    Text encoders that are not trained have the same weights from the first step to the last.
    """
    if Store(run / "diffusion" / "ckpt").steps():
        checkpoint = open_stage(run, "diffusion")
        node = checkpoint.document("config")["conditioner"]
        conditioner = build_saved(node, where="config.json: conditioner", trusted=trusted)
        prefix = "conditioner."
        tensors = {k: v for k, v in read_weights(checkpoint, "ema").items() if k.startswith(prefix)}
        if lost := absent_towers(conditioner, tensors):
            raise no_tower_weights(list(lost), checkpoint.path)
        load_weights(conditioner, {k.removeprefix(prefix): v for k, v in tensors.items()}, checkpoint.path)
        return conditioner.eval(), node
    try:
        described = record["model"]["conditioner"]
    except (KeyError, TypeError) as error:
        hint = "take the run that has them, or write the cache without text=true"
        raise LdmError("CACHE", "the run has no text encoders", where=str(run), next=hint) from error
    conditioner = build(described, where="model.conditioner", trusted=trusted)
    for name, part in text_encoders(conditioner).items():
        if getattr(part, "weights", None) is None:
            what = f"the text encoder {name!r} has no weights yet"
            raise LdmError("CACHE", what, where="model.conditioner", next="name their file: model.conditioner.weights")
    load_pretrained(conditioner)
    return conditioner.eval(), to_saved(described)


def _num_cut(encoders: Mapping[str, Any], texts: Sequence[str]) -> int:
    readers = [encoder.tokenizer for encoder in encoders.values() if hasattr(encoder, "tokenizer")]
    return max((sum(map(reader.is_cut, texts)) for reader in readers), default=0)


# ---- processes and places


def _device(name: str | None, local_rank: int) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise LdmError("DEVICE", "there is no GPU", where="device=cuda", next="device=cpu")
    on_gpu = name == "cuda" or (name is None and torch.cuda.is_available())
    return torch.device("cuda", local_rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")


def _several(argv: Sequence[str], devices: int) -> int:
    """The same command in one process for each device; they share nothing but the folder."""
    command = [sys.executable, "-m", "ldm", "cache", *argv]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(devices)},
            preexec_fn=die_with_parent,
        )
        for rank in range(devices)
    ]
    codes: list[int] = []
    try:
        for process in processes:
            codes.append(process.wait())
    finally:
        for process in processes:
            process.terminate()
    failed = [code for code in codes if code]
    return max(failed) if failed and min(failed) > 0 else TEMPORARY if failed else 0
