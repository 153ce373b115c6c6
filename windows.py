"""Long videos: keyframes are edited in windows, so that cost grows with their number, not its square.

A window's keyframes attend to each other and to a few anchors, keyframes spread over the whole video,
which hold the look. Neighbouring windows share the keyframe between them: it is edited once, with the
anchors alone, so that what is propagated on its two sides is the same.
"""

import itertools
from dataclasses import dataclass

import torch

from tokenflow_utils import Blend

ANCHORS = 4


@dataclass(frozen=True, eq=False)
class Window:
    """Positions among the keyframes, ascending, and the frames (n,) that blend no others."""

    keyframes: list[int]
    frames: torch.Tensor


def anchors(n_keyframes: int) -> list[int]:
    """Positions of the anchors among a video's keyframes: the first, the last, and some between."""
    return torch.linspace(0, n_keyframes - 1, ANCHORS).round().long().unique().tolist()


def windows(blend: Blend, n_keyframes: int, size: int) -> list[Window]:
    """As few windows as hold all keyframes; neighbours share one.

    size: keyframes that attend to each other, at most; in several windows the anchors are among them.
    blend: of all frames of the video.
    """
    bounds = window_bounds(n_keyframes, size)
    window = torch.searchsorted(torch.tensor(bounds), blend.keyframes.amin(1), right=True) - 1
    window = window.clamp(max=len(bounds) - 2)  # the last keyframe begins no window
    return [
        Window(list(range(first, last + 1)), (window == index).nonzero().flatten())
        for index, (first, last) in enumerate(itertools.pairwise(bounds))
    ]


def window_bounds(n_keyframes: int, size: int) -> list[int]:
    """Positions among the keyframes at which windows begin and end, from 0 to the last."""
    own = size if n_keyframes <= size else size - ANCHORS
    n_windows = max(1, -(-(n_keyframes - 1) // (own - 1)))
    return torch.linspace(0, n_keyframes - 1, n_windows + 1).round().long().tolist()
