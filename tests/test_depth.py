"""Stable Diffusion 2 depth: the depth of each frame as a fifth channel, in inversion and edit."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from test_cli import last_line, refusal, run, video_of
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessorPil

import util
from shapes.checkpoint import TINY, build_controlnet
from tokenflow.control.depth import load_depth_model
from tokenflow.diffusion.checkpoint import Checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def depth_checkpoint(checkpoint, tmp_path_factory):
    """The tiny checkpoint with a UNet of five channels and a depth model, all of random weights."""
    folder = tmp_path_factory.mktemp("depth") / "tiny-depth"
    shutil.copytree(checkpoint, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = json.loads((checkpoint / "unet" / "config.json").read_text())
        unet = UNet2DConditionModel.from_config(config | {"in_channels": 5})
        controlnet = build_controlnet(unet, TINY)
        build_depth_model(folder / "depth_estimator", folder / "feature_extractor")
    unet.save_pretrained(folder / "unet")
    controlnet.save_pretrained(folder / "controlnet")
    return folder


def build_depth_model(network, processor):
    """Write a depth model of random weights and its processor to their folders."""
    config = DPTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
    )
    DPTForDepthEstimation(config).save_pretrained(network)
    DPTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(processor)


@pytest.fixture(scope="module")
def model(depth_checkpoint):
    return load_depth_model(str(depth_checkpoint), CPU, ("depth_estimator", "feature_extractor"))


def test_depth_is_relative_to_the_whole_video(model, clip_frames):
    frames = [clip_frames[0], clip_frames[0] // 2, clip_frames[5]]
    depth = np.stack(list(model.scale(partial(iter, frames), 8, 8)))
    raw = np.stack([model.estimate(frame, 8, 8) for frame in frames])
    scaled = 2 * (raw - raw.min()) / (raw.max() - raw.min()) - 1
    np.testing.assert_allclose(depth, scaled, atol=1e-5)
    assert depth.shape == (3, 8, 8) and depth.min() == -1 and depth.max() == pytest.approx(1)
    pictures = np.stack(list(model.draw(partial(iter, frames))))
    assert pictures.shape == (3, 64, 64, 3) and pictures.dtype == np.uint8
    assert pictures.min() == 0 and pictures.max() == 255


@torch.no_grad()
def test_depth_is_the_fifth_channel(depth_checkpoint):
    sd = Checkpoint.find(str(depth_checkpoint)).load(CPU, torch.float32)
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), sd.encode_text("a dog")
    depth = torch.rand(2, 1, 8, 8, generator=generator)
    text = text.expand(2)
    joined = torch.cat([latents, depth], dim=1)
    expected = sd.unet(joined, 500, encoder_hidden_states=text.tokens).sample
    torch.testing.assert_close(sd.predict_noise(latents, 500, text, depth=depth), expected)
    assert sd.takes_depth and sd.latent_shape(2, 64, 64) == (2, 4, 8, 8)


def test_every_technique(tmp_path, depth_checkpoint, clip):
    """The inversion keeps the depth, every technique's edit uses it, and both show it."""
    common = ["--data_path", clip, "--model", depth_checkpoint, "--n_frames", 3]
    common += ["--sd_version", "depth"]
    size = ["--H", 64, "--W", 64, "--steps", 2, "--save_steps", 2]
    size += ["--inversion_prompt", "a square"]
    inverted = tmp_path / last_line(run("preprocess.py", *common, *size, cwd=tmp_path)).parent
    assert np.load(inverted / "depth.npy").shape == (3, 1, 8, 8)
    assert video_of(inverted / "depth.mp4") == (3, 12, 64, 64)
    edit = [*common, "--prompt", "a dog", "--n_inversion_steps", 2, "--n_timesteps", 2]
    edit += ["--keyframe_interval", 8]
    depth_model = tmp_path / "depth"  # with its processor beside it
    for part in ("depth_estimator", "feature_extractor"):
        shutil.copytree(depth_checkpoint / part, depth_model, dirs_exist_ok=True)
    frames = {}
    for technique, flags in {
        "pnp": [],
        "sdedit": ["--mask", "auto"],
        "controlnet": ["--controlnet", depth_checkpoint / "controlnet", "--control", "depth"]
        + ["--depth_model", depth_model],
    }.items():
        result = run(f"run_tokenflow_{technique}.py", *edit, *flags, cwd=tmp_path)
        folder = tmp_path / last_line(result).parent
        assert "denoised along" not in result.stderr
        assert video_of(folder / "depth.mp4") == (3, 12, 64, 64)
        frames[technique] = util.load_frames(folder / "frames", range(3))
    along = run("run_tokenflow_pnp.py", *edit, "--reuse_source", "false", cwd=tmp_path)
    along = util.load_frames(tmp_path / last_line(along).parent / "frames", range(3))
    # Fixed-point iteration does not converge with random weights, so that the recorded features are coarse.
    unlike, like = (np.abs(frames["pnp"].astype(int) - f).mean() for f in (frames["sdedit"], along))
    assert like < unlike / 5, (like, unlike)

    # The depth matters: with another one the same edit differs.
    depth = np.load(inverted / "depth.npy")
    np.save(inverted / "depth.npy", depth[..., ::-1])
    damaged = run("run_tokenflow_pnp.py", *edit, "--seed", 2, cwd=tmp_path)
    refusal(damaged, "depth.npy is damaged", "--overwrite")


def test_a_checkpoint_without_its_depth_model(tmp_path, depth_checkpoint, clip):
    bare = tmp_path / "bare"
    shutil.copytree(depth_checkpoint, bare)
    shutil.rmtree(bare / "depth_estimator")
    flags = ["--data_path", clip, "--model", bare, "--n_frames", 3, "--H", 64, "--W", 64]
    flags += ["--steps", 2, "--save_steps", 2]
    refusal(run("preprocess.py", *flags, cwd=tmp_path), "bare", "its depth_estimator")
    named = [*flags, "--depth_model", bare]
    refusal(run("preprocess.py", *named, cwd=tmp_path), "depth_model: ", bare)
    assert not (tmp_path / "latents").exists()
