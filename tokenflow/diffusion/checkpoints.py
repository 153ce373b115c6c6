"""Checkpoints: from a hub id, a folder or a file to networks on a device, in a precision that suits it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    MultiControlNetModel,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import ConfigMixin
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tokenflow.diffusion.ddim import PREDICTION_TYPES, Schedule
from tokenflow.diffusion.layouts import as_json, layout_of
from tokenflow.diffusion.parts import find, load_config, load_weights, option_of
from tokenflow.diffusion.single_file import SingleFile, read_weights
from tokenflow.diffusion.stable_diffusion import SIZES_OF_XL, StableDiffusion
from tokenflow.errors import UserError
from util import fingerprint

CHANNELS = (4, 5)  # of the latents, and of those with a depth map
SMALLEST_SIDE = 512  # pixels; the depth version's configuration says less than it was trained on
GRAPHS = 64  # compiled from one function, at most
BYTE_TOKENS = 512  # CLIP's smallest vocabulary: each byte within a word and at its end


class PipelineIndex(ConfigMixin):
    """What a checkpoint says of its parts together, without importing diffusers' pipelines."""

    config_name = "model_index.json"


def check_checkpoint(
    model_id: str, height: int | None = None, width: int | None = None, version: str | None = None
) -> None:
    """Before weights are loaded, raise UserError for a checkpoint or frame size (pixels) that cannot work.

    version: see `SingleFile.find`.
    """
    where = configuration_of(model_id, version)
    unet = load_config(UNet2DConditionModel, where, "unet", "block_out_channels")
    try:
        layout_of(unet)
    except ValueError as error:
        raise UserError(f"{model_id}: {error}") from error
    if (channels := unet.get("in_channels")) not in CHANNELS:
        raise UserError(
            f"{model_id}: its UNet takes {channels} channels, not {' or '.join(map(str, CHANNELS))}; "
            "checkpoints for inpainting and upscaling cannot be used"
        )
    vae = load_config(AutoencoderKL, where, "vae", "block_out_channels")
    halvings = len(vae["block_out_channels"]) - 1 + len(unet["block_out_channels"]) - 1
    multiple = 2**halvings
    for name, size in {"H": height, "W": width}.items():
        if size is not None and size % multiple:
            nearest = max(multiple, round(size / multiple) * multiple)
            raise UserError(
                f"{name}: {size} is not a multiple of {multiple}; the nearest valid size is {nearest}"
            )


def trained_side(model_id: str, version: str | None = None) -> int:
    """The larger side of the frames that a checkpoint was trained on, in pixels: 512, 768 or 1024."""
    where = configuration_of(model_id, version)
    unet = load_config(UNet2DConditionModel, where, "unet", "block_out_channels")
    vae = load_config(AutoencoderKL, where, "vae", "block_out_channels")
    found = unet.get("sample_size") or 0
    sides = found if isinstance(found, list) else [found]
    if not all(isinstance(side, int) for side in sides):
        raise UserError(
            f"{model_id}: the sample_size of its UNet is {found}, no whole number; use --H and --W"
        )
    return max(SMALLEST_SIDE, *(side * 2 ** (len(vae["block_out_channels"]) - 1) for side in sides))


def checkpoint_identity(model_id: str, version: str | None = None) -> str:
    """What tells checkpoints apart: the fingerprint of a file or of a folder's UNet, or a hub id."""
    if file := SingleFile.find(model_id, version):
        return file.identity
    weights = sorted((Path(model_id) / "unet").glob("*.safetensors"))
    weights += sorted((Path(model_id) / "unet").glob("*.bin"))
    return fingerprint(weights[0]) if weights else model_id


def configuration_of(model_id: str, version: str | None) -> str:
    """The hub id or folder in diffusers layout that a checkpoint's configuration is in."""
    file = SingleFile.find(model_id, version)
    return file.configuration if file else model_id


def load_scheduler(model_id: str, version: str | None = None) -> DDIMScheduler:
    """The checkpoint's noise schedule with DDIM's steps."""
    config = load_config(DDIMScheduler, configuration_of(model_id, version), "scheduler")
    try:
        scheduler = DDIMScheduler.from_config(config)
        Schedule.of(scheduler, 1)  # checks most of the configuration
    except Exception as error:  # each wrong value raises its own
        raise UserError(f"model: {model_id}: its scheduler cannot be used: {error}") from error
    kind = scheduler.config.prediction_type
    if kind not in PREDICTION_TYPES:
        raise UserError(
            f"model: {model_id}: its scheduler's prediction_type is {kind}, "
            f"none of {', '.join(PREDICTION_TYPES)}"
        )
    return scheduler


def load(
    model_id: str,
    controlnet_ids: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    cpu_offload: bool = False,
    version: str | None = None,
    compiled: bool = False,
) -> StableDiffusion:
    """Load a checkpoint from a hub id, a folder in diffusers layout or a file, and ControlNets likewise.

    With `cpu_offload` only one of the VAE, the text encoders and the UNet is on the device at a time.
    compiled: whether the UNet is compiled, in its first passes. version: see `SingleFile.find`.
    """
    check_controlnets(controlnet_ids)
    file = SingleFile.find(model_id, version)
    where = file.configuration if file else model_id
    weights = read_weights(file.path) if file else None

    def network(cls: type, subfolder: str, dtype: torch.dtype = dtype) -> torch.nn.Module:
        if file:
            return _whole(file.network(weights, cls, subfolder, dtype), model_id, subfolder)
        return _whole(load_weights(cls, model_id, subfolder, dtype), model_id, subfolder)

    def tokenizer(subfolder: str) -> CLIPTokenizer:
        return find(CLIPTokenizer.from_pretrained, where, subfolder)

    unet, second = network(UNet2DConditionModel, "unet"), {}
    vae_config = load_config(AutoencoderKL, where, "vae", "block_out_channels")
    if _is_xl(unet.config):
        second = {
            "tokenizer_2": tokenizer("tokenizer_2"),
            "text_encoder_2": network(CLIPTextModelWithProjection, "text_encoder_2"),
            "zero_if_empty": _zero_if_empty(where),
        }
    sd = StableDiffusion(
        vae=network(AutoencoderKL, "vae", vae_dtype(unet.config, vae_config, dtype)),
        tokenizer=tokenizer("tokenizer"),
        text_encoder=network(CLIPTextModel, "text_encoder"),
        unet=unet,
        scheduler=load_scheduler(model_id, version),
        controlnet=None,
        device=device,
        dtype=dtype,
        **second,
    )
    _check_parts(sd, model_id)
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
        # What is compiled must notice hooks and processors that come and go (TokenFlow's), which torch does
        # not by default, and every width of a layer has a graph of its own.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.config.recompile_limit = GRAPHS
        sd.unet.compile()
    return with_controlnets(replace(sd, compiled=compiled), model_id, controlnet_ids)


def check_controlnets(controlnet_ids: Sequence[str]) -> None:
    """Before weights are loaded, raise UserError for a ControlNet that is not there."""
    for controlnet_id in controlnet_ids:
        load_config(ControlNetModel, controlnet_id, None, "block_out_channels")


def with_controlnets(
    sd: StableDiffusion, model_id: str, controlnet_ids: Sequence[str]
) -> StableDiffusion:
    """The checkpoint `model_id` with these ControlNets instead of those that it has."""
    nets = []
    for controlnet_id in controlnet_ids:
        loaded = load_weights(ControlNetModel, controlnet_id, None, sd.dtype)
        nets.append(_whole(loaded, controlnet_id, None))
        for key in ("cross_attention_dim", "block_out_channels", "in_channels"):
            if (found := as_json(loaded.config[key])) != as_json(sd.unet.config[key]):
                raise UserError(
                    f"controlnet: {controlnet_id} does not fit the model {model_id}: its {key} is "
                    f"{found}, not {as_json(sd.unet.config[key])}; name one of the same version"
                )
    return replace(sd, controlnet=MultiControlNetModel(nets).to(sd.device) if nets else None)


def _whole(network: torch.nn.Module, model_id: str, subfolder: str | None) -> torch.nn.Module:
    """The network, ready to run. Raises UserError if its weights lack some."""
    for name, parameter in network.named_parameters():
        if parameter.is_meta:
            raise UserError(
                f"{option_of(subfolder)}: {model_id} is no {type(network).__name__}: its weights lack {name}"
            )
    return network.eval()


def vae_dtype(unet: Mapping[str, Any], vae: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """The precision of the VAE beside networks in `dtype`, by the configurations of the UNet and the VAE."""
    # XL's VAE overflows in float16; its configuration says so, by diffusers' default.
    upcast = _is_xl(unet) and dtype == torch.float16 and vae.get("force_upcast", True)
    return torch.float32 if upcast else dtype


def _is_xl(unet: Mapping[str, Any]) -> bool:
    return unet.get("addition_embed_type") == "text_time"


def _zero_if_empty(where: str) -> bool:
    """Whether an empty prompt is embedded as zeros, which XL was trained with and diffusers assumes of it."""
    if Path(where).is_dir() and not (Path(where) / PipelineIndex.config_name).exists():
        return True
    index = find(PipelineIndex.load_config, where, "")
    return bool(index.get("force_zeros_for_empty_prompt", True))


def _check_parts(sd: StableDiffusion, model_id: str) -> None:
    """Raise UserError for parts that do not fit each other."""
    unet = sd.unet.config
    texts = [(sd.tokenizer, sd.text_encoder.config)]
    if sd.text_encoder_2:
        texts.append((sd.tokenizer_2, sd.text_encoder_2.config))
        pooled, takes = texts[1][1].projection_dim, sd.unet.add_embedding.linear_1.in_features
        if pooled + SIZES_OF_XL * unet.addition_time_embed_dim != takes:
            raise UserError(
                f"model: {model_id}: its second text encoder's embedding of {pooled} does not fit its UNet; "
                "they belong to different checkpoints"
            )
    width = sum(text.hidden_size for _, text in texts)
    if width != unet.cross_attention_dim:
        raise UserError(
            f"model: {model_id}: its text encoder's width is {width}, "
            f"but its UNet takes {unet.cross_attention_dim}; they belong to different checkpoints"
        )
    for tokenizer, text in texts:
        length = tokenizer.model_max_length
        if length > text.max_position_embeddings or len(tokenizer) > text.vocab_size:
            raise UserError(
                f"model: {model_id}: its tokenizer does not fit its text encoder: {len(tokenizer)} tokens "
                f"in texts of {length}, not {text.vocab_size} in {text.max_position_embeddings}"
            )
        if len(tokenizer) < BYTE_TOKENS:  # transformers does not report missing files
            raise UserError(
                f"model: {model_id}: its tokenizer knows no words; copy or download the checkpoint again"
            )


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and precision that the configuration's `device` and `dtype` stand for.

    auto takes half precision where it is faster and safe: on CUDA, and on CPUs with units for bfloat16.
    """
    # The same seed must give the same bytes, so cuDNN may not choose algorithms by timing them.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    if device == "auto":
        has_mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    chosen = torch.device(device)
    available = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }[chosen.type]
    # torch stores the index in one byte, so it would take cuda:256 for cuda:0.
    if int(device.partition(":")[2] or 0) >= available:
        raise UserError(f"device: {device} is unavailable on this machine; use auto or cpu")
    if dtype == "auto":
        return chosen, _natural_dtype(chosen)
    return chosen, getattr(torch, dtype)


def _natural_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.float16
    # A CPU without such units emulates bfloat16, slowly; no public function tells whether it has them.
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32
