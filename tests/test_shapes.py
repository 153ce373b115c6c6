"""The world of shapes, and what its trained checkpoint must be able to do."""

import numpy as np
import pytest
import torch
from conftest import SHAPES_CHECKPOINT

from benchmarks.clips import held_out_clips
from benchmarks.job import Job, reconstruction_psnr
from benchmarks.measures import measure
from benchmarks.methods import METHODS
from shapes.checkpoint import TINY, build_text_encoder, build_tokenizer
from shapes.flow import flow
from shapes.judge import Judge
from shapes.text import start_text_encoder, tokenize
from shapes.world import BAR, OBJECT, pixel_centers, render, sample_scene, top_layer
from tokenflow.config import PnPConfig
from tokenflow.evaluation.metrics import frame_psnr, warp_error


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gap", [1, 8])
@pytest.mark.parametrize("texture", ["plain", "striped"])
def test_flow_is_exact(seed, gap, texture):
    """A frame warped along the flow is the other frame, except for the blur of interpolation."""
    scene = sample_scene(seed, texture=texture, background_texture=texture)
    (first, _), (second, _) = render(scene, 3), render(scene, 3 + gap)
    motion, valid = flow(scene, 3, 3 + gap)
    assert valid.mean() > 0.5
    along = warp_error(first, second, motion, valid)
    still = warp_error(first, second, np.zeros_like(motion), valid)
    assert along < 1e-3 and along < still / (8 if gap == 8 else 1.5)


def test_hidden_pixels_are_not_valid():
    """Where the bar covers the object in one frame and not in the other, there is no flow."""
    scene = sample_scene(12, barred=True)
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


@pytest.mark.parametrize("seed", range(4))
def test_plain_surfaces_are_shaded_without_edges(seed):
    """What is plain changes everywhere, so that its motion can be seen, and nowhere suddenly."""
    surface = sample_scene(seed).background_surface
    shades = surface.paint(pixel_centers(128), "white", "plain", blur=2.0)[..., 0]
    assert shades.std() > 0.03 and np.abs(np.diff(shades)).max() < 0.03


def test_tokens_new_to_a_checkpoint_leave_its_captions_as_they_were(tmp_path):
    """The old captions' embeddings stay, though the tokenizer numbers the tokens anew."""
    old_words, words = ["a", "red", "square"], ["a", "plain", "red", "square"]
    old_tokenizer, tokenizer = (build_tokenizer(w, TINY.prompt_tokens) for w in (old_words, words))
    old, new = (build_text_encoder(t, TINY).eval() for t in (old_tokenizer, tokenizer))
    old_tokenizer.save_pretrained(tmp_path / "tokenizer")
    old.save_pretrained(tmp_path / "text_encoder")
    start_text_encoder(new, tokenizer, tmp_path)
    old_ids, ids = (tokenize(t, ["a red square"]) for t in (old_tokenizer, tokenizer))
    assert not torch.equal(old_ids, ids)
    assert torch.equal(old(old_ids)[0], new(ids)[0])


def test_judge_reads_renderings():
    judge, scenes = Judge.load(SHAPES_CHECKPOINT / "judge.safetensors"), range(3_000_000, 3_000_040)
    truth = [sample_scene(seed).attributes for seed in scenes]
    answers = judge.read(np.stack([render(sample_scene(seed), 5)[0] for seed in scenes]))
    for name, values in answers.items():
        right = np.mean([getattr(t, name) == v for t, v in zip(truth, values, strict=True)])
        assert right >= 0.9, name


def test_round_trip_and_reconstruction(trained):
    (clip,) = held_out_clips(1, n_frames=2)
    round_trip = trained.decode_latents(trained.encode_frames(clip.frames))
    assert np.mean(frame_psnr(round_trip, clip.frames)) > 24
    naive, fixed = (reconstruction_psnr(trained, clip, 20, fixed) for fixed in (False, True))
    assert naive > 25 and fixed > naive + 10


def test_tokenflow_is_steadier_than_editing_frame_by_frame(trained, tmp_path):
    (clip,) = held_out_clips(1, n_frames=6)
    config = PnPConfig(data_path="", prompt="unused", n_timesteps=8, batch_size=4)
    job = Job.prepare(trained, clip, config, tmp_path)
    job.reconstruct()
    judge = Judge.load(SHAPES_CHECKPOINT / "judge.safetensors")
    alone = measure(clip, METHODS["per_frame"](job), judge)
    flows = measure(clip, METHODS["default"](job), judge)
    assert flows["warp_1"] < alone["warp_1"]
    assert flows["edited_right"] + flows["kept_right"] >= 0.9 * (
        alone["edited_right"] + alone["kept_right"]
    )
