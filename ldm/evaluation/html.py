"""Pages from nested elements: whatever is not an element itself is text, and is escaped. Standard library only."""

from __future__ import annotations

from html import escape
from typing import Any

_VOID = ("img", "meta", "br", "hr", "rect", "circle", "line", "path")


class Html(str):
    """Text that is markup already."""


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """An element. children: elements, sequences of them, text, or None for nothing.

    attributes: `cls` is class, `_` in a name is `-`; None leaves one out, True gives it no value.
    """
    words = [tag]
    for key, value in attributes.items():
        name = "class" if key == "cls" else key.replace("_", "-")
        if value is True:
            words.append(name)
        elif value is not None:
            words.append(f'{name}="{escape(plain(str(value)))}"')
    if tag in _VOID:
        return Html(f"<{' '.join(words)}/>")
    return Html(f"<{' '.join(words)}>{join(*children)}</{tag}>")


def join(*children: Any) -> Html:
    """The children one after the other."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, list | tuple):
            parts.append(join(*child))
        elif isinstance(child, Html):
            parts.append(child)
        elif child is not None:
            parts.append(escape(plain(str(child))))
    return Html("".join(parts))


def plain(text: str) -> str:
    """Control and direction characters, and halves of surrogate pairs, as U+FFFD: names are shown, never obeyed."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
