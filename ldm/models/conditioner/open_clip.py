"""Text towers of open_clip, and with them those of Stable Diffusion 1 and 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.conditioner.tokenizer import VOCAB_SIZE, Tokenizer
from ldm.models.conditioner.transfer import to_device
from ldm.types import Check, Conditioning


class OpenClipText(nn.Module):
    """Captions to `Conditioning`: tokens [B, L, width] and, with `pooled`, the vector [B, E] that CLIP compares with
    pictures. There is no mask: a tower that was trained with its padding has put meaning there.

    config: name of an architecture of open_clip ("ViT-H-14"), or its description as open_clip writes it:
        {embed_dim, quick_gelu, text_cfg: {width, heads, layers, context_length, ...}}.
    width: of the tokens, for networks to refer to; must be the tower's.
    layer: whose output the tokens are: -1 the last block, -2 the one before (Stable Diffusion 2; clip_skip k is
        -1 - k).   final_norm: apply the tower's last norm to it, as SD1 and SD2 do; SDXL does not.
    pooled: provide the vector.
    pad_id: follows the end token: 0 for open_clip and SD2, 49407 for SD1.
    trained: train the tower along; else it stays as it is, in evaluation mode.
    drop_prob: share of the captions that give way to the empty prompt in training.
    weights: file with the tower or the whole CLIP model, read when a training begins and not when a run is loaded; None
        = random.   sha256: of that file, compared before it is read; None = not compared.
    Raises ValueError for an unknown name, a tower with another vocabulary or one that needs a download, a wrong width.
    Source: Radford et al. 2021, arXiv:2103.00020, section 2.4; Cherti et al. 2022, arXiv:2212.07143.
    """

    def __init__(
        self,
        config: str | Mapping[str, Any] = "ViT-H-14",
        width: int = 1024,
        layer: int = -2,
        final_norm: bool = True,
        pooled: bool = False,
        pad_id: int = 0,
        trained: bool = False,
        drop_prob: float = 0.1,
        weights: str | None = None,
        sha256: str | None = None,
    ) -> None:
        super().__init__()
        # five seconds to import: only those who use a tower pay for it
        from open_clip.model import _build_text_tower

        model = describe_tower(config)
        self.tower = _build_text_tower(model["embed_dim"], model["text_cfg"], bool(model.get("quick_gelu")))
        layers = len(self.tower.transformer.resblocks)
        if width != self.tower.width:
            raise ValueError(f"width is {width}, but the tower of {_shown(config)} has {self.tower.width}")
        if not -layers <= layer < 0:
            raise ValueError(f"layer must be -1 (the last) to {-layers}, not {layer}")
        self.layer, self.final_norm, self.pooled, self.trained = layers + layer, final_norm, pooled, trained
        self.weights, self.sha256 = weights, sha256
        self.tokenizer = Tokenizer(self.tower.context_length, pad_id)
        self.reads = ("caption",)
        self.checks: Mapping[str, Sequence[Check]] = {}
        self.length = self.tokenizer.length
        self.provides = frozenset(["tokens", "vector"] if pooled else ["tokens"])
        projected = self.tower.text_projection is not None
        self.width, self.drop_prob = width, drop_prob
        self.vector_size = (model["embed_dim"] if projected else width) if pooled else None
        for name, parameter in self.tower.named_parameters():
            parameter.requires_grad_(trained and self._is_used(name))
        self.train()

    def _is_used(self, name: str) -> bool:
        """Whether a parameter has a part in the result: without one it has no gradient, which DDP refuses."""
        if self.pooled:
            return True
        if name.startswith("transformer.resblocks."):
            return int(name.split(".")[2]) <= self.layer
        return not name.startswith(("text_projection", "cls_emb")) and (
            self.final_norm or not name.startswith("ln_final")
        )

    def train(self, mode: bool = True) -> OpenClipText:
        super().train(mode and self.trained)
        return self

    def forward(self, captions: list[str]) -> Conditioning:
        ids = torch.tensor(self.tokenizer.padded(captions))
        return self.encode(to_device(ids, self.tower.positional_embedding.device))

    def encode(self, ids: Tensor) -> Conditioning:
        """ids: [B, L] token ids, padded."""
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            found = self.tower.forward_intermediates(
                ids,
                indices=[self.layer],
                stop_early=not self.pooled,
                intermediates_only=not self.pooled,
                normalize_intermediates=self.final_norm,
                output_fmt="NLC",
            )
        return Conditioning(tokens=found["text_intermediates"][0], vector=found.get("text_features"))

    def own_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The text tower's part of a file of open_clip's, under this module's names."""
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
        prefix = "text." if any(name.startswith("text.") for name in tensors) else ""
        parts = {name.split(".")[0] for name in self.tower.state_dict()}
        inner = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        return {"tower." + name: tensor for name, tensor in inner.items() if name.split(".")[0] in parts}


def describe_tower(config: str | Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's description of a model. Raises ValueError for a name that it does not have and for towers that are
    not CLIP's own text transformer with CLIP's vocabulary.
    """
    import open_clip

    if isinstance(config, str):
        # other schemes than a plain name would reach for folders and hubs
        found = open_clip.get_model_config(config) if config in open_clip.list_models() else None
        if found is None:
            raise ValueError(f"open_clip has no architecture {config!r}: see open_clip.list_models()")
    else:
        found = dict(config)
    if set(found) < {"embed_dim", "text_cfg"}:
        raise ValueError("the description of a tower needs embed_dim and text_cfg")
    text = dict(found["text_cfg"])
    hub = next((key for key in ("hf_model_name", "hf_tokenizer_name") if text.get(key)), None)
    if hub is not None:
        raise ValueError(
            f"the text tower of {_shown(config)} comes from a hub ({text[hub]}): not one of open_clip's own"
        )
    if text.get("vocab_size", VOCAB_SIZE) != VOCAB_SIZE:
        raise ValueError(f"the text tower of {_shown(config)} has {text['vocab_size']} tokens, CLIP's has {VOCAB_SIZE}")
    return {**found, "text_cfg": text}


def _shown(config: str | Mapping[str, Any]) -> str:
    return repr(config) if isinstance(config, str) else "this description"
