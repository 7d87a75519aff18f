"""Trains the autoencoder: pictures -> latents -> pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.checkpoints.store import Checkpoint
from ldm.errors import UNCLASSIFIED, LdmError
from ldm.model import load_weights
from ldm.models.autoencoder.convolutional import ConvolutionalAutoencoder
from ldm.models.autoencoder.vq import AutoencoderVQ
from ldm.precompute.statistics import batches_of, chosen_images, measure_statistics
from ldm.random import Draws, Purpose
from ldm.reconstruction.adversarial import inputs_of
from ldm.reconstruction.objective import ReconstructionObjective
from ldm.training.codebook import tend_codebook
from ldm.training.ranks import several
from ldm.training.reconstruction_measures import SetMeasures, picture_measures
from ldm.training.stage_module import StageModule, StageSettings
from ldm.training.step import Player
from ldm.types import Batch

DISCRIMINATOR = "objective.adversarial."
DECODER = ("decoder", "post_quant_conv")
"""The parts of an autoencoder that its latents do not depend on."""


class AutoencoderModule(StageModule):
    """autoencoder: as built from the config.   saved_config: the same as a `{"class", "args"}` node.

    discriminator_optimizer: callable from parameters to optimizer, where the objective has an adversarial part.
    statistics_images: on how many training pictures the latents are measured, None = all; see `chosen_images`.
    decoder_only: the latents stay as they are: encoder, quantiser and statistics are in evaluation mode, and what is
        frozen needs no gradients and so keeps no activations.

    `latent_source` says in words where the statistics of the latents come from.
    """

    stage = "autoencoder"

    def __init__(
        self,
        settings: StageSettings,
        autoencoder: ConvolutionalAutoencoder,
        objective: ReconstructionObjective,
        saved_config: dict[str, Any],
        discriminator_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        statistics_images: int | None = None,
        decoder_only: bool = False,
    ) -> None:
        super().__init__(settings)
        self.autoencoder, self.objective, self.saved_config = autoencoder, objective, saved_config
        self.discriminator_optimizer, self.statistics_images = discriminator_optimizer, statistics_images
        self.latent_source: str | None = None
        self._codes: list[dict[str, Tensor]] = []  # of this step's micro-batches, where there is a codebook
        self.decoder_only = decoder_only
        if decoder_only:
            for name, parameter in autoencoder.named_parameters():
                parameter.requires_grad_(name.startswith(DECODER))
            self.latent_id = autoencoder.latent_id()
        num_codes = getattr(autoencoder, "codebook_size", None)
        self.measures = SetMeasures(autoencoder.latent_channels, num_codes, objective.perceptual)
        # DDP waits for a gradient of each of its parameters; the discriminator has none before its start
        self._ddp_params_and_buffers_to_ignore = [name for name in self.state_dict() if name.startswith(DISCRIMINATOR)]
        self.train()  # nobody else calls it before the first validation

    def trained(self) -> nn.Module:
        return self.autoencoder

    def networks(self) -> list[nn.Module]:
        decoder = self.autoencoder.decoder  # without its last layer: compiled code would not call the hook of `loss`
        return [self.autoencoder.encoder, decoder.mid_block, *decoder.up_blocks]

    def train(self, mode: bool = True) -> AutoencoderModule:
        super().train(mode)
        if self.decoder_only:
            self.autoencoder.training = False
            for name, part in self.autoencoder.named_children():
                part.train(mode and name in DECODER)
        return self

    def further_parameters(self) -> dict[str, nn.Parameter]:
        return {} if self.objective.logvar is None else {"objective.logvar": self.objective.logvar}

    def discriminator(self) -> Player | None:
        if self.objective.adversarial is None:
            return None
        assert self.discriminator_optimizer is not None
        parameters = dict(self.objective.adversarial.named_parameters(DISCRIMINATOR.rstrip(".")))
        return Player(parameters, self.discriminator_optimizer, synchronise=True)

    def loss(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        images = batch.images
        assert images is not None
        f = self.autoencoder.downsampling
        noise = None
        if self.autoencoder.moment_channels > self.autoencoder.latent_channels:
            size = (images.shape[-2] // f, images.shape[-1] // f)
            noise = draws.normal(Purpose.POSTERIOR, (self.autoencoder.latent_channels, *size))
        decoder, adversarial = self.autoencoder.decoder, self.objective.adversarial
        step, inputs = self.step.train_step, None
        if adversarial is not None and adversarial.adaptive and adversarial.acts(step):
            with inputs_of(decoder.conv_out) as seen:
                reconstruction, code = self.autoencoder(images, noise)
            inputs = seen[0]
        else:
            reconstruction, code = self.autoencoder(images, noise)
        if isinstance(self.autoencoder, AutoencoderVQ):
            if self.step.micro == 0:  # the first of a step; a skipped one may have left some
                self._codes = []
            self._codes.append({name: code[name].detach() for name in ("latents", "codes")})
        return self.objective.training_terms(
            reconstruction,
            images,
            code,
            step,
            layer=decoder.conv_out,
            inputs=inputs,
            patch_size=decoder.patch_size,
            mean=_mean_over_ranks,
        )

    def step_ended(self) -> None:
        if isinstance(self.autoencoder, AutoencoderVQ):
            self.logs["revived_codes"] = tend_codebook(self.autoencoder, self.step, self._codes, self.key)

    @torch.no_grad()
    def validation_terms(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.images is not None
        reconstruction, code = self.autoencoder(batch.images)
        self.measures.add(reconstruction, batch.images, code, batch.valid)
        return {
            **self.objective.terms(reconstruction, batch.images, code),
            **picture_measures(reconstruction, batch.images),
        }

    def validation_summary(self) -> dict[str, float]:
        return self.measures.results(self.autoencoder.statistics.std if self.has_statistics else None)

    @property
    def has_statistics(self) -> bool:
        """Whether its latents were measured, or come with the factor of a known model, which may be 1."""
        return self.latent_source is not None or self.autoencoder.statistics.known

    def resume_from(self, checkpoint: Checkpoint) -> None:
        super().resume_from(checkpoint)
        state = checkpoint.document("state")
        self.latent_source = state.get("latent_source")
        self.measures.last_std = state.get("validated_latent_std")
        if self.objective.trained_state() and "objective.safetensors" in checkpoint.manifest["files"]:
            load_weights(self.objective, checkpoint.tensors("objective"), checkpoint.path, ignore="perceptual.")

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        objective = self.objective.trained_state()
        return {**super().tensors(), **({"objective": objective} if objective else {})}

    def document(self) -> dict[str, Any]:
        return {"autoencoder": self.saved_config}

    def describe(self) -> dict[str, Any]:
        statistics = self.autoencoder.statistics
        latent_id = None
        if self.has_statistics:
            with self.averaged():
                latent_id = self.autoencoder.latent_id()
        return {
            "latent_id": latent_id,
            "latent_mean": statistics.mean.tolist(),
            "latent_std": statistics.std.tolist(),
            "latent_images": int(statistics.count),
            "latent_source": self.latent_source,
            "validated_latent_std": self.measures.last_std,
        }

    def finish(self) -> None:
        """Latent statistics of the averaged weights over the training set, where the latents were trained."""
        if self.decoder_only:
            if (found := self.autoencoder.latent_id()) != self.latent_id:
                raise LdmError(
                    "LATENT-ID",
                    "training of the decoder alone changed the latents",
                    limit=f"{self.latent_id[:12]} before, {found[:12]} now",
                    next="report it; the checkpoints before this one are intact",
                    exit_code=UNCLASSIFIED,
                )
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        chosen = chosen_images(data.num_train, self.statistics_images)
        ranks = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        with self.averaged():
            count = measure_statistics(
                self.autoencoder, batches_of(data, chosen, batch_size=self.evaluation_batch, **ranks)
            )
        weights = "averaged" if self.step.ema else "last"
        self.latent_source = (
            f"measured on {count} of {data.num_train} training pictures (manifest {data.manifest_hash[:12]}) "
            f"with the {weights} weights of step {self.step.train_step}"
        )


def _mean_over_ranks(value: Tensor) -> Tensor:
    if several():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value
