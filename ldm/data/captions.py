"""What stands around a caption. Which caption is dropped is the model's business, not the data's."""

from __future__ import annotations


def with_affixes(caption: str, prefix: str = "", suffix: str = "") -> str:
    """`prefix`, caption and `suffix` joined as they are, outer blanks removed: the caption stays literal text."""
    return f"{prefix}{caption}{suffix}".strip()
