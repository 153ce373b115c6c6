"""What is measured of edited videos without knowing the truth, in one pass over their frames.

A *meter* sees the latest moments of several videos, the source first, and returns its metrics of the newest
moment. So a video is read once, and the memory needed does not grow with its length.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from tokenflow.evaluation.metrics import (
    CPU,
    flicker,
    frame_psnr,
    frame_ssim,
    gradient_energy,
    warp_error,
)
from tokenflow.motion.optical_flow import OpticalFlow, squared_length

GAPS = (1, 4, 8)  # frames between the two that a warp error compares
STILL_PIXELS = 0.1  # of flow; what moves less may be called still
EQUAL_PSNR = 100.0  # dB, instead of infinity

# The latest moments of all videos, uint8 RGB (videos, H, W, 3), the newest last.
Moments = Sequence[np.ndarray]
Values = dict[str, Sequence[float]]  # by metric, one for each video; NaN where there is none
Curves = dict[str, dict[str, list[float | None]]]  # by metric and video, one value for each frame
Means = dict[str, dict[str, float]]  # by metric and video
# In the order of tables. How a page shows them is in template/page.js.
METRICS = (
    "warp_1 warp_4 warp_8 sharpness drift flicker clip_prompt clip_frames structure psnr ssim lpips"
)
METRICS = METRICS.split()


class Meter(Protocol):
    """Measures some metrics of several videos, one moment after the other."""

    def measure(self, recent: Moments) -> Values:
        """The metrics of the newest moment; those that it does not have are left out."""


def measure(moments: Iterable[np.ndarray], meters: Sequence[Meter]) -> dict[str, np.ndarray]:
    """All metrics of all moments, uint8 RGB (videos, H, W, 3), the source first: (frames, videos) each.

    A value is NaN where a frame has none, such as the first, which has no frame before it.
    """
    recent, measured = deque(maxlen=max(GAPS) + 1), []
    for moment in moments:
        recent.append(moment)
        measured.append({k: v for meter in meters for k, v in meter.measure(recent).items()})
    none = np.full(len(moment), np.nan)
    keys = [key for key in METRICS if any(key in values for values in measured)]
    return {key: np.stack([values.get(key, none) for values in measured]) for key in keys}


def name_curves(measured: Mapping[str, np.ndarray], videos: Mapping[str, int]) -> Curves:
    """The curves of some videos, which are named and of these columns; None for NaN."""
    return {
        key: {
            name: [None if np.isnan(value) else value for value in values[:, column].tolist()]
            for name, column in videos.items()
            if not np.isnan(values[:, column]).all()
        }
        for key, values in measured.items()
    }


def summarize(curves: Curves, frames_per_second: float) -> Means:
    """The mean of each curve; of the drift, that of the last second. A curve without values has none."""
    second = max(1, round(frames_per_second))
    means: Means = {}
    for key, by_name in curves.items():
        for name, curve in by_name.items():
            values = [v for v in (curve[-second:] if key == "drift" else curve) if v is not None]
            if values:
                means.setdefault(key, {})[name] = float(np.mean(values))
    return means


class AlongFlow:
    """Meter of the warp errors and of the flicker of still regions, along the source's optical flow."""

    def __init__(self, flow: OpticalFlow) -> None:
        self.flow = flow

    def measure(self, recent: Moments) -> Values:
        """Warp errors (x 1e-3) between the newest frame and those 1, 4 and 8 earlier (as far as there are
        any): mean squared difference of pixel values in [0, 1] over the pixels where the source's flow is
        valid in both directions. The measure is that of Lai et al., "Learning Blind Video Temporal
        Consistency" (ECCV 2018), section 4.2, which TokenFlow's evaluation uses at gap 1.
        """
        values, now = {}, recent[-1]
        for gap in (gap for gap in GAPS if gap < len(recent)):
            before = recent[-1 - gap]
            motion, valid = self.flow.find_valid(before[0], now[0])
            if valid.any():
                pairs = zip(before, now, strict=True)
                values[f"warp_{gap}"] = [1e3 * warp_error(a, b, motion, valid) for a, b in pairs]
            if gap == 1:
                motionless = valid & (squared_length(motion) < STILL_PIXELS**2)
                values["flicker"] = flicker(before, now, motionless)
        return values


class BesideSource:
    """Meter of each frame against the source's, over all pixels; PSNR and SSIM on a device."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device

    def measure(self, recent: Moments) -> Values:
        """PSNR in dB (100 if equal) and SSIM, as `evaluation.metrics` defines them; sharpness: the gradient
        energy divided by the source's (0 where the source has none, being plain).
        """
        source, others = recent[-1][0], recent[-1][1:]
        energy = gradient_energy(source[None])
        reference = np.stack([source] * len(others))
        psnr = frame_psnr(others, reference, self.device)
        sharpness = [gradient_energy(frame[None]) / energy if energy else 0.0 for frame in others]
        return {
            "psnr": [np.nan, *(min(EQUAL_PSNR, value) for value in psnr)],
            "ssim": [np.nan, *frame_ssim(others, reference, self.device)],
            "sharpness": [np.nan, *sharpness],
        }


class Drift:
    """Meter of the colour drift."""

    def __init__(self, frames_per_second: float, n_frames: int) -> None:
        """The first second is half of a video that is shorter than two."""
        self.second = max(1, min(round(frames_per_second), n_frames // 2))
        self.first: list[np.ndarray] = []  # mean colours within the first second, (videos, 3) each

    def measure(self, recent: Moments) -> Values:
        """How far the newest frame's mean colour is from that of the first second: the root mean square of
        the three channels' differences, in grey levels. No value within the first second. Our own definition.
        """
        colours = recent[-1].mean((1, 2))
        if len(self.first) < self.second:
            self.first.append(colours)
            return {}
        return {"drift": np.sqrt(np.square(colours - np.mean(self.first, axis=0)).mean(1))}
