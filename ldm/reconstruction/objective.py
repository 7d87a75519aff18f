"""The autoencoder's objective (twin of diffusion/objective.py): what a reconstruction and its code cost, per sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.reconstruction.adversarial import Adversarial, gradient_ratio

PIXEL_DISTANCES = ("l1", "l2", "charbonnier")
CHARBONNIER_EPS = 1e-3


class ReconstructionObjective(nn.Module):
    """loss = distance + penalty of the code + adversarial loss, where distance = pixel + weighted perceptual distance.

    pixel: "l1", "l2" or "charbonnier" (sqrt(d^2 + 1e-6), Lai et al. 2017, arXiv:1704.03915), mean over pixels and
        channels of pictures in [-1, 1].
    kl_weight: of the KL in nats per latent value.   kl_warmup_steps: the weight rises from 0 over so many steps.
    codebook_weight, commitment_weight: of the penalties of a quantised code (van den Oord et al. 2017,
        arXiv:1711.00937, eq. 3), mean over the latent's values.
    perceptual: a `FeatureDistance` or None; perceptual_weight: its weight beside the pixels.
    adversarial: an `Adversarial` or None.
    learn_logvar: distance / exp(logvar) + logvar with one learnt number, so that the code's weight is in nats (Rybkin
        et al. 2021, arXiv:2006.13202); 0 at the start.
    """

    def __init__(
        self,
        pixel: str = "l1",
        kl_weight: float = 1e-3,
        kl_warmup_steps: int = 0,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        adversarial: Adversarial | None = None,
        learn_logvar: bool = False,
    ) -> None:
        super().__init__()
        if pixel not in PIXEL_DISTANCES:
            raise ValueError(f"pixel must be one of {', '.join(PIXEL_DISTANCES)}, not {pixel!r}")
        for name, value in (
            ("kl_weight", kl_weight),
            ("kl_warmup_steps", kl_warmup_steps),
            ("codebook_weight", codebook_weight),
            ("commitment_weight", commitment_weight),
            ("perceptual_weight", perceptual_weight),
        ):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, not {value}")
        self.pixel, self.kl_weight, self.kl_warmup_steps = pixel, kl_weight, kl_warmup_steps
        self.codebook_weight, self.commitment_weight = codebook_weight, commitment_weight
        self.perceptual, self.perceptual_weight, self.adversarial = perceptual, perceptual_weight, adversarial
        self.logvar = nn.Parameter(torch.zeros(())) if learn_logvar else None

    def trained_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it: the discriminator and the log-variance, not the frozen perceptual network."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("perceptual.")}

    def terms(
        self, reconstruction: Tensor, images: Tensor, code: Mapping[str, Tensor], step: int | None = None
    ) -> dict[str, Tensor]:
        """[B] each: "loss" without an adversarial part, and what it consists of, unweighted.

        code: what the autoencoder says of its latents, "moments" [B, 2C, h, w] or "codebook" and "commitment" [B].
        step: optimizer steps before this one, for the warm-up; None is after it.
        """
        terms = self.distance(reconstruction, images)
        penalty, parts = self.penalty(code, step)
        return {"loss": terms.pop("distance") + penalty, **terms, **parts}

    def training_terms(
        self,
        reconstruction: Tensor,
        images: Tensor,
        code: Mapping[str, Tensor],
        step: int,
        *,
        layer: nn.Conv2d,
        inputs: Tensor | None,
        patch_size: int = 1,
        mean: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> dict[str, Tensor]:
        """`terms` with the adversarial part: one backward of "loss" gives the gradients of both players.

        The gradients of distance and adversarial loss are taken at a copy of the reconstruction, once each; the
        autoencoder gets their weighted sum in one backward. The discriminator's loss is in the gradient of "loss" but
        not in its value; it sees copies only, so that neither player's loss reaches the other's weights. Losses,
        gradients and weight are in float32; the discriminator computes in what surrounds it, but never in float16.
        layer: the autoencoder's last convolution, whose output is the reconstruction, or is so after `pixel_shuffle`
            by patch_size.   inputs: what that layer was given; None where no adaptive weight is needed at this step.
        mean: of a tensor over the ranks.
        """
        adversarial = self.adversarial
        if adversarial is None or not adversarial.acts(step):
            return self.terms(reconstruction, images, code, step)
        images = wide(images)
        leaf = wide(reconstruction.detach()).requires_grad_()
        terms = self.distance(leaf, images)
        distance = terms.pop("distance")
        wanted = [leaf] if self.logvar is None else [leaf, self.logvar]
        rec, *logvar_gradient = torch.autograd.grad(distance.mean(), wanted)
        with no_float16(leaf.device.type):
            judged = wide(adversarial.discriminator(leaf))
            adv_loss = adversarial.generator_loss(judged)
            (adv,) = torch.autograd.grad(adv_loss.mean(), leaf)
            both = torch.cat([images, leaf.detach()])
            real, fake = wide(adversarial.discriminator(both)).chunk(2)

        weight = leaf.new_full((), adversarial.weight_at(step))
        if adversarial.adaptive:
            assert inputs is not None
            a, b = (F.pixel_unshuffle(g, patch_size) if patch_size > 1 else g for g in (rec, adv))
            weight = weight * gradient_ratio(layer, inputs, a, b, mean).clamp(max=adversarial.max_ratio)

        d_loss = adversarial.discriminator_loss(real, fake)
        penalty, parts = self.penalty(code, step)
        carrier = (wide(reconstruction) * (rec + weight * adv)).sum() + penalty.mean() + d_loss.mean()
        if self.logvar is not None:
            carrier = carrier + self.logvar * logvar_gradient[0]
        value = distance + weight.nan_to_num() * adv_loss + penalty  # a picture that is not a number spoils no other's
        return {
            "loss": _Carried.apply(value.detach(), carrier),
            **terms,
            **parts,
            "adversarial": adv_loss,
            "adaptive_weight": weight.expand(len(images)),
            "discriminator": d_loss,
            "logits_real": real.flatten(1).mean(1),
            "logits_fake": fake.flatten(1).mean(1),
        }

    def distance(self, reconstruction: Tensor, images: Tensor) -> dict[str, Tensor]:
        """[B] each: "pixel", "perceptual_<label>" and "distance", their sum with the perceptual weight."""
        a, b = wide(reconstruction), wide(images)
        difference = (a - b).flatten(1)
        if self.pixel == "l1":
            pixel = difference.abs().mean(1)
        elif self.pixel == "l2":
            pixel = difference.square().mean(1)
        else:
            pixel = (difference.square() + CHARBONNIER_EPS**2).sqrt().mean(1)
        terms, distance = {"pixel": pixel}, pixel
        if self.perceptual is not None:
            perceptual = self.perceptual(a, b)
            terms[f"perceptual_{self.perceptual.label}"] = perceptual
            distance = distance + self.perceptual_weight * perceptual
        if self.logvar is not None:
            distance = distance / self.logvar.exp() + self.logvar
            terms["logvar"] = self.logvar.detach().expand(len(pixel))
        return {**terms, "distance": distance}

    def penalty(self, code: Mapping[str, Tensor], step: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """[B] the code's weighted penalty, and its parts by name, unweighted."""
        if "moments" in code:
            kl = kl_divergence(code["moments"])
            warm = 1.0 if step is None else min(1.0, (step + 1) / max(1, self.kl_warmup_steps))
            return warm * self.kl_weight * kl, {"kl": kl}
        parts = {name: wide(code[name]) for name in ("codebook", "commitment")}
        return self.codebook_weight * parts["codebook"] + self.commitment_weight * parts["commitment"], parts


class _Carried(torch.autograd.Function):
    """The first, with the gradient of the second: `_Carried.apply(value [B], carrier)`, whose mean counts once."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient.sum()


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.float() if x.dtype.itemsize < 4 else x


def no_float16(device_type: str) -> torch.autocast:
    """The surrounding autocast, or none where that is float16: gradients of the mean of many logits vanish in it."""
    half = torch.get_autocast_dtype(device_type) == torch.float16
    return torch.autocast(device_type, enabled=torch.is_autocast_enabled(device_type) and not half)


def kl_divergence(moments: Tensor) -> Tensor:
    """[B] KL from the posterior to a standard normal, in nats per latent value."""
    mean, logvar = wide(moments).chunk(2, dim=1)
    return 0.5 * (mean**2 + torch.exp(logvar) - 1.0 - logvar).flatten(1).mean(1)
