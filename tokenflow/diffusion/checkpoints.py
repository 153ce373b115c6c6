"""Checkpoints: from a hub id or a folder to networks on a device, in a precision that suits it."""

import functools
import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import cpu_offload_with_hook
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import constants, model_info, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tokenflow.diffusion.ddim import Schedule
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.errors import UserError
from util import fingerprint

HUB_TIMEOUT = 10  # seconds

# Stable Diffusion's UNet, as far as TokenFlow and its injections depend on its layers.
SD_LAYOUT = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}

PREDICTION_TYPES = ("epsilon", "v_prediction")
BYTE_TOKENS = 512  # CLIP's smallest vocabulary: each byte within a word and at its end

# diffusers passes a retired argument to the hub, which does not concern the user.
warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks.*")
# Files are looked for in two places; `_find` reports those that are missing in both.
diffusers.utils.logging.set_verbosity(logging.CRITICAL)
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def check_checkpoint(model_id: str, height: int | None = None, width: int | None = None) -> None:
    """Before weights are loaded, raise UserError for a checkpoint or frame size (pixels) that cannot work."""
    unet = _load_config(UNet2DConditionModel, model_id, "unet", "block_out_channels")
    for key, expected in SD_LAYOUT.items():
        found = _plain(unet.get(key))
        if found != expected:
            raise UserError(
                f"{model_id}: its UNet is not of Stable Diffusion 1 or 2's layout: "
                f"{key} is {found}, not {expected}"
            )
    vae = _load_config(AutoencoderKL, model_id, "vae", "block_out_channels")
    halvings = len(vae["block_out_channels"]) - 1 + len(unet["block_out_channels"]) - 1
    multiple = 2**halvings
    for name, size in {"H": height, "W": width}.items():
        if size is not None and size % multiple:
            nearest = max(multiple, round(size / multiple) * multiple)
            raise UserError(
                f"{name}: {size} is not a multiple of {multiple}; the nearest valid size is {nearest}"
            )


def _plain(value: Any) -> Any:
    """A value of a configuration as JSON stores it."""
    return list(value) if isinstance(value, tuple) else value


def checkpoint_identity(model_id: str) -> str:
    """What tells checkpoints apart: the fingerprint of a folder's UNet, or a hub id."""
    weights = sorted((Path(model_id) / "unet").glob("*.safetensors"))
    weights += sorted((Path(model_id) / "unet").glob("*.bin"))
    return fingerprint(weights[0]) if weights else model_id


def load_scheduler(model_id: str) -> DDIMScheduler:
    """The checkpoint's noise schedule with DDIM's steps."""
    config = _load_config(DDIMScheduler, model_id, "scheduler")
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
    controlnet_id: str | None,
    device: torch.device,
    dtype: torch.dtype,
    cpu_offload: bool = False,
    compiled: bool = False,
) -> StableDiffusion:
    """Load a checkpoint, and a ControlNet, from a hub id or a folder in diffusers layout.

    With `cpu_offload` only one of the VAE, the text encoder and the UNet is on the device at a time. If it is
    `compiled`, the UNet's first passes take long.
    """
    if controlnet_id:
        _load_config(ControlNetModel, controlnet_id, None, "block_out_channels")

    def network(cls: type, model: str, subfolder: str | None, dtype_key: str) -> torch.nn.Module:
        loaded = _load_weights(cls, model, subfolder, dtype, dtype_key).eval()
        for name, weights in loaded.named_parameters():
            if weights.is_meta:
                raise UserError(
                    f"{_option(subfolder)}: {model} is no {cls.__name__}: its weights lack {name}"
                )
        return loaded

    sd = StableDiffusion(
        vae=network(AutoencoderKL, model_id, "vae", "torch_dtype"),
        tokenizer=_find(CLIPTokenizer.from_pretrained, model_id, "tokenizer"),
        text_encoder=network(CLIPTextModel, model_id, "text_encoder", "dtype"),
        unet=network(UNet2DConditionModel, model_id, "unet", "torch_dtype"),
        scheduler=load_scheduler(model_id),
        controlnet=network(ControlNetModel, controlnet_id, None, "torch_dtype").to(device)
        if controlnet_id
        else None,
        device=device,
        dtype=dtype,
    )
    _check_parts(sd, model_id, controlnet_id)
    networks = sd.vae, sd.text_encoder, sd.unet
    if cpu_offload:
        hooks = [cpu_offload_with_hook(part, device)[1] for part in networks]
        # A run uses the networks in this order, again and again; each sends the one before it away.
        for hook, before in zip(hooks, hooks[-1:] + hooks[:-1], strict=True):
            hook.hook.prev_module_hook = before
    else:
        for part in networks:
            part.to(device)
    if compiled:
        sd.unet.compile()
    return replace(sd, compiled=compiled)


def _check_parts(sd: StableDiffusion, model_id: str, controlnet_id: str | None) -> None:
    """Raise UserError for parts that do not fit each other, such as a ControlNet of another version."""
    unet, text = sd.unet.config, sd.text_encoder.config
    if text.hidden_size != unet.cross_attention_dim:
        raise UserError(
            f"model: {model_id}: its text encoder's width is {text.hidden_size}, "
            f"but its UNet takes {unet.cross_attention_dim}; they belong to different checkpoints"
        )
    length = sd.tokenizer.model_max_length
    if length > text.max_position_embeddings or len(sd.tokenizer) > text.vocab_size:
        raise UserError(
            f"model: {model_id}: its tokenizer does not fit its text encoder: {len(sd.tokenizer)} tokens "
            f"in texts of {length}, not {text.vocab_size} in {text.max_position_embeddings}"
        )
    if len(sd.tokenizer) < BYTE_TOKENS:  # transformers does not report missing files
        raise UserError(
            f"model: {model_id}: its tokenizer knows no words; copy or download the checkpoint again"
        )
    for key in ("cross_attention_dim", "block_out_channels", "in_channels"):
        if sd.controlnet and (found := _plain(sd.controlnet.config[key])) != _plain(unet[key]):
            raise UserError(
                f"controlnet: {controlnet_id} does not fit the model {model_id}: its {key} is "
                f"{found}, not {_plain(unet[key])}; name one of the same version"
            )


def networks_on_meta(model_id: str, controlnet_id: str | None) -> list[torch.nn.Module]:
    """UNet, VAE, text encoder and, if there is one, ControlNet of a checkpoint, without their weights."""
    text = _find(CLIPTextConfig.from_pretrained, model_id, "text_encoder")
    parts = [(UNet2DConditionModel, model_id, "unet"), (AutoencoderKL, model_id, "vae")]
    parts += [(ControlNetModel, controlnet_id, None)] if controlnet_id else []
    with torch.device("meta"):
        unet, vae, *control = (cls.from_config(_load_config(cls, *part)) for cls, *part in parts)
        return [unet, vae, CLIPTextModel(text), *control]


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


def _load_config(cls: type, model_id: str, subfolder: str | None, *lists: str) -> dict[str, Any]:
    """The configuration of a checkpoint's part, in which the keys `lists` must hold lists."""
    config = _find(cls.load_config, model_id, subfolder)
    if not (isinstance(config, dict) and all(isinstance(config.get(key), list) for key in lists)):
        raise UserError(
            f"{_option(subfolder)}: {model_id}: the configuration of its {subfolder or 'network'} is "
            "broken; copy or download it again"
        )
    return config


def _load_weights(
    cls: type, model_id: str, subfolder: str | None, dtype: torch.dtype, dtype_key: str
) -> torch.nn.Module:
    """A network from the variant nearest to `dtype`; not every repository has both variants."""
    half = dtype != torch.float32
    variants = [{"variant": variant} for variant in (("fp16", None) if half else (None, "fp16"))]
    return _find(cls.from_pretrained, model_id, subfolder, variants, **{dtype_key: dtype})


def _find(
    get: Callable[..., Any],
    model_id: str,
    subfolder: str | None,
    variants: Sequence[dict[str, Any]] = ({},),
    **options: Any,
) -> Any:
    """Call `get` on a checkpoint's part: first on what is on disk, then, if that fails, on the hub."""
    for local_only in (True, False):
        if not local_only and not _on_hub(model_id):
            break
        for variant in variants:
            where = {"subfolder": subfolder or "", "local_files_only": local_only}
            try:
                return get(model_id, **where, **variant, **options)
            except MemoryError:
                raise
            except Exception as error:  # each loader reports a missing file in its own way
                failure = error
    option = _option(subfolder)
    _refuse_broken(option, _local_folder(model_id, subfolder or ""), failure)
    part = f" (its {subfolder})" if subfolder else ""
    if os.path.isdir(model_id):
        raise UserError(f"{option}: the folder {model_id} holds no such checkpoint{part}")
    raise UserError(
        f"{option}: {model_id}{part} is neither a folder nor in {constants.HF_HUB_CACHE}, and cannot be "
        f"downloaded; check the id and the network, or give --{option} a folder in diffusers layout"
    )


def _option(subfolder: str | None) -> str:
    """The option that names a part's checkpoint: only a ControlNet is not in a subfolder."""
    return "controlnet" if subfolder is None else "model"


def _local_folder(model_id: str, subfolder: str) -> Path:
    """The folder that holds a checkpoint's part, or would hold it."""
    if os.path.isdir(model_id):
        return Path(model_id) / subfolder
    for name in ("config.json", "scheduler_config.json", "tokenizer_config.json"):
        with suppress(HFValidationError):  # not a valid name of a model
            cached = try_to_load_from_cache(model_id, f"{subfolder}/{name}".lstrip("/"))
            if isinstance(cached, str):
                return Path(cached).parent
    return Path(constants.HF_HUB_CACHE) / model_id / subfolder


def _refuse_broken(option: str, folder: Path, failure: Exception) -> None:
    """Raise UserError if `folder` holds a part of a checkpoint that cannot be read."""
    if not os.path.isdir(folder):  # unlike Path.is_dir, takes a name that is too long
        return
    files = sorted(path for path in folder.glob("*") if path.is_file())
    for path in files:
        if reason := _broken(path):
            raise UserError(
                f"{option}: {path} is broken: {reason}; copy or download the checkpoint again"
            ) from failure
    if any(path.suffix in (".safetensors", ".bin") for path in files):
        reason = str(failure).strip().partition("\n")[0]
        raise UserError(f"{option}: {folder} cannot be loaded: {reason}") from failure


def _broken(path: Path) -> str:
    """Why a file of a checkpoint cannot be read; empty if it can."""
    try:
        if path.stat().st_size == 0:
            return "it is empty"
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix == ".bin":
            torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # each format fails in its own way
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""


@functools.cache
def _on_hub(model_id: str) -> bool:
    """Whether the hub can be reached and has the model; asked once, without the loaders' retries."""
    if os.path.isdir(model_id):
        return False
    try:
        model_info(model_id, timeout=HUB_TIMEOUT)
    except Exception:  # each HTTP client reports a missing network in its own way
        return False
    return True
