"""What the edits of a sweep have in common, so that it is made once."""

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from tokenflow.config import ControlNetConfig, EditConfig
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.controlnets import use_controlnets
from tokenflow.diffusion.embeddings import use_embeddings
from tokenflow.diffusion.lora import use_loras
from tokenflow.diffusion.stable_diffusion import StableDiffusion

T = TypeVar("T")


class Shared:
    """Things that an edit makes when it first needs them, and that the next one uses if it needs the same."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Hashable, Any]] = {}

    def get(self, name: str, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, or returned for the same `key` when something of that name was last made.

        key: all that decides what it is, and is not the same for all edits of a sweep.
        """
        if name not in self._made or self._made[name][0] != key:
            self._made.pop(name, None)  # before the next one takes memory
            self._made[name] = key, make()
        return self._made[name][1]

    def load(
        self, checkpoint: Checkpoint, config: EditConfig, device: torch.device, dtype: torch.dtype
    ) -> StableDiffusion:
        """The networks of the checkpoint, with the textual inversions, ControlNets and LoRAs of an edit."""

        def load() -> StableDiffusion:
            sd = checkpoint.load(
                device,
                dtype,
                cpu_offload=config.cpu_offload,
                compiled=config.compile,
                clip_skip=config.clip_skip,
            )
            return use_embeddings(sd, config.embeddings)

        sd = self.get("networks", None, load)
        controlnets = config.controlnet_ids if isinstance(config, ControlNetConfig) else ()
        controlled = self.get("ControlNets", controlnets, lambda: use_controlnets(sd, controlnets))
        # Not all that it returns is shared, since the ControlNets of one edit would outlive it.
        adapted = self.get(
            "LoRAs",
            (config.lora, config.lora_scales),
            lambda: use_loras(sd, config.lora, config.lora_scales).adapted,
        )
        return replace(controlled, adapted=adapted)
