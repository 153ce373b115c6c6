"""The VAE: the checkpoint's own, or another that the user names in its place."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers import AutoencoderKL

from tokenflow.diffusion.parts import Repository
from tokenflow.diffusion.single_file import SingleFile
from tokenflow.errors import UserError

# Of the latents of versions 1 and 2, which diffusers takes if a configuration has none.
SCALE = 0.18215


@dataclass(frozen=True)
class Vae:
    """What is known of a VAE before its weights are loaded.

    weights, subfolder: where it is. config: its configuration.
    """

    weights: Repository | SingleFile
    subfolder: str | None
    config: Mapping[str, Any]

    @classmethod
    def find(cls, weights: Repository | SingleFile, named: str | None) -> Self:
        """The VAE of a checkpoint with these weights, or the one that is `named`.

        Raises UserError if it cannot be used.
        """
        described = weights.configuration
        own = _load_config(described, "vae")
        file = SingleFile.find_vae(named, described) if named else None
        if file or named is None:
            _check(own, f"model: {described.name}: its VAE")
            return cls(file or weights, "vae", own)
        repository = Repository(named, option="vae")
        config = _load_config(repository, None)
        _check(config, f"vae: {named}")
        if config["scaling_factor"] != own["scaling_factor"]:
            raise UserError(
                f"vae: {named} scales its latents by {config['scaling_factor']}, but those of the checkpoint "
                f"are scaled by {own['scaling_factor']}; use a VAE for this version"
            )
        return cls(repository, None, config)

    @property
    def is_named(self) -> bool:
        """Whether the user named it; else it is the checkpoint's own."""
        return self.weights.option == "vae"

    @property
    def n_halvings(self) -> int:
        """How often it halves the sides of a frame."""
        return len(self.config["block_out_channels"]) - 1

    def load(self, dtype: torch.dtype, is_xl: bool) -> AutoencoderKL:
        """Load it, beside networks in `dtype`."""
        # XL's VAE overflows in float16; its configuration says so, by diffusers' default.
        if is_xl and dtype == torch.float16 and self.config.get("force_upcast", True):
            dtype = torch.float32
        return self.weights.load_network(AutoencoderKL, self.subfolder, dtype)


def _load_config(where: Repository, subfolder: str | None) -> dict[str, Any]:
    config = where.load_config(AutoencoderKL, subfolder, "block_out_channels")
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
