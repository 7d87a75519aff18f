"""`python -m ldm inspect PATH [key=value ...]`: what a data set holds, what is wrong with it, and what to do.

Every picture is decoded as training would decode it. Nothing is written but the contact sheet, if one is asked for,
and the index that training uses too. Exit code 2 if training would refuse the data as they are.
"""

from __future__ import annotations

import io
import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.checkpoints import files
from ldm.data import paths
from ldm.data.buckets import loss_with_buckets
from ldm.data.decode import BadSample, decode_image
from ldm.data.duplicates import DISTANCE, MAX_DISTANCE, equal_groups, members_of
from ldm.data.index import BAD_KINDS, index_all
from ldm.errors import OK, REFUSED, LdmError
from ldm.tools.inspect_verdict import LIMIT, verdict
from ldm.tools.pool import num_cores, progress
from ldm.tools.samples import (
    FACTS,
    FORMS,
    SUFFIXES,
    Bad,
    Opened,
    Scan,
    Source,
    chunks_of,
    is_table,
    open_source,
    scan_all,
)
from ldm.tools.words import Verb, option

FORMAT = 1
SIDES = (0, 64, 128, 256, 512, 1024, 2048)
ASPECTS = (0.0, 0.5, 0.7, 0.9, 1.1, 1.45, 2.0)
VERB = Verb(
    "inspect",
    ("PATH",),
    "PATH: what data.path takes, a folder, shards or a pattern; or a .csv or .jsonl with a row per picture.\n"
    "docs/prepare.md explains the report and the keys of --json.",
)
_EXAMPLES = 3
_MAT = (238, 238, 238)  # around pictures that are not square
_SHEET_CAPTION = 88  # characters, what four lines below a picture hold


@dataclass(frozen=True)
class Options:
    json: bool = option(False, "the report as JSON on standard output")
    sheet: str | None = option(None, "a PNG file for a contact sheet with captions", str)
    sheet_samples: int = option(32, "pictures on it")
    overwrite: bool = option(False, "replace the sheet if it exists")
    caption: str = option("auto", "where captions come from: auto, sidecar, metadata, filename, or 'a logo of {title}'")
    image_column: str | None = option(None, "of a table: names the picture (file_name, path, image, ...)", str)
    caption_column: str | None = option(None, "of a table: holds the caption (text, caption)", str)
    root: str | None = option(None, "of a table: where the pictures lie (the table's folder)", str)
    near: int = option(DISTANCE, f"bits in which nearly equal pictures may differ, 0 to {MAX_DISTANCE}")
    tokens: bool = option(True, "count tokens, which loads the tokenizer for some seconds")
    index_dir: str | None = option(None, "where the index is kept (beside the data, or the user's cache)", str)
    workers: int | None = option(None, "processes (one for each core)", int)

    def __post_init__(self) -> None:
        bounds = {"near": (0, MAX_DISTANCE), "sheet_samples": (1, 400), "workers": (1, 1024)}
        for key, (low, high) in bounds.items():
            value = getattr(self, key)
            if value is not None and not low <= value <= high:
                raise LdmError("CONFIG", f"{key}={value}", where=key, limit=f"{low} to {high}")


def main(argv: Sequence[str]) -> int:
    parsed = VERB.parse(argv, Options)
    if parsed is None:
        return OK
    [path], options = parsed
    if options.sheet and Path(options.sheet).suffix.lower() != ".png":
        raise LdmError("CONFIG", f"sheet={options.sheet}", where="sheet", next="a file that ends in .png")
    if options.sheet and Path(options.sheet).exists() and not options.overwrite:
        raise LdmError("EXISTS", "there is a file already", where=options.sheet, next="another name, or overwrite=true")
    report = inspect(path, options)
    if options.json:
        print(json.dumps(report, ensure_ascii=True, indent=1, allow_nan=False))
    else:
        from ldm.tools.inspect_view import show

        show(report)
    return OK if report["verdict"]["usable"] else REFUSED


def inspect(path: str, options: Options) -> dict[str, Any]:
    """The report; its keys are those that docs/prepare.md lists. Raises LdmError if nothing at all can be read."""
    source, unusable, truncated = _open(path, options)
    facts, captions, bad = _scan(source, options.workers or num_cores())
    bad = [b for b in bad if b.kind != "second_image"]  # which training leaves out with a remark
    examples = source.examples + bad
    counts = Counter(b.kind for b in bad) + source.problems
    names = [source.names[n] for n in facts["number"]]
    held = np.array([_is_val(name) for name in names], dtype=bool) & isinstance(source, Opened)
    report: dict[str, Any] = {
        "format": FORMAT,
        "path": path,
        "kind": "table" if not isinstance(source, Opened) else "shards" if source.folder is None else "folder",
        "shards": {
            "count": len(source.dataset.shards) + len(unusable) if isinstance(source, Opened) else 0,
            "unusable": [b._asdict() for b in unusable],
            "truncated": [b._asdict() for b in truncated],
        },
        "samples": {
            "good": len(facts),
            "train": int((~held).sum()),
            "val": int(held.sum()),
            "bytes": int(facts["bytes"].sum()),
        },
        "pictures": _pictures(facts),
        "captions": _captions(captions, names, options.tokens),
        "bad": {
            "count": sum(counts.values()),
            "share": sum(counts.values()) / max(1, sum(counts.values()) + len(facts)),
            "kinds": _by_kind(counts, examples),
        },
        "remarks": _remarks(source),
        "duplicates": _duplicates(facts, names, held, options.near),
    }
    report["verdict"] = verdict(report)
    if options.sheet:
        _sheet(source, facts, captions, Path(options.sheet), options.sheet_samples)
    return report


def _open(path: str, options: Options) -> tuple[Source, list[Bad], list[Bad]]:
    """What can be read of `path`, the shards that cannot be used, and those that are cut off."""
    words: dict[str, Any] = {
        "caption": options.caption,
        "image_column": options.image_column,
        "caption_column": options.caption_column,
        "root": options.root,
        "index_dir": options.index_dir,
        "on_missing_caption": "empty",
        "on_truncated": "use",
    }
    if is_table(path):
        return open_source(path, **words), [], []
    shards = paths.expand(path, where="PATH")
    indexes = index_all(shards, Path(options.index_dir) if options.index_dir else None)
    unusable = [Bad(str(s), "unusable", i.unusable) for s, i in zip(shards, indexes, strict=True) if i.unusable]
    truncated = [Bad(str(s), "truncated", i.damage) for s, i in zip(shards, indexes, strict=True) if i.damage]
    good = [str(s) for s, i in zip(shards, indexes, strict=True) if not i.unusable]
    return open_source(good if unusable and good else path, **words), unusable, truncated


def _scan(source: Source, workers: int) -> tuple[NDArray[np.void], list[str], list[Bad]]:
    facts, captions, bad = [np.empty(0, FACTS)], [], []
    for chunk in scan_all(Scan(source), chunks_of(len(source.names)), workers):
        facts.append(chunk.facts)
        captions += chunk.captions
        bad += [Bad(source.names[n], kind, reason) for n, kind, reason in chunk.bad]
    return np.concatenate(facts), captions, bad


def _is_val(name: str) -> bool:
    """Whether a sample of shards is held out: they are named SHARD.tar/KEY, so a picture of a folder never is."""
    shard, slash, _ = name.partition(".tar/")
    return bool(slash) and shard.startswith("val-")


# ---- what is counted


def _pictures(facts: NDArray[np.void]) -> dict[str, Any]:
    width, height = facts["width"].astype(np.float64), facts["height"].astype(np.float64)
    short = np.minimum(width, height)
    aspect = width / height
    forms = Counter(SUFFIXES[FORMS[form]] for form in facts["form"].tolist())
    return {
        "formats": dict(forms.most_common()),
        "transparent": int(facts["transparent"].sum()),
        "short_side": {**_spread(short), "histogram": _histogram(short, SIDES)},
        "aspect": {**_spread(aspect), "histogram": _histogram(aspect, ASPECTS)},
        "centre_crop_loses": float(1 - (short / np.maximum(width, height)).mean()) if len(facts) else 0.0,
        "buckets_lose": loss_with_buckets(np.stack([width, height], axis=1)) if len(facts) else 0.0,
    }


def _spread(values: NDArray[np.float64]) -> dict[str, float]:
    if not len(values):
        return {}
    names = ("min", "p05", "median", "p95", "max")
    return dict(zip(names, np.percentile(values, (0, 5, 50, 95, 100)).round(3).tolist(), strict=True))


def _histogram(values: NDArray[np.float64], edges: Sequence[float]) -> list[dict[str, Any]]:
    """Counts of from <= value < to; the last has no end."""
    counts = np.histogram(values, [*edges, np.inf])[0].tolist()
    ends = [*edges[1:], None]
    return [{"from": a, "to": b, "count": n} for a, b, n in zip(edges, ends, counts, strict=True)]


def _captions(captions: list[str], names: list[str], with_tokens: bool) -> dict[str, Any]:
    given = [(text, name) for text, name in zip(captions, names, strict=True) if text]
    common = Counter(text for text, _ in given).most_common(1)
    report: dict[str, Any] = {
        "with": len(given),
        "without": len(captions) - len(given),
        "coverage": len(given) / max(1, len(captions)),
        "distinct": len({text for text, _ in given}),
        "most_common": {"caption": common[0][0], "count": common[0][1]} if common else None,
        "first_without": next((name for text, name in zip(captions, names, strict=True) if not text), None),
        "tokens": None,
    }
    if with_tokens and given:
        from ldm.models.conditioner.tokenizer import Tokenizer

        tokenizer, lengths = Tokenizer(length=10**6), []
        tokenizer([""])  # reads the vocabulary, which is no progress
        with progress("counting tokens", len(given)) as advance:
            for text, _ in given:
                lengths.append(len(tokenizer([text])[0]))
                advance(1)
        cut = [name for length, (_, name) in zip(lengths, given, strict=True) if length > LIMIT]
        report["tokens"] = {
            **_spread(np.array(lengths, dtype=np.float64)),
            "limit": LIMIT,
            "truncated": len(cut),
            "truncated_share": len(cut) / len(given),
            "first_truncated": cut[0] if cut else None,
        }
    return report


def _by_kind(counts: Counter[str], examples: Iterable[Bad]) -> dict[str, Any]:
    first: dict[str, Bad] = {}
    for example in examples:
        first.setdefault(example.kind, example)
    return {
        kind: {"count": count, "first": {"path": example.path, "reason": example.reason}}
        for kind, count in counts.most_common()
        for example in [first.get(kind, Bad("", kind, ""))]
    }


def _remarks(source: Source) -> dict[str, Any]:
    """What the index remarks on beside bad samples, and what it inferred."""
    if not isinstance(source, Opened):
        return {"kinds": {}, "sentences": source.remarks}
    counts = Counter({k: n for k, n in source.dataset.problems.items() if k not in BAD_KINDS})
    examples = [Bad(f"{p.shard}/{p.key}", p.kind, p.reason) for p in source.dataset.examples]
    return {"kinds": _by_kind(counts, examples), "sentences": source.remarks}


def _duplicates(facts: NDArray[np.void], names: list[str], held: NDArray[np.bool_], distance: int) -> dict[str, Any]:
    exact, near = equal_groups(facts["pixels"], facts["phash"], facts["small"], distance)
    found = {"exact": members_of(exact), "near": members_of(near, unless=exact)}
    across = [g for g in members_of(near) if held[g].any() and not held[g].all()]
    report: dict[str, Any] = {}
    for kind, groups in {**found, "train_val": across}.items():
        report[kind] = {
            "groups": len(groups),
            "pictures": sum(map(len, groups)),
            "first": [[names[i] for i in _both_sides(g, held)] for g in groups[:_EXAMPLES]],
        }
    return report


def _both_sides(group: NDArray[np.intp], held: NDArray[np.bool_]) -> list[int]:
    """Four of a group, those of training and of validation in turn, so that a pair across them is seen."""
    train, val = group[~held[group]].tolist(), group[held[group]].tolist()
    return (train[:1] + val[:1] + train[1:] + val[1:])[:4]


# ---- the contact sheet


def _sheet(
    source: Source, facts: NDArray[np.void], captions: list[str], path: Path, count: int, cell: int = 160
) -> None:
    """`count` pictures, evenly over the data set, each whole in a square cell, its caption below."""
    from PIL import Image

    from ldm.sampling.outputs import captioned_grid

    rows = np.unique(np.linspace(0, max(0, len(facts) - 1), count).round().astype(int))[: len(facts)]
    cells, texts = [], []
    for row in rows:
        try:
            image = decode_image(source.read(int(facts["number"][row])).image)
        except BadSample:  # gone since it was read
            continue
        zoom = max(1, cell // max(image.size))
        image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
        image.thumbnail((cell, cell), Image.Resampling.LANCZOS)
        square = Image.new("RGB", (cell, cell), _MAT)
        square.paste(image, ((cell - image.width) // 2, (cell - image.height) // 2))
        cells.append(square)
        texts.append(textwrap.shorten(captions[row], _SHEET_CAPTION, placeholder=" …") or "(no caption)")
    if not cells:
        raise LdmError("DATA", "there is no picture for the sheet", where=str(path))
    file = io.BytesIO()
    captioned_grid(cells, texts, columns=min(8, len(cells)), cell=cell).save(file, "PNG")
    try:
        files.replace_file(path, file.getvalue())
    except OSError as error:
        raise LdmError("DISK", f"cannot write the sheet: {error.strerror}", where=str(path)) from error
