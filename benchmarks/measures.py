"""What the benchmarks measure of an edited clip, and how sure the means over clips are."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from benchmarks.clips import SIZE, Clip
from shapes.judge import Judge
from shapes.world import render
from tokenflow.evaluation.metrics import frame_psnr, gradient_energy, warp_error
from tokenflow.motion.optical_flow import find_targets
from util import load_frames

GAPS = (1, 8, 16)  # frames between the two that a warp error compares
DRIFT_GAP = 16  # frames between the two that a drift compares
DRIFT_SIGMA = 8.0  # pixels; one latent is as wide, so that detail and noise are gone
ENDS = 24  # frames, the first and the last, whose colours are compared

# Of a clip, or of several; None where there is nothing to measure.
Row = dict[str, float | None]


def measure(clip: Clip, frames: np.ndarray, judge: Judge) -> Row:
    """Steadiness, detail, content and faithfulness of an edited clip; frames: uint8 (N, H, W, 3).

    Means over all pairs of frames so far apart, where the clip is long enough: `warp_<gap>` and
    `visible_<gap>`, `warp_error` and `visible_error` x 1e-3; `drift`, in grey levels. `gradient`: gradient
    energy in (grey levels / pixel)^2, and `gradient_by_spread`: see that function. `colour_drift`: of a long
    clip. `edited_right`, `kept_right`: share of attributes. `kept_psnr`: PSNR in dB of what should stay the
    same; None where the edit names everything.
    """
    row, gaps = {}, [gap for gap in GAPS if gap < clip.n_frames]
    for gap in gaps:
        row[f"warp_{gap}"] = 1e3 * float(along_motion(warp_error, clip, frames, gap).mean())
    for gap in gaps:
        pairs = [(i, i + gap) for i in range(clip.n_frames - gap)]
        row[f"visible_{gap}"] = 1e3 * float(
            np.mean([visible_error(clip, frames, *p) for p in pairs])
        )
    if clip.n_frames > DRIFT_GAP:
        row["drift"] = float(along_motion(drift, clip, frames, DRIFT_GAP).mean())
    row["gradient"] = gradient_energy(frames)
    row["gradient_by_spread"] = gradient_by_spread(frames)
    answers = judge.read(frames)
    for name, edited in (("edited_right", True), ("kept_right", False)):
        right = [
            answer == value
            for attribute, value in clip.truth(edited).items()
            for answer in answers[attribute]
        ]
        row[name] = float(np.mean(right))
    stays = np.stack([clip.stays(time) for time in range(clip.n_frames)])
    row["kept_psnr"] = None
    if stays.any():
        error = np.square((frames.astype(float) - clip.frames)[stays] / 255).mean()
        row["kept_psnr"] = float(-10 * np.log10(max(error, 1e-10)))
    if clip.n_frames >= 2 * ENDS:
        row["colour_drift"] = colour_drift(clip, frames)
    return row


def drift(frame: np.ndarray, later: np.ndarray, flow: np.ndarray, valid: np.ndarray) -> float:
    """How far the colours of whole regions wander between two frames: in grey levels, root mean square.

    Arguments as for `warp_error`. The change along the motion is blurred (a Gaussian of standard deviation
    `DRIFT_SIGMA`, over valid pixels alone), then squared and averaged over valid pixels and channels. It is
    the change that is blurred and not the frames, for in blurred frames an object would mix with the
    background that it moves over, and a perfect video would drift. Detail that flickers cancels out;
    brightness that rises by 3 grey levels from one frame to the other gives 3.
    """
    warped = cv2.remap(later, *find_targets(flow), cv2.INTER_LINEAR).astype(np.float64)
    change = np.where(valid[..., None], warped - frame, 0)
    blurred, weight = (
        cv2.GaussianBlur(x, (0, 0), DRIFT_SIGMA, borderType=cv2.BORDER_CONSTANT)
        for x in (change, valid.astype(np.float64))
    )
    return float(np.sqrt(np.square(blurred[valid] / weight[valid][:, None]).mean()))


def visible_error(clip: Clip, frames: np.ndarray, i: int, j: int) -> float:
    """The warp error of frames i and j, as far as the source shows how it moves.

    What an edit puts on a surface that is plain in the source may move with it or stand still: no one can
    tell which is right. There the error is the lesser of the one along the motion and the one without any.
    """
    motion, seen = clip.find_flow(i, j)
    layers, later = clip.find_layers(i), clip.find_layers(j)
    total = 0.0
    for layer in np.unique(layers[seen]):
        here = seen & (layers == layer)
        error = warp_error(frames[i], frames[j], motion, here)
        stands = (layers == layer) & (later == layer)
        if layer in clip.plain_layers and stands.any():
            error = min(error, warp_error(frames[i], frames[j], np.zeros_like(motion), stands))
        total += error * here.sum()
    return total / seen.sum()


def gradient_by_spread(frames: np.ndarray) -> float:
    """Gradient energy over the variance of colours within frames: in 1 / pixel^2, means over channels.

    It tells detail from contrast: more contrast or saturation raises both alike, blur lowers the gradients
    alone. frames: uint8 (N, H, W, 3).
    """
    gradients = (np.gradient(frame.astype(np.float32), axis=(0, 1)) for frame in frames)
    energy = np.mean([np.mean(np.square(dy) + np.square(dx)) for dy, dx in gradients])
    return float(energy / np.var(frames, axis=(1, 2)).mean())


def colour_drift(clip: Clip, frames: np.ndarray) -> float:
    """How far the mean colours of object and background are apart in the first and in the last frames.

    Root mean square over both layers and three channels, in grey levels.
    """

    def colours(times: range) -> np.ndarray:
        masks = np.stack([render(clip.scene, time, SIZE)[1] for time in times])
        shown = frames[times.start : times.stop]
        return np.stack([shown[masks].mean(0), shown[~masks].mean(0)])  # layers 3

    first, last = range(ENDS), range(clip.n_frames - ENDS, clip.n_frames)
    return float(np.sqrt(np.square(colours(first) - colours(last)).mean()))


def find_reconstruction_psnr(inverted: Path) -> float:
    """PSNR in dB, mean over frames, of an inversion's reconstruction against the VAE's round trip."""
    frames = range(len(list((inverted / "vae").iterdir())))
    sampled, encoded = (load_frames(inverted / name, frames) for name in ("frames", "vae"))
    return float(np.mean(frame_psnr(sampled, encoded)))


def along_motion(
    metric: Callable[..., float], clip: Clip, frames: np.ndarray, gap: int
) -> np.ndarray:
    """A `metric` such as `warp_error` of each frame and the one `gap` later, along the exact flow."""
    pairs = [(i, i + gap) for i in range(clip.n_frames - gap)]
    return np.array([metric(frames[i], frames[j], *clip.find_flow(i, j)) for i, j in pairs])


def add_sharpness(row: Row, frame_by_frame: Row) -> Row:
    """A clip's measures and, as `sharpness`, its gradient energies relative to those of another edit.

    That is the same edit of the same clip made frame by frame, which nothing but the model has blurred:
    1 is as sharp, less is softer.
    """
    relative = {
        key.replace("gradient", "sharpness"): value / frame_by_frame[key]
        for key, value in row.items()
        if key.startswith("gradient")
    }
    return row | relative


def summarize(rows: list[Row]) -> Row:
    """The mean of every number in rows of the same keys, without those that are None, and its standard error.

    Under `<key>_se` is the rows' standard deviation (of n - 1 degrees of freedom) / sqrt(n), which takes rows
    as independent; None of fewer than two.
    """
    summary = {}
    for key in rows[0]:
        values = [row[key] for row in rows if row[key] is not None]
        summary[key] = float(np.mean(values)) if values else None
        several = len(values) > 1
        summary[f"{key}_se"] = (
            float(np.std(values, ddof=1) / len(values) ** 0.5) if several else None
        )
    return summary


def compare(rows: list[Row], base: list[Row]) -> Row:
    """The summary of what `rows` have more than `base`, a list of the same clips in the same order.

    Clips differ more than methods do. In differences within each clip that cancels out, so their standard
    error says how sure a difference is, which the standard errors of two means do not.
    """
    paired = [
        {key: row[key] - other[key] if None not in (row[key], other[key]) else None for key in row}
        for row, other in zip(rows, base, strict=True)
    ]
    return summarize(paired)
