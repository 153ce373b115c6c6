"""A UNet of exactly Stable Diffusion 1.5's configuration with random weights: for costs, not pictures."""

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from shapes.checkpoint import BOS, Size, build_scheduler, build_text_encoder, build_tokenizer
from tokenflow.diffusion.stable_diffusion import StableDiffusion

TEXT = Size((), (), (), text_width=768, text_layers=1, prompt_tokens=77, control_channels=())


def random_sd15(device: torch.device, dtype: torch.dtype, seed: int = 0) -> StableDiffusion:
    """Stable Diffusion 1.5 without an autoencoder, with a text encoder of one layer."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, attention_head_dim=8, cross_attention_dim=768)
    unet = filled(unet, device, dtype, seed)
    tokenizer = build_tokenizer([BOS], TEXT.prompt_tokens)
    text_encoder = build_text_encoder(tokenizer, TEXT).to(device, dtype).eval()
    scheduler = build_scheduler()
    return StableDiffusion(
        None, tokenizer, text_encoder, unet, scheduler, None, device=device, dtype=dtype
    )


def filled(
    network: nn.Module, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> nn.Module:
    """A network of the meta device with random weights; weights of one shape are equal, which saves time."""
    network = network.to(dtype).to_empty(device=device).eval()
    generator, drawn = torch.Generator(device).manual_seed(seed), {}
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2:
            parameter.data.fill_(float(name.endswith("weight")))
            continue
        if parameter.shape not in drawn:
            fan_in = parameter[0].numel()
            drawn[parameter.shape] = torch.empty_like(parameter.data)
            drawn[parameter.shape].normal_(0, fan_in**-0.5, generator=generator)
        parameter.data.copy_(drawn[parameter.shape])
    for name, buffer in network.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]))
    return network
