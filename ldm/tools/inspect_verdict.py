"""What the numbers of `inspect` mean for training: findings in words, each and what mends each."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

MAX_BAD = 0.01  # data.max_bad_fraction
LIMIT = 77  # tokens that the text transformer reads, the start and the end token among them
_SMALL = 64  # pixels
LEVELS = ("stop", "mend", "note", "ok")


class Say(Protocol):
    def __call__(self, level: str, text: str, key: str = "") -> None: ...


def verdict(report: dict[str, Any]) -> dict[str, Any]:
    """usable: whether training takes the data as they are.   findings: level (ok, note, mend, stop), text, key."""
    found: list[dict[str, str]] = []

    def say(level: str, text: str, key: str = "") -> None:
        found.append({"level": level, "text": text, "key": key})

    _judge_shards(report, say)
    _judge_samples(report, say)
    _judge_captions(report, say)
    _judge_pictures(report, say)
    _judge_duplicates(report, say)
    found.sort(key=lambda finding: LEVELS.index(finding["level"]))
    return {"usable": all(finding["level"] != "stop" for finding in found), "findings": found}


def _judge_shards(report: dict[str, Any], say: Say) -> None:
    shards = report["shards"]
    if unusable := shards["unusable"]:
        text = f"{len(unusable)} of {shards['count']} shards cannot be used"
        say("stop", text, "copy them again, or leave them out of data.path")
    if cut := shards["truncated"]:
        say("stop", f"{_count(len(cut), 'shard')} cut off", "copy again, or data.on_truncated=use")


def _judge_samples(report: dict[str, Any], say: Say) -> None:
    samples, bad = report["samples"], report["bad"]
    if not samples["good"]:
        say("stop", "no picture can be used", "see the bad samples")
        return
    if bad["share"] > MAX_BAD:
        limit = min(1.0, np.ceil(100 * bad["share"] + 0.5) / 100)
        say("stop", f"{100 * bad['share']:.1f} % of the samples are bad; training stops above {100 * MAX_BAD:.0f} %",
            f"python -m ldm prepare leaves them out; or data.max_bad_fraction={limit:.2f}")  # fmt: skip
    elif bad["count"]:
        text = f"{_count(bad['count'], 'bad sample')} will be left out"
        say("note", text, "python -m ldm prepare lists them and leaves them out")
    else:
        say("ok", "every picture can be decoded")
    if not samples["val"]:
        held = "of shards training holds out 1 %" if report["kind"] == "shards" else "a folder is trained on whole"
        text = f"there is no validation set; {held}: data.val_fraction is the share, by the pictures' names"
        say("note", text, "python -m ldm prepare splits by content")
    if samples["train"] < 1000:
        text = f"{_count(samples['train'], 'picture')} are few to train from nothing"
        say("note", text, "fine-tune: init_from=runs/...")


def _judge_captions(report: dict[str, Any], say: Say) -> None:
    captions = report["captions"]
    if not captions["with"] and captions["without"]:
        ways = "KEY.txt beside KEY.jpg, or data.caption=filename, or data.on_missing_caption=empty"
        say("stop", "no picture has a caption", ways)
    elif captions["without"]:
        first = f"the first is {captions['first_without']}"
        say("mend", f"{_count(captions['without'], 'picture')} without a caption will be left out; {first}",
            "write them, or data.on_missing_caption=empty")  # fmt: skip
    elif captions["with"]:
        say("ok", "every picture has a caption")
    common, given = captions["most_common"], captions["with"]
    if common and given >= 20 and common["count"] > 0.2 * given:
        share = f"{100 * common['count'] / given:.0f} %"
        text = f"{share} of the captions are {common['caption'][:60]!r}: words teach nothing there"
        say("mend", text, "data.caption takes another field, a template or the file name")
    tokens = captions["tokens"]
    if tokens and tokens["truncated"]:
        share = f"{100 * tokens['truncated_share']:.1f} %"
        many = _count(tokens["truncated"], "caption")
        say("mend" if tokens["truncated_share"] > 0.05 else "note",
            f"{many} ({share}) longer than {LIMIT} tokens; the rest of each is not read",
            "put what matters first, or shorten them")  # fmt: skip
    elif tokens:
        say("ok", f"every caption fits into {LIMIT} tokens")


def _judge_pictures(report: dict[str, Any], say: Say) -> None:
    pictures, good = report["pictures"], report["samples"]["good"]
    if not good:
        return
    fifth = pictures["short_side"]["p05"]
    fits = min(1024, int(fifth) // 64 * 64)
    if fits:
        text = f"95 % of the pictures have a short side of {fifth:.0f} pixels or more"
        say("ok", text, f"data.image_size up to {fits}")
    else:
        say("mend", f"one in twenty pictures is smaller than {_SMALL} pixels", "data.upscale=false leaves them out")
    loss = pictures["centre_crop_loses"]
    if loss > 0.05:
        text = f"a square centre crop loses {100 * loss:.0f} % of the pictures' area"
        buckets = f"data.bucket.enable_bucket=true loses {100 * pictures['buckets_lose']:.0f} %"
        say("note", text, f"{buckets}, data.crop=pad nothing")
    if pictures["transparent"]:
        text = f"{_count(pictures['transparent'], 'picture')} have transparency"
        say("note", text, "data.background says what shows through")


def _judge_duplicates(report: dict[str, Any], say: Say) -> None:
    duplicates = report["duplicates"]
    if across := duplicates["train_val"]["groups"]:
        many = _count(across, "group")
        say("mend", f"{many} of (nearly) equal pictures lie in both train and val, where figures will flatter",
            "python -m ldm prepare splits by content")  # fmt: skip
    for kind, words in (("exact", "the same"), ("near", "nearly the same")):
        found = duplicates[kind]
        if found["groups"]:
            say("note", f"{found['pictures']} pictures in {_count(found['groups'], 'group')} are {words}",
                f"python -m ldm prepare ... drop={kind}")  # fmt: skip
    if not duplicates["exact"]["groups"] and not duplicates["near"]["groups"]:
        say("ok", "no duplicates")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
