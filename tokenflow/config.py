"""The configuration of each command: every field is a YAML key and a flag."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tokenflow.cli import for_each, option
from tokenflow.config_control import ControlConfig
from tokenflow.config_model import ModelConfig
from tokenflow.diffusion.versions import VERSIONS
from tokenflow.errors import UserError

MAX_FRAMES, MAX_SIZE = 10**6, 2**14  # frames (eleven hours of video); pixels
RESIZE = ("crop", "stretch", "pad")
# Options that change how an inversion or an edit is computed, but not its result.
HOW = ("batch_size", "device", "cpu_offload", "compile", "resume", "overwrite")

# Options of the same bounds.
frames_option = partial(option, low=1, high=MAX_FRAMES)
steps_option = partial(option, low=1, high=999)
share_option = partial(option, low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(ModelConfig, ControlConfig):
    """Options of `preprocess.py`."""

    data_path: str = option(
        "video file, or folder of images, which are used in natural order (2 before 10) and play at 24 "
        "frames per second"
    )
    inversion_prompt: str = option("what the source video shows, in words", "")
    H: int | None = option(
        "height of the frames in pixels, a multiple of 64; auto: what the checkpoint was trained on, 512, "
        "768 or 1024",
        None,
        low=8,
        high=MAX_SIZE,
        none="auto",
    )
    W: int | None = option(
        "width of the frames in pixels, a multiple of 64; auto: what the checkpoint was trained on, 512, "
        "768 or 1024",
        None,
        low=8,
        high=MAX_SIZE,
        none="auto",
    )
    resize: str = option(
        "how frames of another size become H x W pixels; crop: cut out the centre, stretch: change the "
        "aspect ratio, pad: add black borders",
        "crop",
        choices=RESIZE,
    )
    start_frame: int = frames_option("first frame used, counted from 0", 0, low=0)
    n_frames: int = frames_option("number of frames used; 0: all", 40, low=0)
    stride: int = frames_option(
        "distance between frames that are used; 2: every second frame, at half the frame rate", 1
    )
    inversion: str = option(
        "how the video is inverted; fixed_point: each step's equation is solved by iteration, ddim: the "
        "published approximation, for which no source features are kept",
        "fixed_point",
        choices=("fixed_point", "ddim"),
    )
    steps: int = steps_option(
        "number of inversion steps; they must include the editing steps (save_steps)", 50
    )
    save_steps: int = steps_option(
        "number of editing steps that the inversion is for (n_timesteps of the edits); the latents of "
        "each are saved",
        50,
    )
    keep_source: bool = option(
        "keep the source features on disk, which makes edits faster; the space is reported before it is "
        "taken",
        True,
    )
    keyframe_interval: int = frames_option(
        "number of frames per keyframe; kept source features serve only edits with the same "
        "keyframe_interval",
        8,
    )
    no_reconstruction: bool = option(
        "save the time of reconstructing the video; without inverted.mp4 the inversion cannot be "
        "judged",
        False,
    )
    batch_size: int | None = frames_option(
        "frames in one UNet pass, which changes memory and speed only; auto: 16, or 32 on a GPU, halved "
        "while the device is out of memory",
        None,
        none="auto",
    )
    save_dir: str = option("folder in which each inversion gets a folder of its own", "latents")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_controls()
        if not self.controlnet_ids and self.control != ("canny",):
            raise UserError(
                f"control: {' '.join(self.control)} needs ControlNets; name them (controlnet), or use "
                "sd_version ControlNet"
            )
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
    def controlnet_ids(self) -> tuple[str, ...]:
        """Hub ids or folders of the ControlNets that condition the inversion, if any do."""
        conditioned = VERSIONS[self.sd_version].conditioned
        return self.controlnet or (self.known_controlnets(self.sd_version) if conditioned else ())


@dataclass(frozen=True, kw_only=True)
class EditConfig(ModelConfig):
    """Options that all three techniques share."""

    sd_version: str = option(
        "version of Stable Diffusion, the one that the inversion was computed with",
        "2.1",
        choices=tuple(name for name, version in VERSIONS.items() if not version.conditioned),
    )
    data_path: str = option("the video file or folder of images that preprocess.py was given")
    latents_path: str = option("folder of all inversions (save_dir of preprocess.py)", "latents")
    output_path: str = option(
        "folder in which each edit gets a folder of its own", "tokenflow-results"
    )
    prompt: str = option("what the whole edited video shows, in words, not just what changes")
    negative_prompt: str = option("what the edit is guided away from, in words", "")
    lora: tuple[str, ...] = option(
        "LoRAs that change the model for the edit alone: .safetensors files in kohya's or diffusers' format, "
        "folders that hold one, or hub ids; the source's inversion serves edits with and without them",
        (),
    )
    lora_scale: tuple[float, ...] = option(
        "strength of the LoRAs: one number for all, or one for each; 0: no effect",
        (1.0,),
        low=-10,
        high=10,
    )
    n_inversion_steps: int = steps_option(
        "number of inversion steps of the inversion to use (steps of preprocess.py)", 50
    )
    n_timesteps: int = steps_option(
        "number of editing steps, whose latents the inversion must have saved (save_steps of "
        "preprocess.py)",
        50,
    )
    n_frames: int = frames_option(
        "number of frames to edit, from the first; 0: all that were inverted", 40, low=0
    )
    batch_size: int | None = frames_option(
        "frames in one UNet pass, which changes memory and speed; auto: 8, or 10 to 16 on a GPU, halved "
        "while the device is out of memory",
        None,
        none="auto",
    )
    keyframe_interval: int | None = frames_option(
        "number of frames per keyframe, which is chosen at random at each step; None: batch_size, "
        "or 8 if that is auto",
        None,
    )
    # At least four anchors and two neighbouring keyframes.
    keyframe_window: int = frames_option(
        "largest number of keyframes edited jointly; a larger one lets the frames of a long video attend "
        "to more of it, takes more memory, and can lose textures that turn or change",
        8,
        low=6,
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
    correspondences: str = option(
        "where a frame's tokens are found in its keyframes; tokens: at those that are most alike, flow: "
        "where the source's optical flow leads, and where that fails at those that are most alike",
        "tokens",
        choices=("tokens", "flow"),
    )
    max_displacement: float = option(
        "longest optical flow in pixels that correspondences flow follows; longer ones count as failed",
        50.0,
        low=0,
        high=MAX_SIZE,
    )
    consensus: int | None = option(
        "how often, in the last 40 % of the steps, predicted clean frames are averaged along the source's "
        "motion, which is steadier; the last time is followed by one step, which sharpens the frames again; "
        "None: 3 times, but 0 (never) with propagation previous, as published",
        None,
        low=0,
        high=10,
    )
    mask: str = option(
        "where the edit may change the video; none: everywhere, auto: where the prompt and inversion_prompt "
        "differ, else a video or folder of images as long as the source, white where the edit may change it",
        "none",
    )
    fuse: int | None = option(
        "frames on each side that finished frames are averaged with along the source's motion, which takes "
        "their flicker; more takes fine detail, too; None: 1, but 0 with propagation previous, as published",
        None,
        low=0,
        high=50,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt.strip():
            raise UserError("prompt: it is empty; say what the edited video shows")
        if self.mask_path and not self.mask_path.exists():
            raise UserError(f"mask: {self.mask} is neither none, auto, nor a file or folder")
        for_each("lora_scale", self.lora_scale, "lora", self.lora)

    @property
    def frames_at_once(self) -> int:
        """Frames in one UNet pass, if they fit in memory."""
        return self.batch_size or 8

    @property
    def lora_scales(self) -> tuple[float, ...]:
        """The strength of each LoRA."""
        return for_each("lora_scale", self.lora_scale, "lora", self.lora)

    @property
    def interval(self) -> int:
        """Frames per keyframe."""
        return self.keyframe_interval or self.frames_at_once

    @property
    def mask_path(self) -> Path | None:
        """The user's own mask, if there is one."""
        return None if self.mask in ("none", "auto") else Path(self.mask)

    @property
    def consensus_count(self) -> int:
        """How often the frames' predictions are averaged."""
        return self._unless_published(self.consensus, 3)

    @property
    def fuse_distance(self) -> int:
        """Frames on each side that finished frames are averaged with."""
        return self._unless_published(self.fuse, 1)

    @property
    def inversions(self) -> tuple[str, ...]:
        """Folders in `latents_path` that may hold this edit's inversion, the preferred one first."""
        return (inversion_name(self.model, self.sd_version, conditioned=False),)

    def _unless_published(self, value: int | None, default: int) -> int:
        """An option's value; if the user gave none, the default, which the published algorithm is without."""
        if value is None:
            return default if self.propagation == "flanking" else 0
        return value


@dataclass(frozen=True, kw_only=True)
class PnPConfig(EditConfig):
    """Options of `run_tokenflow_pnp.py`."""

    pnp_attn_t: float = share_option(
        "share of the editing steps, from the first, that take over the source's self-attention; more "
        "keeps more of its structure",
        0.5,
    )
    pnp_f_t: float = share_option(
        "share of the editing steps, from the first, that take over the source's features; more keeps "
        "more of its structure",
        0.8,
    )


@dataclass(frozen=True, kw_only=True)
class SDEditConfig(EditConfig):
    """Options of `run_tokenflow_sdedit.py`."""

    start: float = share_option(
        "share of the editing steps that are run, which are the last ones and at least one; more goes "
        "further from the source",
        0.9,
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
class ControlNetConfig(EditConfig, ControlConfig):
    """Options of `run_tokenflow_controlnet.py`."""

    sd_version: str = option(
        "version of Stable Diffusion; ControlNet: version 1.5, on an inversion under the same ControlNets "
        "if there is one",
        "ControlNet",
        choices=tuple(VERSIONS),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_controls()
        if not self.controlnet:
            self.known_controlnets(self.sd_version)

    @property
    def controlnet_ids(self) -> tuple[str, ...]:
        """Hub ids or folders of the ControlNets that condition the edit."""
        return self.controlnet or self.known_controlnets(self.sd_version)

    @property
    def inversions(self) -> tuple[str, ...]:
        """As for all edits; an inversion under ControlNets is preferred to one without it."""
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
