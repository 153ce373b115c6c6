"""The folder of an inversion: what `preprocess.py` writes and an edit reads.

`<save_dir>/sd_<version or model>/<video>/steps_<steps>/nframes_<n>/` holds, of N frames (H, W),

    latents/noisy_latents_<t>.npy  (N, 4, h, w), fp32, for every editing timestep t
    latents/clean_latents.npy      the encoded frames, of the same shape
    latents/inverted_latents.npy   where the inversion ended, if that is no editing timestep
    source/ vae/ frames/           PNGs: the frames before encoding, after the VAE's round trip, and
                                   reconstructed from the noisiest latents
    inverted.mp4 report.html       the reconstruction as a video, and how good it is
    sound.m4a                      what is heard during these frames, if the video has sound
    depth.npy depth.mp4            (N, 1, h, w), fp32: the frames' depth, if the UNet takes it
    source_features/               what edits need from the source stream, if it was kept
    inversion_prompt.txt           the prompt that the video was inverted under
    manifest.json                  all that the files were computed from
    digests.json                   digests that reveal damage to any of these files
    flow/ motion/                  the optical flow that edits have followed, in latents and in pixels, with
                                   digests of their own (motion/pairs.py)
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import torch

from tokenflow.config import HOW, PreprocessConfig
from tokenflow.errors import DamagedError, UserError
from tokenflow.evaluation.subject import RECONSTRUCTION, SOURCE, VAE
from tokenflow.inversion.frames import FrameChoice
from tokenflow.inversion.source_features import SourceFeatureFiles
from tokenflow.options import build, for_each
from tokenflow.propagation.keyframes import KeyframeSchedule
from tokenflow.runtime.digests import check
from tokenflow.runtime.frame_array import FrameArray
from util import frame_path

CLEAN = "clean_latents"
INVERTED = "inverted_latents"
VIDEO = "inverted.mp4"
SOUND = "sound.m4a"
DEPTH = "depth.npy"
# What a manifest has besides the options, and how another value of it is described.
ADDED = {
    "conditioned": "other ControlNets",
    "control_frames": "other frames of control_path",
    "networks": "other ControlNets",
}
# Options that say where things lie. What lies there is told by digests.
PATHS = ("data_path", "save_dir", "control_path", "model", "vae", "controlnet", "depth_model")


@dataclass(frozen=True)
class Manifest:
    """Everything that an inversion was computed from."""

    config: dict  # of the PreprocessConfig
    source: str  # digest of the video
    checkpoint: str  # what tells it from other checkpoints
    fps: str  # frames per second of the frames used, as a fraction
    n_frames: int
    timesteps: tuple[int, ...]  # editing timesteps whose latents are saved, the noisiest first
    inverted: str  # name of the latents that the inversion ended with
    inverted_timestep: int  # timestep of those latents
    keyframes: KeyframeSchedule | None = None  # of the kept source features

    @classmethod
    def read(cls, text: str) -> "Manifest":
        """From JSON. Raises LookupError, TypeError, ValueError or UserError for one of another version."""
        stored = json.loads(text)
        if kept := stored["keyframes"]:
            stored["keyframes"] = KeyframeSchedule(**kept | {"timesteps": tuple(kept["timesteps"])})
        manifest = cls(**stored | {"timesteps": tuple(stored["timesteps"])})
        for field in fields(cls):
            if field.type in (str, int, dict) and type(stored[field.name]) is not field.type:
                raise TypeError(field.name)
        names = {f.name for f in fields(PreprocessConfig)}
        build(PreprocessConfig, {name: manifest.config[name] for name in names})
        if manifest.config.keys() != names | ADDED.keys():
            raise LookupError("other options")
        Fraction(manifest.fps)
        return manifest

    @property
    def identity(self) -> dict:
        """What tells inversions apart: those of the same identity are equal, wherever things lie."""
        config = {key: value for key, value in self.config.items() if key not in (*HOW, *PATHS)}
        return {"config": config, "source": self.source, "checkpoint": self.checkpoint}

    def describe_difference(self, other: "Manifest") -> str:
        """What tells it from another inversion of the same video; empty if nothing does."""
        if self.checkpoint != other.checkpoint:
            return "another model or VAE"
        theirs = other.identity["config"]
        for key, value in self.identity["config"].items():
            if value != theirs[key]:
                return ADDED.get(key) or f"{key} {value!r}, not {theirs[key]!r}"
        return ""

    @property
    def choice(self) -> FrameChoice:
        """Which frames of a video were used, and their size."""
        return FrameChoice.of(self.config)

    @property
    def frame_rate(self) -> Fraction:
        """Frames per second of the frames used."""
        return Fraction(self.fps)

    @property
    def latents_by_timestep(self) -> dict[int, str]:
        """Names of the saved latents, except the clean ones."""
        return {self.inverted_timestep: self.inverted} | {t: noisy(t) for t in self.timesteps}


class Inversion:
    """The files of one inversion.

    source_frames, vae, reconstruction: folders of the source's frames, of these after the VAE's round trip,
    and of the reconstructed ones, if there are any. sound: the source's, if it has any.
    source_features: what edits need from the source stream, if it was kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.sound = folder, folder / SOUND
        self.source_frames, self.vae = folder / "source", folder / "vae"
        self.reconstruction = folder / "frames"
        self.source_features = SourceFeatureFiles(folder / "source_features")

    @classmethod
    def of(cls, config: PreprocessConfig, n_frames: int) -> "Inversion":
        """Where `preprocess.py` puts the inversion of `n_frames` frames."""
        conditioned = bool(config.controlnet_ids)
        name = name_model(config.model, config.sd_version, conditioned)
        video = Path(config.save_dir) / name / name_video(config.data_path)
        return cls(video / f"steps_{config.steps}" / f"nframes_{n_frames}")

    def list_videos(self) -> dict[str, Path]:
        """The folders of frames, by what they show, the source first."""
        videos = {SOURCE: self.source_frames, VAE: self.vae, RECONSTRUCTION: self.reconstruction}
        return {name: folder for name, folder in videos.items() if folder.exists()}

    @property
    def exists(self) -> bool:
        """Whether the folder holds a finished inversion."""
        return (self.folder / "manifest.json").is_file()

    @cached_property
    def manifest(self) -> Manifest:
        """What the inversion was computed from. Raises DamagedError, also for one of another version."""
        check(self.folder, lambda name: name == "manifest.json")
        path = self.folder / "manifest.json"
        try:
            return Manifest.read(path.read_text(encoding="utf-8"))
        except (LookupError, TypeError, ValueError, UserError) as error:
            raise DamagedError(f"{path} is not as this version of the code writes it") from error

    @property
    def prompt(self) -> str:
        """The prompt that the video was inverted under."""
        return (self.folder / "inversion_prompt.txt").read_text(encoding="utf-8")

    @property
    def control_scales(self) -> tuple[float, ...] | None:
        """Factors on the ControlNets' residuals while the video was inverted; None without ControlNets."""
        config = self.manifest.config
        if not config["conditioned"]:
            return None
        control, scale = config["control"], config["control_scale"]
        return for_each("control_scale", scale, "control", control)

    @property
    def depth(self) -> FrameArray | None:
        """The frames' depth (N, 1, h, w) in [-1, 1], if the UNet takes it."""
        array = FrameArray(self.folder / DEPTH)
        return array if array.path.is_file() else None

    def write_manifest(self, manifest: Manifest) -> None:
        """Write the prompt and the manifest, which marks the inversion as finished."""
        prompt = manifest.config["inversion_prompt"]
        (self.folder / "inversion_prompt.txt").write_text(prompt, encoding="utf-8")
        text = json.dumps(asdict(manifest), indent=2, ensure_ascii=False)
        (self.folder / "manifest.json").write_text(text + "\n", encoding="utf-8")

    def check_for_edit(self, timesteps: tuple[int, ...]) -> None:
        """Check all files that an edit of these timesteps reads, except the source features.

        Raises DamagedError.
        """
        manifest = self.manifest
        names = {CLEAN, manifest.inverted, *map(noisy, timesteps)}
        read = {"inversion_prompt.txt", DEPTH, *(f"latents/{name}.npy" for name in names)}
        check(self.folder, lambda name: name in read or name.endswith(".png"))

    def check_sound(self) -> None:
        """Check the source's sound. Raises DamagedError."""
        check(self.folder, lambda name: name == SOUND)

    def check_source_features(self) -> None:
        """Check the source features. Raises DamagedError."""
        check(self.folder, lambda name: name.startswith(self.source_features.folder.name))

    def latents(self, name: str) -> FrameArray:
        """Saved latents (N, 4, h, w); `noisy(t)`, `CLEAN` or `INVERTED` names them."""
        return FrameArray(self.folder / "latents" / f"{name}.npy")


@dataclass(frozen=True)
class FrameFiles:
    """What a stage of a run writes of each frame: a row in each array, and an image, if it has a folder."""

    arrays: Sequence[FrameArray]
    images: Path | None

    def read(self, frames: torch.Tensor) -> Iterator[bytes]:
        """All bytes of the frames (n,)."""
        for array in self.arrays:
            yield array[frames].numpy().tobytes()
        for index in frames.tolist() if self.images else ():
            yield frame_path(self.images, index).read_bytes()


def name_model(model: str | None, sd_version: str, conditioned: bool) -> str:
    """The name of a model's folder of inversions: `sd_2.1`, `sd_ControlNet`, `sd_my-model`."""
    if conditioned and sd_version in ("1.5", "ControlNet") and not model:
        return "sd_ControlNet"
    name = Path(model).name if model else sd_version
    return f"sd_{name}_ControlNet" if conditioned else f"sd_{name}"


def name_video(data_path: str) -> str:
    """The name of a video's folder of inversions: that of a folder whole, of a file without its suffix."""
    path = Path(os.path.abspath(data_path))  # the current folder has a name, too
    return path.name if path.is_dir() else path.stem


def noisy(t: int) -> str:
    """Name of the latents of timestep `t`."""
    return f"noisy_latents_{t}"
