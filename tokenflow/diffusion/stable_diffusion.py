"""The networks of Stable Diffusion: text encoder, VAE, and the UNet's noise prediction."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, MultiControlNetModel, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tokenflow.diffusion.ddim import check_finite
from tokenflow.diffusion.prompts import (
    find_cut_words,
    find_other_syntax,
    split_weights,
    weights_of_tokens,
)
from tokenflow.errors import UserError
from tokenflow.runtime.batching import Batches, Limits
from tokenflow.runtime.transfer import to_device

# Of several frames in one pass of the VAE, which works at full resolution and needs the most memory. A GPU
# takes two thirds of the time for a frame of 512 x 512 if four pass together (H100).
VAE_PIXELS, VAE_PIXELS_ON_CUDA = 1 << 16, 1 << 20

CUT = "warning: the prompt is longer than %d tokens; this end of it is cut off: %r"
OTHER_SYNTAX = (
    "warning: %r in the prompt is read as words, though not by web interfaces; a weight is written "
    "(words:1.3), LoRAs and textual inversions are options"
)

log = logging.getLogger("tokenflow")


@dataclass(frozen=True)
class Text:
    """What the UNet is told of n prompts: embeddings of their tokens (n, l, d).

    pooled: one more embedding of each whole prompt (n, p) in Stable Diffusion XL, else None.
    """

    tokens: torch.Tensor
    pooled: torch.Tensor | None = None

    def expand(self, n: int) -> "Text":
        """One prompt for n frames."""
        pooled = None if self.pooled is None else self.pooled.expand(n, -1)
        return Text(self.tokens.expand(n, -1, -1), pooled)

    @classmethod
    def cat(cls, texts: Sequence["Text"]) -> "Text":
        """Concatenate the prompts of several batches."""
        pooled = None if texts[0].pooled is None else torch.cat([text.pooled for text in texts])
        return cls(torch.cat([text.tokens for text in texts]), pooled)


@dataclass(frozen=True)
class Control:
    """What m ControlNets are given: control images (m, n, 3, H, W) in [0, 1] and scales (m, n)."""

    images: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, images: torch.Tensor, scales: Sequence[float]) -> "Control":
        """Control images (m, n, 3, H, W) with one scale for each ControlNet."""
        return cls(images, torch.tensor(scales)[:, None].repeat(1, images.shape[1]))

    @classmethod
    def cat(cls, controls: Sequence["Control"]) -> "Control":
        """Concatenate what is given in several batches."""
        images = torch.cat([control.images for control in controls], dim=1)
        return cls(images, torch.cat([control.scales for control in controls], dim=1))


@dataclass(frozen=True)
class StableDiffusion:
    """The networks of one checkpoint on one device, its noise schedule, and how much fits at once.

    tokenizer_2, text_encoder_2: Stable Diffusion XL's others. zero_if_empty: whether its embeddings of an
    empty prompt are zeros, which is how it was trained to denoise without a prompt.
    clip_skip: layers that are left out at the end of the text encoders. adapted: networks that LoRAs change.
    compiled: whether the UNet is. words: what words of prompts stand for (`use_embeddings`).
    limits: of the samples and frames that fit in memory at once.
    """

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler
    controlnet: MultiControlNetModel | None
    device: torch.device
    dtype: torch.dtype
    tokenizer_2: CLIPTokenizer | None = None
    text_encoder_2: CLIPTextModelWithProjection | None = None
    zero_if_empty: bool = False
    clip_skip: int = 0
    adapted: tuple[torch.nn.Module, ...] = ()
    compiled: bool = False
    words: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        encoders = [part for part in (self.text_encoder, self.text_encoder_2) if part]
        layers = min(encoder.config.num_hidden_layers for encoder in encoders)
        most = layers - len(encoders)  # XL takes the last layer but one even so
        if self.clip_skip > most:
            raise UserError(
                f"clip_skip: {self.clip_skip}, but the text encoder has {layers} layers in all; "
                f"use at most {most}"
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

    @property
    def plans_by_shape(self) -> bool:
        """Whether each shape of a pass that was not seen before costs time to plan."""
        return self.compiled or self.device.type == "cuda"

    @property
    def takes_depth(self) -> bool:
        """Whether the UNet takes the depth of each frame beside its latents."""
        return self.unet.config.in_channels > self.vae.config.latent_channels

    @torch.no_grad()
    def encode_text(self, prompt: str) -> Text:
        """What the UNet is told of a prompt, cut or padded to the tokenizer's length; n is 1.

        The tokens of `(words:1.3)` go further from those of the empty prompt, as in ComfyUI; the pooled
        embedding is of the words alone. What is cut, or is only read by others, is logged.
        """
        plain = prompt
        for word, tokens in self.words.items():
            prompt, plain = prompt.replace(word, tokens), plain.replace(word, word.strip("<>"))
        words, weights = split_weights(prompt)
        if cut := find_cut_words(self.tokenizer, words):
            length = self.tokenizer.model_max_length
            log.warning(CUT, length, cut)
        if other := find_other_syntax(split_weights(plain)[0]):
            log.warning(OTHER_SYNTAX, other)
        text = self._encode(words)
        if not prompt and self.zero_if_empty:
            return Text(torch.zeros_like(text.tokens), torch.zeros_like(text.pooled))
        if not weights:
            return text
        factors = weights_of_tokens(self.tokenizer, words, weights)[:, None].to(text.tokens)
        return replace(text, tokens=torch.lerp(self._encode("").tokens, text.tokens, factors))

    def _encode(self, words: str) -> Text:
        """What `encode_prompt` of diffusers' pipelines gives, which transformers 5 breaks for clip_skip."""
        first = self._run_encoder(self.tokenizer, self.text_encoder, words)
        if self.text_encoder_2 is None:
            if not self.clip_skip:
                return Text(first.last_hidden_state)
            # The layer norm that follows the last layer follows an earlier one.
            last_layer = first.hidden_states[-(self.clip_skip + 1)]
            return Text(self.text_encoder.final_layer_norm(last_layer))
        # XL takes the last layer but one of both encoders (Podell et al., arXiv 2307.01952, section 2.1).
        second = self._run_encoder(self.tokenizer_2, self.text_encoder_2, words)
        layer = -(self.clip_skip + 2)
        tokens = torch.cat([first.hidden_states[layer], second.hidden_states[layer]], dim=-1)
        return Text(tokens, second.text_embeds)

    def _run_encoder(
        self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, words: str
    ) -> Any:
        length = tokenizer.model_max_length
        tokens = tokenizer(
            words, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return text_encoder(tokens.input_ids.to(self.device), output_hidden_states=True)

    @torch.no_grad()
    def encode_frames(self, frames: np.ndarray) -> torch.Tensor:
        """Latents (n, 4, h, w), fp32 on the CPU, of uint8 RGB frames (n, H, W, 3): posterior means."""

        def encode(batch: torch.Tensor) -> torch.Tensor:
            images = self.to_images(batch.numpy()).to(self.vae.dtype)
            posterior = self.vae.encode(2 * images - 1).latent_dist
            return posterior.mean.float().cpu() * self.vae.config.scaling_factor

        batches = self._vae_batches("encoding", math.prod(frames.shape[1:3]))
        return batches.map(encode, torch.from_numpy(frames))

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> np.ndarray:
        """Uint8 RGB frames (n, H, W, 3) of latents (n, 4, h, w)."""

        def decode(batch: torch.Tensor) -> torch.Tensor:
            images = self.vae.decode(to_device(batch, self.device, self.vae.dtype)).sample.float()
            check_finite(images, "the VAE's decoded frames")
            return (images / 2 + 0.5).clamp(0, 1).mul(255).round().byte().cpu()

        pixels = math.prod(latents.shape[2:]) * self._pixels_of_latent**2
        batches = self._vae_batches("decoding", pixels)
        frames = batches.map(decode, latents / self.vae.config.scaling_factor)
        return frames.permute(0, 2, 3, 1).numpy()

    def _vae_batches(self, kind: str, pixels: int) -> Batches:
        """Batches of frames of so many pixels."""
        most = VAE_PIXELS_ON_CUDA if self.device.type == "cuda" else VAE_PIXELS
        return Batches(max(1, most // pixels), limits=self.limits, kind=kind)

    def latent_shape(self, n_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape (N, 4, h, w) of the latents of N frames of that size in pixels."""
        factor = self._pixels_of_latent
        return n_frames, self.vae.config.latent_channels, height // factor, width // factor

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
        text: Text,
        control: Control | None = None,
        depth: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The noise (n, 4, h, w) that the UNet predicts in `latents` (n, 4, h, w); fp32 on their device.

        Where a zero-terminal-SNR schedule ends in pure noise, the latents are the noise: there the velocity
        is given instead, the negative of the clean latents, as `ddim_step` expects it.
        text: of n prompts. control: of the ControlNets, whose residuals are added in the UNet.
        depth: (n, 1, h, w) in [-1, 1], if `takes_depth`.
        """
        model_input = latents if depth is None else torch.cat([latents, depth.to(latents)], dim=1)
        model_input = to_device(model_input, self.device, self.dtype)
        # Created on the device, while a number would be copied there.
        timestep = torch.full((), t, device=self.device)
        told: dict[str, Any] = {"encoder_hidden_states": text.tokens}
        if text.pooled is not None:  # XL is told as well that the frames are uncropped
            size = [self._pixels_of_latent * n for n in latents.shape[2:]]
            ids = to_device(torch.tensor([*size, 0, 0, *size]), self.device, self.dtype)
            sizes = {"text_embeds": text.pooled, "time_ids": ids.expand(len(latents), -1)}
            told["added_cond_kwargs"] = sizes
        residuals = {}
        if control is not None:
            scales = to_device(control.scales, self.device, self.dtype)[..., None, None, None]
            down, mid = self.controlnet(
                model_input,
                timestep,
                controlnet_cond=control.images,
                conditioning_scale=scales,
                **told,
                return_dict=False,
            )
            residuals["down_block_additional_residuals"] = down
            residuals["mid_block_additional_residual"] = mid
        output = self.unet(model_input, timestep, **told, **residuals).sample
        output = output.float().to(latents.device)
        alpha = self.scheduler.alphas_cumprod[t].item()
        if self.scheduler.config.prediction_type == "v_prediction" and alpha > 0:
            return math.sqrt(alpha) * output + math.sqrt(1 - alpha) * latents
        return output
