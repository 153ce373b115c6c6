"""The networks of Stable Diffusion: text encoder, VAE, and the UNet's noise prediction."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, MultiControlNetModel, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from tokenflow.diffusion.control import Control
from tokenflow.diffusion.ddim import check_finite
from tokenflow.errors import UserError
from tokenflow.runtime.transfer import to_device

# Of several frames in one pass of the VAE, which works at full resolution and needs the most memory.
VAE_PIXELS = 1 << 16

log = logging.getLogger("tokenflow")


@dataclass(frozen=True)
class StableDiffusion:
    """The networks of one checkpoint on one device, and its noise schedule."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler
    controlnet: MultiControlNetModel | None
    device: torch.device
    dtype: torch.dtype
    clip_skip: int = 0  # layers of the text encoder that are left out at its end
    adapted: tuple[torch.nn.Module, ...] = ()  # networks that LoRAs change

    def __post_init__(self) -> None:
        layers = self.text_encoder.config.num_hidden_layers
        if self.clip_skip >= layers:
            raise UserError(
                f"clip_skip: {self.clip_skip}, but the text encoder has {layers} layers in all; "
                f"use at most {layers - 1}"
            )

    @contextmanager
    def original(self) -> Iterator[None]:
        """The networks without LoRAs while the block lasts, as the source was inverted."""
        for network in self.adapted:
            network.disable_adapters()
        try:
            yield
        finally:
            for network in self.adapted:
                network.enable_adapters()

    @torch.no_grad()
    def encode_text(self, prompt: str) -> torch.Tensor:
        """Embedding (1, l, d) of a prompt, cut or padded to the tokenizer's length.

        A prompt that is cut is logged, with the words that are lost.
        """
        length = self.tokenizer.model_max_length
        if cut := words_cut(self.tokenizer, prompt):
            log.warning(
                "warning: the prompt is longer than %d tokens; this end of it is cut off: %r",
                length,
                cut,
            )
        tokens = self.tokenizer(
            prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        encoded = self.text_encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
        if not self.clip_skip:
            return encoded.last_hidden_state
        # As diffusers skips layers: the layer norm that follows the last layer follows an earlier one.
        skipped_to = encoded.hidden_states[-(self.clip_skip + 1)]
        return self.text_encoder.final_layer_norm(skipped_to)

    @torch.no_grad()
    def encode_frames(self, frames: np.ndarray) -> torch.Tensor:
        """Latents (n, 4, h, w), fp32 on the CPU, of uint8 RGB frames (n, H, W, 3): posterior means."""
        latents = []
        height, width = frames.shape[1:3]
        for start in range(0, len(frames), size := vae_batch_size(height, width)):
            images = self.to_images(frames[start : start + size])
            posterior = self.vae.encode(2 * images - 1).latent_dist
            latents.append(posterior.mean.float().cpu() * self.vae.config.scaling_factor)
        return torch.cat(latents)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> np.ndarray:
        """Uint8 RGB frames (n, H, W, 3) of latents (n, 4, h, w)."""
        frames = []
        size = vae_batch_size(*(self._pixels_of_latent * n for n in latents.shape[2:]))
        for batch in (latents / self.vae.config.scaling_factor).split(size):
            images = self.vae.decode(to_device(batch, self.device, self.dtype)).sample.float()
            check_finite(images, "the VAE's decoded frames")
            frames.append((images / 2 + 0.5).clamp(0, 1).mul(255).round().byte().cpu())
        return torch.cat(frames).permute(0, 2, 3, 1).numpy()

    def latent_shape(self, n_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape (N, 4, h, w) of the latents of N frames of that size in pixels."""
        factor = self._pixels_of_latent
        return n_frames, self.vae.config.latent_channels, height // factor, width // factor

    @property
    def takes_depth(self) -> bool:
        """Whether the UNet takes the depth of each frame beside its latents."""
        return self.unet.config.in_channels > self.vae.config.latent_channels

    @property
    def _pixels_of_latent(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def to_images(self, frames: np.ndarray) -> torch.Tensor:
        """Uint8 frames (..., H, W, 3) as images (..., 3, H, W) in [0, 1], as the networks take them."""
        images = torch.from_numpy(frames).movedim(-1, -3)
        return to_device(images, self.device).to(self.dtype) / 255

    @torch.no_grad()
    def predict_noise(
        self,
        latents: torch.Tensor,
        t: int,
        text: torch.Tensor,
        control: Control | None = None,
        depth: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The noise (n, 4, h, w) that the UNet predicts in `latents` (n, 4, h, w); fp32 on their device.

        text: (n, l, d). control: condition of the ControlNets, whose residuals are added in the UNet.
        depth: (n, 1, h, w) in [-1, 1], if `takes_depth`.
        """
        model_input = latents if depth is None else torch.cat([latents, depth.to(latents)], dim=1)
        model_input = to_device(model_input, self.device, self.dtype)
        # Created on the device, while a number would be copied there.
        timestep = torch.full((), t, device=self.device)
        residuals = (
            {} if control is None else self._control_residuals(model_input, timestep, text, control)
        )
        output = self.unet(model_input, timestep, encoder_hidden_states=text, **residuals).sample
        output = output.float().to(latents.device)
        if self.scheduler.config.prediction_type == "v_prediction":
            alpha = self.scheduler.alphas_cumprod[t].item()
            return math.sqrt(alpha) * output + math.sqrt(1 - alpha) * latents
        return output

    def _control_residuals(
        self,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        control: Control,
    ) -> dict[str, Any]:
        scales = to_device(control.scales, self.device, self.dtype)[..., None, None, None]
        down, mid = self.controlnet(
            model_input,
            timestep,
            encoder_hidden_states=text,
            controlnet_cond=control.images,
            conditioning_scale=scales,
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def words_cut(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """The end of a prompt that is beyond the tokenizer's length; empty if all of it fits."""
    spans = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    kept = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    return prompt[spans[kept][0] :] if len(spans) > kept else ""


def vae_batch_size(height: int, width: int) -> int:
    """How many frames of that size (in pixels) pass the VAE at once."""
    return max(1, VAE_PIXELS // (height * width))
