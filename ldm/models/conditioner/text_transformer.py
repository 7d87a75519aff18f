"""The small text transformer that is trained along with the denoiser, as the latent-diffusion paper did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ldm.models.conditioner.tokenizer import VOCAB_SIZE, Tokenizer
from ldm.models.conditioner.transfer import to_device
from ldm.models.layers.attention import Attention
from ldm.types import Check, Conditioning


class TextTransformer(nn.Module):
    """Captions to `Conditioning`: tokens [B, L, width], mask [B, L], vector [B, width] (mean over the mask).

    width, depth, num_heads: size of the transformer; it reads in both directions.
    embedding_size: width of the token table, projected to `width` where they differ (Lan et al. 2019,
        arXiv:1909.11942, section 3.1). The table is the largest part of a small model, and a dense optimizer visits
        all of it in every step.
    length: token ids, start and end included.   pad_id: see `Tokenizer`.
    trim: cut the batch to its longest caption, rounded up to a multiple of 8. The mask hides padding anyway, so the
        result is the same to rounding; switch it off where static shapes matter (torch.compile).
    qk_norm: see `Attention`.   drop_prob: share of the captions that give way to the empty prompt in training.
    Source: Rombach et al. 2022, arXiv:2112.10752, appendix E.2.1.
    """

    def __init__(
        self,
        width: int = 128,
        depth: int = 2,
        num_heads: int = 4,
        embedding_size: int = 64,
        length: int = 77,
        pad_id: int = 49407,
        trim: bool = True,
        qk_norm: bool = False,
        drop_prob: float = 0.1,
    ) -> None:
        super().__init__()
        self.tokenizer = Tokenizer(length, pad_id)
        self.trim = trim
        self.reads = ("caption",)
        self.checks: Mapping[str, Sequence[Check]] = {}
        self.width, self.vector_size, self.drop_prob = width, width, drop_prob
        self.length = None if trim else length
        self.provides = frozenset(["tokens", "mask", "vector"])
        self.token_embedding = nn.Embedding(VOCAB_SIZE, embedding_size)
        factorised = embedding_size != width
        projection = nn.Linear(embedding_size, width, bias=False)
        self.embedding_proj = projection if factorised else nn.Identity()
        self.position_embedding = nn.Parameter(torch.empty(length, width))
        self.blocks = nn.ModuleList(_TextBlock(width, num_heads, qk_norm) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width)
        # Small, so that Adam turns them quickly; and nothing shared may drown what tells the tokens apart, for the
        # norm that follows would scale both alike: a projection with a bias here cost the demo all of its shapes.
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)
        nn.init.normal_(projection.weight, std=embedding_size**-0.5)

    def forward(self, captions: list[str]) -> Conditioning:
        rows = self.tokenizer(captions)
        length = self.tokenizer.length
        if self.trim:
            length = min(length, -(-max(map(len, rows)) // 8) * 8)
        ids = torch.tensor([row + [self.tokenizer.pad_id] * (length - len(row)) for row in rows])
        counts = torch.tensor([len(row) for row in rows])
        device = self.position_embedding.device
        return self.encode(to_device(ids, device), to_device(counts, device))

    def encode(self, ids: Tensor, counts: Tensor) -> Conditioning:
        """ids: [B, L] token ids; counts: [B] ids that matter, end token included."""
        mask = torch.arange(ids.shape[1], device=ids.device) < counts[:, None]
        h = self.embedding_proj(self.token_embedding(ids)) + self.position_embedding[: ids.shape[1]]
        for block in self.blocks:
            h = block(h, mask)
        h = self.final_norm(h)
        weight = mask.to(h.dtype)[..., None]
        vector = (h * weight).sum(1) / weight.sum(1)
        return Conditioning(tokens=h, mask=mask, vector=vector)


class _TextBlock(nn.Module):
    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads, bias=True, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))
