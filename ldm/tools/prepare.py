"""`python -m ldm prepare FOLDER OUT [key=value ...]`: pictures and captions to tar shards in the layout of img2dataset.

Two passes. The first decodes every picture: what is bad is left out and listed, and what is the same, or nearly, is
found. The second writes whole shards, several at a time, each under a temporary name until it is on the disk. A rerun
of the same command goes on with what is not there yet. The same input and options give the same bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from ldm.checkpoints import files
from ldm.data.captions import fields_of
from ldm.data.decode import BadSample, decode_image, open_image, upright_size
from ldm.data.duplicates import DISTANCE, MAX_DISTANCE, are_near, equal_groups, members_of
from ldm.errors import LdmError
from ldm.tools.disk import refusals
from ldm.tools.pool import each, num_cores, progress
from ldm.tools.samples import (
    FACTS,
    SUFFIXES,
    Bad,
    Chunk,
    Opened,
    Scan,
    Source,
    chunks_of,
    json_bytes,
    open_source,
    plain,
    scan_all,
)
from ldm.tools.words import Verb, option

_SHARDS = ("train-*.tar", "val-*.tar")
REPORT, SKIPPED, DUPLICATES, WORK = "prepare_report.json", "skipped.jsonl", "duplicates.jsonl", ".prepare"
VERB = Verb(
    "prepare",
    ("FOLDER", "OUT"),
    "FOLDER: pictures with captions as training reads them, a .csv or .jsonl with a row per picture, or shards.\n"
    "OUT: a folder for train-000000.tar, val-000000.tar, ... and prepare_report.json; docs/prepare.md says more.",
)
OWN = "prepare"  # in a sample's JSON: what we say about it, beside the fields that it came with
_VERSION = 2
_EXAMPLE_ROWS = 3


@dataclass(frozen=True)
class Options:
    caption: str = option("auto", "where captions come from: auto, sidecar, metadata, filename, or 'a logo of {title}'")
    on_missing_caption: str = option("skip", "skip or empty", choices=("skip", "empty"))
    on_truncated: str = option("refuse", "shards that are cut off: refuse or use", choices=("refuse", "use"))
    image_column: str | None = option(None, "of a table: names the picture (file_name, path, image, ...)", str)
    caption_column: str | None = option(None, "of a table: holds the caption (text, caption)", str)
    root: str | None = option(None, "of a table: where the pictures lie (the table's folder)", str)
    val_fraction: float = option(0.01, "share of the pictures held out as val-*.tar, by content")
    near: int = option(DISTANCE, f"bits in which nearly equal pictures may differ, 0 to {MAX_DISTANCE}")
    drop: str = option(
        "none", "leave out all but one of equal pictures: none, exact, near", choices=("none", "exact", "near")
    )
    shard_mb: float = option(256.0, "size of a shard, about")
    shard_samples: int | None = option(None, "most samples in a shard", int)
    size: int | None = option(None, "shrink to this short side in pixels; smaller pictures stay", int)
    format: str = option("original", "original, jpg, png or webp", choices=("original", "jpg", "png", "webp"))
    quality: int = option(95, "of jpg and webp, 1 to 100; webp is lossless at 100")
    background: str = option("white", "under transparent pixels, where a picture is encoded anew")
    index_dir: str | None = option(None, "where the index is kept (beside the data, or the user's cache)", str)
    workers: int | None = option(None, "processes (one for each core)", int)
    overwrite: bool = option(False, "replace what an earlier prepare wrote into OUT")

    def __post_init__(self) -> None:
        bounds = {
            "val_fraction": (0, 0.5),
            "near": (0, MAX_DISTANCE),
            "shard_mb": (0.001, 1e6),
            "shard_samples": (1, 10**9),
            "size": (1, 16_384),
            "quality": (1, 100),
            "workers": (1, 1024),
        }
        for key, (low, high) in bounds.items():
            value = getattr(self, key)
            if value is not None and not low <= value <= high:
                raise LdmError("CONFIG", f"{key}={value}", where=key, limit=f"{low} to {high}")
        with suppress(ValueError):
            ImageColor.getrgb(self.background)
            return
        raise LdmError("CONFIG", f"background={self.background}", where="background", next="white, black or #rrggbb")

    @property
    def reencodes(self) -> bool:
        return self.size is not None or self.format != "original"

    def result(self) -> dict[str, Any]:
        """Those that the output depends on."""
        return {k: v for k, v in asdict(self).items() if k not in ("index_dir", "workers", "overwrite")}


def main(argv: Sequence[str]) -> int:
    parsed = VERB.parse(argv, Options)
    if parsed is not None:
        (source, out), options = parsed
        prepare(source, Path(out), options)
    return 0


def prepare(path: str, out: Path, options: Options) -> dict[str, Any]:
    """Writes the shards and returns the report. Raises LdmError, in one line, for all that a user can do wrong."""
    began = time.monotonic()
    out = out.expanduser()
    _refuse_overlap(Path(path).expanduser(), out)
    source = open_source(path, **{f.name: getattr(options, f.name) for f in fields(options) if f.name in _OPENING})
    wanted = {"version": _VERSION, "source": source.identity, **options.result()}
    plan_id = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:32]
    with refusals(out, "shards"):
        done = _finished(out, plan_id)
        if done is not None:
            print(f"{out} holds this already: {_sentence(done)}")
            return done
        with _work_folder(out, plan_id, options.overwrite) as work:
            report = _run(source, str(path), out, work, plan_id, options)
            files.remove_leftovers(out)  # of workers that outlived an earlier, killed run for a moment
        shutil.rmtree(work)
    print(f"{_sentence(report)} in {time.monotonic() - began:.0f} s")
    _print_findings(report, out)
    return report


_OPENING = ("caption", "on_missing_caption", "on_truncated", "root", "image_column", "caption_column", "index_dir")


def _run(source: Source, path: str, out: Path, work: Path, plan_id: str, options: Options) -> dict[str, Any]:
    workers = options.workers or num_cores()
    facts, bad = _scan(source, work, options, workers)
    bad = source.examples + bad
    if not len(facts):
        first = f"{bad[0].path}: {bad[0].reason}" if bad else "nothing was found"
        raise LdmError("DATA", f"none of {len(bad)} pictures can be used", where=path, limit=first)
    exact, near = equal_groups(facts["pixels"], facts["phash"], facts["small"], options.near)
    kept, dropped = _drop(source, facts, exact, near, options)
    train, val = _split(facts, near, kept, options.val_fraction)
    jobs = _jobs(source, facts, {"train": train, "val": val}, options)
    _check_space(out, work, facts, kept, options)
    shards = _write_all(source, out, work, jobs, options, workers)
    counts = Counter(b.kind for b in bad) | source.problems  # of tars the first ten of a kind are named
    counts.update(b.kind for b in dropped)
    _write_lines(out / SKIPPED, [b._asdict() for b in sorted(bad + dropped)])
    groups = {"exact": members_of(exact), "near": members_of(near, unless=exact)}
    lines = [
        {"kind": kind, "paths": [source.names[n] for n in facts["number"][g]]} for kind in groups for g in groups[kind]
    ]
    _write_lines(out / DUPLICATES, lines)
    report = {
        "version": _VERSION,
        "plan": plan_id,
        "source": path,
        "options": options.result(),
        "train": len(train),
        "val": len(val),
        "skipped": dict(sorted(counts.items())),
        "duplicates": {
            kind: {"groups": len(found), "pictures": sum(map(len, found)), "first": lines_of(kind, lines)}
            for kind, found in groups.items()
        },
        "remarks": source.remarks + _repeats(source),
        "shards": shards,
    }
    files.replace_file(out / REPORT, json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    return report


def lines_of(kind: str, lines: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [line["paths"] for line in lines if line["kind"] == kind][:_EXAMPLE_ROWS]


# ---- places


def _refuse_overlap(source: Path, out: Path) -> None:
    one, other = source.resolve(), out.resolve()
    folder = one if one.is_dir() else one.parent
    if other == folder or (one.is_dir() and (other.is_relative_to(one) or one.is_relative_to(other))):
        raise LdmError(
            "CONFIG", "OUT and FOLDER lie in one another", where=str(out), next="choose an OUT beside FOLDER"
        )


def _finished(out: Path, plan_id: str) -> dict[str, Any] | None:
    """The report in `out`, if it is of this plan and its shards are there."""
    report = _report_in(out)
    return report if report.get("plan") == plan_id and not _changed(out, report) else None


def _report_in(out: Path) -> dict[str, Any]:
    """What an earlier prepare said about OUT; empty where none did."""
    try:
        report = files.read_json(out / REPORT)
        whole = all(about["bytes"] >= 0 for about in report["shards"].values()) and report["plan"]
        return report if whole else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _changed(out: Path, report: dict[str, Any]) -> list[str]:
    """Shards that are no longer as they were written."""

    def size(name: str) -> int:
        try:
            return (out / name).stat().st_size
        except FileNotFoundError:
            return -1

    return [name for name, about in report["shards"].items() if size(name) != about["bytes"]]


@contextmanager
def _work_folder(out: Path, plan_id: str, overwrite: bool) -> Iterator[Path]:
    """The folder of what is known so far, for this process alone."""
    out.mkdir(parents=True, exist_ok=True)
    work = out / WORK
    state = work / "plan.json"
    going_on = state.is_file() and state.read_text() == plan_id
    there = [p.name for p in sorted(out.iterdir()) if p.name != WORK]
    if (there or work.exists()) and not going_on and not overwrite:
        report = _report_in(out)
        if report.get("plan") == plan_id:
            what = f"of the shards in OUT are gone or changed: {', '.join(_changed(out, report)[:3])}"
        elif work.exists() or (out / REPORT).exists():
            what = "OUT holds shards of another source or of other options"
        else:
            what = f"OUT is not empty: {', '.join(there[:3])}"
        raise LdmError("EXISTS", what, where=str(out), next="choose another OUT, or overwrite=true")
    shards = {p.name for pattern in _SHARDS for p in out.glob(pattern)}
    if not going_on and (foreign := sorted(shards - _names_written(out, work))):
        what = f"OUT holds shards that no prepare wrote: {', '.join(foreign[:3])}"
        raise LdmError("EXISTS", what, where=str(out), next="choose another OUT, or remove them yourself")
    work.mkdir(exist_ok=True)
    with open(work / "lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LdmError("LOCKED", "another prepare writes into OUT", where=str(out), next="wait for it") from error
        files.remove_leftovers(out)
        files.remove_leftovers(work)
        if not going_on:
            for old in (*(out / name for name in shards), *work.glob("*.np?"), *work.glob("*.json")):
                old.unlink()
            for name in (REPORT, SKIPPED, DUPLICATES):
                (out / name).unlink(missing_ok=True)
            shutil.rmtree(out / ".ldm-index", ignore_errors=True)
            files.replace_file(state, plan_id.encode())
        yield work


def _names_written(out: Path, work: Path) -> set[str]:
    """Names of the shards that an earlier prepare wrote into OUT."""
    return {*_report_in(out).get("shards", {}), *(p.name.removesuffix(".json") for p in work.glob("*.tar.json"))}


def _check_space(out: Path, work: Path, facts: NDArray[np.void], kept: NDArray[np.intp], options: Options) -> None:
    """Before gigabytes are written for nothing."""
    there = sum(p.stat().st_size for p in out.glob("*.tar"))
    need = int(_sizes(facts, options)[kept].sum()) + 4096 * len(kept) - there
    free = shutil.disk_usage(out).free
    if need > free:
        raise LdmError(
            "DISK",
            "the shards do not fit",
            where=str(out),
            limit=f"need {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free",
            next="free space, or choose another OUT",
        )


# ---- first pass


def _scan(source: Source, work: Path, options: Options, workers: int) -> tuple[NDArray[np.void], list[Bad]]:
    """Facts of all usable pictures, from finished chunks where they lie in `work`, and the others."""
    tasks = chunks_of(len(source.names))
    saved = [work / f"scan-{n:06d}.npz" for n in range(len(tasks))]
    open_tasks = [n for n in range(len(tasks)) if not saved[n].exists()]
    scan = Scan(source, Encoder(options) if options.reencodes else None)
    for n, chunk in zip(open_tasks, scan_all(scan, [tasks[n] for n in open_tasks], workers), strict=True):
        file = io.BytesIO()
        np.savez(
            file, facts=chunk.facts, bad=np.frombuffer(json.dumps(chunk.bad).encode(), np.uint8), allow_pickle=False
        )
        files.replace_file(saved[n], file.getvalue())
    chunks = [_load(path) for path in saved]
    facts = np.concatenate([chunk.facts for chunk in chunks]) if chunks else np.empty(0, FACTS)
    return facts, [Bad(source.names[n], kind, reason) for chunk in chunks for n, kind, reason in chunk.bad]


def _load(path: Path) -> Chunk:
    with np.load(path, allow_pickle=False) as saved:
        return Chunk(saved["facts"], [], [tuple(row) for row in json.loads(saved["bad"].tobytes())])


def _drop(
    source: Source, facts: NDArray[np.void], exact: NDArray[np.int64], near: NDArray[np.int64], options: Options
) -> tuple[NDArray[np.intp], list[Bad]]:
    """Rows that stay, and what is left out: of equal pictures the largest stays, of those the first by name."""
    if options.drop == "none":
        return np.arange(len(facts)), []
    dropped: dict[int, tuple[str, int]] = {}
    for group in members_of(near if options.drop == "near" else exact):
        pixels = facts["width"][group].astype(np.int64) * facts["height"][group]
        order = sorted(range(len(group)), key=lambda i: (-pixels[i], source.names[facts["number"][group[i]]]))
        kept: list[int] = []
        for row in group[order]:
            same = [k for k in kept if exact[k] == exact[row]]
            if options.drop == "near" and not same and kept:
                # A chain of small steps must not fall to its first link: only what is near to one that stays goes.
                those = np.array(kept)
                close = are_near(facts["phash"], facts["small"], np.full(len(kept), row), those, options.near)
                same = those[close].tolist()
            if same:
                dropped[int(row)] = ("duplicate" if exact[same[0]] == exact[row] else "near_duplicate", same[0])
            else:
                kept.append(int(row))
    names = [source.names[n] for n in facts["number"]]
    bad = [Bad(names[row], kind, f"as {names[of]}") for row, (kind, of) in sorted(dropped.items())]
    return np.array([row for row in range(len(facts)) if row not in dropped], dtype=np.intp), bad


def _split(
    facts: NDArray[np.void], near: NDArray[np.int64], kept: NDArray[np.intp], fraction: float
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows for training and validation. A group is on one side: by the smallest digest of its pixels, so that it does
    not depend on names, and on what else is there only through the group. Groups above the share itself are for
    training. With a fraction there is at least one picture in each, if there are two groups.
    """
    digest = np.array([int.from_bytes(bytes(d)[:8], "big") for d in facts["pixels"]], dtype=np.uint64)
    smallest = np.full(len(facts), np.iinfo(np.uint64).max)
    np.minimum.at(smallest, near, digest)
    sizes = np.bincount(near[kept], minlength=len(facts))
    draw = smallest[near].astype(np.float64) / 2**64
    held = (draw < fraction) & (sizes[near] <= max(1, fraction * len(kept)))
    groups = np.unique(near[kept])
    if fraction and len(groups) > 1:
        inside = held[kept]
        if not inside.any():
            held = near == min(groups, key=lambda g: (sizes[g], smallest[g]))
        elif inside.all():
            held &= near != max(groups, key=lambda g: smallest[g])
    ranks = [hashlib.sha256(bytes(facts["sha256"][row]) + b"%d" % facts["number"][row]).digest() for row in kept]
    mixed = kept[sorted(range(len(kept)), key=ranks.__getitem__)]  # neighbours of a folder lie in different shards
    return mixed[~held[mixed]], mixed[held[mixed]]


# ---- second pass


class Job(NamedTuple):
    """One shard. numbers: of the samples in their source.   first: the first sample's key."""

    name: str
    first: int
    numbers: list[int]


@dataclass(frozen=True)
class Encoder:
    """Bytes of a picture to bytes of the wanted size and format; as they are where nothing has to change."""

    options: Options

    def __call__(self, data: bytes) -> bytes:
        options, header = self.options, open_image(data)
        own = SUFFIXES[str(header.format)]
        form = own if options.format == "original" else options.format
        shrinks = options.size is not None and min(header.size) > options.size
        if not shrinks and form == own:
            return data
        ground = ImageColor.getrgb(options.background)[:3]
        image = decode_image(data, background=ground, at_least=options.size or 0)
        if shrinks and min(image.size) > (size := options.size or 1):
            short = min(image.size)
            image = image.resize(
                (round(image.width * size / short), round(image.height * size / short)), Image.Resampling.LANCZOS
            )
        lossless = options.quality == 100 or (own == "webp" and b"VP8L" in data[:64])
        words: dict[str, dict[str, Any]] = {
            "jpg": {"format": "JPEG", "quality": options.quality, "subsampling": 0, "optimize": True},
            "png": {"format": "PNG", "optimize": False},
            "webp": {"format": "WEBP", "lossless": lossless, "quality": options.quality, "method": 4},
        }
        file = io.BytesIO()
        image.save(file, **words[form])
        return file.getvalue()


def _sizes(facts: NDArray[np.void], options: Options) -> NDArray[np.int64]:
    """[N], bytes in the shards; where pictures are encoded anew, an estimate from those that were tried."""
    if not options.reencodes:
        return facts["bytes"] + facts["further"]
    pixels = facts["width"].astype(np.float64) * facts["height"]
    short = np.minimum(facts["width"], facts["height"])
    pixels *= np.minimum(1.0, (options.size or short) / short) ** 2
    tried = facts["encoded"] > 0
    each_pixel = facts["encoded"][tried].sum() / pixels[tried].sum() if tried.any() else 3.0
    return np.rint(pixels * each_pixel).astype(np.int64) + facts["further"]


def _jobs(source: Source, facts: NDArray[np.void], splits: dict[str, NDArray[np.intp]], options: Options) -> list[Job]:
    """Shards of nearly equal size, cut from the rows of each split."""
    jobs: list[Job] = []
    first = 0
    sizes = _sizes(facts, options) + 2560  # three headers, and what fills their blocks
    for split, rows in splits.items():
        if not len(rows):
            continue
        ends = np.cumsum(sizes[rows])
        count = -(-int(ends[-1]) // int(options.shard_mb * 1e6))
        if options.shard_samples:
            count = max(count, -(-len(rows) // options.shard_samples))
            edges = np.linspace(0, len(rows), count + 1).round().astype(int)
        else:
            edges = np.concatenate(
                [[0], np.searchsorted(ends, ends[-1] * np.arange(1, count) / count) + 1, [len(rows)]]
            )
        for begin, end in pairwise(edges.tolist()):
            if end > begin:
                number = sum(job.name.startswith(split) for job in jobs)
                jobs.append(
                    Job(f"{split}-{number:06d}.tar", first + int(begin), facts["number"][rows[begin:end]].tolist())
                )
        first += len(rows)
    return jobs


def _write_all(
    source: Source, out: Path, work: Path, jobs: list[Job], options: Options, workers: int
) -> dict[str, dict[str, Any]]:
    """Name -> samples, bytes and sha256 of every shard."""
    done = {job.name: record for job in jobs if (record := _written(out, work, job.name)) is not None}
    todo = [job for job in jobs if job.name not in done]
    with progress("writing", sum(len(job.numbers) for job in todo)) as advance:
        state = (source, out, work, Encoder(options))
        for job, record in zip(
            todo, each(write_shard, state, todo, workers, lambda job: advance(len(job.numbers))), strict=True
        ):
            done[job.name] = record
    return {job.name: done[job.name] for job in jobs}


def _written(out: Path, work: Path, name: str) -> dict[str, Any] | None:
    try:
        record = files.read_json(work / f"{name}.json")
        return record if (out / name).stat().st_size == record["bytes"] else None
    except (OSError, ValueError, KeyError):
        return None


def write_shard(state: tuple[Source, Path, Path, Encoder], job: Job) -> dict[str, Any]:
    """One shard, whole or not at all: written beside its place, synced, renamed; then its record."""
    source, out, work, encode = state
    temporary = files.temporary(out / job.name)
    temporary.unlink(missing_ok=True)
    try:
        with files.new_file(temporary) as file:
            with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
                for key, number in enumerate(job.numbers, job.first):
                    for name, data in _members(source, number, f"{key:09d}", encode):
                        info = tarfile.TarInfo(name)  # time, owner and group 0: equal input, equal bytes
                        info.size, info.mode = len(data), 0o644
                        tar.addfile(info, io.BytesIO(data))
            record = {"samples": len(job.numbers), "bytes": file.size, "sha256": file.sha256}
        os.replace(temporary, out / job.name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    files.sync_folder(out)
    files.replace_file(work / f"{job.name}.json", files.json_bytes(record))
    return record


def _members(source: Source, number: int, key: str, encode: Encoder) -> Iterator[tuple[str, bytes]]:
    try:
        sample = source.read(number)
    except BadSample as bad:
        what = f"{source.names[number]} changed while it was read: {bad.reason}"
        raise LdmError("DATA", what, next="run the same command again") from bad
    image = encode(sample.image)
    before, header = upright_size(sample.image), open_image(image)
    width, height = upright_size(image)
    facts = {
        "key": key,
        "path": source.names[number],
        "caption": sample.caption,
        "width": width,
        "height": height,
        "original_width": before[0],
        "original_height": before[1],
        "sha256": hashlib.sha256(sample.image).hexdigest(),
    }
    yield f"{key}.{SUFFIXES[str(header.format)]}", image
    if sample.txt is not None and sample.txt.strip():
        yield f"{key}.txt", sample.txt
    elif len(sample.captions) < 2:  # several are in the JSON, and one in a .txt would be taken before them
        yield f"{key}.txt", sample.caption.encode("utf-8", "replace")
    yield f"{key}.json", json_bytes(fields_of(sample.json) | {OWN: facts})
    for name, data in sample.further.items():
        yield f"{key}{name}", data


# ---- words


def _repeats(source: Source) -> list[str]:
    if isinstance(source, Opened) and (source.dataset.repeats > 1).any():
        return [
            "the shards hold every picture once: what shall be repeated goes into shards of its own, with data.repeats"
        ]
    return []


def _write_lines(path: Path, rows: Iterable[Any]) -> None:
    files.replace_file(path, b"".join(json_bytes(row) + b"\n" for row in rows))


def _sentence(report: dict[str, Any]) -> str:
    megabytes = sum(about["bytes"] for about in report["shards"].values()) / 1e6
    counts = f"{report['train']} + {report['val']} samples (train + val)"
    return f"{counts} in {len(report['shards'])} shards, {megabytes:.1f} MB"


def _print_findings(report: dict[str, Any], out: Path) -> None:
    if skipped := sum(report["skipped"].values()):
        kinds = ", ".join(f"{count} {kind}" for kind, count in report["skipped"].items())
        print(f"left out {skipped}: {kinds}; each in {out / SKIPPED}")
    for kind, words in (("exact", "the same as others"), ("near", "nearly the same as others")):
        found = report["duplicates"][kind]
        if found["groups"]:
            example = plain(" = ".join(found["first"][0][:2]))
            groups = f"{found['groups']} groups, e.g. {example}"
            print(f"{found['pictures']} pictures are {words}, in {groups}; see {DUPLICATES}")
    if not report["val"] and report["options"]["val_fraction"]:
        print("no validation set: all pictures are (nearly) the same")
    for remark in report["remarks"]:
        print(plain(remark))
    print(f"train on them: python train.py data=shards data.path={out}")
