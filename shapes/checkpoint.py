"""Build miniature Stable Diffusion checkpoints: SD's own structure at a fraction of its size.

Nothing that loads one can tell it from a real checkpoint but by its numbers: four UNet levels of
SD's block types with two layers a block, a KL autoencoder of scale factor 8, a CLIP text encoder
with a byte-level CLIP tokenizer, SD's DDIM schedule, and a Canny ControlNet in the sub-folder
`controlnet`.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

BOS, EOS, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


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


def build_text_encoder(tokenizer: CLIPTokenizer, size: Size) -> CLIPTextModel:
    """CLIP text encoder with random weights for `tokenizer`'s vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.text_width,
            intermediate_size=4 * size.text_width,
            num_hidden_layers=size.text_layers,
            num_attention_heads=max(2, size.text_width // 32),
            max_position_embeddings=size.prompt_tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_vae(size: Size) -> AutoencoderKL:
    """KL autoencoder of scale factor 8 with random weights."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=size.vae_channels,
        layers_per_block=1,
        norm_num_groups=size.vae_channels[0] // 4,
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
    return ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=size.control_channels
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's DDIM schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_pipeline(vae, text_encoder, tokenizer, unet) -> StableDiffusionPipeline:
    """The networks as diffusers runs them, without a safety checker."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save(folder: Path, vae, text_encoder, tokenizer, unet, controlnet) -> None:
    """Write a diffusers folder for `from_pretrained`, with the ControlNet in `controlnet/`."""
    build_pipeline(vae, text_encoder, tokenizer, unet).save_pretrained(folder)
    controlnet.save_pretrained(Path(folder) / "controlnet")


def build_random(folder: Path, size: Size = TINY, seed: int = 0) -> Path:
    """Write a checkpoint of random weights, also in the ControlNet's outputs; returns `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(["a", "red", "blue", "circle"], size.prompt_tokens)
        unet = build_unet(size)
        controlnet = build_controlnet(unet, size)
        for layer in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
            torch.nn.init.normal_(layer.weight, std=0.1)
        torch.nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.1)
        text_encoder = build_text_encoder(tokenizer, size)
        save(folder, build_vae(size), text_encoder, tokenizer, unet, controlnet)
    return Path(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a tiny checkpoint of random weights.")
    parser.add_argument("folder", type=Path)
    build_random(parser.parse_args().folder)
