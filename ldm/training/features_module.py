"""Trains an image tower and a text tower on captioned pictures; the image tower then judges reconstructions."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.models.conditioner.compose import parts_of
from ldm.models.features import Contrastive
from ldm.random import Draws
from ldm.training.contrastive import Pairs, caption_ids, contrastive_terms
from ldm.training.ranks import of_all_ranks
from ldm.training.stage_module import StageModule, StageSettings
from ldm.types import Batch


class FeaturesModule(StageModule):
    """model: as built from the config.   saved_config: the same as a `{"class", "args"}` node."""

    stage = "features"

    def __init__(self, settings: StageSettings, model: Contrastive, saved_config: dict[str, Any]) -> None:
        super().__init__(settings)
        self.model, self.saved_config = model, saved_config

    def trained(self) -> nn.Module:
        return self.model

    def networks(self) -> list[nn.Module]:
        return [self.model.image]

    @property
    def evaluation_batch(self) -> int:
        """How many captions a picture chooses from, whatever training does: so that validations compare."""
        return 64

    def pairs(self, batch: Batch) -> Pairs:
        images, texts = self.model(batch.images, batch.captions)
        return Pairs(images, texts, caption_ids(batch.captions).to(self.device))

    def loss(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Chosen from the pairs of all ranks: the loss does not depend on how many ranks there are."""
        own, scale = self.pairs(batch), self.model.scale()
        pool = Pairs(*map(of_all_ranks, own))
        first = len(own.ids) * dist.get_rank() if len(pool.ids) > len(own.ids) else 0
        return {**contrastive_terms(own, pool, scale, first=first), "scale": scale.expand(len(own.ids))}

    def step_ended(self) -> None:
        self.model.limit_scale()

    @torch.no_grad()
    def validation_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Chosen from the valid pairs of the batch, which is of this rank."""
        own = self.pairs(batch)
        return contrastive_terms(own, own, self.model.scale(), usable=batch.valid)

    def captions_cut(self) -> int:
        parts = parts_of(self.model.text)
        return max((part.tokenizer.truncated for part in parts if hasattr(part, "tokenizer")), default=0)

    def document(self) -> dict[str, Any]:
        return {"features": self.saved_config}
