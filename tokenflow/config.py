"""The configuration of each command: every field is a YAML key and a flag."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenflow.config_control import ControlConfig
from tokenflow.config_model import ModelConfig
from tokenflow.diffusion.versions import VERSIONS
from tokenflow.errors import UserError
from tokenflow.options import for_each, option

MAX_FRAMES, MAX_SIZE = 10**6, 2**14  # frames (eleven hours of video); pixels
RESIZE = ("crop", "stretch", "pad")
# Options that change how an inversion or an edit is computed, but not its result.
HOW = ("batch_size", "device", "cpu_offload", "compile", "resume", "overwrite")
# What None stands for in an edit, by its propagation; previous is the published algorithm.
IF_NONE = {
    "guidance": {"flanking": "keyframes", "previous": "every_frame"},
    "relevance": {"flanking": 1.0, "previous": 0},
    "own_weight": {"flanking": 3.0, "previous": 1.0},
    "consensus": {"flanking": 3, "previous": 0},
    "fuse": {"flanking": 1, "previous": 0},
}


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(ModelConfig, ControlConfig):
    """Options of `preprocess.py`."""

    data_path: str
    """Video file, or folder of images in natural order (2 before 10)."""
    inversion_prompt: str = ""
    """Prompt that describes the source video."""
    H: int | None = option(0, 0, MAX_SIZE, none="auto")
    """Height of the frames in pixels, a multiple of 64. 0: as the checkpoint was trained. auto: as the
    source's aspect ratio needs, with as many pixels as the checkpoint was trained on."""
    W: int | None = option(0, 0, MAX_SIZE, none="auto")
    """Width of the frames in pixels, likewise. If H or W is a number and the other auto, both keep the
    aspect ratio."""
    resize: str = option("crop", choices=RESIZE)
    """How frames of another size are fitted. crop: cut out the centre. stretch: change the aspect ratio.
    pad: add black borders."""
    start_frame: int = option(0, 0, MAX_FRAMES)
    """First frame to use, counted from 0."""
    n_frames: int = option(40, 0, MAX_FRAMES)
    """Number of frames to use. 0: all."""
    stride: int = option(1, 1, MAX_FRAMES)
    """Distance between the frames to use. 2: every second frame, at half the frame rate."""
    fps: float | None = option(None, 0.1, 1000, none="auto")
    """Frames per second of the source. auto: as the time stamps of the frames used say; 24 for a folder of
    images."""
    inversion: str = option("fixed_point", choices=("fixed_point", "ddim"))
    """Method of inversion. fixed_point: solve each step's equation by iteration. ddim: approximate it, as
    published, for which no source features are kept."""
    steps: int = option(50, 1, 999)
    """Number of inversion steps, which must include the editing steps (save_steps)."""
    save_steps: int = option(50, 1, 999)
    """Number of editing steps, for which the latents are saved (n_timesteps of the edits)."""
    keep_source: bool = True
    """Keep the source features on disk, which makes edits faster. The log names their size beforehand."""
    keyframe_interval: int = option(8, 1, MAX_FRAMES)
    """Number of frames per keyframe. Edits with the same number can use the source features."""
    no_reconstruction: bool = False
    """Skip the reconstruction of the video, without which the inversion cannot be judged."""
    batch_size: int | None = option(None, 1, MAX_FRAMES, none="auto")
    """Number of frames in one UNet pass, for memory and speed alone. auto: 16, or 32 on a GPU, halved when
    out of memory."""
    save_dir: str = "latents"
    """Folder of all inversions. Each gets a folder of its own."""

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
    def controlnet_ids(self) -> tuple[str, ...]:
        """Hub ids or folders of the ControlNets that condition the inversion, if any do."""
        conditioned = VERSIONS[self.sd_version].conditioned
        return self.controlnet or (self.known_controlnets(self.sd_version) if conditioned else ())


@dataclass(frozen=True, kw_only=True)
class EditConfig(ModelConfig):
    """Options that all three techniques share."""

    sd_version: str = option(
        "2.1", choices=tuple(name for name, version in VERSIONS.items() if not version.conditioned)
    )
    """Version of Stable Diffusion with which the inversion was computed."""
    data_path: str
    """The video file or folder of images that preprocess.py was given."""
    latents_path: str = "latents"
    """Folder of all inversions (save_dir of preprocess.py)."""
    output_path: str = "tokenflow-results"
    """Folder of all edits. Each gets a folder of its own."""
    prompt: str
    """Prompt that describes the whole edited video, not just what changes."""
    negative_prompt: str = ""
    """Prompt that the edit is guided away from."""
    lora: tuple[str, ...] = ()
    """LoRAs, for the edit alone: .safetensors files in kohya's (LoCon, LoHa and LoKr too) or diffusers'
    format, folders that hold one, or hub ids."""
    lora_scale: tuple[float, ...] = option((1.0,), -10, 10)
    """Strength of the LoRAs: one for all, or one for each."""
    embeddings: tuple[str, ...] = ()
    """Textual inversions, for the edit alone: files of which mine.safetensors or mine.pt is <mine> in the
    prompts."""
    n_inversion_steps: int = option(50, 1, 999)
    """Number of inversion steps of the inversion (steps of preprocess.py)."""
    n_timesteps: int = option(50, 1, 999)
    """Number of editing steps, whose latents were saved (save_steps of preprocess.py)."""
    n_frames: int = option(40, 0, MAX_FRAMES)
    """Number of frames to edit, from the first. 0: all that were inverted."""
    batch_size: int | None = option(None, 1, MAX_FRAMES, none="auto")
    """Number of frames in one UNet pass, for memory and speed alone. auto: 8, or 10 to 16 on a GPU, halved
    when out of memory."""
    keyframe_interval: int = option(8, 1, MAX_FRAMES)
    """Number of frames per keyframe, which is drawn at random at each step."""
    # At least four anchors and two neighbouring keyframes.
    keyframe_window: int = option(8, 6, MAX_FRAMES)
    """Largest number of keyframes that are edited jointly. More see more of a long video, take more memory,
    and can lose textures that turn or change."""
    reuse_source: bool = True
    """Use the source features that preprocess.py kept, which changes only the speed."""
    guidance_scale: float = option(5.0, 0, 1000)
    """Scale of classifier-free guidance. More follows the prompt more closely. 1: no guidance."""
    guidance: str | None = option(None, choices=("keyframes", "every_frame"))
    """Frames for which the negative prompt is evaluated. keyframes: these alone, in most steps; the
    difference that it makes is propagated to the others. every_frame: all. None: keyframes, but every_frame
    with propagation previous."""
    relevance: float | None = option(None, 0, 1)
    """How much weaker guidance is where prompt and inversion_prompt agree, so that the source stays. 1: there
    is none. 0: it is the same everywhere. None: 1, but 0 with propagation previous."""
    own_weight: float | None = option(None, 1, 1000)
    """How often a keyframe's own tokens count when keyframes are edited jointly. More keep textures that
    turn or change. 1: once, as in the paper. None: 3, but 1 with propagation previous."""
    alternate: bool = False
    """From 30 % of the steps on, evaluate in every second step the keyframes alone, and move the other
    frames along. Faster, and less steady."""
    propagation: str = option("flanking", choices=("flanking", "previous"))
    """Keyframes that a frame blends. flanking: the nearest on each side, as in the paper. previous: those
    of its own and the previous interval, as in the authors' code."""
    correspondences: str = option("tokens", choices=("tokens", "flow"))
    """How a frame's tokens are found in its keyframes. tokens: by cosine similarity. flow: along the
    source's optical flow, and by similarity where that fails."""
    max_displacement: float = option(50.0, 0, MAX_SIZE)
    """Longest optical flow, in pixels, that correspondences flow follows. Longer flow counts as failed."""
    consensus: int | None = option(None, 0, 10)
    """How often, in the last 40 % of the steps, predicted x0 is averaged along the source's motion, for
    steadiness. None: 3, but 0 with propagation previous."""
    mask: str = "none"
    """Where the edit may change the video. none: everywhere. auto: where prompt and inversion_prompt
    differ. A video or folder of images: where it is white."""
    sound: bool = True
    """Give the edited video what is heard in the source, if the source has sound."""
    fuse: int | None = option(None, 0, 50)
    """Number of frames on each side with which finished frames are averaged along the source's motion. More
    take flicker and fine detail. None: 1, but 0 with propagation previous."""

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
    def mask_path(self) -> Path | None:
        """The user's own mask, if there is one."""
        return None if self.mask in ("none", "auto") else Path(self.mask)

    def resolve(self, name: str) -> Any:
        """The value of an option, or what stands for None if the user gave none."""
        value = getattr(self, name)
        return IF_NONE[name][self.propagation] if value is None else value


@dataclass(frozen=True, kw_only=True)
class PnPConfig(EditConfig):
    """Options of `run_tokenflow_pnp.py`."""

    pnp_attn_t: float = option(0.5, 0, 1)
    """Share of the editing steps, from the first, that inject the source's self-attention. More keeps more
    structure."""
    pnp_f_t: float = option(0.8, 0, 1)
    """Share of the editing steps, from the first, that inject the source's features. More keeps more
    structure."""


@dataclass(frozen=True, kw_only=True)
class SDEditConfig(EditConfig):
    """Options of `run_tokenflow_sdedit.py`."""

    start: float = option(0.9, 0, 1)
    """Share of the editing steps to run: the last ones, at least one. More goes further from the source."""
    use_ddim_noise: bool = True
    """Start from the noise of the inversion. false: from one random noise for all frames."""

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

    sd_version: str = option("ControlNet", choices=tuple(VERSIONS))
    """Version of Stable Diffusion. ControlNet: 1.5, and preferably an inversion under the same
    ControlNets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_controls()
        if not self.controlnet:
            self.known_controlnets(self.sd_version)

    @property
    def controlnet_ids(self) -> tuple[str, ...]:
        """Hub ids or folders of the ControlNets that condition the edit."""
        return self.controlnet or self.known_controlnets(self.sd_version)
