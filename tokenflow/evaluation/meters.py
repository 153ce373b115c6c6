"""What can be measured about an edited video without knowing the truth, frame by frame.

A *meter* takes the latest frames of several videos that show the same moments, and returns values of one
or several figures for the newest frame. So a video passes once, and memory does not grow with its length.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tokenflow.evaluation.metrics import CPU, frame_psnr, frame_ssim, gradient_energy, warp_error
from tokenflow.motion.optical_flow import Flow, valid_flow

# What a video is in an evaluation. The floors, all but the last two, are what no edit can be blamed for.
SOURCE, VAE, RECONSTRUCTION, PER_FRAME, EDIT = (
    "source",
    "vae",
    "reconstruction",
    "frame_by_frame",
    "edit",
)

GAPS = (1, 4, 8)  # frames between the two that a warp error compares
STILL_PIXELS, STILL_LEVELS = (
    0.1,
    2,
)  # below this much flow, and up to this many grey levels of change
STILL_SHARE = 0.01  # of a frame's pixels; fewer still ones tell nothing
EQUAL_PSNR = 100.0  # dB, instead of infinity

Recent = Mapping[str, Sequence[np.ndarray]]  # the latest frames of each video, the newest last
Values = dict[str, dict[str, float]]  # by figure and video
Meter = Callable[[Recent], Values]
Curves = dict[str, dict[str, list[float | None]]]  # by figure and video, one value for each frame


@dataclass(frozen=True)
class Figure:
    """How a figure is shown: its name, its unit, which values are better, and what it means."""

    title: str
    unit: str
    better: str
    meaning: str


FIGURES = {
    **{
        f"warp_{gap}": Figure(
            f"warp error, gap {gap}",
            "x 1e-3",
            "less",
            f"mean square difference to the frame {when}, along the source's optical flow, pixel values from "
            "0 to 1; a blank or blurred video has little, so read it beside the sharpness",
        )
        for gap, when in zip(GAPS, ("before", "4 before", "8 before"), strict=True)
    },
    "sharpness": Figure(
        "sharpness",
        "of the source's",
        "near 1",
        "mean square gradient of the luminance, divided by the source's; blur lowers it, noise raises it",
    ),
    "drift": Figure(
        "colour drift",
        "grey levels",
        "less",
        "how far the frame's mean colour is from that of the first second; the figure is the mean over "
        "the last second; motion alone changes it too, so compare it with the source's",
    ),
    "flicker": Figure(
        "flicker of still regions",
        "grey levels",
        "less",
        "root mean square difference between neighbouring frames where the source stands still",
    ),
    "clip_prompt": Figure(
        "agreement with the prompt",
        "x 0.01",
        "more",
        "cosine similarity of CLIP's embeddings of a frame and of the edit's prompt",
    ),
    "clip_frames": Figure(
        "frame consistency",
        "x 0.01",
        "more",
        "cosine similarity of CLIP's embeddings of neighbouring frames",
    ),
    "structure": Figure(
        "structure distance",
        "x 1e-3",
        "less",
        "mean square difference between how alike a frame's regions are to each other (DINO) and how "
        "alike the source's are",
    ),
    "psnr": Figure(
        "PSNR",
        "dB",
        "more",
        "of a frame against the source's, over all pixels: how much was left alone",
    ),
    "ssim": Figure("SSIM", "", "more", "of a frame against the source's, over all pixels"),
    "lpips": Figure(
        "LPIPS", "", "less", "perceptual distance of a frame from the source's, all pixels"
    ),
}


def measure(videos: Mapping[str, Iterable[np.ndarray]], meters: Sequence[Meter]) -> Curves:
    """Curves of all the meters' figures, over the frames uint8 (H, W, 3) of videos of equal length.

    A value is None where a frame has none, such as the first, which has no frame before it.
    """
    recent = {name: deque(maxlen=max(GAPS) + 1) for name in videos}
    curves: Curves = {}
    for index, frames in enumerate(zip(*videos.values(), strict=True)):
        for name, frame in zip(videos, frames, strict=True):
            recent[name].append(frame)
        for meter in meters:
            for key, values in meter(recent).items():
                for name, value in values.items():
                    curve = curves.setdefault(key, {}).setdefault(name, [])
                    curve += [None] * (index - len(curve)) + [value]
    n_frames = index + 1
    for by_name in curves.values():
        for curve in by_name.values():
            curve += [None] * (n_frames - len(curve))
    return curves


def summarize(curves: Curves, frames_per_second: float) -> Values:
    """One number for each curve: the mean of its values; of the drift, the mean of its last second.

    A curve without any values has none.
    """
    second = max(1, round(frames_per_second))
    figures: Values = {}
    for key, by_name in curves.items():
        for name, curve in by_name.items():
            values = [v for v in (curve[-second:] if key == "drift" else curve) if v is not None]
            if values:
                figures.setdefault(key, {})[name] = float(np.mean(values))
    return figures


class AlongFlow:
    """Meter of the warp errors and of the flicker of still regions, along the source's optical flow."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow

    def __call__(self, recent: Recent) -> Values:
        """Warp errors (x 1e-3) between the newest frame and those 1, 4 and 8 earlier (as far as there are
        any): mean square difference of pixel values in [0, 1] over the pixels where the source's flow is
        valid in both directions. The measure is that of Lai et al., "Learning Blind Video Temporal
        Consistency" (ECCV 2018), section 4.2, which TokenFlow's evaluation uses at gap 1.
        """
        values: Values = {}
        source = recent[SOURCE]
        for gap in GAPS:
            if len(source) <= gap:
                continue
            motion, valid = valid_flow(self.flow, source[-1 - gap], source[-1])
            if not valid.any():
                continue
            values[f"warp_{gap}"] = {
                name: 1e3 * warp_error(frames[-1 - gap], frames[-1], motion, valid)
                for name, frames in recent.items()
            }
            if gap == 1:
                values |= _flicker(
                    recent, valid & (np.hypot(*motion.transpose(2, 0, 1)) < STILL_PIXELS)
                )
        return values


def _flicker(recent: Recent, motionless: np.ndarray) -> Values:
    """Flicker: root mean square difference, in grey levels, of neighbouring frames in still regions.

    Still are pixels that do not move (`motionless`, bool (H, W)) and whose luminance changes by at most two
    grey levels in the source. A frame with too few of them has no value. Our own definition.
    """
    before, now = (frame.astype(np.float32).mean(-1) for frame in list(recent[SOURCE])[-2:])
    still = motionless & (np.abs(now - before) <= STILL_LEVELS)
    if still.mean() < STILL_SHARE:
        return {}
    changes = {
        name: frames[-1][still].astype(np.float64) - frames[-2][still]
        for name, frames in recent.items()
    }
    return {"flicker": {name: float(np.sqrt(np.square(c).mean())) for name, c in changes.items()}}


def beside_source(recent: Recent, device: torch.device = CPU) -> Values:
    """Meter of each newest frame against the source's, over all pixels; PSNR and SSIM on a device.

    PSNR in dB (100 if equal) and SSIM, as `evaluation.metrics` defines them; sharpness: the gradient energy
    divided by the source's (0 where the source has none, being plain).
    """
    source, *others = ((name, frames[-1][None]) for name, frames in recent.items())
    energy = gradient_energy(source[1])
    return {
        "psnr": {n: min(EQUAL_PSNR, *frame_psnr(frame, source[1], device)) for n, frame in others},
        "ssim": {n: frame_ssim(frame, source[1], device)[0] for n, frame in others},
        "sharpness": {n: gradient_energy(frame) / energy if energy else 0.0 for n, frame in others},
    }


class Drift:
    """Meter of the colour drift."""

    def __init__(self, frames_per_second: float, n_frames: int) -> None:
        """The first second is half of a video that is shorter than two."""
        self.second = max(1, min(round(frames_per_second), n_frames // 2))
        self.first: dict[str, list[np.ndarray]] = {}

    def __call__(self, recent: Recent) -> Values:
        """How far the newest frame's mean colour is from that of the first second: the root mean square of
        the three channels' differences, in grey levels. No value within the first second. Our own definition.
        """
        values = {}
        for name, frames in recent.items():
            colour, first = frames[-1].mean((0, 1)), self.first.setdefault(name, [])
            if len(first) < self.second:
                first.append(colour)
            else:
                away = colour - np.mean(first, axis=0)
                values[name] = float(np.sqrt(np.square(away).mean()))
        return {"drift": values}
