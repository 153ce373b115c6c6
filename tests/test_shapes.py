"""The world of shapes, and what its trained checkpoint must be able to do."""

import numpy as np
import pytest
from conftest import SHAPES_CHECKPOINT

from benchmarks.clips import held_out_clips
from benchmarks.job import Job, reconstruction_psnr
from benchmarks.quality import METHODS, measure
from shapes.flow import flow
from shapes.judge import Judge
from shapes.world import BAR, OBJECT, pixel_centers, render, sample_scene, top_layer
from tokenflow.config import PnPConfig
from tokenflow.metrics import frame_psnr, warp_error


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gap", [1, 8])
def test_flow_is_exact(seed, gap):
    """A frame warped along the flow is the other frame, except for the blur of interpolation."""
    scene = sample_scene(seed)
    (first, _), (second, _) = render(scene, 3), render(scene, 3 + gap)
    motion, valid = flow(scene, 3, 3 + gap)
    assert valid.mean() > 0.5
    along = warp_error(first, second, motion, valid)
    still = warp_error(first, second, np.zeros_like(motion), valid)
    assert along < 2e-3 and along < still / 3


def test_hidden_pixels_are_not_valid():
    """Where the bar covers the object in one frame and not in the other, there is no flow."""
    scene = sample_scene(11, barred=True)
    layers = [top_layer(scene, time, pixel_centers(128)) for time in (0, 12)]
    assert all((layer == BAR).any() and (layer == OBJECT).any() for layer in layers)
    motion, valid = flow(scene, 0, 12)
    y, x = np.argwhere(valid).T
    there = np.round(np.stack([y, x], 1) + motion[y, x][:, ::-1]).astype(int).clip(0, 127)
    same = layers[1][there[:, 0], there[:, 1]] == layers[0][y, x]
    assert same.mean() > 0.98 and valid.mean() < 0.95


def test_scenes_repeat_and_keep_their_motion_when_edited():
    scene = sample_scene(5)
    assert scene == sample_scene(5) != sample_scene(6)
    other = scene.with_attributes(color="yellow", background_color="blue")
    assert np.array_equal(render(scene, 7)[1], render(other, 7)[1])
    assert not np.array_equal(render(scene, 7)[0], render(other, 7)[0])


def test_judge_reads_renderings():
    judge, scenes = Judge.load(SHAPES_CHECKPOINT / "judge.safetensors"), range(3_000_000, 3_000_040)
    truth = [sample_scene(seed).attributes for seed in scenes]
    answers = judge.read(np.stack([render(sample_scene(seed), 5)[0] for seed in scenes]))
    for name, values in answers.items():
        right = np.mean([getattr(t, name) == v for t, v in zip(truth, values, strict=True)])
        assert right >= 0.9, name


def test_round_trip_and_reconstruction(trained):
    (clip,) = held_out_clips(1, n_frames=3)
    round_trip = trained.decode_latents(trained.encode_frames(clip.frames))
    assert np.mean(frame_psnr(round_trip, clip.frames)) > 24
    naive, fixed = (reconstruction_psnr(trained, clip, 20, fixed) for fixed in (False, True))
    assert naive > 25 and fixed > naive + 10


def test_tokenflow_is_steadier_than_editing_frame_by_frame(trained, tmp_path):
    (clip,) = held_out_clips(1, n_frames=8)
    config = PnPConfig(data_path="", prompt="unused", n_timesteps=10, batch_size=4)
    job = Job.prepare(trained, clip, config, tmp_path)
    job.reconstruct()
    judge = Judge.load(SHAPES_CHECKPOINT / "judge.safetensors")
    alone = measure(clip, METHODS["per_frame"](job), judge, gaps=(1,))
    flows = measure(clip, METHODS["tokenflow_flanking"](job), judge, gaps=(1,))
    assert flows["warp_1"] < alone["warp_1"]
    assert flows["edited_right"] + flows["kept_right"] >= 0.9 * (
        alone["edited_right"] + alone["kept_right"]
    )
