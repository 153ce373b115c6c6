"""The VAE: the checkpoint's own, or another that the user names in its place."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers import AutoencoderKL

from tokenflow.diffusion.identity import identify
from tokenflow.diffusion.parts import load_config, load_network
from tokenflow.diffusion.single_file import SingleFile
from tokenflow.errors import UserError

# Of the latents of versions 1 and 2, which diffusers takes if a configuration has none.
SCALE = 0.18215


@dataclass(frozen=True)
class Vae:
    """What is known of a VAE before its weights are loaded.

    model_id, subfolder: where it is in diffusers layout. file: its weights, if they are in a single file.
    is_named: whether the user named it; else it is the checkpoint's own.
    """

    model_id: str
    subfolder: str | None
    config: Mapping[str, Any]
    file: SingleFile | None
    is_named: bool

    @classmethod
    def find(
        cls, model_id: str, configuration: str, file: SingleFile | None, named: str | None
    ) -> Self:
        """The VAE of a checkpoint, or the one that is `named`. Raises UserError if it cannot be used.

        model_id: of the checkpoint. configuration: the hub id or folder that describes it. file: its weights.
        """
        config = _load_config(configuration, "vae", "model")
        if named is None:
            _check(config, f"model: {model_id}: its VAE")
            return cls(model_id, "vae", config, file, is_named=False)
        if file := SingleFile.find_vae(named, configuration):
            _check(config, f"model: {model_id}: its VAE")
            return cls(configuration, "vae", config, file, is_named=True)
        own, config = config, _load_config(named, None, "vae")
        _check(config, f"vae: {named}")
        if config["scaling_factor"] != own["scaling_factor"]:
            raise UserError(
                f"vae: {named} scales its latents by {config['scaling_factor']}, but those of the checkpoint "
                f"are scaled by {own['scaling_factor']}; use a VAE for this version"
            )
        return cls(named, None, config, None, is_named=True)

    @property
    def identity(self) -> str:
        """What tells it from others: a digest of its files, or the hub's revision."""
        return self.file.identity if self.file else identify(self.model_id)

    @property
    def n_halvings(self) -> int:
        """How often it halves the sides of a frame."""
        return len(self.config["block_out_channels"]) - 1

    def load(self, dtype: torch.dtype, is_xl: bool) -> AutoencoderKL:
        """Load it, beside networks in `dtype`."""
        # XL's VAE overflows in float16; its configuration says so, by diffusers' default.
        if is_xl and dtype == torch.float16 and self.config.get("force_upcast", True):
            dtype = torch.float32
        if self.file:
            return self.file.load_network(AutoencoderKL, "vae", dtype)
        option = "vae" if self.is_named else "model"
        return load_network(AutoencoderKL, self.model_id, self.subfolder, dtype, option)


def _load_config(where: str, subfolder: str | None, option: str) -> dict[str, Any]:
    config = load_config(AutoencoderKL, where, subfolder, "block_out_channels", option=option)
    return {"scaling_factor": SCALE} | config


def _check(config: Mapping[str, Any], name: str) -> None:
    """Raise UserError for a VAE whose latents are scaled in another way than those of Stable Diffusion."""
    factor = config["scaling_factor"]
    if not (isinstance(factor, int | float) and 0 < factor < math.inf):
        reason = f"scaling_factor is {factor}, no positive number"
    elif config.get("latents_mean") or config.get("latents_std"):
        reason = "it has latents_mean or latents_std, which are not supported"
    elif (channels := config.get("latent_channels", 4)) != 4:
        reason = f"its latents have {channels} channels, not 4"
    else:
        return
    raise UserError(f"{name} cannot be used: {reason}; use another")
