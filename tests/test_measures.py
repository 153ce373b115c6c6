"""What the benchmarks measure, held to videos whose measures are known, and to sums done by hand."""

from argparse import ArgumentTypeError
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from benchmarks import quality
from benchmarks.clips import held_out_clips
from benchmarks.kept import keep, kept_path
from benchmarks.measures import (
    add_sharpness,
    along_motion,
    compare,
    drift,
    gradient_by_spread,
    measure,
    summarize,
    visible_error,
)
from benchmarks.meter import Meter
from benchmarks.methods import Method, parse_methods
from tokenflow.evaluation.metrics import gradient_energy, warp_error


@pytest.fixture(scope="module")
def moving():
    """A held-out clip whose object and background move."""
    return held_out_clips(1, 20)[0]


def test_gradient_energy_is_that_of_a_ramp_of_stripes_and_of_noise():
    ramp = np.broadcast_to(3 * np.arange(40)[:, None, None], (2, 40, 30, 3)).astype(np.uint8)
    assert gradient_energy(ramp) == pytest.approx(9)
    # In squares of two pixels, each pixel has one neighbour of the other tone in each direction, except
    # the outermost: their neighbour has the same.
    rows, columns = np.indices((42, 42)) // 2 % 2
    squares = np.repeat(10 * (rows ^ columns)[..., None], 3, -1).astype(np.uint8)
    assert gradient_energy(squares[None]) == pytest.approx(2 * 5**2 * 40 / 42)
    noise = np.random.default_rng(0).normal(128, 10, (1, 200, 200, 1)).round().astype(np.uint8)
    assert gradient_energy(noise.repeat(3, -1)) == pytest.approx(100, rel=0.05)


def test_drift_is_the_rise_of_brightness_and_not_detail_that_flickers(moving):
    """2 grey levels a frame are 32 in 16; as much in random pixels is a warp error and no drift."""
    dimmed = (moving.frames * 0.8).astype(int)
    rising = (dimmed + 2 * np.arange(20)[:, None, None, None]).astype(np.uint8)
    still = along_motion(drift, moving, dimmed.astype(np.uint8), 16)
    assert still.max() < 1
    assert along_motion(drift, moving, rising, 16) == pytest.approx(32, abs=1)
    sign = np.random.default_rng(0).choice([-16, 16], (20, 128, 128, 1))
    flickering = (dimmed + 20 + sign).astype(np.uint8)
    assert along_motion(drift, moving, flickering, 16).max() < 3
    errors = [along_motion(warp_error, moving, video, 16).mean() for video in (flickering, rising)]
    assert errors[0] > 0.25 * errors[1]


@pytest.mark.parametrize("shows_motion", [False, True])
def test_what_stands_on_a_surface_that_does_not_show_its_motion_is_steady(shows_motion):
    """And what moves with it is, too; but neither what flickers nor what stands on a textured surface."""
    _, plain = held_out_clips(2, 9)
    scene = plain.scene.with_attributes(texture="striped", background_texture="dotted")
    textured = replace(plain, scene=scene)
    clip = textured if shows_motion else plain
    moves = textured.frames
    stands = moves[:1].repeat(9, 0)
    sign = np.random.default_rng(0).choice([-16, 16], (9, 128, 128, 1))
    flickers = (stands * 0.8 + 20 + sign).astype(np.uint8)

    def errors(metric):
        return [1e3 * metric(frames) for frames in (moves, stands, flickers)]

    along = errors(lambda frames: warp_error(frames[0], frames[8], *clip.find_flow(0, 8)))
    visible = errors(lambda frames: visible_error(clip, frames, 0, 8))
    assert along[0] < 1 and along[1] > 3 and along[2] > 3
    assert visible[0] < 1 and visible[2] > 3
    assert visible[1] == pytest.approx(along[1]) if shows_motion else visible[1] < 1


def test_blur_lowers_sharpness_and_flicker_does_not(moving):
    """Contrast and saturation change the sharpness, but not the one by spread."""
    frames, grey = moving.frames, moving.frames.mean(-1, keepdims=True)
    sharp, by_spread = gradient_energy(frames), gradient_by_spread(frames)
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 2) for frame in frames])
    assert gradient_energy(blurred) < 0.7 * sharp
    assert gradient_by_spread(blurred) < 0.8 * by_spread
    flickering = (frames * 0.8).astype(np.uint8) + np.uint8(20)
    flickering[::2] += 25
    assert gradient_energy(flickering) == pytest.approx(0.64 * sharp, rel=0.02)
    assert gradient_by_spread(flickering) == pytest.approx(by_spread, rel=0.02)
    duller = (frames * 0.5 + 60).astype(np.uint8)
    assert gradient_energy(duller) < 0.3 * sharp
    assert gradient_by_spread(duller) == pytest.approx(by_spread, rel=0.02)
    paler = (grey + 0.7 * (frames - grey)).astype(np.uint8)
    assert gradient_by_spread(paler) == pytest.approx(by_spread, rel=0.15)


def test_measures_of_a_short_clip():
    """Gaps longer than a clip are left out."""
    (clip,), judge = held_out_clips(1, 9), SimpleNamespace(read=lambda _: defaultdict(lambda: "?"))
    base, paler = (measure(clip, frames, judge) for frames in (clip.frames, clip.frames // 2 + 64))
    assert {"warp_1", "warp_8", "gradient", "kept_psnr"} < set(base)
    assert not {"warp_16", "drift"} & set(base)
    row = add_sharpness(paler, base)
    assert row["sharpness"] == pytest.approx(0.25, rel=0.1)
    assert row["sharpness_by_spread"] == pytest.approx(1, rel=0.1)


def test_standard_errors_and_paired_differences():
    rows = [{"warp": 1.0, "psnr": 20.0}, {"warp": 2.0, "psnr": None}, {"warp": 6.0, "psnr": 24.0}]
    # Deviations -2, -1, 3: a variance of 14 / 2; and -2, 2: one of 8.
    expected = {"warp": 3.0, "warp_se": (7 / 3) ** 0.5, "psnr": 22.0, "psnr_se": 2.0}
    assert summarize(rows) == pytest.approx(expected)
    base = [{"warp": 0.5, "psnr": 19.0}, {"warp": 1.0, "psnr": 1.0}, {"warp": 5.5, "psnr": 21.0}]
    # Differences 0.5, 1, 0.5, whose standard error is a tenth of the means'; and 1, 3.
    paired = {"warp": 2 / 3, "warp_se": 1 / 6, "psnr": 2.0, "psnr_se": 1.0}
    assert compare(rows, base) == pytest.approx(paired)
    assert summarize(rows[1:2]) == {"warp": 2.0, "warp_se": None, "psnr": None, "psnr_se": None}


def test_only_edits_that_are_not_kept_are_made(tmp_path, monkeypatch):
    """And a kept one is another's as soon as anything that decides it is."""
    made = []

    def make_edits(args, model, clip, kept):
        made.append(list(kept))
        for index, path in enumerate(kept.values()):
            keep(path, {"gradient": float(index + 1)})

    monkeypatch.setattr(quality, "make_edits", make_edits)
    clips, methods = held_out_clips(2, 9), parse_methods("published,--fuse 2")
    assert list(methods) == ["per_frame", "per_frame_ddim", "default", "published", "--fuse 2"]
    assert methods["--fuse 2"] == Method("--fuse 2")

    def rows(clip, run, methods):
        paths = {name: kept_path(tmp_path, name, run, clip, of) for name, of in methods.items()}
        return quality.edit_clip(SimpleNamespace(methods=methods), None, clip, paths)

    first = rows(clips[0], "run", methods)
    # Each is relative to the frame by frame edit of its own inversion.
    assert [row["sharpness"] for row in first.values()] == [1, 1, 3, 2, 5]
    assert rows(clips[0], "run", methods) == first
    rows(clips[0], "run", parse_methods("sdedit"))
    rows(clips[1], "run", methods)
    rows(clips[0], "changed code", methods)
    assert made == [list(methods), ["sdedit"], list(methods), list(methods)]
    with pytest.raises(
        ArgumentTypeError, match="'defaults' is neither flags nor one of source, vae"
    ):
        parse_methods("published,defaults")


def test_a_meter_counts_what_stages_take():
    unet, meter = torch.nn.Conv2d(4, 4, 1), Meter(counts=True)
    meter.watch(unet)
    with meter.stage("passes"):
        unet(torch.zeros(3, 4, 8, 8))
        unet(torch.zeros(2, 4, 8, 8))
    with meter.stage("nothing"):
        pass
    passes, nothing = meter.stages.values()
    assert (passes.evaluations, nothing.evaluations) == (5, 0)
    assert passes.tflop == 2 * 5 * 64 * 4 * 4 / 1e12 and nothing.tflop == 0


def test_report():
    """It tells textured and plain clips apart; rows of another checkpoint stand below the first ones."""
    clips = held_out_clips(4, 9)  # whose second and fourth are plain
    first, other = (
        [{"default": {"warp_1": a * w}, "published": {"warp_1": b * w}} for w in (1, 2, 3, 6)]
        for a, b in ((1, 2), (5, 8))
    )
    done = quality.interleave({"": first, quality.OTHER: other})
    report = quality.summarize_clips(clips, done)
    names = ["default", "default, other checkpoint", "published", "published, other checkpoint"]
    assert [row["method"] for row in report["rows"]] == names
    assert [row["warp_1"] for row in report["rows"]] == [3, 15, 6, 24]
    assert report["rows"][2]["warp_1_se"] == pytest.approx(2.16, abs=0.01)
    assert [row["warp_1"] for row in report["textured"]] == [2, 10, 4, 16]
    assert [row["warp_1"] for row in report["plain"]] == [4, 20, 8, 32]
    # Each is compared with its own default.
    paired, of_other = report["differences"]
    assert (paired["method"], of_other["method"]) == (names[2], names[3])
    assert (paired["warp_1"], of_other["warp_1"]) == (3, 9)
    assert paired["warp_1_se"] == pytest.approx(1.08, abs=0.01)
    tables = quality.format_tables(report)
    assert "| published | 6.00 ± 2.16 |" in tables and "| published | +3.00 ± 1.08 |" in tables
