"""The CLIP text tower: transformers' names <-> open_clip's (which are ours), and the vocabulary as files.

transformers keeps queries, keys and values apart where open_clip stacks them in one matrix, and a projection that
follows as a linear layer where open_clip has the bare matrix [width, out].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.checkpoints.formats import keymap
from ldm.checkpoints.formats.keymap import KeyMap, Place
from ldm.checkpoints.formats.reading import count, setting
from ldm.errors import LdmError

VOCAB_SIZE = 49408
PAD_TOKENS = {49407: "<|endoftext|>", 0: "!"}
"""What follows the end token, as an id and in the words of a tokenizer's files: SD1's, SD2's."""

_TOP = {
    "token_embedding.weight": Place(("embeddings.token_embedding.weight",)),
    "positional_embedding": Place(("embeddings.position_embedding.weight",)),
    "ln_final.weight": Place(("final_layer_norm.weight",)),
    "ln_final.bias": Place(("final_layer_norm.bias",)),
}
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def map_transformers(names: Iterable[str], *, prefix: str = "tower.", text_model: str = "text_model.") -> KeyMap:
    """Our names (`prefix` and open_clip's) -> those of transformers' CLIPTextModel, or with a projection, of
    CLIPTextModelWithProjection. Raises LdmError naming a tensor that these do not have.
    """

    def rule(name: str) -> Place:
        inner = name.removeprefix(prefix)
        if inner in _TOP:
            return Place(tuple(text_model + other for other in _TOP[inner].names))
        if inner == "text_projection":
            return Place(("text_projection.weight",), "transposed")
        match = _BLOCK.fullmatch(inner)
        if match is not None:
            number, layer, kind = match.groups()
            home = f"{text_model}encoder.layers.{number}."
            if layer == "attn.in_proj":
                return Place(tuple(f"{home}self_attn.{part}_proj.{kind}" for part in "qkv"))
            if layer in _LAYER:
                return Place((f"{home}{_LAYER[layer]}.{kind}",))
        raise LdmError("EXPORT", f"transformers' CLIP text model has no place for {inner}", where="conditioner")

    return keymap.make(names, rule)


# ---- settings


def arguments_from_transformers(config: Mapping[str, Any], where: str, *, projection: bool, pad_id: int) -> dict:
    """A config.json of transformers -> arguments of `OpenClipText`. Raises LdmError naming what differs from CLIP."""
    fixed = {
        "layer_norm_eps": 1e-5,
        "vocab_size": VOCAB_SIZE,
        "attention_dropout": 0.0,
        "model_type": "clip_text_model",
    }
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise LdmError("FORMAT", f"{key} is {config[key]}, expected {value}", where=where)
    act = setting(config, "hidden_act", "quick_gelu", where)
    if act not in ("gelu", "quick_gelu"):
        raise LdmError("FORMAT", f"hidden_act is {act!r}, expected gelu or quick_gelu", where=where)
    sizes = {
        key: count(config, key, default, where)
        for key, default in (
            ("hidden_size", 512), ("intermediate_size", 2048), ("num_hidden_layers", 12), ("num_attention_heads", 8),
            ("max_position_embeddings", 77), ("projection_dim", 512),
        )
    }  # fmt: skip
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if width % heads:
        raise LdmError("FORMAT", f"num_attention_heads {heads} does not divide hidden_size {width}", where=where)
    return arguments(
        width,
        sizes["num_hidden_layers"],
        heads=heads,
        mlp_ratio=sizes["intermediate_size"] / width,
        length=sizes["max_position_embeddings"],
        quick_gelu=act == "quick_gelu",
        projection=sizes["projection_dim"] if projection else None,
        pad_id=pad_id,
    )


def arguments(
    width: int,
    layers: int,
    *,
    heads: int,
    quick_gelu: bool,
    projection: int | None,
    pad_id: int,
    mlp_ratio: float = 4.0,
    length: int = 77,
    layer: int = -1,
) -> dict[str, Any]:
    """Arguments of `OpenClipText` for a plain CLIP tower."""
    text: dict[str, Any] = {
        "context_length": length,
        "vocab_size": VOCAB_SIZE,
        "width": width,
        "heads": heads,
        "layers": layers,
        "mlp_ratio": mlp_ratio,
        "proj_type": "none" if projection is None else "linear",
    }
    return {
        "config": {"embed_dim": projection or width, "quick_gelu": quick_gelu, "text_cfg": text},
        "width": width,
        "layer": layer,
        "pad_id": pad_id,
    }


def as_in_xl(args: Mapping[str, Any], *, pooled: bool) -> dict[str, Any]:
    """Arguments of a tower that SDXL uses: its last layer but one without the norm, and dropped with the other one.

    Source: Podell et al. 2023, arXiv:2307.01952, section 2.1.
    """
    return {**args, "layer": -2, "final_norm": False, "pooled": pooled, "drop_prob": 0.0}


def xl_towers() -> dict[str, dict[str, Any]]:
    """The two that SDXL was published with: CLIP ViT-L/14 and OpenCLIP ViT-bigG/14."""
    first = arguments(768, 12, heads=12, quick_gelu=True, projection=None, pad_id=49407)
    second = arguments(1280, 32, heads=20, quick_gelu=False, projection=1280, pad_id=0)
    return {"clip": as_in_xl(first, pooled=False), "open_clip": as_in_xl(second, pooled=True)}


def config_for_transformers(args: Mapping[str, Any], model: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The config.json of a CLIPTextModel. args: of `OpenClipText`; model: its architecture as open_clip describes it;
    layers: how many blocks are exported.
    """
    text = model["text_cfg"]
    width = text["width"]
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "attention_dropout": 0.0,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": args["pad_id"],
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "hidden_size": width,
        "intermediate_size": int(width * text.get("mlp_ratio", 4.0)),
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": text.get("context_length", 77),
        "num_attention_heads": text["heads"],
        "num_hidden_layers": layers,
        "projection_dim": model["embed_dim"],
        "torch_dtype": "float32",
        "vocab_size": VOCAB_SIZE,
    }


# ---- the vocabulary


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """Token -> id, and the merges in their order, as transformers writes them; from open_clip's packaged file."""
    from open_clip.tokenizer import SimpleTokenizer

    bpe = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    tokens = {names.get(token, token): number for token, number in bpe.encoder.items()}
    return tokens, [" ".join(pair) for pair in bpe.bpe_ranks]


def tokenizer_files(pad_id: int, length: int) -> dict[str, Any]:
    """The files of a `tokenizer/` folder: name -> JSON value, or text."""
    if pad_id not in PAD_TOKENS:
        raise LdmError(
            "EXPORT", f"pad_id {pad_id} has no name in a tokenizer's files", where="conditioner", limit="49407 or 0"
        )
    tokens, merges = vocabulary()
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": PAD_TOKENS[pad_id],
    }
    return {
        "vocab.json": tokens,
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": length,
            "do_lower_case": True,
            **special,
        },
    }


def read_pad_id(settings: Mapping[str, Any], tokens: Mapping[str, int], where: str) -> int:
    """The id that fills up prompts, from a tokenizer's settings; refuses a vocabulary that is not CLIP's."""
    ours = vocabulary()[0]
    if dict(tokens) != ours:
        other = sorted(name for name in tokens.keys() | ours.keys() if tokens.get(name) != ours.get(name))
        raise LdmError(
            "FORMAT",
            "the tokenizer is not CLIP's",
            where=where,
            limit=f"{len(other)} of {len(tokens)} tokens differ, e.g. {', '.join(map(repr, other[:3]))}",
        )
    pad = settings.get("pad_token", "<|endoftext|>")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if not isinstance(pad, str) or pad not in tokens:
        raise LdmError("FORMAT", f"the padding token {pad!r} is not in the vocabulary", where=where)
    return tokens[pad]
