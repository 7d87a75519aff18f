"""Which text a sample gets. A caption and a template are data: nothing in them is ever executed. Without torch.

Which caption is dropped is the model's business, not the data's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ldm.data.decode import MAX_JSON, BadSample, decode_caption
from ldm.data.order import permutation
from ldm.errors import LdmError, nearest

SOURCES = ("auto", "sidecar", "metadata", "filename")
CHOICES = ("first", "random", "cycle")
TEXT_FIELDS = ("text", "caption", "captions")  # of a sample's JSON, the first that holds a text is its caption
FILENAME = "filename"  # in a template: the words of the file's name, unless the JSON has such a field

_FIELD = re.compile(r"[^\W_][\w-]*(\.[^\W_][\w-]*)*")  # never `__class__`, `x!r`, `x:>9` or `x[0]`
_BETWEEN_WORDS = re.compile(r"[\s_\-+.,()\[\]{}]+")


@dataclass(frozen=True)
class Captions:
    """From what is known of a sample to the one text that it gets in its slot. The fields are settings of `data`.

    caption: where the text comes from: "sidecar" (the .txt), "metadata" (`text`, `caption` or `captions` of the JSON),
        "auto" (the first of these that is there), "filename", or a text with fields of the JSON, `a logo of {title}`.
    caption_lines: each line of a .txt is a caption of its own; otherwise its lines are one.
    caption_choice: which of several captions: "first", "random" by the slot, or "cycle": the next at each use.
    shuffle_caption: the tags between `caption_separator` in random order, the first `keep_tokens` in their places. A
        separator with blanks of its own, " and ", is put back as it is; behind any other there is one blank.
    caption_prefix, caption_suffix: put around the result as they are.
    on_missing_caption: "empty" takes a sample without a field of the template for one without text; else it is bad.
    Raises LdmError if a setting is unknown or a template is more than plain fields.
    """

    caption: str = "auto"
    caption_lines: bool = False
    caption_choice: str = "first"
    shuffle_caption: bool = False
    keep_tokens: int = 0
    caption_separator: str = ","
    caption_prefix: str = ""
    caption_suffix: str = ""
    on_missing_caption: str = "skip"

    def __post_init__(self) -> None:
        if self.caption not in SOURCES:
            _check_template(self.caption)
        if self.caption_choice not in CHOICES:
            what, hint = f"unknown value {self.caption_choice!r}", "one of: " + ", ".join(CHOICES)
            raise LdmError("CONFIG", what, where="data.caption_choice", next=hint)
        if not isinstance(self.keep_tokens, int) or isinstance(self.keep_tokens, bool) or self.keep_tokens < 0:
            raise LdmError("CONFIG", f"keep_tokens={self.keep_tokens!r}", where="data.keep_tokens", limit="0 or more")
        if not self.caption_separator:
            raise LdmError("CONFIG", "the separator of tags is empty", where="data.caption_separator", next='","')

    def without_chance(self) -> Captions:
        """The same for validation: the first caption, its tags as they stand."""
        return replace(self, caption_choice="first", shuffle_caption=False)

    @property
    def fields(self) -> tuple[str, ...]:
        """Dotted paths in a sample's JSON that the template names; none without a template."""
        paths = () if self.caption in SOURCES else re.findall(r"\{(.*?)\}", self.caption)
        return tuple(dict.fromkeys(path for path in paths if path != FILENAME))

    @property
    def names_file(self) -> bool:
        """Whether the template has a place for the words of the file's name."""
        return self.caption not in SOURCES and f"{{{FILENAME}}}" in self.caption

    @property
    def members(self) -> tuple[str, ...]:
        """Which of a sample's members the text may come from: "txt", "json"."""
        if self.caption not in SOURCES:
            return ("json",) if "{" in self.caption else ()
        return {"auto": ("txt", "json"), "sidecar": ("txt",), "metadata": ("json",), "filename": ()}[self.caption]

    def __call__(self, key: str, txt: bytes | None, data: bytes | None, pick: int = 0, order: int = 0) -> str:
        """The text of a sample, one line; empty where the sample has none.

        txt, data: its .txt and .json.   pick: which of n captions, taken modulo n.   order: stands for the order of
        the tags.   Raises BadSample: `caption_missing` if a field of the template is not there, `caption_encoding`.
        """
        found = self.all_of(key, txt, data)
        text = found[pick % len(found)] if found else ""
        if self.shuffle_caption:
            text = self._shuffled(text, order)
        return f"{self.caption_prefix}{text}{self.caption_suffix}".strip()

    def all_of(self, key: str, txt: bytes | None, data: bytes | None) -> list[str]:
        """The captions of a sample, of which it gets one; see `__call__`."""
        if self.caption not in SOURCES:
            tree = fields_of(data)
            lacking = not all(has_text(tree, path) for path in self.fields)
            lacking |= self.names_file and not (words_of(key) or has_text(tree, FILENAME))
            return [] if lacking and self.on_missing_caption == "empty" else [self._filled(key, tree)]
        if self.caption == "filename":
            return [words_of(key)]
        if txt is not None and "txt" in self.members:
            texts = [decode_caption(line) for line in (txt.splitlines() if self.caption_lines else [txt])]
            if any(texts):
                return [text for text in texts if text]
        return captions_in(fields_of(data)) if "json" in self.members else []

    def _filled(self, key: str, tree: Mapping[str, Any]) -> str:
        """The template in one pass: what a value contains is never read as a template."""

        def value(match: re.Match[str]) -> str:
            path = match[1]
            words = words_of(key) if path == FILENAME and not has_text(tree, path) else ""
            return words or _text_at(tree, path)

        return _clean(re.sub(r"\{(.*?)\}", value, self.caption))

    def _shuffled(self, text: str, order: int) -> str:
        tags = [tag.strip() for tag in text.split(self.caption_separator)]
        tags = [tag for tag in tags if tag]
        kept, loose = tags[: self.keep_tokens], tags[self.keep_tokens :]
        moved = [loose[i] for i in permutation(len(loose), order)]
        between = self.caption_separator
        return (between if " " in between else f"{between} ").join(kept + moved)


def fields_of(data: bytes | None) -> dict[str, Any]:
    """A sample's JSON as a mapping; empty where there is none that can be read."""
    try:
        return read_fields(data) if data else {}
    except ValueError:
        return {}


def read_fields(data: bytes) -> dict[str, Any]:
    """A sample's JSON as a mapping. Raises ValueError that says why it is none."""
    if len(data) > MAX_JSON:
        raise ValueError(f"{len(data)} bytes, limit {MAX_JSON}")
    try:
        tree = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(tree, dict):
        raise ValueError("not an object, {...}")
    return tree


def captions_in(tree: Mapping[str, Any]) -> list[str]:
    """The captions that a sample's JSON holds, in order."""
    for name in TEXT_FIELDS:
        value = tree.get(name)
        texts = [_clean(text) for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        if any(texts):
            return [text for text in texts if text]
    return []


def words_of(key: str) -> str:
    """`logos/red_fox-01` to "red fox": the words of a file's name, numbers at its end left out."""
    words = [word for word in _BETWEEN_WORDS.split(key.rpartition("/")[2]) if word]
    while words and words[-1].isdecimal():
        words.pop()
    return " ".join(words)


def _check_template(template: str) -> None:
    """Only plain fields, `{title}` or `{marks.0.shape}`: no format specs, no attributes, no lone braces."""
    if not isinstance(template, str) or not ("{" in template or " " in template.strip()):
        hint = nearest(str(template), SOURCES) + " or a template such as 'a logo of {title}'"
        raise LdmError("CONFIG", f"unknown value {template!r}", where="data.caption", next=hint)
    for part in re.split(r"(\{[^{}]*\})", template):
        is_field = part.startswith("{") and part.endswith("}")
        if not (is_field and _FIELD.fullmatch(part[1:-1])) and ("{" in part or "}" in part):
            what, hint = f"{part!r} is no field", "plain names and dotted paths only: {title}, {marks.0.shape}"
            raise LdmError("CONFIG", what, where="data.caption", next=hint)


def has_text(tree: Mapping[str, Any], path: str) -> bool:
    """Whether a template can name the dotted path `path` of a sample's JSON."""
    try:
        return bool(_text_at(tree, path))
    except BadSample:
        return False


def _text_at(tree: Mapping[str, Any], path: str) -> str:
    value: Any = tree
    for step in path.split("."):
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            value = None
    values = value if isinstance(value, list) else [value]
    texts = [_clean(str(v)) for v in values if isinstance(v, str | int | float)]
    if not all(texts) or len(texts) != len(values) or not texts:
        raise BadSample("caption_missing", f"the sample's JSON has no text or number at {path!r}"[:200])
    return ", ".join(texts)


def _clean(text: str) -> str:
    return decode_caption(text.encode("utf-8", "replace"))
