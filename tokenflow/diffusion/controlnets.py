"""ControlNets: from hub ids or folders to networks that fit the checkpoint's."""

from collections.abc import Sequence
from dataclasses import replace

from diffusers import ControlNetModel, MultiControlNetModel

from tokenflow.diffusion.layouts import as_json
from tokenflow.diffusion.parts import Repository
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.errors import UserError

SHARED_KEYS = ("cross_attention_dim", "block_out_channels", "in_channels")  # with the UNet


def check_controlnets(controlnets: Sequence[str]) -> None:
    """Before weights are loaded, raise UserError for a ControlNet that is not there."""
    for name in controlnets:
        repository = Repository(name, "controlnet")
        repository.load_config(ControlNetModel, None, "block_out_channels")


def use_controlnets(sd: StableDiffusion, controlnets: Sequence[str]) -> StableDiffusion:
    """`sd` with these ControlNets, hub ids or folders, instead of those that it has.

    Raises UserError for one that cannot be read or is for another version.
    """
    networks = [
        Repository(name, "controlnet").load_network(ControlNetModel, None, sd.dtype)
        for name in controlnets
    ]
    for name, network in zip(controlnets, networks, strict=True):
        for key in SHARED_KEYS:
            value, expected = as_json(network.config[key]), as_json(sd.unet.config[key])
            if value != expected:
                raise UserError(
                    f"controlnet: {name} does not fit the model: its {key} is {value}, not {expected}; name "
                    "one for the same version"
                )
    joined = MultiControlNetModel(networks).to(sd.device) if networks else None
    return replace(sd, controlnet=joined)
