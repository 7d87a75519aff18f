"""Reduced copies of Stable Diffusion's true architectures with random weights, made by diffusers and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldm.build import build_saved
from ldm.checkpoints.files import json_bytes
from ldm.checkpoints.formats import clip
from ldm.checkpoints.run import open_run
from ldm.checkpoints.store import Store

LEVELS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (32, 64, 64, 64),
        "attention_head_dim": 8,
        "cross_attention_dim": 64,
        "use_linear_projection": False,
    },
    "sd2": {
        "block_out_channels": (64, 64, 128, 128),
        "attention_head_dim": (1, 1, 2, 2),
        "cross_attention_dim": 64,
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (64, 64, 128),
        "attention_head_dim": (1, 1, 2),
        "cross_attention_dim": 96,
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 48 + 6 * 8,
    },
}
FULL_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8, "cross_attention_dim": 768},
    "sd2": {
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "sdxl": {
        **UNETS["sdxl"],
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10),
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAE = {
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 64,
}
FULL_VAE = {**VAE, "block_out_channels": (128, 256, 512, 512)}
TEXTS: dict[str, dict[str, Any]] = {
    "sd1": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 1},
    "sd2": {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 1,
        "hidden_act": "gelu",
    },
    "sdxl": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 1},
    "sdxl_2": {
        "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 1,
        "hidden_act": "gelu", "projection_dim": 48,
    },
}  # fmt: skip


def unet(family: str, **changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    return listening(UNet2DConditionModel(sample_size=8, **{**UNETS[family], **changes}).eval())


def listening(network: Any) -> Any:
    """Random networks hardly hear the text: with this a wrong token shows in the picture."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "attn2.to_out" in name or "attn2.to_v" in name:
                parameter.mul_(4)
    return network


def vae(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    return AutoencoderKL(**{**VAE, **changes}).eval()


def text_encoder(family: str, **changes: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(3)
    kind = CLIPTextModelWithProjection if family == "sdxl_2" else CLIPTextModel
    model = kind(CLIPTextConfig(**{**TEXTS[family], **changes})).eval()
    for parameter in model.parameters():  # transformers' initial values give nearly equal tokens
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def tokenizer(folder: Path, pad_id: int) -> Any:
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    for name, value in clip.tokenizer_files(pad_id, 77).items():
        (folder / name).write_bytes(value.encode() if isinstance(value, str) else json_bytes(value))
    return CLIPTokenizer.from_pretrained(folder)


def pipeline(family: str, folder: Path, prediction: str = "epsilon", **unet_changes: Any) -> Any:
    """A pipeline of Stable Diffusion saved in `folder` by diffusers itself."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    def words(number: str, pad_id: int) -> Any:
        return tokenizer(folder.with_name(f"{folder.name}-tokenizer{number}"), pad_id)

    parts = {
        "vae": vae(**({"scaling_factor": 0.13025} if family == "sdxl" else {})),
        "text_encoder": text_encoder(family),
        "tokenizer": words("", 0 if family == "sd2" else 49407),
        "unet": unet(family, **unet_changes),
        "scheduler": DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1, prediction_type=prediction,
        ),
    }  # fmt: skip
    if family == "sdxl":
        second = {"text_encoder_2": text_encoder("sdxl_2"), "tokenizer_2": words("_2", 0)}
        pipe = StableDiffusionXLPipeline(**parts, **second, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


OURS: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_channels": [32, 64, 64, 64], "num_heads": 8, "head_dim": None, "context_size": 64,
        "linear_projection": False,
    },
    "sd2": {"block_channels": [64, 64, 128, 128], "head_dim": 64, "context_size": 64, "linear_projection": True},
    "sdxl": {
        "block_channels": [64, 64, 128], "head_dim": 64, "context_size": 96, "linear_projection": True,
        "transformer_depth": [0, 2, 3], "mid_transformer_depth": 3, "vector_size": 96,
    },
}  # fmt: skip
FULL_OURS: dict[str, dict[str, Any]] = {
    "sd1": {"num_heads": 8, "head_dim": None, "context_size": 768, "linear_projection": False},
    "sd2": {"context_size": 1024},
    "sdxl": {
        "block_channels": [320, 640, 1280], "transformer_depth": [0, 2, 10], "mid_transformer_depth": 10,
        "context_size": 2048, "vector_size": 2816,
    },
}  # fmt: skip
OUR_VAE = {"block_channels": [32, 32, 64, 64]}


def our_text(family: str, layers: int = 3, **changes: Any) -> dict[str, Any]:
    """Arguments of `OpenClipText`: SD1's with its last layer, SD2's whole with its last layer but one."""
    first = family == "sd1"
    return clip.arguments(
        64, layers, heads=1, quick_gelu=first, projection=None if first else 64, pad_id=49407 if first else 0,
        layer=-1 if first else -2, **changes,
    )  # fmt: skip


def our_xl_text() -> dict[str, Any]:
    """The conditioner of a reduced XL: tokens of 64 + 32, a vector of 48 and six sizes of 8."""
    tower = "ldm.models.conditioner.open_clip.OpenClipText"
    first = clip.arguments(64, 3, heads=1, quick_gelu=True, projection=None, pad_id=49407)
    second = clip.arguments(32, 3, heads=1, quick_gelu=False, projection=48, pad_id=0)
    return {
        "class": "ldm.models.conditioner.compose.Compose",
        "args": {
            "parts": {
                "clip": {"class": tower, "args": clip.as_in_xl(first, pooled=False)},
                "open_clip": {"class": tower, "args": clip.as_in_xl(second, pooled=True)},
                "size": {"class": "ldm.models.conditioner.size.Size", "args": {"num_sinusoids": 8}},
            },
            "tokens": ["clip", "open_clip"], "vector": ["open_clip", "size"], "join": "channels", "keep": ["size"],
            "drop_prob": 0.1,
        },
    }  # fmt: skip


def our_run(
    folder: Path,
    family: str = "sd1",
    *,
    prediction: str = "Epsilon",
    std: float | list[float] = 1 / 0.18215,
    mean: float | list[float] = 0.0,
    network: dict[str, Any] | None = None,
    autoencoder: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    schedule: dict[str, Any] | None = None,
    sampler: dict[str, Any] | None = None,
) -> Path:
    """A run of ours with random weights, as training leaves it, without an average."""
    torch.manual_seed(4)
    nodes: dict[str, Any] = {
        "network": {"class": "ldm.models.unet.unet.UNet", "args": {**OURS[family], **(network or {})}},
        "schedule": schedule or {"class": "ldm.diffusion.schedule.DiscreteVP", "args": {}},
        "prediction": {"class": f"ldm.diffusion.prediction.{prediction}", "args": {}},
    }
    vae_node = {"class": "ldm.models.autoencoder.kl.AutoencoderKL", "args": {**OUR_VAE, **(autoencoder or {})}}
    text_node = text or {"class": "ldm.models.conditioner.open_clip.OpenClipText", "args": our_text(family)}
    vae_model = build_saved(vae_node)
    vae_model.statistics.mean.copy_(torch.tensor(mean))
    vae_model.statistics.std.copy_(torch.tensor(std))
    config = {
        "conditioner": text_node,
        "denoiser": {"class": "ldm.diffusion.denoiser.Denoiser", "args": nodes},
        "image_size": 64,
        "sampler": {
            "_target_": "ldm.sampling.tasks.Sampling",
            "function": {"_target_": "ldm.diffusion.samplers.ddim.sample_ddim", "_partial_": True, "eta": 0.0},
            "steps": 20, "guidance_scale": 5.0, "spacing": "leading", "offset": 1, "final": "first",
            **(sampler or {}),
        },
    }  # fmt: skip
    conditioner = build_saved(text_node)
    weights = {f"denoiser.network.{k}": v for k, v in listening(build_saved(nodes["network"])).state_dict().items()}
    weights |= {f"conditioner.{k}": v for k, v in conditioner.state_dict().items()}
    state = {"train_step": 7, "finished": True, "fingerprint": {}, "latent_id": vae_model.latent_id()}
    with open_run(folder.parent, folder.name) as run:
        for stage, tensors, document in (
            ("autoencoder", vae_model.state_dict(), {"autoencoder": vae_node}),
            ("diffusion", weights, config),
        ):
            store = Store(run.stage(stage).ckpt)
            store.save(7, tensors={"model": tensors}, trees={}, documents={"state": state, "config": document})
    return folder


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """Everything that the newest checkpoints of both stages hold."""
    found = {}
    for stage in ("autoencoder", "diffusion"):
        checkpoint = Store(run / stage / "ckpt").newest()
        assert checkpoint is not None
        found |= {f"{stage}/{k}": v for k, v in checkpoint.tensors("model").items()}
    return found


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """L2 distance of a to the reference b, over b's norm."""
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())
