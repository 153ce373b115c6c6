"""A UNet of exactly Stable Diffusion 1.5's configuration with random weights: for costs, not pictures."""

import torch
from diffusers import UNet2DConditionModel

from shapes.checkpoint import BOS, Size, build_scheduler, build_text_encoder, build_tokenizer
from tokenflow.diffusion.stable_diffusion import StableDiffusion

TEXT = Size((), (), (), text_width=768, text_layers=1, prompt_tokens=77, control_channels=())


def random_sd15(device: torch.device, dtype: torch.dtype, seed: int = 0) -> StableDiffusion:
    """Stable Diffusion 1.5 without an autoencoder, with a text encoder of one layer."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, attention_head_dim=8, cross_attention_dim=768)
    unet = unet.to(dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.data.normal_(0, fan_in**-0.5, generator=generator)
        else:
            parameter.data.fill_(float(name.endswith("weight")))
    tokenizer = build_tokenizer([BOS], TEXT.prompt_tokens)
    text_encoder = build_text_encoder(tokenizer, TEXT).to(device, dtype).eval()
    scheduler = build_scheduler()
    return StableDiffusion(
        None, tokenizer, text_encoder, unet, scheduler, None, device=device, dtype=dtype
    )
