"""How far apart two pictures look: the distance of their features in a network that is not trained any more."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.errors import LdmError

EPS = 1e-8  # below the square root: the gradient stays finite where every feature is zero


class FeatureDistance(nn.Module):
    """Distance of two pictures in the features of a frozen network.

    d(a, b) = sum over layers of the mean over places of sum_c w_c (f_c(a) - f_c(b))^2, where f is scaled to length 1
    along its channels. Zhang et al. 2018, arXiv:1801.03924, equation 1.

    network: pictures [B, 3, H, W] in [-1, 1] to a list of feature maps [B, C_l, h_l, w_l], fine to coarse. It may say
        by `min_size` how many pixels a side must have at least.
    label: what it is, for the names of measures and logs: `perceptual_<label>`, `fd_<label>`.
    channel_weights: w, one [C_l] for each layer; None = 1 everywhere.
    bf16: run the network in bfloat16: faster and smaller on a GPU, a relative error near 1e-2. Else in float32,
        whatever autocast surrounds it.
    Raises ValueError for a label that cannot stand in the name of a measure, or for weights that are negative.
    """

    def __init__(
        self,
        network: nn.Module,
        label: str,
        channel_weights: Sequence[Tensor] | None = None,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", label):
            raise ValueError(f"label must be of a-z, 0-9, _ and -, not {label!r}")
        self.network, self.label, self.bf16 = network, label, bf16
        for layer, weights in enumerate(channel_weights or ()):
            if not bool((weights >= 0).all()):  # a distance could be negative
                raise ValueError(f"the weights of layer {layer} are negative or not finite")
            self.register_buffer(f"weights_{layer}", weights.float().reshape(-1, 1, 1))
        self.num_weighted = len(channel_weights or ())
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FeatureDistance:
        """The network stays in evaluation mode, also inside a module that is trained."""
        return super().train(False)

    @property
    def identity(self) -> str:
        """Label and sha256 of the weights: what a resumed training must find unchanged."""
        return f"{self.label}:{weights_sha256(self)}"

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b: [B, 3, H, W] in [-1, 1]. Returns [B] float32, with a gradient to a alone.

        Raises LdmError, `SIZE`, if the pictures are smaller than the network needs.
        """
        # two passes: through one of both together, the gradient would also walk back to b, where nobody needs it
        with torch.no_grad():
            fixed = self._unit_maps(b)
        distance = torch.zeros(len(a), device=a.device)
        for layer, (f, g) in enumerate(zip(self._unit_maps(a), fixed, strict=True)):
            difference = (f - g).square()
            if self.num_weighted:
                difference = difference * self.get_buffer(f"weights_{layer}")
            distance = distance + difference.sum(1).mean((1, 2))
        return distance

    def embed(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] to [B, D] float32: the last feature map, averaged over its places."""
        return self._maps(images)[-1].float().mean((2, 3))

    def check_size(self, height: int, width: int) -> None:
        """Raises LdmError, `SIZE`, for pictures that are smaller than the network needs."""
        least = getattr(self.network, "min_size", 1)
        if min(height, width) < least:
            raise LdmError(
                "SIZE",
                f"the pictures are too small for the perceptual distance {self.label}",
                where="data.image_size",
                limit=f"sides of at least {least} pixels, not {width}x{height}",
                next=f"set data.image_size={least} or more, or perceptual=none",
            )

    def _maps(self, images: Tensor) -> Sequence[Tensor]:
        self.check_size(*images.shape[-2:])
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return self.network(images.float())

    def _unit_maps(self, images: Tensor) -> list[Tensor]:
        maps = (f.float() for f in self._maps(images))
        return [f * torch.rsqrt(f.square().sum(1, keepdim=True) + EPS) for f in maps]


def weights_sha256(module: nn.Module) -> str:
    """sha256 over names, shapes and float32 bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tuple(value.shape)}".encode())
        digest.update(value.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
