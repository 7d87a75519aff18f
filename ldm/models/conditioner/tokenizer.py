"""Prompts to token ids: open_clip's BPE, with the padding that the encoder was trained with."""

from __future__ import annotations

from functools import lru_cache

START, END = 49406, 49407
VOCAB_SIZE = 49408


class Tokenizer:
    """Text to ids: start token, at most length - 2 tokens of text, end token, then `pad_id`.

    pad_id: 49407 for models of our own and SD1 (the end token again), 0 for open_clip's own habit.
    truncated: how many texts were too long so far; the end token is always kept.
    """

    def __init__(self, length: int = 77, pad_id: int = END) -> None:
        self.length, self.pad_id, self.truncated = length, pad_id, 0

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Ids from start to end token, not padded: lists of 2 to `length` ids."""
        rows = []
        for text in texts:
            self.truncated += self.is_cut(text)
            ids = _encode(text)[: self.length - 2]
            rows.append([START, *ids, END])
        return rows

    def is_cut(self, text: str) -> bool:
        """True if the text does not fit."""
        return len(_encode(text)) > self.length - 2

    def padded(self, texts: list[str]) -> list[list[int]]:
        """Ids filled up to `length` with `pad_id`."""
        return [row + [self.pad_id] * (self.length - len(row)) for row in self(texts)]


@lru_cache(maxsize=65_536)
def _encode(text: str) -> tuple[int, ...]:
    return tuple(_bpe().encode(text))


@lru_cache(maxsize=1)
def _bpe():
    # open_clip costs about five seconds to import: only those who read text pay for it
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()
