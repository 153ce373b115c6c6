"""Build miniature Stable Diffusion checkpoints: SD's own structure at a fraction of its size.

Nothing that loads one can tell it from a real checkpoint but by its numbers: four UNet levels of
SD's block types with two layers a block, a KL autoencoder of scale factor 8, a CLIP text encoder
with a byte-level CLIP tokenizer, SD's DDIM schedule, and a Canny ControlNet in the sub-folder
`controlnet`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

BOS, EOS, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
SPECIAL = ("bos", "eos", "pad")
WORDS = ["a", "red", "blue", "circle"]  # of the captions that tests use


@dataclass(frozen=True)
class Size:
    """Widths of one miniature checkpoint; everything that is not here is Stable Diffusion's."""

    vae_channels: tuple[int, int, int, int]
    unet_channels: tuple[int, int, int, int]
    unet_heads: tuple[int, int, int, int]
    text_width: int
    text_layers: int
    prompt_tokens: int
    control_channels: tuple[int, int, int, int]


# For tests: as small as SD's 32 normalisation groups allow, with random weights.
TINY = Size((8, 16, 16, 16), (32, 32, 64, 64), (2, 2, 4, 4), 32, 2, 77, (4, 8, 8, 16))
# For the demo and the quality benchmark: what two CPU cores can train.
SHAPES = Size((16, 32, 64, 64), (64, 128, 192, 192), (2, 4, 6, 6), 128, 3, 32, (8, 16, 32, 64))


def build_tokenizer(words: list[str], prompt_tokens: int) -> CLIPTokenizer:
    """CLIP tokenizer with one token for each of `words`; other text falls back to its bytes."""
    symbols = sorted(ByteLevel.alphabet())
    vocab = symbols + [symbol + WORD_END for symbol in symbols]
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            ending = WORD_END if end == len(word) else ""
            merge = (word[: end - 1], word[end - 1] + ending)
            if merge not in merges:
                merges.append(merge)
            if "".join(merge) not in vocab:
                vocab.append("".join(merge))
    vocab += [BOS, EOS]
    ids = {token: index for index, token in enumerate(vocab)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=prompt_tokens)


def size_clip(width: int, layers: int, heads: int, activation: str = "quick_gelu") -> dict:
    """Keys of the configuration of a CLIP text encoder."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
        "projection_dim": width,
    }


def configure_clip(tokenizer: CLIPTokenizer, **keys) -> CLIPTextConfig:
    """The configuration of a CLIP text encoder with those `keys`, for `tokenizer`'s vocabulary."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    length = tokenizer.model_max_length
    return CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=length, **special, **keys
    )


def build_text_encoder(tokenizer: CLIPTokenizer, size: Size) -> CLIPTextModel:
    """CLIP text encoder with random weights."""
    keys = size_clip(size.text_width, size.text_layers, max(2, size.text_width // 32))
    return CLIPTextModel(configure_clip(tokenizer, **keys))


def build_vae(channels: tuple[int, int, int, int], layers_per_block: int = 1) -> AutoencoderKL:
    """KL autoencoder of scale factor 8 with random weights."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=layers_per_block,
        norm_num_groups=channels[0] // 4,
        latent_channels=4,
    )


def build_unet(size: Size) -> UNet2DConditionModel:
    """Denoising UNet of Stable Diffusion's layout with random weights."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=size.unet_channels,
        attention_head_dim=size.unet_heads,
        cross_attention_dim=size.text_width,
    )


def build_controlnet(unet: UNet2DConditionModel, size: Size) -> ControlNetModel:
    """ControlNet on `unet`'s encoder: its weights are copied, its outputs start at zero."""
    channels = size.control_channels
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)


def randomize_outputs(controlnet: ControlNetModel) -> None:
    """Give weights to a ControlNet's layers that start at zero."""
    for layer in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
        torch.nn.init.normal_(layer.weight, std=0.1)
    torch.nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.1)


def build_scheduler(**keys) -> DDIMScheduler:
    """Stable Diffusion's DDIM schedule; `keys`: what a version has otherwise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **keys,
    )


def save(
    folder: Path,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    controlnet: ControlNetModel | None = None,
    scheduler: DDIMScheduler | None = None,
    text_encoder_2: CLIPTextModelWithProjection | None = None,
) -> None:
    """Write a diffusers folder, with a ControlNet in `controlnet/`. Two text encoders make it XL's."""
    parts = {"vae": vae, "unet": unet, "scheduler": scheduler or build_scheduler()}
    parts |= {"text_encoder": text_encoder, "tokenizer": tokenizer}
    if text_encoder_2:
        parts |= {"text_encoder_2": text_encoder_2, "tokenizer_2": tokenizer}
        pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None}
        pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    if controlnet:
        controlnet.save_pretrained(Path(folder) / "controlnet")


def build_random(folder: Path, size: Size = TINY) -> Path:
    """Write a checkpoint of random weights, also in the ControlNet's outputs; returns `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = build_tokenizer(WORDS, size.prompt_tokens)
        unet = build_unet(size)
        controlnet = build_controlnet(unet, size)
        randomize_outputs(controlnet)
        text_encoder = build_text_encoder(tokenizer, size)
        save(folder, build_vae(size.vae_channels), text_encoder, tokenizer, unet, controlnet)
    return Path(folder)
