"""The world of shapes, and what its trained checkpoint must be able to do."""

import importlib
import shlex

import numpy as np
import pytest
import torch
from conftest import SHAPES_CHECKPOINT

from benchmarks.clips import SIZE, held_out_clips
from benchmarks.commands import Commands
from benchmarks.measures import find_reconstruction_psnr, measure
from benchmarks.methods import METHODS
from shapes import fit
from shapes.judge import Judge
from shapes.world import BAR, OBJECT, find_flow, find_top_layer, pixel_centers, render, sample_scene
from tokenflow.evaluation.metrics import frame_psnr, warp_error


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gap", [1, 8])
@pytest.mark.parametrize("texture", ["plain", "striped"])
def test_flow_is_exact(seed, gap, texture):
    """A frame warped along the flow is the other frame, except for the blur of interpolation."""
    scene = sample_scene(seed, texture=texture, background_texture=texture)
    (first, _), (second, _) = render(scene, 3), render(scene, 3 + gap)
    motion, valid = find_flow(scene, 3, 3 + gap)
    assert valid.mean() > 0.5
    along = warp_error(first, second, motion, valid)
    still = warp_error(first, second, np.zeros_like(motion), valid)
    assert along < 1e-3 and along < still / (8 if gap == 8 else 1.5)


def test_hidden_pixels_are_not_valid():
    """Where the bar covers the object in one frame and not in the other, there is no flow."""
    scene = sample_scene(12, barred=True)
    layers = [find_top_layer(scene, time, pixel_centers(128)) for time in (0, 12)]
    assert all((layer == BAR).any() and (layer == OBJECT).any() for layer in layers)
    motion, valid = find_flow(scene, 0, 12)
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


@pytest.mark.parametrize("seed", range(4))
def test_plain_surfaces_are_shaded_without_edges(seed):
    """What is plain changes everywhere, so that its motion can be seen, and nowhere suddenly."""
    surface = sample_scene(seed).background_surface
    shades = surface.paint(pixel_centers(128), "white", "plain", blur=2.0)[..., 0]
    assert shades.std() > 0.03 and np.abs(np.diff(shades)).max() < 0.03


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "CHECKPOINT_SECONDS", 0)

    def train(name, n_losses):
        torch.manual_seed(0)
        layer, losses = torch.nn.Linear(4, 4), iter(range(n_losses))

        def loss(generator):
            next(losses)  # raises StopIteration when they are used up
            return layer(torch.randn(8, 4, generator=generator)).square().mean()

        fit.fit(name, {"layer": layer}, loss, 6, tmp_path, learning_rate=0.1, seed=1)
        return layer.weight

    whole = train("whole", 6)
    with pytest.raises(StopIteration):
        train("interrupted", 4)
    assert torch.equal(train("interrupted", 2), whole)
    assert torch.equal(train("interrupted", 0), whole)  # is finished


@pytest.mark.parametrize("room", ["benchmarks", "shapes"])
def test_every_module_can_be_imported(room):
    """Also those that nothing else here imports, such as `shapes.train`."""
    for path in sorted((SHAPES_CHECKPOINT.parents[1] / room).glob("*.py")):
        importlib.import_module(f"{room}.{path.stem}")


def test_judge_reads_renderings():
    judge, scenes = Judge.load(SHAPES_CHECKPOINT / "judge.safetensors"), range(3_000_000, 3_000_040)
    truth = [sample_scene(seed).attributes for seed in scenes]
    answers = judge.read(np.stack([render(sample_scene(seed), 5)[0] for seed in scenes]))
    for name, values in answers.items():
        right = np.mean([getattr(t, name) == v for t, v in zip(truth, values, strict=True)])
        assert right >= 0.9, name


def test_round_trip_and_reconstruction(trained, tmp_path):
    (clip,) = held_out_clips(1, n_frames=2)
    round_trip = trained.decode_latents(trained.encode_frames(clip.frames))
    assert np.mean(frame_psnr(round_trip, clip.frames)) > 24
    commands = Commands(tmp_path, clip, SIZE, 20, SHAPES_CHECKPOINT, ["--dtype", "float32"])
    naive, fixed = (
        find_reconstruction_psnr(commands.invert(flags)) for flags in ("--inversion ddim", "")
    )
    assert naive > 25 and fixed > naive + 10


def test_tokenflow_is_steadier_than_editing_frame_by_frame(tmp_path):
    (clip,) = held_out_clips(1, n_frames=6)
    options = shlex.split("--dtype float32 --batch_size 4 --keyframe_interval 4")
    commands = Commands(tmp_path, clip, SIZE, 8, SHAPES_CHECKPOINT, options)
    judge = Judge.load(SHAPES_CHECKPOINT / "judge.safetensors")
    alone, edited = (
        measure(clip, commands.edit(METHODS[name]), judge) for name in ("per_frame", "default")
    )
    assert edited["warp_1"] < alone["warp_1"]
    assert edited["edited_right"] + edited["kept_right"] >= 0.9 * (
        alone["edited_right"] + alone["kept_right"]
    )
    stages = commands.meter.stages
    # Of the inversion, 6 samples in each of 8 steps at least. Of the edit 4 that compare the prompts
    # for each frame, and fewer than 2 in each step, since the negative prompt is evaluated for keyframes
    # alone in most.
    assert stages["inversion"].evaluations >= 6 * 8
    assert 6 * 8 < stages["edit"].evaluations - 6 * 4 < 2 * 6 * 8
