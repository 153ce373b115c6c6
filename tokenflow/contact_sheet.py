"""Contact sheets: videos as one picture that a person can judge."""

import cv2
import numpy as np

LABEL_HEIGHT = 18  # pixels
WHITE = 255


def moments(n_frames: int, columns: int = 8) -> list[int]:
    """Indices of at most `columns` frames spread evenly over a video."""
    return np.unique(np.linspace(0, n_frames - 1, columns).round().astype(int)).tolist()


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
    label = np.full((LABEL_HEIGHT, width, 3), WHITE, np.uint8)
    at, font = (4, LABEL_HEIGHT - 5), cv2.FONT_HERSHEY_SIMPLEX
    return cv2.putText(label, text, at, font, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
