"""An inversion on disk: what `preprocess.py` writes and an edit reads.

`<save_dir>/sd_<version or model>/<video>/steps_<steps>/nframes_<n>/` holds

- `latents/noisy_latents_<t>.npy`, (N, 4, h, w) fp32, for every editing timestep t;
- `latents/clean_latents.npy`: the encoded frames, of the same shape;
- `latents/inverted_latents.npy`: where the inversion ended, if not at an editing timestep; of the same shape;
- `source/`, `vae/`, `frames/`: the frames before encoding, after the VAE's round trip, and reconstructed from
  the noisiest latents; `inverted.mp4`: the reconstructed frames as a video;
- `depth.npy`, (N, 1, h, w) fp32, and `depth.mp4`: the frames' depth, if the UNet takes it;
- `source_features/`: what edits need from the source stream, if it was kept;
- `flow/`, `motion/`: the optical flow that an edit has followed between frames, in latents and in pixels;
  `kept_pairs.py` checks it;
- `inversion_prompt.txt`, `manifest.json`, `digests.json`: the prompt, all that the files were computed from,
  and digests that reveal damage to any of these files.
"""

import json
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from tokenflow.config import HOW, PreprocessConfig, inversion_name
from tokenflow.inversion.source_features import SourceFeatureFiles
from tokenflow.options import for_each
from tokenflow.runtime.digests import check
from tokenflow.runtime.frame_array import FrameArray
from tokenflow_utils import KeyframeSchedule
from util import frame_path, read_image

CLEAN = "clean_latents"
INVERTED = "inverted_latents"


@dataclass(frozen=True)
class Manifest:
    """Everything that an inversion was computed from."""

    config: dict  # of the PreprocessConfig
    source: str  # fingerprint of the video
    checkpoint: str  # fingerprint of the UNet's weights, or the hub id
    fps: str  # frames per second of the frames used, as a fraction
    n_frames: int
    timesteps: tuple[int, ...]  # editing timesteps whose latents are saved, the noisiest first
    inverted: str  # name of the latents that the inversion ended with
    inverted_timestep: int  # timestep of those latents
    keyframes: KeyframeSchedule | None = None  # of the kept source features

    @property
    def identity(self) -> dict:
        """What tells inversions apart: those of the same identity are equal."""
        config = {key: value for key, value in self.config.items() if key not in HOW}
        return {"config": config, "source": self.source, "checkpoint": self.checkpoint}

    @property
    def frame_rate(self) -> Fraction:
        """Frames per second of the frames used."""
        return Fraction(self.fps)


@dataclass(frozen=True)
class Inversion:
    """The files of one inversion."""

    folder: Path

    @classmethod
    def of(cls, config: PreprocessConfig, n_frames: int) -> "Inversion":
        """Where `preprocess.py` puts the inversion of `n_frames` frames."""
        conditioned = bool(config.controlnet_ids)
        name = inversion_name(config.model, config.sd_version, conditioned)
        video = Path(config.save_dir) / name / Path(config.data_path).stem
        return cls(video / f"steps_{config.steps}" / f"nframes_{n_frames}")

    @property
    def source_frames(self) -> Path:
        """Folder of the source's frames."""
        return self.folder / "source"

    def source_frame(self, index: int) -> np.ndarray:
        """A frame of the source, uint8 RGB (H, W, 3)."""
        return read_image(frame_path(self.source_frames, index))

    @property
    def vae(self) -> Path:
        """Folder of the frames after the VAE's round trip."""
        return self.folder / "vae"

    @property
    def reconstruction(self) -> Path:
        """Folder of the reconstructed frames."""
        return self.folder / "frames"

    @cached_property
    def source_features(self) -> SourceFeatureFiles:
        """What edits need from the source stream; there are no files if it was not kept."""
        return SourceFeatureFiles(self.folder / "source_features")

    @property
    def exists(self) -> bool:
        """Whether the folder holds a finished inversion."""
        return (self.folder / "manifest.json").is_file()

    @cached_property
    def manifest(self) -> Manifest:
        """What the inversion was computed from. Raises DamagedError."""
        check(self.folder, "manifest.json".__eq__)
        stored = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        if kept := stored.get("keyframes"):
            kept["timesteps"] = tuple(kept["timesteps"])
            stored["keyframes"] = KeyframeSchedule(**kept)
        return Manifest(**stored)

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
        array = FrameArray(self.folder / "depth.npy")
        return array if array.path.is_file() else None

    def create_depth(self, shape: tuple[int, ...]) -> FrameArray:
        """Create the file of the frames' depth (N, 1, h, w), unless it exists."""
        FrameArray(self.folder / "depth.npy").ensure(shape, torch.float32)
        return self.depth

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
        read = {"inversion_prompt.txt", "depth.npy", *(f"latents/{name}.npy" for name in names)}
        check(self.folder, lambda name: name in read or name.endswith(".png"))

    def check_source_features(self) -> None:
        """Check the source features. Raises DamagedError."""
        check(self.folder, lambda name: name.startswith(self.source_features.folder.name))

    def latents(self, name: str) -> FrameArray:
        """Saved latents (N, 4, h, w); `noisy(t)`, `CLEAN` or `INVERTED` names them."""
        return FrameArray(self.folder / "latents" / f"{name}.npy")

    def noisy_latents(self, t: int, frames: torch.Tensor) -> torch.Tensor:
        """Saved latents (n, 4, h, w) of the frames (n,) at timestep `t`."""
        return self.latents(noisy(t))[frames]


def noisy(t: int) -> str:
    """Name of the latents of timestep `t`."""
    return f"noisy_latents_{t}"
