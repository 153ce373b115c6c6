"""What ControlNets are given, several of them at once, and mistakes in naming them."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from diffusers import MultiControlNetModel
from test_cli import last_line, refusal, run, video_of

from tokenflow.config import ControlNetConfig, PreprocessConfig
from tokenflow.control import detectors
from tokenflow.control.control_images import ControlImages
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


@pytest.mark.parametrize(
    "values, words",
    [
        ({"control": "pose"}, "control: 'pose' is none of canny, depth"),
        ({"control": []}, "control: it is empty"),
        ({"control": ["canny", "tile"], "controlnet": "one"}, "controlnet: 1 for 2 of control"),
        (
            {"control": ["canny", "tile"], "control_scale": [1, 1, 1]},
            "control_scale: 3 numbers for 2",
        ),
        ({"control_scale": [0.5, 3]}, "control_scale: 3 is out of range"),
        ({"control": "path", "controlnet": "one"}, "control_path: missing"),
        ({"control_path": "."}, "control_path: . is not used, because control is canny"),
        ({"control": "path", "control_path": "."}, "controlnet: none is known for path"),
        ({"sd_version": "2.0"}, "none is known for canny under sd_version 2.0; .* sd_version 1.5"),
        ({"sd_version": "2.1", "control": "tile"}, "none is known for tile under sd_version 2.1"),
    ],
)
def test_conditions_that_do_not_belong_together(values, words):
    with pytest.raises(UserError, match=words):
        config_of(**values)


def test_known_controlnets():
    assert config_of().controlnet_ids == ("lllyasviel/sd-controlnet-canny",)
    both = config_of(sd_version="1.5", control=["depth", "tile"], control_scale=0.5)
    assert [name.rpartition("_")[2] for name in both.controlnet_ids] == ["depth", "tile"]
    assert both.control_scales == (0.5, 0.5)
    assert "sd21-canny" in config_of(sd_version="2.1").controlnet_ids[0]
    assert not build(PreprocessConfig, {"data_path": "a.mp4", "sd_version": "1.5"}).controlnet_ids
    with pytest.raises(UserError, match="control: tile needs ControlNets"):
        build(PreprocessConfig, {"data_path": "a.mp4", "control": "tile"})


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
