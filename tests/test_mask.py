"""Masks: where an edit may change the video."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_consensus import CPU, fusion_of
from videos import store_turned, turn, write_frames

from tokenflow.editing.mask import Mask, check_mask, draw_to_edges, read_mask, write_mask
from tokenflow.errors import UserError
from tokenflow.inversion.frames import FrameChoice
from tokenflow.runtime.frame_array import FrameArray
from util import save_frames

FRAMES = torch.arange(3)
CHOICE = FrameChoice(H=64, W=64, resize="crop", start_frame=1, stride=2)


def test_a_given_mask_is_read_as_the_source_was(tmp_path):
    """White squares that move by 8 pixels a frame, on black, in one frame too few."""
    pictures = np.zeros((5, 64, 64, 3), np.uint8)
    for index, picture in enumerate(pictures):
        picture[8:24, 8 * index : 8 * index + 16] = 255
    save_frames(tmp_path, 0, pictures)
    check_mask(tmp_path, CHOICE, 2)
    for index, mask in enumerate(read_mask(tmp_path, CHOICE, 2)):
        assert np.array_equal(mask, pictures[1 + 2 * index, ..., 0] > 0)
    with pytest.raises(UserError, match="mask: .* has 2 frames for 3 of .*, from start_frame 1"):
        check_mask(tmp_path, CHOICE, 3)


def test_a_mask_that_a_phone_turned(tmp_path, clip_frames):
    path = write_frames(tmp_path / "phone.mov", store_turned(clip_frames[:, :48]))
    turn(path)
    choice = FrameChoice(H=48, W=64, resize="crop", start_frame=0, stride=1)
    assert [mask.shape for mask in read_mask(path, choice, 7)] == [(48, 64)] * 7


def test_relevance_ends_where_the_picture_has_an_edge():
    """Relevance that rises over four latents becomes a step at the edge of the picture's bright half."""
    bright = (torch.arange(128) >= 52).float().expand(128, 128)
    blurred = (torch.arange(128) - 36).div(32).clamp(0, 1).expand(128, 128)
    noise = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0)) / 50
    drawn = draw_to_edges(blurred, bright + noise, 8)
    assert torch.equal((drawn >= 0.5).float(), bright)
    assert (blurred[:, 51] > 0.45).all() and drawn[:, 51].max() < 0.35


def test_a_flickering_mask_is_steadied(tmp_path):
    """Of nine still frames one misses the place, which its neighbours know, and an edge ends."""
    source = np.random.default_rng(0).integers(0, 60, (64, 64, 3), np.uint8)
    source[16:40, 16:40] += 190
    fusion = fusion_of(source[None].repeat(9, 0), (1, 2), tmp_path)
    differences = torch.full((9, 1, 8, 8), 0.02)
    differences[:, :, 2:5, 2:5] = 0.2
    differences[4] = 0.02
    inside = FrameArray.create(tmp_path / "mask.npy", (9, 1, 64, 64), torch.uint8)
    write_mask(inside, differences, SimpleNamespace(picture=lambda _: source), fusion, CPU)
    expected = torch.zeros(64, 64, dtype=torch.uint8)
    expected[16:40, 16:40] = 1
    assert all(torch.equal(mask[0], expected) for mask in inside[torch.arange(9)])


def test_outside_stays_the_source(tmp_path):
    """Latents of which a pixel is inside are edited; around the inside pixels pass into the source's."""
    inside = FrameArray.create(tmp_path / "mask.npy", (3, 1, 16, 24), torch.uint8)
    shape = torch.zeros(3, 1, 16, 24)
    shape[..., 2:9, :7] = 1
    inside[FRAMES] = shape
    source = np.full((16, 24, 3), 7, np.uint8)

    video = SimpleNamespace(picture=lambda frame: source + frame)
    video.latents = lambda t, frames: torch.full((len(frames), 4, 2, 3), float(t))
    mask = Mask(inside, video)
    confined = mask.confine(torch.ones(3, 4, 2, 3), 7, FRAMES)
    expected = torch.tensor([[1.0, 7.0, 7.0], [1.0, 7.0, 7.0]]).expand(3, 4, 2, 3)
    assert torch.equal(confined, expected)

    pictures = mask.compose(np.full((2, 16, 24, 3), 207, np.uint8), torch.tensor([2, 0]))
    for picture, outside in zip(pictures, (9, 7), strict=True):
        assert (picture[2:9, :7] == 207).all()
        assert (picture[11:] == outside).all() and (picture[:, 9:] == outside).all()
        assert 207 > picture[4, 7, 0] > picture[4, 8, 0] > outside
