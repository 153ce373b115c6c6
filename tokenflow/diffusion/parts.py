"""A checkpoint's parts: configurations and networks, from a folder in diffusers layout or from the hub."""

import functools
import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
import transformers
from huggingface_hub import constants, model_info, snapshot_download
from safetensors import safe_open

from tokenflow.errors import UserError, blame, describe, is_out_of_resources
from tokenflow.runtime.digests import digest_files

SUFFIXES = (".json", ".txt", ".safetensors", ".bin")  # of the files that identify a repository
HUB_TIMEOUT = 10  # seconds
MOST_LAYERS = 200  # of a network, or of a part of it; with more it would be built for hours

# diffusers passes a retired argument to the hub, which does not concern the user.
warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks.*")
# Files are looked for in two places; `Repository.load` reports those that are missing in both.
diffusers.utils.logging.set_verbosity(logging.CRITICAL)
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class Repository:
    """A folder in the layout of diffusers or transformers, or a hub id.

    option: the one that names it. A part is in a subfolder, or, for None, in the repository itself.
    """

    name: str
    option: str = "model"

    @property
    def configuration(self) -> Self:
        """What describes its parts, as for a `SingleFile`."""
        return self

    def identify(self, patterns: Sequence[str] = ("*",)) -> str:
        """What tells it from others, wherever it lies: a digest of its files, or the hub's revision.

        patterns: of the names of files that are read; configurations, vocabularies and weights count.
        """
        if not os.path.isdir(self.name):
            snapshot = find_folder(self.name)
            return snapshot.name if snapshot else self.name
        folder, files = Path(self.name), {}
        for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
            is_unused = path.suffix == ".bin" and any(path.parent.glob("*.safetensors"))
            if path.suffix in SUFFIXES and path.is_file() and not is_unused:
                files[path.relative_to(folder).as_posix()] = path
        return digest_files(files)

    def load_config(self, cls: type, subfolder: str | None, *lists: str) -> dict[str, Any]:
        """The configuration of a part, in which the keys `lists` must hold lists."""
        return self.check_config(self.load(cls.load_config, subfolder), subfolder, *lists)

    def check_config(self, config: Any, subfolder: str | None, *lists: str) -> dict[str, Any]:
        """A configuration. Raises UserError if it is broken, or asks for an impossible number of layers."""
        config = config if isinstance(config, dict) else {}
        wrong = [key for key in lists if not isinstance(config.get(key), list)]
        for key in (key for key in config if "layers" in key):
            counts = config[key] if isinstance(config[key], list) else [config[key]]
            if not all(0 <= n <= MOST_LAYERS for n in counts if isinstance(n, int)):
                wrong.append(key)
        if wrong or not config:
            reason = f"{wrong[0]} is {config.get(wrong[0])}" if wrong else "it is empty"
            raise UserError(
                f"{self.option}: {self.name}: the configuration of its {subfolder or 'network'} is "
                f"broken: {reason}; copy or download it again"
            )
        return config

    def load_network(self, cls: type, subfolder: str | None, dtype: torch.dtype) -> torch.nn.Module:
        """A network, ready to run, from the variant nearest to `dtype`; not every repository has both."""
        variants = (None, "fp16") if dtype == torch.float32 else ("fp16", None)
        key = "dtype" if issubclass(cls, transformers.PreTrainedModel) else "torch_dtype"
        options = [{key: dtype, "variant": variant} for variant in variants]
        network = self.load(cls.from_pretrained, subfolder, *options)
        return check_whole(network, f"{self.option}: {self.name}")

    def load(self, get: Callable[..., Any], subfolder: str | None, *attempts: dict) -> Any:
        """Call `get` on a part: first on what is on disk, then, if that fails, on the hub.

        attempts: options of `get`, of which the first that work are taken. Raises UserError, which names a
        broken file.
        """
        name, option = self.name, self.option
        for is_local in (True, False):
            if not is_local and not on_hub(name):
                break
            where = {"subfolder": subfolder or "", "local_files_only": is_local}
            for options in attempts or [{}]:
                part, failure = _attempt(get, name, **where, **options)
                if failure is None:
                    return part
        if "trust_remote_code" in str(failure):
            raise UserError(
                f"{option}: {name} needs code of its own, which is never run; use one that is a model of "
                "transformers"
            )
        if folder := find_folder(name):
            _refuse_broken(option, folder / (subfolder or ""), failure)
        part = f" (its {subfolder})" if subfolder else ""
        if os.path.isdir(name):
            raise UserError(f"{option}: the folder {name} holds no such checkpoint{part}")
        raise UserError(
            f"{option}: {name}{part} is neither a folder nor in {constants.HF_HUB_CACHE}, and cannot be "
            f"downloaded; check the id and the network, or give --{option} a folder in diffusers layout"
        )


def check_whole(network: torch.nn.Module, origin: str) -> torch.nn.Module:
    """The network, ready to run. Raises UserError if its weights, of that origin, lack some."""
    for name, parameter in network.named_parameters():
        if parameter.is_meta:
            raise UserError(f"{origin} is no {type(network).__name__}: its weights lack {name}")
    return network.eval()


def _attempt(
    get: Callable[..., Any], model_id: str, **options: Any
) -> tuple[Any, Exception | None]:
    """What `get` returns, and the error that it raises instead.

    Whoever stores an error in the call that caught it keeps that call's frame alive, and with it the
    callers' networks, until the garbage collector finds the circle.
    """
    try:
        return get(model_id, **options), None
    except Exception as error:  # each loader reports a missing file in its own way
        if is_out_of_resources(error):
            raise
        return None, error


def find_folder(model_id: str) -> Path | None:
    """The folder of a checkpoint on disk: itself, or what the hub's cache holds of it, if it holds any."""
    if os.path.isdir(model_id):  # unlike Path.is_dir, takes a name that is too long
        return Path(model_id)
    try:
        return Path(snapshot_download(model_id, local_files_only=True))
    except (ValueError, OSError) as error:  # not a valid id, or nothing is there
        if is_out_of_resources(error):
            raise
        return None


def _refuse_broken(option: str, folder: Path, failure: Exception) -> None:
    """Raise UserError if `folder` holds a part of a checkpoint that cannot be read."""
    files = sorted(path for path in folder.glob("*") if path.is_file())
    for path in files:
        with blame(f"{option}: {path} is broken", remedy="copy or download the checkpoint again"):
            _check_file(path)
    if any(path.suffix in (".safetensors", ".bin") for path in files):
        raise UserError(f"{option}: {folder} cannot be loaded: {describe(failure)}") from failure


def _check_file(path: Path) -> None:
    """Read a file of a checkpoint as far as shows whether it can be read. Raises what its format raises."""
    if path.stat().st_size == 0:
        raise ValueError("it is empty")
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt"):
            pass
    elif path.suffix == ".bin":
        torch.load(path, map_location="meta", weights_only=True)


@functools.cache
def on_hub(model_id: str) -> bool:
    """Whether the hub can be reached and has the model; asked once, without the loaders' retries."""
    if os.path.isdir(model_id):
        return False
    try:
        model_info(model_id, timeout=HUB_TIMEOUT)
    except Exception as error:  # each HTTP client reports a missing network in its own way
        if is_out_of_resources(error):
            raise
        return False
    return True
