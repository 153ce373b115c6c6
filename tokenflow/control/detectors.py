"""Detectors of control images: Canny edges, soft edges and line art of a video's frames.

Frames are uint8 RGB (H, W, 3), and so is what is detected. Networks are loaded when they are needed.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec

import cv2
import numpy as np
import torch

from tokenflow.config_control import ControlConfig
from tokenflow.control.depth import DEPTH_MODEL, load_depth_model
from tokenflow.errors import UserError, blame

# Detectors of controlnet_aux, those whose edges the ControlNets were trained with, and their weights.
AUX_DETECTORS = {"softedge": "PidiNetDetector", "lineart": "LineartDetector"}
AUX_WEIGHTS = "lllyasviel/Annotators"
AUX_PACKAGES = "controlnet_aux", "torchvision", "timm", "skimage", "scipy", "einops"

Frames = Iterable[np.ndarray]


def check_detectors(config: ControlConfig) -> None:
    """Raise UserError, with the command to install it, if the package of a detector is missing."""
    needed = [control for control in config.control if control in AUX_DETECTORS]
    if needed and (missing := [package for package in AUX_PACKAGES if find_spec(package) is None]):
        raise UserError(
            f"control: {needed[0]} needs the package {missing[0]}; install what it takes with: "
            "pip install --no-deps -r requirements-detectors.txt"
        )


def detect(
    config: ControlConfig,
    frames: Callable[[], Frames],
    own: Callable[[], Frames],
    device: torch.device,
) -> Iterator[Frames]:
    """For each ControlNet of the configuration, the control image of each frame.

    frames, own: give the source's frames and those of control_path, of the same number and size, anew.
    """
    for control in config.control:
        if control == "canny":
            low, high = config.canny_low, config.canny_high
            yield (detect_canny(frame[None], low, high)[0] for frame in frames())
        elif control == "depth":
            yield load_depth_model(config.depth_model or DEPTH_MODEL, device).draw(frames)
        elif control in AUX_DETECTORS:
            yield detect_with_aux(control, frames(), device)
        else:
            yield frames() if control == "tile" else own()


def detect_canny(frames: np.ndarray, low: int, high: int) -> np.ndarray:
    """Canny edges of uint8 RGB frames (n, H, W, 3) as uint8 RGB (n, H, W, 3), white on black.

    `low` and `high` are the hysteresis thresholds on the gradient, in grey levels.
    """
    edges = np.stack([cv2.Canny(frame, low, high) for frame in frames])
    return np.repeat(edges[..., None], 3, axis=-1)


def detect_with_aux(control: str, frames: Frames, device: torch.device) -> Iterator[np.ndarray]:
    """Soft edges or line art of frames, white on black, found with the package controlnet_aux."""
    kind = getattr(importlib.import_module("controlnet_aux"), AUX_DETECTORS[control])
    missing = "are not in the hub's cache, and cannot be downloaded"
    what = f"control: {control}: the weights of {AUX_WEIGHTS} {missing}"
    with blame(what, remedy="check the network"):
        detector = kind.from_pretrained(AUX_WEIGHTS).to(device)
    for frame in frames:
        height, width = frame.shape[:2]
        size = min(height, width)  # of the frame itself, so that nothing is scaled
        edges = detector(frame, detect_resolution=size, image_resolution=size, output_type="np")
        yield cv2.resize(edges, (width, height), interpolation=cv2.INTER_LINEAR)
