"""The adversarial part of the autoencoder's objective: its losses, when it acts, and how strongly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

KINDS = ("hinge", "vanilla", "lsgan")
_EPS = 1e-4  # of the ratio, as in latent diffusion


class Adversarial(nn.Module):
    """A discriminator, its losses, and the weight of the adversarial loss in the autoencoder's objective.

    discriminator: pictures [B, 3, H, W] in [-1, 1] to logits [B, ...].
    kind: "hinge" (Lim and Ye 2017, arXiv:1705.02894), "vanilla" (Goodfellow et al. 2014, arXiv:1406.2661, the
        non-saturating form) or "lsgan" (Mao et al. 2017, arXiv:1611.04076).
    start_step: optimizer step from which there is a discriminator at all.   ramp_steps: over so many steps from there
        the weight rises from 0 to `weight`.
    adaptive: the weight is that share of the reconstruction's gradient (Esser et al. 2021, arXiv:2012.09841, eq. 7):
        weight * |gradient of the reconstruction| / |gradient of the adversarial loss|, both at the last layer, the
        ratio at most `max_ratio`. Otherwise it is `weight` itself.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        kind: str = "hinge",
        weight: float = 0.5,
        start_step: int = 0,
        ramp_steps: int = 0,
        adaptive: bool = True,
        max_ratio: float = 1e4,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
        for name, value in (("weight", weight), ("start_step", start_step), ("ramp_steps", ramp_steps)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, not {value}")
        if not max_ratio > 0:
            raise ValueError(f"max_ratio must be above 0, not {max_ratio}")
        self.discriminator = discriminator
        self.kind, self.weight, self.adaptive, self.max_ratio = kind, weight, adaptive, max_ratio
        self.start_step, self.ramp_steps = start_step, ramp_steps

    def acts(self, step: int) -> bool:
        return step >= self.start_step

    def weight_at(self, step: int) -> float:
        """`weight` after the ramp, its share within it. step: optimizer steps before this one."""
        return self.weight * min(1.0, (step - self.start_step + 1) / max(1, self.ramp_steps))

    def generator_loss(self, fake: Tensor) -> Tensor:
        """[B] what the autoencoder minimises, of the logits of its reconstructions."""
        if self.kind == "hinge":
            loss = -fake
        elif self.kind == "vanilla":
            loss = F.softplus(-fake)
        else:
            loss = 0.5 * (fake - 1.0).square()
        return loss.flatten(1).mean(1)

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """[B] what the discriminator minimises, of the logits of pictures and of reconstructions."""
        if self.kind == "hinge":
            losses = F.relu(1.0 - real) + F.relu(1.0 + fake)
        elif self.kind == "vanilla":
            losses = F.softplus(-real) + F.softplus(fake)
        else:
            losses = (real - 1.0).square() + fake.square()
        return 0.5 * losses.flatten(1).mean(1)


def gradient_ratio(
    layer: nn.Conv2d, inputs: Tensor, reconstruction: Tensor, adversarial: Tensor, mean: Callable[[Tensor], Tensor]
) -> Tensor:
    """|dL_rec / dW| / |dL_adv / dW| for the weight W of `layer`, a scalar on the device, without a host's look at it.

    inputs: what the layer was given, [B, C, H, W].   reconstruction, adversarial: the gradients of the two losses at
    its output, [B, C', H, W].   mean: over the ranks, so that all agree and their number does not matter.
    Each gradient of the weight is one convolution; no backward pass through anything else is repeated.
    """
    x, shape = inputs.to(reconstruction.dtype), layer.weight.shape
    options: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)
    gradients = [conv2d_weight(x, shape, g, *options) for g in (reconstruction, adversarial)]
    rec, adv = mean(torch.stack(gradients)).flatten(1).norm(dim=1)
    return rec / (adv + _EPS)


@contextmanager
def inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Within it, what `layer` is given is collected."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()
