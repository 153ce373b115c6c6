"""LoRA: low-rank changes of the UNet and of the text encoders, which can be switched off.

Converting them (kohya's format to diffusers') and adding them is the work of diffusers and peft.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import FrozenDict
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import recurse_remove_peft_layers, set_weights_and_activate_adapters
from huggingface_hub import hf_hub_download, model_info
from safetensors.torch import load_file
from torch import nn

from tokenflow.diffusion.lycoris import is_plain, to_lora, unflatten
from tokenflow.diffusion.parts import find_folder, on_hub
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.errors import UserError, blame
from tokenflow.runtime.digests import digest_files

OTHER_FILES = ("scheduler", "optimizer", "checkpoint")  # in the names of what is no LoRA


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


def identify_lora(lora: str) -> str:
    """What tells LoRAs apart: a digest of the file."""
    return digest_files({"": find_lora(lora)})


def find_lora(lora: str) -> Path:
    """The file of a LoRA: itself, or that of a folder or of the hub's repository.

    Of several, diffusers would take whichever the disk lists first; here it is the first by name.
    Raises UserError if there is none.
    """
    if os.path.isfile(lora):
        return Path(lora)
    folder = find_folder(lora)
    if folder and (name := _choose(os.listdir(folder))):
        return folder / name
    if on_hub(lora) and (name := _choose(file.rfilename for file in model_info(lora).siblings)):
        return Path(hf_hub_download(lora, name))
    if os.path.isdir(lora):
        raise UserError(f"lora: {lora} holds no LoRA in a .safetensors file")
    raise UserError(
        f"lora: {lora} is neither a file nor a folder, and cannot be downloaded; check the path, or the id "
        "and the network"
    )


def _choose(names: Iterable[str]) -> str | None:
    """Which of the files in a repository is the LoRA, as diffusers sees it; None if none is."""
    files = sorted(
        name
        for name in names
        if name.endswith(".safetensors") and not any(part in name for part in OTHER_FILES)
    )
    named = [name for name in files if name.endswith(LORA_WEIGHT_NAME_SAFE)]
    return next(iter(named + files), None)


def _add(networks: Mapping[str, nn.Module], name: str, lora: str) -> None:
    """Add a LoRA to the `networks`, which its keys name, as the adapter `name`."""
    tensors, alphas, metadata = _read(lora, networks["unet"].config)
    options = {"network_alphas": alphas, "adapter_name": name, "metadata": metadata}
    by_part = {part: [k for k in tensors if k.startswith(f"{part}.")] for part in networks}
    with blame(f"lora: {lora} does not fit the model, and may be for another version"):
        tensors = unflatten(tensors, networks)
        for part in (part for part, keys in by_part.items() if keys):
            if part == "unet":
                networks[part].load_lora_adapter(tensors, prefix=part, **options)
            else:
                load = Loader.load_lora_into_text_encoder
                load(tensors, text_encoder=networks[part], prefix=part, **options)
    # Layers that a network does not have are left out in silence, so what was added is counted.
    parameters = (name for network in networks.values() for name, _ in network.named_parameters())
    n_missing = len(tensors) - sum(f".{name}." in parameter for parameter in parameters)
    if n_missing > 0:
        known = {key for keys in by_part.values() for key in keys}
        example = next((key for key in tensors if key not in known), next(iter(tensors)))
        raise UserError(
            f"lora: {lora} does not fit the model: of its {len(tensors)} tensors, such as {example}, "
            f"{n_missing} belong to none of its layers; use one for this version"
        )


def _read(
    lora: str, unet_config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any] | None]:
    """The tensors of a LoRA in diffusers' format, with their alphas and metadata, if there are any.

    unet_config: by which diffusers understands the original names of XL's layers.
    """
    options = {"use_safetensors": True, "return_lora_metadata": True, "local_files_only": True}
    path = find_lora(lora)
    with blame(f"lora: {path} is no LoRA in a .safetensors file"):
        tensors = load_file(path)
        # diffusers would leave these out in silence
        if any("dora_scale" in name for name in tensors):
            raise ValueError("it is a DoRA in kohya's format, which diffusers does not read")
        source = str(path) if is_plain(tensors) else to_lora(tensors)
        return Loader.lora_state_dict(source, unet_config=unet_config, **options)
