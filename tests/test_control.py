"""What ControlNets are given, several of them at once, and mistakes in naming them."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from diffusers import MultiControlNetModel, StableDiffusionControlNetPipeline
from test_cli import last_line, refusal, run, video_of

from tokenflow.config import ControlNetConfig, PreprocessConfig
from tokenflow.control import detectors
from tokenflow.control.control_images import ControlImages
from tokenflow.diffusion.ddim import Schedule, sample
from tokenflow.diffusion.stable_diffusion import Control
from tokenflow.errors import UserError
from tokenflow.options import build
from tokenflow.video.read import decode_frames
from tokenflow.video.write import write_video

CPU = torch.device("cpu")


def config_of(**values):
    return build(ControlNetConfig, {"data_path": "a.mp4", "prompt": "a dog", **values})


@torch.no_grad()
def test_two_controlnets_of_half_the_scale_are_one(sd):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    images, others = torch.rand(2, 2, 3, 64, 64, generator=generator)
    others = 100 * others  # the tiny ControlNet's random weights hardly see smaller differences
    text = sd.encode_text("a red circle").expand(2)
    net = sd.controlnet.nets[0]
    two = replace(sd, controlnet=MultiControlNetModel([net, net]))

    def noise(sd, images, scales):
        return sd.predict_noise(latents, 500, text, Control.of(torch.stack(images), scales))

    one = noise(sd, [images], [1.0])
    torch.testing.assert_close(noise(two, [images, images], [0.5, 0.5]), one, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(noise(two, [images, others], [1.0, 0.0]), one, atol=1e-4, rtol=1e-4)
    assert (noise(two, [images, others], [0.5, 0.5]) - one).abs().mean() > 1e-3


@torch.no_grad()
def test_controlnet_residuals(sd):
    """Sampling with a weakened ControlNet gives what diffusers' pipeline gives."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    images = torch.rand(2, 3, 64, 64, generator=generator)
    parts = {"vae": sd.vae, "text_encoder": sd.text_encoder, "tokenizer": sd.tokenizer}
    parts |= {"unet": sd.unet, "controlnet": sd.controlnet.nets[0], "scheduler": sd.scheduler}
    pipeline = StableDiffusionControlNetPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    options |= {"image": images, "latents": latents, "controlnet_conditioning_scale": 0.6}
    theirs = pipeline(["a red circle"] * 2, **options).images
    text = sd.encode_text("a red circle").expand(2)

    def sampled(scale):
        def predict(x, t, frames):
            return sd.predict_noise(x, t, text, Control.of(images[None], [scale]))

        *_, last = sample(latents, torch.arange(2), Schedule.of(sd.scheduler, 4), predict)
        return last

    torch.testing.assert_close(sampled(0.6), theirs, atol=1e-3, rtol=1e-3)
    assert (sampled(0.0) - theirs).abs().mean() > 0.01


def test_control_images_are_kept_frame_by_frame(tmp_path, clip_frames):
    """Canny edges, the frames themselves and a user's own, in the order that was asked for."""
    controls = {"control": ["path", "canny", "tile"], "controlnet": ["a", "b", "c"]}
    config = config_of(control_path=str(tmp_path), **controls)
    kept = ControlImages(tmp_path, 3)
    kept.find(config, partial(iter, clip_frames), partial(iter, 255 - clip_frames), 7, CPU)
    edges = detectors.detect_canny(clip_frames, 100, 200)
    expected = np.stack([255 - clip_frames, edges, clip_frames])
    wanted = torch.tensor([4, 0, 6])
    assert np.array_equal(kept[wanted], expected[:, wanted])
    assert edges.any() and all(
        file.path.stat().st_size < 1.01 * 7 * 64 * 64 * 3 for file in kept.files
    )


def test_a_missing_detector_says_how_to_install_it(monkeypatch):
    present = {"controlnet_aux", "torchvision", "timm"}
    monkeypatch.setattr(detectors, "find_spec", lambda name: name in present or None)
    for control in ("softedge", "lineart"):
        with pytest.raises(
            UserError, match=f"control: {control} needs .* skimage; .* pip install .*-detectors.txt"
        ):
            detectors.check_detectors(config_of(control=["tile", control]))
    detectors.check_detectors(config_of(control="tile"))


def test_known_controlnets():
    assert config_of().controlnet_ids == ("lllyasviel/sd-controlnet-canny",)
    both = config_of(sd_version="1.5", control=["depth", "tile"], control_scale=0.5)
    assert [name.rpartition("_")[2] for name in both.controlnet_ids] == ["depth", "tile"]
    assert both.control_scales == (0.5, 0.5)
    assert "sd21-canny" in config_of(sd_version="2.1").controlnet_ids[0]
    assert not build(PreprocessConfig, {"data_path": "a.mp4", "sd_version": "1.5"}).controlnet_ids


def test_several_end_to_end(tmp_path, checkpoint, clip, clip_frames):
    """Two ControlNets, one given a user's own frames, in an inversion and in its edit."""
    write_video(tmp_path / "own.mp4", clip_frames[::-1], 12)
    write_video(tmp_path / "short.mp4", clip_frames[:2], 12)
    net = checkpoint / "controlnet"
    common = ["--data_path", clip, "--model", checkpoint, "--n_frames", 3]
    common += ["--controlnet", net, net, "--control_path", "own.mp4"]
    size = ["--H", 64, "--W", 64, "--steps", 2, "--save_steps", 2, "--start_frame", 2]
    invert = [*common, *size, "--control", "path", "canny"]
    last_line(run("preprocess.py", *invert, cwd=tmp_path))
    edit = [*common, "--prompt", "a dog", "--n_inversion_steps", 2, "--n_timesteps", 2]
    edit += ["--control_scale", 0.5, 0.7, "--keyframe_interval", 8]
    right = [*edit, "--control", "path", "canny"]
    result = run("run_tokenflow_controlnet.py", *right, cwd=tmp_path)
    folder = tmp_path / last_line(result).parent
    assert "denoised along" not in result.stderr
    assert video_of(folder / "control.mp4") == (3, 12, 2 * 64, 64)
    shown = next(decode_frames(folder / "control.mp4"))
    assert np.abs(shown[:, :64].astype(int) - clip_frames[4]).mean() < 8  # the third from the end
    assert yaml.safe_load((folder / "config.yaml").read_text())["control_scale"] == [0.5, 0.7]

    before = sorted(tmp_path.rglob("*"))
    script = "run_tokenflow_controlnet.py"
    other = run(script, *edit, "--control", "path", "tile", cwd=tmp_path)
    refusal(other, "control: path tile, but", "with path canny", "--control path tile")
    short = ["--control_path", "short.mp4"]
    refusal(
        run("preprocess.py", *invert, *short, cwd=tmp_path), "control_path: short.mp4 has 0 frames"
    )
    write_video(tmp_path / "own.mp4", clip_frames, 12)
    refusal(run(script, *right, cwd=tmp_path), "control_path: the frames in own.mp4 have changed")
    assert sorted(tmp_path.rglob("*")) == before
