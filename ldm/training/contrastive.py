"""The contrast of pictures and captions: each must find the other among those of the whole batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """images, texts: unit vectors [B, E], row by row of one pair.   ids: [B] int64 of `caption_ids`."""

    images: Tensor
    texts: Tensor
    ids: Tensor


def contrastive_terms(
    own: Pairs, pool: Pairs, scale: Tensor, *, first: int = 0, usable: Tensor | None = None
) -> dict[str, Tensor]:
    """[B] each: "loss", and whether a picture's caption and a caption's picture came first.

    own: the B pairs that choose.   pool: the N pairs they choose from, own ones from row `first` on.
    scale: of the cosines.   usable: [N] bool, rows of the pool that may be chosen; None = all.
    Another pair with an equal caption is no wrong answer, so it is left out.
    Source: Radford et al. 2021, arXiv:2103.00020, figure 3; the loss is symmetric.
    """
    target = torch.arange(first, first + len(own.ids), device=own.ids.device)
    left_out = own.ids[:, None] == pool.ids[None]
    if usable is not None:
        left_out = left_out | ~usable[None]
    left_out = left_out.scatter(1, target[:, None], False)
    terms, losses = {}, []
    for name, rows, columns in (("caption_found", own.images, pool.texts), ("picture_found", own.texts, pool.images)):
        with torch.autocast(rows.device.type, enabled=False):  # half precision would round logits near 100 by 0.5
            logits = (scale * rows @ columns.T).masked_fill(left_out, -torch.inf)
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        terms[name] = (logits.argmax(1) == target).float()
    return {"loss": torch.stack(losses).mean(0), **terms}


def caption_ids(captions: Sequence[str]) -> Tensor:
    """[B] int64, equal for equal captions on every rank."""
    digests = (hashlib.sha256(caption.encode()).digest() for caption in captions)
    return torch.tensor([int.from_bytes(digest[:8], "little", signed=True) for digest in digests])
