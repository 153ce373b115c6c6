"""Long videos: keyframes are edited in windows, so that the cost is linear in their number.

A window's keyframes attend to each other and to a few anchors: keyframes spread over the whole video,
which keep its look the same. Neighbouring windows share one keyframe. It is edited once and attends to
the anchors alone, so that both windows propagate the same outputs from it.

Keyframes are named by their position among the keyframes of a timestep.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenflow_utils import Blend, JointEdit

ANCHORS = 4


@dataclass(frozen=True, eq=False)
class Window:
    """Neighbouring keyframes, ascending, and the frames (n,) that blend only these."""

    positions: list[int]
    frames: torch.Tensor


def choose_anchors(n_keyframes: int) -> list[int]:
    """The anchors among a video's keyframes: the first, the last, and some between."""
    return torch.linspace(0, n_keyframes - 1, ANCHORS).round().long().unique().tolist()


def divide_into_windows(blend: Blend, n_keyframes: int, size: int) -> list[Window]:
    """The fewest windows that hold all keyframes; neighbouring windows share one.

    size: largest number of keyframes that attend to each other; of several windows each includes the anchors.
    blend: of all frames of the video.
    """
    bounds = find_window_bounds(n_keyframes, size)
    window = torch.searchsorted(torch.tensor(bounds), blend.positions.amin(1), right=True) - 1
    window = window.clamp(max=len(bounds) - 2)  # the last keyframe begins no window
    return [
        Window(list(range(first, last + 1)), (window == index).nonzero().flatten())
        for index, (first, last) in enumerate(itertools.pairwise(bounds))
    ]


def find_window_bounds(n_keyframes: int, size: int) -> list[int]:
    """The first keyframe of each window, and the last keyframe of the last window."""
    own = size if n_keyframes <= size else size - ANCHORS
    n_windows = max(1, -(-(n_keyframes - 1) // (own - 1)))
    return torch.linspace(0, n_keyframes - 1, n_windows + 1).round().long().tolist()


def find_shared(window: Window, n_keyframes: int) -> list[int]:
    """The keyframes that a window shares with others: the anchors, then its first and last."""
    return list(
        dict.fromkeys([*choose_anchors(n_keyframes), window.positions[0], window.positions[-1]])
    )


def plan_joint_edits(window: Window, n_keyframes: int, edited: Sequence[int]) -> list[JointEdit]:
    """The passes that edit a window's keyframes: the anchors, each end, and the rest.

    edited: keyframes that are in the cache and need not pass again.
    """
    if len(window.positions) == n_keyframes:
        return [JointEdit(window.positions)]
    shared, anchors = find_shared(window, n_keyframes), choose_anchors(n_keyframes)
    # The ends attend to the anchors alone, so that the two windows of an end edit it alike.
    plan = [
        (anchors, []),
        *(([end], anchors) for end in shared[len(anchors) :]),
        (window.positions, shared),
    ]
    passes, edited = [], list(edited)
    for group, attended in plan:
        if new := [position for position in group if position not in edited]:
            passes.append(JointEdit(new, attended, attended_later=attended is not shared))
            edited += new
    return passes
