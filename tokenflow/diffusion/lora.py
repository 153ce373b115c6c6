"""LoRA: low-rank changes of the UNet and of the text encoders, which can be switched off.

Reading, converting (kohya's format to diffusers') and adding them is the work of diffusers and peft.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import FrozenDict
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import recurse_remove_peft_layers, set_weights_and_activate_adapters
from torch import nn

from tokenflow.diffusion.parts import on_hub
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.errors import UserError
from util import fingerprint


def use_loras(
    sd: StableDiffusion, loras: Sequence[str], scales: Sequence[float]
) -> StableDiffusion:
    """`sd` with LoRAs, each a file, a folder or a hub id, times its scale; `sd.original()` is without.

    They take the place of those that its networks have.
    Raises UserError for one that cannot be read or does not fit the networks.
    """
    networks = {"unet": sd.unet, "text_encoder": sd.text_encoder}
    networks |= {"text_encoder_2": sd.text_encoder_2} if sd.text_encoder_2 else {}
    for network in networks.values():
        if getattr(network, "peft_config", None):
            recurse_remove_peft_layers(network)
            del network.peft_config
            network._hf_peft_config_loaded = False
    names = [f"lora_{index}" for index in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        _add(networks, name, lora)
    adapted = tuple(n for n in networks.values() if getattr(n, "peft_config", None))
    for network in adapted:
        set_weights_and_activate_adapters(network.to(sd.dtype), names, list(scales))
    return replace(sd, adapted=adapted)


def check_loras(loras: Sequence[str], unet_config: Mapping[str, Any]) -> None:
    """Before weights are loaded, raise UserError for a LoRA that cannot be read for a UNet of this kind."""
    for lora in loras:
        _read(lora, FrozenDict(unet_config))


def lora_identity(lora: str) -> str:
    """What tells LoRAs apart: the fingerprint of the first file, or a hub id."""
    path = Path(lora)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return fingerprint(files[0]) if files and files[0].is_file() else lora


def _add(networks: Mapping[str, nn.Module], name: str, lora: str) -> None:
    """Add a LoRA to the `networks`, which its keys name, as the adapter `name`."""
    tensors, alphas, metadata = _read(lora, networks["unet"].config)
    options = {"network_alphas": alphas, "adapter_name": name, "metadata": metadata}
    of = {part: [key for key in tensors if key.startswith(f"{part}.")] for part in networks}
    try:
        for part, network in networks.items():
            if not of[part]:
                continue
            if part == "unet":
                network.load_lora_adapter(tensors, prefix=part, **options)
            else:
                Loader.load_lora_into_text_encoder(
                    tensors, text_encoder=network, prefix=part, **options
                )
    except Exception as error:  # peft and torch each report a misfit in their own way
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"lora: {lora} does not fit the model, and may be for another version: {reason}"
        ) from error
    # Layers that a network does not have are left out in silence, so what was added is counted.
    added = sum(
        f".{name}." in parameter
        for network in networks.values()
        for parameter, _ in network.named_parameters()
    )
    if added < len(tensors):
        known = {key for keys in of.values() for key in keys}
        example = next((key for key in tensors if key not in known), next(iter(tensors)))
        raise UserError(
            f"lora: {lora} does not fit the model: of its {len(tensors)} tensors, such as {example}, "
            f"{len(tensors) - added} belong to none of its layers; use one for this version"
        )


def _read(
    lora: str, unet: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any] | None]:
    """The tensors of a LoRA in diffusers' format, with their alphas and metadata, if there are any.

    unet: the UNet's configuration, by which diffusers understands the original names of XL's layers.
    """
    exists = Path(lora).exists()
    # A hub id in the cache needs the file's name; it is almost always this.
    attempts = [
        {"local_files_only": True, "weight_name": None if exists else LORA_WEIGHT_NAME_SAFE}
    ]
    attempts += [{}] if not exists and on_hub(lora) else []
    for where in attempts:
        try:
            options = {"use_safetensors": True, "return_lora_metadata": True, "unet_config": unet}
            return Loader.lora_state_dict(lora, **options, **where)
        except Exception as error:  # each way to fail has its own
            failure = error
    if exists:
        reason = str(failure).strip().partition("\n")[0]
        raise UserError(f"lora: {lora} is no LoRA in a .safetensors file: {reason}") from failure
    raise UserError(
        f"lora: {lora} is neither a file nor a folder, and cannot be downloaded; check the path, or the id "
        "and the network"
    ) from failure
