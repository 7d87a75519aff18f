"""The words of a verb: places first, then `key=value` or `--key value`; `--key` alone is short for `key=true`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from ldm.errors import LdmError, nearest

Options = TypeVar("Options")


def option(default: Any, words: str, kind: type | None = None, choices: Sequence[str] = ()) -> Any:
    """A field of a verb's dataclass of options. kind: of its values, where the default is None."""
    return field(default=default, metadata={"words": words, "kind": kind or type(default), "choices": tuple(choices)})


@dataclass(frozen=True)
class Verb:
    """name: after `python -m ldm`.   places: names of the words without `=`, all needed, but for a last one in
    brackets, which stands for any number.   purpose: one line or more.
    """

    name: str
    places: tuple[str, ...]
    purpose: str

    def parse(self, argv: Sequence[str], options: type[Options]) -> tuple[list[str], Options] | None:
        """(places, options), or None after printing the help. Raises LdmError, `CONFIG`, with the nearest name."""
        known = {f.name: f.metadata for f in fields(options)}  # type: ignore[arg-type]
        places: list[str] = []
        found: dict[str, Any] = {}
        words = iter(argv)
        for word in words:
            if word in ("-h", "--help"):
                print(self.help(options))
                return None
            switch, (key, equals, value) = word.startswith("--"), word.removeprefix("--").partition("=")
            key = key.replace("-", "_") if switch else key
            if not switch and not (equals and key.isidentifier()):  # `./a=b` is a path
                places.append(word)
            elif key in known:
                if not equals:  # --key alone, or --key VALUE
                    value = "true" if known[key]["kind"] is bool else next(words, "")
                    if not value or value.startswith("--"):
                        raise LdmError("CONFIG", f"{word} needs a value", where=key, next=f"{key}=VALUE")
                found[key] = _value(key, value, known[key])
            elif key != "traceback":  # which ldm.cli reads
                raise LdmError("CONFIG", f"unknown option {word!r}", next=nearest(key, known))
        needed = [name for name in self.places if not name.startswith("[")]
        if len(places) < len(needed) or (len(places) > len(needed) == len(self.places)):
            expected = f"expected {' '.join(self.places)}"
            got = f"got {' '.join(map(repr, places))}" if places else "got nothing"
            raise LdmError("CONFIG", f"{expected}, {got}", next=f"python -m ldm {self.name} --help")
        return places, options(**found)

    def help(self, options: type[Any]) -> str:
        lines = [f"usage: python -m ldm {self.name} {' '.join(self.places)} [key=value ...]", "", self.purpose, ""]
        for f in fields(options):
            shown = "" if f.default is None else str(f.default).lower() if isinstance(f.default, bool) else f.default
            lines.append(f"  {f'{f.name}={shown}':<28}{f.metadata['words']}")
        return "\n".join(lines)


def _value(key: str, text: str, about: Any) -> Any:
    kind, choices = about["kind"], about["choices"]
    if choices and text not in choices:
        raise LdmError("CONFIG", f"unknown value {text!r}", where=key, next="one of: " + ", ".join(choices))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise LdmError("CONFIG", f"{key}={text}", where=key, next="true or false")
        return text.lower() == "true"
    if kind is str:
        return text
    try:
        return kind(text)
    except ValueError as error:
        words = {int: "a whole number", float: "a number"}[kind]
        raise LdmError("CONFIG", f"{key}={text}", where=key, next=f"{key} is {words}") from error
