"""Checkpoints in a single file: the weights of all networks, in the layout of the original code.

Such a file holds weights and nothing else: no configuration, and no vocabulary. diffusers converts the
weights, but it takes the rest from a folder or from the hub; no package ships it. So the rest comes from a
folder in diffusers layout beside the file, or from the hub's repository of the version that the weights are
of, which is on disk once that version was used.
"""

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from diffusers.loaders.single_file_utils import (
    create_diffusers_clip_model_from_ldm,
    infer_diffusers_model_type,
)
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tokenflow.diffusion.parts import Repository, check_whole, find_folder, on_hub
from tokenflow.diffusion.versions import VERSIONS
from tokenflow.errors import UserError, describe, is_out_of_resources
from tokenflow.runtime.digests import digest_files

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
# How the names of a network's weights begin.
PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae.", "encoder."),  # the last one in a file of its own
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SingleFile:
    """A file of weights, and what describes them.

    weights: by name; they are read from disk when they are used. option: the one that named the file.
    """

    path: Path
    configuration: Repository
    weights: Weights
    option: str = "model"

    @classmethod
    def find(cls, model_id: str, version: str | None = None) -> Self | None:
        """The single file that `model_id` names; None if it names no file.

        version: of the versions that have the same weights' layout, the one whose configuration is taken if
        none lies beside the file. Raises UserError for a file that is missing, broken, or of another layout.
        """
        if (file := _read_file(model_id, "model")) is None:
            return None
        path, weights = file
        versions = _find_versions(path, weights)
        for folder in (path.with_suffix(""), path.parent):
            if (folder / "unet" / "config.json").is_file():
                return cls(path, Repository(str(folder)), weights)
        name = version if version in versions else versions[0]
        configuration = VERSIONS[name].model
        if not (find_folder(configuration) or on_hub(configuration)):
            raise UserError(
                f"model: {path} holds weights alone, and the configuration of version {name}, "
                f"{configuration}, is neither on disk nor can be downloaded; put a folder of it in "
                f"diffusers layout beside the file, named {path.stem}"
            )
        return cls(path, Repository(configuration), weights)

    @classmethod
    def find_vae(cls, vae: str, configuration: Repository) -> Self | None:
        """The file of a VAE for the checkpoint that `configuration` describes; None if `vae` is no file.

        Raises UserError for a file that is missing, broken, or holds no VAE.
        """
        if (file := _read_file(vae, "vae")) is None:
            return None
        path, weights = file
        if not any(name.startswith(PREFIXES["vae"]) for name in weights):
            raise UserError(f"vae: {path} holds no weights of a VAE")
        return cls(path, configuration, weights, option="vae")

    def identify(self) -> str:
        """What tells the file from others."""
        return digest_files({"": self.path})

    def load_network(self, cls: type, subfolder: str, dtype: torch.dtype) -> torch.nn.Module:
        """A network, ready to run. Raises UserError if the weights are not of its configuration."""
        described = self.configuration
        if not any(name.startswith(PREFIXES[subfolder]) for name in self.weights):
            beside = Path(described.name, subfolder)
            if any(beside.glob("*.safetensors")) or any(beside.glob("*.bin")):
                return described.load_network(cls, subfolder, dtype)
            raise UserError(
                f"{self.option}: {self.path} holds no weights of a {subfolder}; put a folder in diffusers "
                f"layout that has them beside the file, named {self.path.stem}"
            )
        is_text_encoder = issubclass(cls, PreTrainedModel)
        read_config = cls.config_class.from_pretrained if is_text_encoder else cls.load_config
        described.load(read_config, subfolder)  # from now on it is on disk
        where = {"config": described.name, "subfolder": subfolder, "local_files_only": True}
        try:
            if is_text_encoder:
                network = create_diffusers_clip_model_from_ldm(
                    cls, self.weights, torch_dtype=dtype, **where
                )
            else:
                network = cls.from_single_file(self.weights, torch_dtype=dtype, **where)
        except Exception as error:  # weights of another configuration fail in many ways
            if is_out_of_resources(error):
                raise
            is_part = isinstance(error, NotImplementedError)  # of moving what has no data
            reason = "some weights are missing" if is_part else describe(error)
            raise UserError(
                f"{self.option}: {self.path}: its {subfolder} is not of the configuration "
                f"{described.name}: {reason}"
            ) from error
        return check_whole(network, f"{self.option}: {self.path}")


def _read_file(name: str, option: str) -> tuple[Path, Weights] | None:
    """The path of a file, and its weights by name; None for the name of a folder or a hub id.

    Raises UserError.
    """
    path = Path(name)
    if path.suffix.lower() not in SUFFIXES:
        return None
    if not path.is_file():
        raise UserError(f"{option}: {path}: no such file")
    try:
        if path.suffix.lower() == ".safetensors":
            return path, load_file(path)
        is_mapped = zipfile.is_zipfile(path)
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
        weights = weights.get("state_dict", weights)
        return path, {key: value for key, value in weights.items() if torch.is_tensor(value)}
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{option}: {path} holds more than weights, and reading it could run any program; "
            "use a .safetensors file of the same checkpoint"
        ) from error
    except Exception as error:  # each format fails in its own way
        if is_out_of_resources(error):
            raise
        reason = describe(error)
        raise UserError(
            f"{option}: {path} is broken: {reason}; copy or download it again"
        ) from error


def _find_versions(path: Path, weights: Weights) -> list[str]:
    """The names of the versions that have weights of this layout. Raises UserError if there are none."""
    if FIRST_LAYER not in weights or weights[FIRST_LAYER].ndim != 4:
        raise UserError(
            f"model: {path} is no checkpoint of Stable Diffusion: it lacks a convolution {FIRST_LAYER} "
            "(a LoRA or a part of a checkpoint cannot stand for the whole)"
        )
    layout, channels = infer_diffusers_model_type(weights), weights[FIRST_LAYER].shape[1]
    names = [n for n, v in VERSIONS.items() if (v.layout, v.channels) == (layout, channels)]
    if not names:
        raise UserError(
            f"model: {path} has the layout {layout} with {channels} channels, which is that of none of "
            f"{', '.join(VERSIONS)}"
        )
    return names
