"""Checkpoints of Stable Diffusion's real sizes with random weights: for costs, not pictures."""

from pathlib import Path

import torch
from torch import nn

from shapes.checkpoint import TINY, build_random, build_scheduler, build_tokenizer, save
from shapes.versions import CONFIGURATIONS, build_on_meta, build_text_encoders

TINY_VERSION = "tiny"  # the tests' checkpoint
VERSIONS = [TINY_VERSION, *(name for name in CONFIGURATIONS if name != "depth")]
QUIET = 0.02  # of the noise that a UNet of random weights predicts


def save_random(folder: Path, version: str, device: torch.device, dtype: torch.dtype) -> Path:
    """Write a checkpoint of one of `VERSIONS` in diffusers layout; returns its folder.

    The UNet predicts little noise, so that the fixed-point inversion needs one evaluation a step, as it
    mostly does with a trained one.
    """
    if version == TINY_VERSION:
        return build_random(folder)
    config, tokenizer = CONFIGURATIONS[version], build_tokenizer(["a"], TINY.prompt_tokens)
    unet, vae = build_on_meta(version)
    with torch.device("meta"):
        texts = build_text_encoders(config, tokenizer)
    vae, unet, *texts = (fill(network, device, dtype) for network in (vae, unet, *texts))
    unet.conv_out.weight.data *= QUIET
    scheduler = build_scheduler(**config.scheduler)
    save(folder, vae, texts[0], tokenizer, unet, None, scheduler, *texts[1:])
    return folder


def fill(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A network of the meta device with random weights; weights of one shape are equal, which saves time."""
    network = network.to(dtype).to_empty(device=device).eval()
    generator, drawn = torch.Generator(device).manual_seed(0), {}
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
