"""The motion of an inverted video, found when an edit first needs it and kept with the inversion."""

import os
from pathlib import Path

from tokenflow.config import EditConfig
from tokenflow.inversion.files import CLEAN, Inversion
from tokenflow.motion.dense import DenseMotion
from tokenflow.motion.pairs import KeptPairs
from tokenflow.motion.to_keyframes import SourceMotion, dis_between, furthest_keyframe
from tokenflow.runtime.distributed import Processes


def dense_motion(inversion: Inversion, n_frames: int, elsewhere: Path) -> DenseMotion:
    """The motion of an inverted video, kept with its inversion, or `elsewhere` if that is read-only.

    None of it is found yet.
    """
    folder = inversion.folder if os.access(inversion.folder, os.W_OK) else elsewhere
    manifest = inversion.manifest
    video = manifest.n_frames, manifest.config["H"], manifest.config["W"]
    return DenseMotion.kept_in(folder / "motion", video, inversion.source_frame, n_frames)


def kept_motion(
    inversion: Inversion, config: EditConfig, n_frames: int, processes: Processes
) -> SourceMotion:
    """The motion that an edit of the first `n_frames` frames follows."""
    shape = inversion.latents(CLEAN).shape
    pairs = KeptPairs(inversion.folder / "flow", shape[0], (2, *shape[2:], 2))
    pairs.create(range(1, furthest_keyframe(config.interval, n_frames) + 1), n_frames, processes)
    cell = inversion.manifest.config["H"] // shape[2]
    return SourceMotion(pairs, dis_between(inversion.source_frame), cell, config.max_displacement)
