"""Group norms over tiles with the statistics of the whole: first each tile tells its own, then all take their union."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SharedNorms:
    """While `attached`, the group norms among `modules` tell their statistics, until `settle`; then they use them.

    The tiles of a picture go through twice, and then those of the next one. The statistics are those of the picture for
    the first norm; for later ones they are of tiles whose earlier norms were their own.
    weight: of the tile that goes through, [h, w] at any resolution, so that what lies in two tiles counts once.
    """

    def __init__(self, modules: Iterator[nn.Module]) -> None:
        self.norms = [module for module in modules if isinstance(module, nn.GroupNorm)]
        self.weight = torch.ones(1, 1)
        self._told: dict[nn.Module, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._settled: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    @property
    def any(self) -> bool:
        return bool(self.norms)

    @contextmanager
    def attached(self) -> Iterator[None]:
        self._told, self._settled = {}, {}
        handles = [norm.register_forward_hook(self._norm) for norm in self.norms]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def settle(self) -> None:
        """The union of what was told, by the formula of the variance of a mixture, in float64."""
        for norm, told in self._told.items():
            share, mean, variance = (torch.stack(values) for values in zip(*told, strict=True))
            share = (share / share.sum()).view(-1, 1, 1)
            centre = (share * mean).sum(0)
            self._settled[norm] = centre, (share * (variance + (mean - centre).square())).sum(0)

    def _norm(self, norm: nn.GroupNorm, inputs: tuple[Tensor], normed: Tensor) -> Tensor:
        x = inputs[0]
        groups = x.unflatten(1, (norm.num_groups, -1))  # [1, groups, channels of each, h, w]
        if norm in self._settled:
            mean, variance = (value.to(x)[..., None, None, None] for value in self._settled[norm])
            scaled = ((groups - mean) * (variance + norm.eps).rsqrt()).flatten(1, 2)
            return scaled * norm.weight[:, None, None] + norm.bias[:, None, None] if norm.affine else scaled
        weight = F.interpolate(self.weight[None, None].to(x), x.shape[-2:], mode="area")[:, None]
        share = weight.sum() * groups.shape[2]
        mean = (groups * weight).sum((2, 3, 4)) / share
        variance = ((groups - mean[..., None, None, None]).square() * weight).sum((2, 3, 4)) / share
        self._told.setdefault(norm, []).append((share.double(), mean.double(), variance.double()))
        return normed
