"""The layouts of UNets that TokenFlow knows, and where Plug-and-Play injects into each.

Plug-and-Play (Tumanyan et al., arXiv 2211.12572) injects into Stable Diffusion 1 and 2 the queries and keys
of all self-attentions of the decoder except the first (the paper's layers 4-11), and the output of one
residual block of the decoder (its layer 4).

Stable Diffusion XL has three resolutions instead of four, and no attention at the first. What is injected
there follows Ctrl-X (Lin et al., arXiv 2406.07540; `ctrl_x/utils/sdxl.py` of github.com/genforce/ctrl-x),
whose authors evaluated it on XL: the queries and keys of all self-attentions at the decoder's lowest
resolution, and the features of its first residual block, which Ctrl-X takes after the shortcut and this
code before it, as Plug-and-Play does. No weights of XL were at hand, so the choice has not been measured
here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import UNet2DConditionModel

from tokenflow.errors import UserError

LEVEL = re.compile(r"(down|up)_blocks\.(\d)|mid_block")


@dataclass(frozen=True)
class Layout:
    """What TokenFlow depends on in a UNet.

    required: the keys of diffusers' configuration that make a UNet one of this layout, and their values.
    injected_attention: matches the names of the self-attentions that Plug-and-Play injects into.
    injected_resnet: the indices of the decoder's block and of its residual block likewise.
    """

    name: str
    required: Mapping[str, Any]
    injected_attention: re.Pattern
    injected_resnet: tuple[int, int]

    def find_mismatch(self, config: Mapping[str, Any]) -> str:
        """In which key a UNet's configuration is not of this layout; empty if it is."""
        for key, expected in self.required.items():
            if (value := as_json(config.get(key))) != expected:
                return f"{key} is {value}, not {expected}"
        return ""


LAYOUTS = (
    Layout(
        "Stable Diffusion 1 or 2",
        {
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            "layers_per_block": 2,
            "addition_embed_type": None,
            "class_embed_type": None,
        },
        re.compile(r"up_blocks\.(1\.attentions\.[12]|[23]\.attentions\.\d+)\."),
        (1, 1),
    ),
    Layout(
        "Stable Diffusion XL",
        {
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
            "layers_per_block": 2,
            "addition_embed_type": "text_time",
            "class_embed_type": None,
        },
        re.compile(r"up_blocks\.0\.attentions\.\d+\."),
        (0, 0),
    ),
)


def find_layout(config: Mapping[str, Any]) -> Layout:
    """The layout of a UNet with this configuration. Raises UserError, which says why it is none of them."""
    for layout in LAYOUTS:
        if not layout.find_mismatch(config):
            return layout
    levels = len(config.get("down_block_types") or ())
    by_levels = {len(layout.required["down_block_types"]): layout for layout in LAYOUTS}
    nearest = by_levels.get(levels, LAYOUTS[0])
    names = ", ".join(layout.name for layout in LAYOUTS)
    raise UserError(
        f"model: the layout of its UNet is none of {names}: {nearest.find_mismatch(config)}"
    )


def count_tokens(unet: UNet2DConditionModel, latent_shape: tuple[int, ...]) -> dict[str, int]:
    """The number of a frame's tokens in each self-attention, by name, for latents (N, 4, h, w)."""
    height, width = latent_shape[-2:]
    lowest, tokens = _lowest_level(unet), {}
    for name in unet.attn_processors:
        if name.endswith(".attn1.processor"):
            side, block = LEVEL.match(name).groups()
            level = {"down": int(block or 0), "up": lowest - int(block or 0)}.get(side, lowest)
            tokens[name] = height * width // 4**level
    return tokens


def find_finest_self_attention(unet: UNet2DConditionModel) -> str:
    """The name of the decoder's last self-attention, which has the most tokens."""
    names = [name for name in unet.attn_processors if name.endswith(".attn1.processor")]
    return [name for name in names if name.startswith("up_blocks")][-1]


def features_shape(unet: UNet2DConditionModel, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape (c, h, w) of what Plug-and-Play injects into a frame, for latents (N, 4, h, w)."""
    block, _ = find_layout(unet.config).injected_resnet
    level = _lowest_level(unet) - block
    channels = unet.config.block_out_channels[level]
    return channels, latent_shape[-2] // 2**level, latent_shape[-1] // 2**level


def _lowest_level(unet: UNet2DConditionModel) -> int:
    """How often the latents are halved at the UNet's lowest resolution."""
    return len(unet.config.block_out_channels) - 1


def as_json(value: Any) -> Any:
    """A value of a configuration as JSON stores it."""
    return list(value) if isinstance(value, tuple) else value
