"""A learnt codebook: nearest codes, gradients around the choice, and new life for codes that are never chosen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.random import bits

TABLE = 2**24
"""Distances that are held at once (64 MiB): positions of the latents times codes."""


class Codebook(nn.Module):
    """`size` codes of `channels` values. Vector quantisation of van den Oord et al. 2017, arXiv:1711.00937.

    `uses` [size] counts the choices of each code since the last `revive`; `count` adds to it, nothing else does. It is
    saved with the weights, for the next `revive` depends on it.
    """

    uses: Tensor

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, channels)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)
        self.register_buffer("uses", torch.zeros(size, dtype=torch.int64))

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """z: [B, C, h, w]. The code at the smallest squared distance, in float32 at least: [B, h, w] int64."""
        codes = widened(self.embedding.weight)
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 would choose among neighbours by its rounding
            squares = codes.square().sum(1)
            rows = z.to(codes.dtype).movedim(1, -1).flatten(0, -2).split(max(1, TABLE // len(codes)))
            # |z - e|^2 without |z|^2, which is the same for all codes
            found = [torch.addmm(squares, part, codes.T, alpha=-2).argmin(1) for part in rows]
        return torch.cat(found).view(len(z), *z.shape[2:])

    def look_up(self, codes: Tensor) -> Tensor:
        """codes: [B, h, w]. Their values, [B, C, h, w]."""
        return self.embedding(codes).movedim(-1, 1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z: [B, C, h, w] -> (values of the nearest codes, codes [B, h, w], codebook penalty [B], commitment [B]).

        The gradient goes past the choice: that of the values is handed to z, and the codes learn by their penalty
        alone. Penalties (equation 3 there): |sg(z) - e|^2 and |z - sg(e)|^2, mean over channels and positions.
        """
        z = widened(z)
        codes = self.nearest(z)
        values = widened(self.look_up(codes))
        codebook = (z.detach() - values).square().flatten(1).mean(1)
        commitment = (z - values.detach()).square().flatten(1).mean(1)
        return values.detach() + (z - z.detach()), codes, codebook, commitment

    @torch.no_grad()
    def count(self, codes: Tensor, total: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """Count choices, codes [...] int64. total: sums [size] over the ranks."""
        chosen = torch.zeros_like(self.uses)
        self.uses += total(chosen.index_add_(0, codes.flatten(), torch.ones_like(codes.flatten())))

    @torch.no_grad()
    def revive(self, candidates: Tensor, key: Tensor) -> Tensor:
        """Give codes that were not chosen since the last call the place of a latent each, and count anew.

        candidates: [N, C] latents, the same in the same order on every rank; each is taken at most once, so with fewer
            of them than dead codes the last codes wait for the next call.
        key: [1] int64; which candidates are taken depends on it, N and the number of dead codes alone.
        Returns the codes that were replaced, [D] int64, increasing.
        Source: the random restarts of Dhariwal et al. 2020, arXiv:2005.00341, section 3.1.
        """
        dead = (self.uses == 0).nonzero().flatten()[: len(candidates)]
        order = bits(key, len(candidates))[0].argsort(stable=True)
        weight = self.embedding.weight
        weight[dead] = candidates[order[: len(dead)].to(candidates.device)].to(weight.dtype)
        self.uses.zero_()
        return dead


def widened(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.float() if x.dtype.itemsize < 4 else x
