"""CLIP text models of transformers, from a local folder. Needs the extra `interop`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.models.conditioner.tokenizer import VOCAB_SIZE, Tokenizer
from ldm.models.conditioner.transfer import to_device
from ldm.types import Check, Conditioning

SD1 = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}
"""The text model of Stable Diffusion 1, in the words of transformers' CLIPTextConfig."""


class HFClipText(nn.Module):
    """Captions to `Conditioning`: tokens [B, 77, width] and, with `pooled`, the vector [B, width] at the end token.
    There is no mask, as in Stable Diffusion. Imported models use `OpenClipText`, which needs no extra.

    config: fields of transformers' CLIPTextConfig; a folder's own config.json must agree with them.
    width: of the tokens, for networks to refer to; must be hidden_size.
    clip_skip: blocks left out at the end; the last norm is applied in any case.
    pooled, pad_id, trained, drop_prob, sha256: see `OpenClipText`.
    weights: a folder with config.json and model.safetensors, or the file alone, read when a training begins and not
        when a run is loaded; None = random.
    Raises LdmError INSTALL without transformers, ValueError for settings that do not fit together.
    """

    def __init__(
        self,
        config: Mapping[str, Any] = SD1,
        width: int = 768,
        clip_skip: int = 0,
        pooled: bool = False,
        pad_id: int = 49407,
        trained: bool = False,
        drop_prob: float = 0.1,
        weights: str | None = None,
        sha256: str | None = None,
    ) -> None:
        super().__init__()
        try:
            from transformers import CLIPTextConfig, CLIPTextModel
        except ImportError as error:
            raise LdmError(
                "INSTALL", "CLIP text models of transformers need an extra", next='pip install "ldm[interop]"'
            ) from error
        self.config = {**SD1, **config}
        if width != self.config["hidden_size"]:
            raise ValueError(f"width is {width}, but hidden_size is {self.config['hidden_size']}")
        if not 0 <= clip_skip < self.config["num_hidden_layers"]:
            raise ValueError(f"clip_skip must be 0 to {self.config['num_hidden_layers'] - 1}, not {clip_skip}")
        if self.config.get("vocab_size", VOCAB_SIZE) != VOCAB_SIZE:
            raise ValueError(f"vocab_size is {self.config['vocab_size']}, CLIP's is {VOCAB_SIZE}")
        model = CLIPTextModel(CLIPTextConfig(**self.config))
        # transformers 5.6 dropped a level of the module tree: what lies below is the same in all versions
        self.tower = getattr(model, "text_model", model)
        self.clip_skip, self.pooled, self.trained = clip_skip, pooled, trained
        self.weights, self.sha256 = weights, sha256
        self.tokenizer = Tokenizer(self.config["max_position_embeddings"], pad_id)
        self.reads = ("caption",)
        self.checks: Mapping[str, Sequence[Check]] = {}
        self.length = self.tokenizer.length
        self.provides = frozenset(["tokens", "vector"] if pooled else ["tokens"])
        self.width, self.vector_size, self.drop_prob = width, width if pooled else None, drop_prob
        used = self.config["num_hidden_layers"] - (0 if pooled else clip_skip)
        for name, parameter in self.tower.named_parameters():
            skipped = name.startswith("encoder.layers.") and int(name.split(".")[2]) >= used
            parameter.requires_grad_(trained and not skipped)  # what is skipped has no gradient, which DDP refuses
        self.train()

    def train(self, mode: bool = True) -> HFClipText:
        super().train(mode and self.trained)
        return self

    def forward(self, captions: list[str]) -> Conditioning:
        ids = torch.tensor(self.tokenizer.padded(captions))
        return self.encode(to_device(ids, self.tower.final_layer_norm.weight.device))

    def encode(self, ids: Tensor) -> Conditioning:
        """ids: [B, 77] token ids, padded."""
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            found = self.tower(input_ids=ids, output_hidden_states=True)
            tokens = found.last_hidden_state
            if self.clip_skip:
                tokens = self.tower.final_layer_norm(found.hidden_states[-1 - self.clip_skip])
        return Conditioning(tokens=tokens, vector=found.pooler_output if self.pooled else None)

    def own_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The text model's part of a file of transformers', under this module's names."""
        prefixed = any(name.startswith("text_model.") for name in tensors)
        return {
            "tower." + name.removeprefix("text_model."): tensor
            for name, tensor in tensors.items()
            if name.startswith("text_model.") == prefixed and not name.endswith(("position_ids", "projection.weight"))
        }

    def check_config(self, found: Mapping[str, Any], where: str) -> None:
        """Refuse a folder whose config.json describes another model."""
        from transformers import CLIPTextConfig

        theirs, ours = CLIPTextConfig(**found), CLIPTextConfig(**self.config)
        other = [
            f"{key}={getattr(theirs, key)} (not {getattr(ours, key)})"
            for key in self.config
            if getattr(theirs, key) != getattr(ours, key)
        ]
        if other:
            raise LdmError(
                "CONFIG", "the folder holds another text model", where=where, limit=", ".join(other),
                next="set these in model.conditioner.config",
            )  # fmt: skip
