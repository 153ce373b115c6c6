"""The motion of the source, and consensus and fusion: averages along it."""

import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from reference import average_by_hand, carry_by_hand
from test_tokenflow import edit_of, source_of, video_of
from torch.nn import functional as F

from tokenflow.config import PnPConfig
from tokenflow.editing.checkpoint import EditCheckpoint
from tokenflow.editing.consensus import DISTANCES, Consensus, choose_steps
from tokenflow.editing.denoise import TokenFlowDenoiser, denoise
from tokenflow.editing.source import Source, find_flow, open_motion
from tokenflow.motion.averaging import average, carry, find_reliability, warp
from tokenflow.motion.dense import DenseMotion
from tokenflow.motion.fusion import FLICKER, Fusion
from tokenflow.motion.to_keyframes import FlowToKeyframes, find_furthest_keyframe
from tokenflow.runtime.distributed import Processes

CPU = torch.device("cpu")


def fusion_of(source: np.ndarray, distances: tuple[int, ...], folder: Path) -> Fusion:
    """A fusion along the motion of a source, uint8 RGB (N, H, W, 3), with its files in a folder."""
    n_frames, shape = len(source), (*source.shape[1:3], 3)
    motion = DenseMotion(folder / "motion", source.__getitem__, n_frames, n_frames, shape)
    fusion = Fusion(motion, distances, folder / "pictures.npy", Processes(CPU))
    fusion.begin()
    return fusion


def test_the_average_equals_the_reference():
    generator = torch.Generator().manual_seed(0)
    frame = torch.rand(3, 9, 7, generator=generator)
    others = torch.rand(2, 3, 9, 7, generator=generator)
    weights = torch.rand(2, 9, 7, generator=generator)
    flows = 6 * torch.rand(2, 9, 7, 2, generator=generator) - 3  # some leave the frame
    expected = average_by_hand(frame, others, flows, weights)
    result = average(frame, warp(others, flows), weights)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_what_is_carried_equals_the_reference():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 4, 6, 5, generator=generator)
    motion = 20 * torch.rand(2, 24, 20, 3, generator=generator) - 10  # pixels; some leave the frame
    motion[..., 2] = torch.rand(2, 24, 20, generator=generator)
    result = carry(values, motion, torch.tensor([1, 2]))
    torch.testing.assert_close(result, carry_by_hand(values, motion, [1, 2]), rtol=0, atol=1e-4)
    motion[..., 2] = 0  # nothing can be relied on
    assert (carry(values, motion, torch.tensor([1, 2])) == 0).all()


def test_what_is_hidden_is_unreliable():
    """A square that moves by 12 pixels hides what is there, and shows what was behind it."""
    frame, other = (np.full((64, 64, 3), 90, np.uint8) for _ in range(2))
    frame[20:40, 10:30] = other[20:40, 22:42] = 200
    flow = np.zeros((64, 64, 2), np.float32)
    back = flow.copy()
    flow[20:40, 10:30, 0], back[20:40, 22:42, 0] = 12, -12
    reliable = find_reliability(frame, other, flow, back)
    assert (reliable[22:38, 12:26] > 0.95).all() and (reliable[:15] > 0.95).all()
    assert (reliable[24:36, 33:39] < 0.05).all()  # is hidden by the square
    brighter = np.full_like(other, 200)
    assert (find_reliability(frame, brighter, 0 * flow, 0 * back)[50:] < 0.05).all()


def test_flicker_goes_and_detail_stays(texture, tmp_path):
    """Frames with noise of their own are averaged: less noise, and no blur."""
    noise = np.random.default_rng(0).normal(0, 20, texture.shape)
    noisy = (texture + noise).clip(0, 255).astype(np.uint8)
    fusion = fusion_of(texture, (1, 2), tmp_path)
    fusion.put(torch.arange(6), noisy)
    result = fusion.average(torch.arange(6), CPU)
    inner = np.s_[:, 12:-12, 12:-12]

    def error(frames: np.ndarray) -> float:
        return np.sqrt(np.square(frames.astype(float) - texture)[inner].mean())

    assert error(result) < 0.6 * error(noisy)
    fusion.put(torch.arange(6), texture)
    assert error(fusion.average(torch.arange(6), CPU)) < 2  # grey levels


def test_what_does_not_follow_the_source_is_not_smeared(texture, tmp_path):
    """Stripes that stand still, while the source moves across them, stay stripes."""
    fusion = fusion_of(texture, (1,), tmp_path)
    columns = np.arange(64) // 2 % 2
    stripes = np.zeros_like(texture) + np.uint8(60 + 140 * columns)[:, None]
    fusion.put(torch.arange(6), stripes)

    def contrast(tolerance: float | None) -> float:
        return fusion.average(torch.arange(6), CPU, tolerance)[1:5, 20:44, 20:44].std() / 70

    assert contrast(FLICKER) > 0.98
    assert contrast(None) < 0.6


def test_motion_is_found_once_and_mended(texture, tmp_path, monkeypatch):
    """Motion is read where it was kept; that of a pair whose file is damaged is found again."""
    found, measure = [], DenseMotion.measure

    def count(self, *frames):
        found.append([int(np.where((texture == frame).all((1, 2, 3)))[0][0]) for frame in frames])
        return measure(self, *frames)

    monkeypatch.setattr(DenseMotion, "measure", count)
    motion = fusion_of(texture, (2,), tmp_path).motion
    assert found == [[0, 2], [1, 3], [2, 4], [3, 5]]
    there, back = motion.read(1, 3)[20:40, 20:40], motion.read(3, 1)[20:40, 20:40]
    expected = torch.tensor([4.0, 2.0])
    torch.testing.assert_close(there[..., :2].float().mean((0, 1)), expected, rtol=0, atol=0.1)
    torch.testing.assert_close(back[..., :2].float().mean((0, 1)), -expected, rtol=0, atol=0.1)
    assert (there[..., 2] > 0.9).float().mean() > 0.9

    path = tmp_path / "motion" / "2.npy"
    stored = path.read_bytes()
    damaged = bytearray(stored)
    damaged[len(stored) // 4] ^= 1  # in the second of six rows
    path.write_bytes(damaged)
    fusion_of(texture, (1, 2), tmp_path)
    expected = [[first, first + 1] for first in range(5)] + [[1, 3]]
    assert sorted(found[4:]) == sorted(expected) and path.read_bytes() == stored


def test_motion_of_a_read_only_inversion_is_kept_elsewhere(texture, monkeypatch, tmp_path):
    inversion = SimpleNamespace(folder=tmp_path / "inversion", source_frame=texture.__getitem__)
    inversion.manifest = SimpleNamespace(n_frames=9, config={"H": 64, "W": 64})
    inversion.latents = lambda name: torch.empty(9, 4, 8, 8)
    for writable, parent in ((True, "inversion"), (False, "edit")):
        monkeypatch.setattr(os, "access", lambda *_, writable=writable: writable)
        source, elsewhere = Source(inversion, 5), tmp_path / "edit"
        flow = find_flow(source, PnPConfig(data_path="", prompt="x"), Processes(CPU), elsewhere)
        assert flow.folder == tmp_path / parent / "flow" and (flow.folder / "1.npy").is_file()
        pairs = open_motion(source, elsewhere)
        assert pairs.folder == tmp_path / parent / "motion"
        assert (pairs.n_frames, pairs.n_used, pairs.shape) == (9, 5, (64, 64, 3))


def test_flow_to_keyframes(texture, tmp_path):
    """In cells of the latents; it fails where it leaves the frame, or leads too far."""
    flow = FlowToKeyframes(
        tmp_path, texture.__getitem__, 6, 6, (16, 16, 2), cell=4, max_displacement=50.0
    )
    flow.create(range(1, find_furthest_keyframe(2, 6) + 1), Processes(CPU))
    at, others = torch.tensor([1, 3]), torch.tensor([[0, 3], [1, 3]])
    flows = flow.find_between(at, others)
    middle = flows.flatten(2, 3).nanmedian(dim=2).values
    expected = torch.tensor([[[-0.5, -0.25], [1, 0.5]], [[-1, -0.5], [0, 0]]])
    torch.testing.assert_close(middle, expected, atol=0.1, rtol=0)
    assert flows.isfinite().float().mean() > 0.8
    assert flows[0, 1, :, -1].isnan().all()
    near = replace(flow, max_displacement=4.0).find_between(at, others)  # pixels, of 4.5
    assert near[1, 0].isnan().all() and torch.equal(
        near[0, 0].nan_to_num(9), flows[0, 0].nan_to_num(9)
    )


def test_pictures_without_neighbours_stay(texture, tmp_path):
    fusion = fusion_of(texture[:2], (3, 6), tmp_path)
    fusion.put(torch.arange(2), texture[:2])
    assert np.array_equal(fusion.average(torch.arange(2), CPU), texture[:2])


def test_consensus_comes_late():
    assert choose_steps(20, 3) == [12, 15, 18]
    assert choose_steps(50, 3) == [30, 39, 48]
    assert choose_steps(50, 1) == [48]
    assert choose_steps(50, 0) == []
    assert choose_steps(3, 10) == [1]


class Blocks:
    """In place of a Stable Diffusion: a latent is the colour of 8 by 8 pixels, and a fourth number, 0."""

    device, decoded = CPU, 0

    def decode_latents(self, latents):
        self.decoded += len(latents)
        pixels = latents[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2)
        return pixels.round().byte().permute(0, 2, 3, 1).numpy()

    def encode_frames(self, frames):
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
        return F.pad(F.avg_pool2d(pixels, 8), (0, 0, 0, 0, 0, 1))

    def latent_shape(self, n_frames, height, width):
        return n_frames, 4, height // 8, width // 8


def test_frames_between_those_that_agree_go_along(texture, tmp_path):
    """Six grey frames, of which the first and the fourth agree on the middle between the two."""
    blocks, fusion = Blocks(), fusion_of(texture, DISTANCES, tmp_path)
    for name in ("pictures.npy", "corrections.npy"):  # of a killed run
        (tmp_path / name).write_bytes(b"damaged")
    every = Consensus(blocks, fusion, [5, 7, 9])
    grey = torch.tensor([60.0, 110, 50, 120, 100, 90])

    def moved_by(step):
        consensus = every.at(step)
        for frames in torch.arange(6).split(4):
            clean = grey[frames].view(-1, 1, 1, 1).expand(-1, 4, 8, 8)
            consensus.note(frames, clean)
        moved = torch.zeros(6, 4, 8, 8)
        for frames, correction in consensus.find_corrections(4):
            moved[frames] = correction
        return moved[:, :3, 2:-2, 2:-2].mean((1, 2, 3))

    expected = torch.tensor([30.0, 10, -10, -30, -30, -30])  # none is known beyond the fourth
    torch.testing.assert_close(moved_by(5), expected, rtol=0, atol=1)
    assert blocks.decoded == 2
    # The next one asks the second and the fifth, and the last one asks all.
    expected = torch.tensor([-5.0, -5, -5 / 3, 5 / 3, 5, 5])
    torch.testing.assert_close(moved_by(7), expected, rtol=0, atol=1)
    expected = torch.tensor([30.0, -5, 20, -30, 5, -20])
    torch.testing.assert_close(moved_by(9), expected, rtol=0, atol=1)
    assert blocks.decoded == 2 + 2 + 6
    assert every.at(6) is None


class Nudge:
    """In place of a `Consensus`: moves all clean latents by one half after the last of ten steps."""

    steps = (9,)

    def __init__(self):
        self.noted = torch.empty(7, 4, 16, 16)

    def at(self, step):
        return self if step == 9 else None

    def note(self, frames, clean):
        self.noted[frames] = clean

    def find_corrections(self, size):
        for frames in torch.arange(7).split(size):
            yield frames, torch.full((len(frames), 4, 16, 16), 0.5)


@torch.no_grad()
def test_a_consensus_moves_the_clean_latents(sd, tmp_path):
    source, latents = video_of(7)
    edit, nudge = edit_of(sd, source_of(source), latents), Nudge()
    before, plain, moved = (torch.empty(7, 4, 16, 16) for _ in range(3))
    for consensus, result in ((None, plain), (nudge, moved)):
        folder = tmp_path / str(consensus is None)
        checkpoint = EditCheckpoint(folder, latents.shape, Processes(CPU))
        with TokenFlowDenoiser.install(replace(edit, consensus=consensus)) as denoiser:
            for done in denoise(denoiser, checkpoint):
                if done == 9:
                    before[:] = checkpoint.latents(9)[torch.arange(7)]
        result[:] = checkpoint.latents(10)[torch.arange(7)]
    last, end = edit.technique.schedule.alphas[-2:]
    torch.testing.assert_close(moved, plain + 0.5 * math.sqrt(end))
    noise = (before - math.sqrt(last) * nudge.noted) / math.sqrt(1 - last)
    expected = math.sqrt(end) * nudge.noted + math.sqrt(1 - end) * noise
    torch.testing.assert_close(plain, expected, atol=1e-4, rtol=1e-4)
