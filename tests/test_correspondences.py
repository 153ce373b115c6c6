"""Correspondences along the optical flow: against the slow reference, and properties that must hold."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_tokenflow import assert_same_noise, edit_of, predicted, record, source_of, video_of

from tokenflow.motion.to_keyframes import FlowToKeyframes, find_furthest_keyframe
from tokenflow.propagation.cache import BlendedRows
from tokenflow.propagation.correspondences import (
    FlowCorrespondences,
    find_correspondences,
    follow_flow,
)
from tokenflow.runtime.distributed import Processes

CPU = torch.device("cpu")
CELLS = 16  # of the latents, on each side


def constant(dx, dy):
    """A flow (h, w, 2) in cells that is the same everywhere."""
    return torch.tensor([dx, dy], dtype=torch.float16).expand(CELLS, CELLS, 2)


def flow_between(frame, other):
    """A flow (h, w, 2) in cells that moves and fails in other places for each pair of frames."""
    generator = torch.Generator().manual_seed(100 * frame + other)
    flow = 6 * torch.rand(CELLS, CELLS, 2, generator=generator) - 3
    fails = torch.rand(CELLS, CELLS, 1, generator=generator) < 0.3
    return flow.masked_fill(fails, torch.nan) if frame != other else constant(0, 0).float()


class Motion:
    """In place of a `FlowToKeyframes`."""

    def find_between(self, frames, others):
        pairs = zip(frames.tolist(), others.tolist(), strict=True)
        return torch.stack([torch.stack([flow_between(f, o) for o in row]) for f, row in pairs])


@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_whole_tokens(side):
    """No motion leads to the same token, and a motion by whole tokens to the token so far away."""
    n = CELLS // side
    grid = torch.arange(n * n).view(n, n)
    assert follow_flow(constant(0, 0), n * n).tolist() == grid.flatten().tolist()
    moved = follow_flow(constant(side, -side), n * n).view(n, n)  # to the right, and up
    assert torch.equal(moved[1:, :-1], grid[:-1, 1:])
    assert torch.equal(moved[0], moved[0].clamp(max=n - 1))  # the border goes on outside
    barely = follow_flow(constant(0.49 * side, -0.49 * side), n * n)
    assert torch.equal(barely, grid.flatten())
    assert (follow_flow(constant(math.nan, math.nan), n * n) == -1).all()


def test_only_what_the_flow_loses_is_searched():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 64, 6, generator=generator)
    keys = torch.nn.functional.normalize(torch.randn(4, 64, 6, generator=generator), dim=-1)
    rows, weights = torch.tensor([[2, 0], [0, 3], [3, 1]]), torch.tensor([[0.5, 0.5]] * 3)
    weights[1] = torch.tensor([1.0, 0.0])
    found = find_correspondences(tokens, keys, BlendedRows.of(rows, weights, CPU))
    targets = torch.randint(64, (3, 2, 64), generator=generator)
    fails = torch.rand(3, 2, 64, generator=generator) < 0.4
    along_flow = FlowCorrespondences.of(targets.masked_fill(fails, -1), rows, weights, CPU)
    expected = torch.where(fails, found, targets)
    assert torch.equal(along_flow.find(tokens, keys), expected)
    assert torch.equal(along_flow.complete(found), expected)
    searched = sum(len(places) for places in along_flow.places.values())
    assert searched == (fails & (weights > 0)[..., None]).sum()
    nowhere = FlowCorrespondences.of(torch.full((3, 2, 64), -1), rows, weights, CPU)
    assert torch.equal(nowhere.find(tokens, keys), found)


@pytest.mark.parametrize("propagation, window", [("flanking", 14), ("previous", 7)])
@torch.no_grad()
def test_equals_reference(sd, propagation, window):
    source, latents = video_of(13)
    sizes = {"batch_size": 2, "keyframe_interval": 2, "keyframe_window": window}
    along = source_of(source, flow=Motion())
    edit = edit_of(sd, along, latents, propagation=propagation, **sizes)
    ours = predicted(edit, latents)
    assert_same_noise(ours, edit, source, latents, motion=flow_between)
    plain = predicted(
        edit_of(sd, source_of(source), latents, propagation=propagation, **sizes), latents
    )
    assert (ours - plain).square().mean() > 1e-4 * plain.square().mean()


@pytest.mark.parametrize("together", [True, False])
@torch.no_grad()
def test_kept_source_features_equal_the_reference(sd, tmp_path, monkeypatch, together):
    """What the flow loses takes the correspondences that the inversion kept."""
    monkeypatch.setattr("tokenflow.editing.denoise.FILLED_CPU", 1 << 12 if together else 1)
    source, latents = video_of(9)
    files, _ = record(sd, tmp_path, source, 3, batch_size=9, chunk=9)
    known = source_of(source, files, Motion())
    edit = edit_of(sd, known, latents, keyframe_interval=3)
    ours = predicted(edit, latents)
    assert_same_noise(ours, edit, source, latents, tolerance=1e-2, motion=flow_between)


def textured(n_frames, dx, dy):
    """Frames of a smooth texture that moves by (dx, dy) pixels a frame: uint8 RGB (n, 128, 128, 3)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 32, 32, generator=generator)
    texture = torch.nn.functional.interpolate(coarse, (256, 256), mode="bicubic").clamp(0, 1)[0]
    corners = [(64 - dy * n, 64 - dx * n) for n in range(n_frames)]
    crops = torch.stack([texture[:, y : y + 128, x : x + 128] for y, x in corners])
    return (255 * crops).round().byte().permute(0, 2, 3, 1).numpy()


def test_the_sources_motion_is_found_once_and_kept(tmp_path, monkeypatch):
    frames, asked, measure = textured(5, 8, 0), [], FlowToKeyframes.measure

    def count(self, *pair):
        asked.append(tuple(np.flatnonzero((frames == one).all((1, 2, 3))).item() for one in pair))
        return measure(self, *pair)

    monkeypatch.setattr(FlowToKeyframes, "measure", count)
    flow = FlowToKeyframes(
        tmp_path / "flow",
        frames.__getitem__,
        n_frames=5,
        n_used=5,
        shape=(CELLS, CELLS, 2),
        cell=8,
        max_displacement=50.0,
    )
    apart = range(1, find_furthest_keyframe(2, 5) + 1)
    flow.create(apart, Processes(CPU))
    at, others = torch.tensor([1, 3]), torch.tensor([[0, 2], [1, 3]])
    flows = flow.find_between(at, others)
    assert asked == [(0, 1), (1, 2), (1, 3)]
    middle = flows.flatten(2, 3).nanmedian(dim=2).values
    expected = torch.tensor([[[-1.0, 0], [1, 0]], [[-2, 0], [0, 0]]])
    torch.testing.assert_close(middle, expected, atol=0.1, rtol=0)
    assert flows.isfinite().float().mean() > 0.8
    assert flows[0, 1, :, -1].isnan().all()  # leaves the frame
    again = flow.find_between(at, others)
    assert torch.equal(again.nan_to_num(99), flows.nan_to_num(99)) and len(asked) == 3
    near = replace(flow, max_displacement=12.0).find_between(at, others)  # 16 pixels are further
    assert near[1, 0].isnan().all() and torch.equal(near[0].nan_to_num(99), flows[0].nan_to_num(99))

    path = tmp_path / "flow" / "2.npy"
    stored = path.read_bytes()
    damaged = bytearray(stored)
    damaged[3 * len(stored) // 10] ^= 1  # in the middle of the second of five rows
    path.write_bytes(damaged)
    flow.create(apart, Processes(CPU))
    mended = flow.find_between(at, others)
    assert torch.equal(mended.nan_to_num(99), flows.nan_to_num(99)) and asked[3:] == [(1, 3)]
    assert path.read_bytes() == stored
