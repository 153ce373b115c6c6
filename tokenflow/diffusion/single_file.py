"""Checkpoints in a single file: the weights of all networks, in the layout of the original code.

Such a file holds weights and nothing else: no configuration, and no vocabulary. diffusers converts the
weights, but it takes the rest from a folder or from the hub; no package ships it. So the rest comes from a
folder in diffusers layout beside the file, or from the hub's repository of the version that the weights are
of, which is on disk once that version was used.
"""

import hashlib
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

from tokenflow.diffusion.parts import check_whole, find_folder, load_part, on_hub
from tokenflow.diffusion.versions import VERSIONS
from tokenflow.errors import UserError, describe

SUFFIXES = (".safetensors", ".ckpt")
# How the names of a network's weights begin.
PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"
SAMPLES, SAMPLE_BYTES = 64, 1 << 14  # of a file, which tell it apart

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SingleFile:
    """A file of weights, and the folder or hub id in diffusers layout that describes them.

    weights: by name; they are read from disk when they are used.
    """

    path: Path
    configuration: str
    weights: Weights

    @classmethod
    def find(cls, model_id: str, version: str | None = None) -> Self | None:
        """The single file that `model_id` names; None if it names no file.

        version: of the versions that have the same weights' layout, the one whose configuration is taken if
        none lies beside the file. Raises UserError for a file that is missing, broken, or of another layout.
        """
        path = Path(model_id)
        if path.suffix not in SUFFIXES:
            return None
        if not path.is_file():
            raise UserError(f"model: {path}: no such file")
        weights = _read_weights(path)
        versions = _find_versions(path, weights)
        for folder in (path.with_suffix(""), path.parent):
            if (folder / "unet" / "config.json").is_file():
                return cls(path, str(folder), weights)
        name = version if version in versions else versions[0]
        configuration = VERSIONS[name].model
        if not (find_folder(configuration) or on_hub(configuration)):
            raise UserError(
                f"model: {path} holds weights alone, and the configuration of version {name}, "
                f"{configuration}, is neither on disk nor can be downloaded; put a folder of it in "
                f"diffusers layout beside the file, named {path.stem}"
            )
        return cls(path, configuration, weights)

    @property
    def identity(self) -> str:
        """What tells files apart, and how they are understood, without reading them whole."""
        digest, size = hashlib.blake2b(digest_size=8), self.path.stat().st_size
        digest.update(str(size).encode())
        with self.path.open("rb") as file:  # fine-tunes may differ in some layers alone
            for sample in range(SAMPLES):
                file.seek(size * sample // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
        is_beside = Path(self.configuration).is_dir()
        return digest.hexdigest() + ("" if is_beside else f" as {self.configuration}")

    def load_network(self, cls: type, subfolder: str, dtype: torch.dtype) -> torch.nn.Module:
        """A network, ready to run. Raises UserError if the weights are not of its configuration."""
        if not any(name.startswith(PREFIXES[subfolder]) for name in self.weights):
            raise UserError(f"model: {self.path} holds no weights of a {subfolder}")
        is_text_encoder = issubclass(cls, PreTrainedModel)
        read_config = cls.config_class.from_pretrained if is_text_encoder else cls.load_config
        load_part(read_config, self.configuration, subfolder)  # from now on it is on disk
        where = {"config": self.configuration, "subfolder": subfolder, "local_files_only": True}
        try:
            if is_text_encoder:
                network = create_diffusers_clip_model_from_ldm(
                    cls, self.weights, torch_dtype=dtype, **where
                )
            else:
                network = cls.from_single_file(self.weights, torch_dtype=dtype, **where)
        except MemoryError:
            raise
        except Exception as error:  # weights of another configuration fail in many ways
            is_part = isinstance(error, NotImplementedError)  # of moving what has no data
            reason = "some weights are missing" if is_part else describe(error)
            raise UserError(
                f"model: {self.path}: its {subfolder} is not of the configuration "
                f"{self.configuration}: {reason}"
            ) from error
        return check_whole(network, str(self.path), subfolder)


def _read_weights(path: Path) -> Weights:
    """The weights in a file, by name. Raises UserError."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        is_mapped = zipfile.is_zipfile(path)
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
        while "state_dict" in weights:
            weights = weights["state_dict"]
        return weights
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"model: {path} holds more than weights, and reading it could run any program; "
            "use a .safetensors file of the same checkpoint"
        ) from error
    except Exception as error:  # each format fails in its own way
        reason = describe(error)
        raise UserError(f"model: {path} is broken: {reason}; copy or download it again") from error


def _find_versions(path: Path, weights: Weights) -> list[str]:
    """The names of the versions that have weights of this layout. Raises UserError if there are none."""
    if FIRST_LAYER not in weights:
        raise UserError(
            f"model: {path} is no checkpoint of Stable Diffusion: it lacks {FIRST_LAYER} "
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
