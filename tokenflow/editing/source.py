"""What an edit takes of the inversion of its source video."""

import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from tokenflow.config import EditConfig
from tokenflow.editing.find_inversion import preprocess_command
from tokenflow.editing.shared import Shared
from tokenflow.errors import DamagedError
from tokenflow.inversion.files import CLEAN, Inversion, noisy
from tokenflow.inversion.source_features import SourceFeatureFiles
from tokenflow.motion.dense import DenseMotion
from tokenflow.motion.to_keyframes import FlowToKeyframes, find_furthest_keyframe
from tokenflow.propagation.keyframes import KeyframeSchedule
from tokenflow.runtime.distributed import Processes
from util import read_frame

log = logging.getLogger("tokenflow")


@dataclass(frozen=True)
class Source:
    """The first `n_frames` frames of an inverted video.

    features: what the inversion kept of the source stream; None if that is denoised along with the edit.
    flow: the optical flow to keyframes, if tokens follow it.
    """

    inversion: Inversion
    n_frames: int
    features: SourceFeatureFiles | None = None
    flow: FlowToKeyframes | None = None

    def latents(self, t: int | None, frames: torch.Tensor) -> torch.Tensor:
        """Latents (n, 4, h, w) of the frames (n,): inverted to timestep `t`, or the clean ones (None)."""
        return self.inversion.latents(CLEAN if t is None else noisy(t))[frames]

    def noisiest_latents(self, frames: torch.Tensor) -> torch.Tensor:
        """Latents (n, 4, h, w) of the frames (n,) that the inversion ended with."""
        return self.inversion.latents(self.inversion.manifest.inverted)[frames]

    @property
    def noisiest_timestep(self) -> int:
        """The timestep of these latents."""
        return self.inversion.manifest.inverted_timestep

    @property
    def control_scales(self) -> tuple[float, ...] | None:
        """Factors on the ControlNets' residuals while the video was inverted; None without ControlNets."""
        return self.inversion.control_scales

    def depth(self, frames: torch.Tensor) -> torch.Tensor | None:
        """The depth (n, 1, h, w) of the frames (n,), which all streams share, if the UNet takes it."""
        depth = self.inversion.depth
        return None if depth is None else depth[frames]

    def picture(self, frame: int) -> np.ndarray:
        """A frame of the video, uint8 RGB (H, W, 3)."""
        return read_frame(self.inversion.source_frames, frame)


def find_features(
    inversion: Inversion, config: EditConfig, keyframes: KeyframeSchedule, shared: Shared
) -> SourceFeatureFiles | None:
    """What an inversion kept of the source stream, if it serves an edit with these keyframes.

    Otherwise the source is denoised along with the edit; the log says why.
    """
    if reason := _why_unfit(inversion, config, keyframes):
        log.info("the source is denoised along with the edit: %s", reason)
        return None
    try:
        shared.get("source features", inversion.folder, inversion.check_source_features)
    except DamagedError as damage:
        log.warning(
            "warning: %s; the source is denoised along with the edit instead; "
            "to recompute its features: %s --overwrite",
            damage,
            preprocess_command(config, inversion.manifest.config),
        )
        return None
    return inversion.source_features


def _why_unfit(inversion: Inversion, config: EditConfig, keyframes: KeyframeSchedule) -> str:
    """Why an edit cannot use the source features of an inversion; empty if it can."""
    kept = inversion.manifest.keyframes
    if not config.reuse_source:
        return "reuse_source is false"
    if config.propagation != "flanking":
        return f"nothing is kept for propagation {config.propagation}"
    if kept is None:
        return f"{inversion.folder} holds no source features (keep_source)"
    for name, value in asdict(keyframes).items():
        if getattr(kept, name) != value:
            return f"the inversion kept its features for other keyframes ({name})"
    return ""


def find_flow(
    source: Source, config: EditConfig, processes: Processes, elsewhere: Path
) -> FlowToKeyframes:
    """The optical flow between frames and their keyframes, kept as `open_motion` keeps the motion."""
    inversion = source.inversion
    n_frames, _, height, width = inversion.latents(CLEAN).shape
    flow = FlowToKeyframes(
        _choose_folder(inversion, elsewhere) / "flow",
        source.picture,
        n_frames=n_frames,
        n_used=source.n_frames,
        shape=(height, width, 2),
        cell=inversion.manifest.config["H"] // height,
        max_displacement=config.max_displacement,
    )
    furthest = find_furthest_keyframe(config.keyframe_interval, source.n_frames)
    flow.create(range(1, furthest + 1), processes)
    return flow


def open_motion(source: Source, elsewhere: Path) -> DenseMotion:
    """The motion between all frames, kept with the inversion, or `elsewhere` if that is read-only."""
    manifest = source.inversion.manifest
    return DenseMotion(
        _choose_folder(source.inversion, elsewhere) / "motion",
        source.picture,
        n_frames=manifest.n_frames,
        n_used=source.n_frames,
        shape=(manifest.config["H"], manifest.config["W"], 3),
    )


def _choose_folder(inversion: Inversion, elsewhere: Path) -> Path:
    return inversion.folder if os.access(inversion.folder, os.W_OK) else elsewhere
