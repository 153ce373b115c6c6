"""A checkpoint of Stable Diffusion: found once, and loaded onto a device in a precision that suits it."""

import logging
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import cpu_offload_with_hook
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tokenflow.diffusion.controlnets import use_controlnets
from tokenflow.diffusion.ddim import PREDICTION_TYPES, Schedule
from tokenflow.diffusion.layouts import find_layout
from tokenflow.diffusion.parts import Repository
from tokenflow.diffusion.single_file import SingleFile
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.diffusion.vae import Vae
from tokenflow.errors import UserError, blame

log = logging.getLogger("tokenflow")

CHANNELS = (4, 5)  # of the latents, and of those with a depth map
SMALLEST_SIDE = 512  # pixels; the depth version's configuration says less than it was trained on
BETAS = {"beta_start", "beta_end", "beta_schedule", "trained_betas"}  # one of which DDPM needs
GRAPHS = 64  # compiled from one function, at most
# The files that are read of a folder.
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
PARTS += ("depth_estimator", "feature_extractor")  # of Stable Diffusion 2 depth
FILES = ("model_index.json", *(f"{part}/*" for part in PARTS))


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint before its weights are loaded.

    model_id: how the user names it: a hub id, a folder in diffusers layout, or a file.
    weights: where they are; their `configuration` describes its parts.
    scheduler: its noise schedule, with the steps of DDIM.
    """

    model_id: str
    weights: Repository | SingleFile
    unet_config: Mapping[str, Any]
    vae: Vae
    scheduler: DDIMScheduler

    @classmethod
    def find(cls, model_id: str, version: str | None = None, vae: str | None = None) -> Self:
        """The checkpoint that a hub id, a folder or a file names. Raises UserError if it cannot work.

        version: the sd_version, whose configuration is taken for a file that has none beside it.
        vae: a hub id, a folder or a file of the VAE that takes the place of its own.
        """
        weights = SingleFile.find(model_id, version) or Repository(model_id)
        where = weights.configuration
        unet = where.load_config(UNet2DConditionModel, "unet", "block_out_channels")
        find_layout(unet)  # refuses those whose layers are not known
        if (channels := unet.get("in_channels")) not in CHANNELS:
            raise UserError(
                f"model: {model_id}: its UNet takes {channels} channels, not 4, or 5 with depth; checkpoints "
                "for inpainting and upscaling cannot be used"
            )
        found = cls(
            model_id=model_id,
            weights=weights,
            unet_config=unet,
            vae=Vae.find(weights, named=vae),
            scheduler=_load_scheduler(where),
        )
        for part in ("text_encoder", "text_encoder_2") if found.is_xl else ("text_encoder",):
            config, _ = where.load(CLIPTextConfig.get_config_dict, part)
            where.check_config(config, part)
        return found

    @property
    def identity(self) -> str:
        """What tells checkpoints apart: digests of the files that are read, or the hub's revision."""
        digests = [self.weights.configuration.identify(FILES)]
        if isinstance(self.weights, SingleFile):
            digests.insert(0, self.weights.identify())
        if self.vae.is_named:
            digests.append(self.vae.weights.identify())
        return " ".join(digests)

    @property
    def is_xl(self) -> bool:
        """Whether it is a Stable Diffusion XL, which has two text encoders."""
        return self.unet_config.get("addition_embed_type") == "text_time"

    @property
    def trained_side(self) -> int:
        """The larger side of the frames that it was trained on, in pixels: 512, 768 or 1024."""
        size = self.unet_config.get("sample_size") or 0
        sides = size if isinstance(size, list) else [size]
        if not all(isinstance(side, int) for side in sides):
            raise UserError(
                f"model: {self.model_id}: the sample_size of its UNet is {size}, no number; use --H and --W"
            )
        return max(SMALLEST_SIDE, *(side * 2**self.vae.n_halvings for side in sides))

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError for a frame size in pixels that the networks cannot halve as often as they do."""
        for name, size in {"H": height, "W": width}.items():
            if size % self._size_multiple:
                raise UserError(
                    f"{name}: {size} is not a multiple of {self._size_multiple}; the nearest valid size is "
                    f"{self.nearest_size(size)}"
                )

    def nearest_size(self, size: float) -> int:
        """The height or width in pixels nearest to `size` that the networks take."""
        return max(1, round(size / self._size_multiple)) * self._size_multiple

    @property
    def _size_multiple(self) -> int:
        return 2 ** (self.vae.n_halvings + len(self.unet_config["block_out_channels"]) - 1)

    def load(
        self,
        device: torch.device,
        dtype: torch.dtype,
        controlnets: Sequence[str] = (),
        cpu_offload: bool = False,
        compiled: bool = False,
        clip_skip: int = 0,
    ) -> StableDiffusion:
        """Load its networks, and ControlNets from hub ids or folders.

        cpu_offload: only one of the VAE, the text encoders and the UNet is on the device at a time.
        compiled: the UNet is compiled, in its first passes. clip_skip: see `StableDiffusion`.
        """
        log.info("loading %s on %s in %s", self.model_id, device, dtype)
        where, load_network = self.weights.configuration, self.weights.load_network
        sd = StableDiffusion(
            vae=self.vae.load(dtype, self.is_xl),
            tokenizer=where.load(CLIPTokenizer.from_pretrained, "tokenizer"),
            text_encoder=load_network(CLIPTextModel, "text_encoder", dtype),
            unet=load_network(UNet2DConditionModel, "unet", dtype),
            scheduler=self.scheduler,
            controlnet=None,
            device=device,
            dtype=dtype,
            clip_skip=clip_skip,
            compiled=compiled,
        )
        if self.is_xl:
            second = load_network(CLIPTextModelWithProjection, "text_encoder_2", dtype)
            sd = replace(
                sd,
                tokenizer_2=where.load(CLIPTokenizer.from_pretrained, "tokenizer_2"),
                text_encoder_2=second,
                zero_if_empty=self._is_zero_if_empty(),
            )
        _check_parts(sd, self.model_id)
        networks = [part for part in (sd.vae, sd.text_encoder, sd.text_encoder_2, sd.unet) if part]
        if cpu_offload:
            hooks = [cpu_offload_with_hook(part, device)[1] for part in networks]
            # A run uses the networks in this order, again and again; each sends the one before it away.
            for hook, before in zip(hooks, hooks[-1:] + hooks[:-1], strict=True):
                hook.hook.prev_module_hook = before
        else:
            for part in networks:
                part.to(device)
        if compiled:
            # What is compiled must notice hooks and processors that come and go (TokenFlow's), which torch
            # does not by default, and every width of a layer has a graph of its own.
            torch._dynamo.config.skip_nnmodule_hook_guards = False
            torch._dynamo.config.recompile_limit = GRAPHS
            sd.unet.compile()
        return use_controlnets(sd, controlnets)

    def _is_zero_if_empty(self) -> bool:
        """Whether XL's empty prompt is embedded as zeros: it was trained so, and diffusers assumes it."""
        where = self.weights.configuration
        folder = Path(where.name)
        if folder.is_dir() and not (folder / DiffusionPipeline.config_name).exists():
            return True
        index = where.load(DiffusionPipeline.load_config, None)
        return bool(index.get("force_zeros_for_empty_prompt", True))


def _load_scheduler(where: Repository) -> DDIMScheduler:
    """The checkpoint's noise schedule, with the steps of DDIM. Raises UserError if it cannot be used."""
    config = where.load_config(DDIMScheduler, "scheduler")
    with blame(f"model: {where.name}: its scheduler cannot be used"):
        if not BETAS & set(config):
            raise ValueError(f"{config.get('_class_name')} has no betas, as DDPM has")
        scheduler = DDIMScheduler.from_config(config)
        Schedule.of(scheduler, 1)  # checks most of the configuration
        if (kind := scheduler.config.prediction_type) not in PREDICTION_TYPES:
            raise ValueError(
                f"its prediction_type is {kind}, none of {', '.join(PREDICTION_TYPES)}"
            )
    return scheduler


def _check_parts(sd: StableDiffusion, model_id: str) -> None:
    """Raise UserError for parts that do not fit each other."""
    unet, misfits = sd.unet.config, []
    texts = {sd.tokenizer: sd.text_encoder.config}
    if sd.text_encoder_2:
        texts[sd.tokenizer_2] = sd.text_encoder_2.config
        # Beside the embedding of the prompt, the UNet takes six sizes and places.
        pooled = sd.text_encoder_2.config.projection_dim + 6 * unet.addition_time_embed_dim
        if pooled != (takes := sd.unet.add_embedding.linear_1.in_features):
            misfits.append(f"a pooled embedding of {pooled}, but a UNet that takes {takes}")
    width = sum(text.hidden_size for text in texts.values())
    if width != (takes := unet.cross_attention_dim):
        misfits.append(f"text encoders of width {width}, but a UNet that takes {takes}")
    for tokenizer, text in texts.items():
        size = len(tokenizer), tokenizer.model_max_length
        if size[0] > text.vocab_size or size[1] > text.max_position_embeddings:
            takes = text.vocab_size, text.max_position_embeddings
            misfits.append(f"a tokenizer of size {size}, but a text encoder that takes {takes}")
        letters = tokenizer(string.ascii_letters, add_special_tokens=False).input_ids
        if set(letters) <= {tokenizer.unk_token_id}:  # transformers does not report missing files
            raise UserError(
                f"model: {model_id}: its tokenizer knows no words; copy or download the checkpoint again"
            )
    if misfits:
        raise UserError(f"model: {model_id}: its parts are of different checkpoints: {misfits[0]}")
