"""The configurations of Stable Diffusion's versions, and random checkpoints that have them.

Written from the `config.json` files of the hub's repositories, as far as these differ from diffusers'
defaults.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from shapes.checkpoint import (
    TINY,
    WORDS,
    build_controlnet,
    build_scheduler,
    build_tokenizer,
    build_vae,
    configure_clip,
    randomize_outputs,
    save,
    size_clip,
)

NARROW = 160  # channels: the fewest that 32 groups and the 20 heads of versions 2 and XL divide
NARROWER = 8  # how many times narrower the text is
LAYERS = 3  # of a text encoder: one is read, one XL leaves out, and one clip_skip may leave out


@dataclass(frozen=True)
class Configuration:
    """What sets one version apart: keys of the UNet, of the text encoders and of the noise schedule."""

    unet: dict[str, Any]
    texts: tuple[dict[str, Any], ...]
    scheduler: dict[str, Any]

    @property
    def is_xl(self) -> bool:
        """Whether there are two text encoders."""
        return len(self.texts) == 2

    def narrow(self) -> "Configuration":
        """The same keys at a fraction of the width; heads, blocks and kinds of layers are the version's."""
        levels = len(self.unet["block_out_channels"])
        text = tuple(
            size_clip(
                t["hidden_size"] // NARROWER, LAYERS, t["num_attention_heads"], t["hidden_act"]
            )
            for t in self.texts
        )
        changes = {
            "block_out_channels": (NARROW,) * levels,
            "cross_attention_dim": sum(t["hidden_size"] for t in text),
        }
        if self.is_xl:
            sizes = self.unet["addition_time_embed_dim"] // NARROWER
            changes["addition_time_embed_dim"] = sizes
            pooled = text[1]["projection_dim"]
            changes["projection_class_embeddings_input_dim"] = pooled + 6 * sizes
        return replace(self, unet=self.unet | changes, texts=text)


_WIDTHS = (320, 640, 1280, 1280)
_CLIP_L = size_clip(768, 12, 12, "quick_gelu")
_CLIP_H = size_clip(1024, 23, 16, "gelu")
_CLIP_G = size_clip(1280, 32, 20, "gelu")
_UNET_2 = {
    "sample_size": 64,
    "block_out_channels": _WIDTHS,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
_UNET_XL = {
    "sample_size": 128,
    "block_out_channels": _WIDTHS[:3],
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_UNET_1 = {
    "sample_size": 64,
    "block_out_channels": _WIDTHS,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
_V = {"prediction_type": "v_prediction"}

CONFIGURATIONS = {
    "1.5": Configuration(_UNET_1, (_CLIP_L,), {}),
    "2.1": Configuration(_UNET_2, (_CLIP_H,), {}),
    "2.1-768": Configuration(
        _UNET_2 | {"sample_size": 96, "upcast_attention": True}, (_CLIP_H,), _V
    ),
    "depth": Configuration(_UNET_2 | {"sample_size": 32, "in_channels": 5}, (_CLIP_H,), {}),
    "XL": Configuration(_UNET_XL, (_CLIP_L, _CLIP_G), {}),
}


def build_narrow(folder: Path, version: str) -> Path:
    """Write a narrow checkpoint of a version with random weights, and its ControlNet; returns `folder`."""
    config, controlnet = CONFIGURATIONS[version].narrow(), None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = build_tokenizer(WORDS, TINY.prompt_tokens)
        unet = UNet2DConditionModel(**config.unet)
        vae, texts = build_vae(TINY.vae_channels), build_text_encoders(config, tokenizer)
        if unet.config.in_channels == 4:
            controlnet = build_controlnet(unet, TINY)
            randomize_outputs(controlnet)
    scheduler = build_scheduler(**config.scheduler)
    save(folder, vae, texts[0], tokenizer, unet, controlnet, scheduler, *texts[1:])
    return Path(folder)


def build_text_encoders(config: Configuration, tokenizer: CLIPTokenizer) -> list[nn.Module]:
    """All text encoders of a version, of random weights; the second one also embeds the whole prompt."""
    classes = CLIPTextModel, CLIPTextModelWithProjection
    return [
        cls(configure_clip(tokenizer, **text))
        for cls, text in zip(classes, config.texts, strict=False)
    ]


def build_on_meta(version: str) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """UNet and VAE of a version in full, without weights."""
    with torch.device("meta"):
        vae = build_vae((128, 256, 512, 512), layers_per_block=2)
        return UNet2DConditionModel(**CONFIGURATIONS[version].unet), vae
