"""Contact sheets: videos as one picture that a person can judge."""

import textwrap
from collections.abc import Iterable

import cv2
import numpy as np

LABEL_HEIGHT, MARGIN = 18, 4  # pixels: of a line of text, and to its left
THUMBNAIL = 160  # pixels, the longer side of a frame in a report's contact sheet
MOST_LINES = 16  # of a label
WHITE = 255


def moments(n_frames: int, columns: int = 8) -> list[int]:
    """Indices of at most `columns` frames spread evenly over a video."""
    return np.unique(np.linspace(0, n_frames - 1, columns).round().astype(int)).tolist()


def thumbnails(frames: Iterable[np.ndarray], n_frames: int) -> np.ndarray:
    """The frames (H, W, 3) of a video at its `moments`, made small: uint8 RGB (n, h, w, 3)."""
    shown = moments(n_frames)
    return np.stack([shrink(frame) for index, frame in enumerate(frames) if index in shown])


def shrink(frame: np.ndarray) -> np.ndarray:
    """A frame (H, W, 3) whose longer side is at most `THUMBNAIL`."""
    scale = THUMBNAIL / max(frame.shape[:2])
    size = [max(1, round(n * scale)) for n in (frame.shape[1], frame.shape[0])]
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA) if scale < 1 else frame


def contact_sheet(rows: dict[str, np.ndarray], title: str = "") -> np.ndarray:
    """A picture of several stacks of uint8 RGB frames (n, H, W, 3), one labelled row for each."""
    strips = {label: np.concatenate(frames, axis=1) for label, frames in rows.items()}
    width = max(strip.shape[1] for strip in strips.values())
    sheet = [_label(title, width)] if title else []
    for label, strip in strips.items():
        rest = ((0, 0), (0, width - strip.shape[1]), (0, 0))
        sheet += [_label(label, width), np.pad(strip, rest, constant_values=WHITE)]
    return np.concatenate(sheet)


def _label(text: str, width: int) -> np.ndarray:
    """Text as a picture, uint8 RGB, `width` pixels wide. Of endless text, the middle is left out."""
    text = "".join(c if c.isprintable() else " " for c in text)
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.42
    (needed, _), _ = cv2.getTextSize(text, font, scale, 1)
    # Letters differ in width: a tenth is left for lines of wide ones.
    share = min(1.0, 0.9 * (width - 2 * MARGIN) / max(1, needed))
    lines = textwrap.wrap(text, max(1, int(share * len(text)))) if share < 1 else [text]
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES // 2], "...", *lines[1 - MOST_LINES // 2 :]]
    label = np.full((LABEL_HEIGHT * len(lines), width, 3), WHITE, np.uint8)
    for index, line in enumerate(lines, 1):
        at = (MARGIN, LABEL_HEIGHT * index - 5)
        cv2.putText(label, line, at, font, scale, (0, 0, 0), 1, cv2.LINE_AA)
    return label
