"""The commands end to end: what they print and write."""

import contextlib
import importlib
import io
import json
import shutil
import subprocess
import sys
import unittest.mock
from dataclasses import fields
from pathlib import Path

import av
import numpy as np
import pytest
import yaml

import util
from tokenflow.config import ControlNetConfig, PnPConfig, SDEditConfig
from tokenflow.evaluation.metrics import frame_psnr

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "data" / "shapes-sd"
TECHNIQUES = {"pnp": PnPConfig, "sdedit": SDEditConfig, "controlnet": ControlNetConfig}


def in_float32(script, flags):
    """The flags of a command, in float32 unless they name a precision: `auto` depends on the processor."""
    precision = [] if script == "evaluate.py" or "--dtype" in flags else ["--dtype", "float32"]
    return [*precision, *map(str, flags)]


def run(script, *flags, cwd):
    """Run a command in this process, which saves the seconds of importing torch; returns how it ended."""
    module = importlib.import_module(script.removesuffix(".py"))
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    argv = [script, *in_float32(script, flags)]
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        unittest.mock.patch("sys.argv", argv),
    ):
        try:
            module.main()
        except SystemExit as end:
            status = end.code or 0
    return subprocess.CompletedProcess(argv, status, stdout.getvalue(), stderr.getvalue())


def run_process(script, *flags, cwd):
    """Run a command as a user does."""
    command = [sys.executable, ROOT / script, *in_float32(script, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def last_line(result) -> Path:
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 1, "nothing but the path belongs on stdout"
    return Path(lines[0])


def refusal(result, *words):
    """The one line of a refusal; it must hold all of `words`."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for word in words:
        assert str(word) in errors[0]
    return errors[0]


def video_of(path):
    with av.open(str(path)) as container:
        frames = sum(1 for _ in container.decode(video=0))
        stream = container.streams.video[0]
        return frames, stream.average_rate, stream.width, stream.height


@pytest.fixture(scope="module")
def work(tmp_path_factory, checkpoint, clip):
    """A folder with a clip, whose inversions (5 steps, 64x64) are in `latents`, with and without control."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copy(clip, folder / "clip.mp4")
    flags = ["--data_path", "clip.mp4", "--model", checkpoint, "--H", 64, "--W", 64]
    flags += ["--steps", 5, "--save_steps", 5, "--n_frames", 7]
    flags += ["--inversion_prompt", "a red square"]
    results = [
        run_process("preprocess.py", *flags, cwd=folder),
        run("preprocess.py", *flags, "--controlnet", checkpoint / "controlnet", cwd=folder),
    ]
    return folder, flags, results


def edit_flags(checkpoint, technique):
    flags = ["--data_path", "clip.mp4", "--model", checkpoint, "--prompt", "a blue square"]
    flags += ["--n_inversion_steps", 5, "--n_timesteps", 5, "--n_frames", 7, "--batch_size", 3]
    flags += ["--keyframe_interval", 3]
    control = ["--controlnet", checkpoint / "controlnet"] if technique == "controlnet" else []
    return [*flags, "--output_path", "out", *control]


def test_preprocess(work):
    folder, _, results = work
    video = folder / last_line(results[0])
    inversion = folder / "latents" / "sd_tiny" / "clip" / "steps_5" / "nframes_7"
    assert video == inversion / "inverted.mp4" and video_of(video) == (7, 12, 64, 64)
    assert (inversion / "inversion_prompt.txt").read_text() == "a red square"
    for t in (1, 201, 401, 601, 801):
        latents = np.load(inversion / "latents" / f"noisy_latents_{t}.npy", mmap_mode="r")
        assert latents.shape == (7, 4, 8, 8) and latents.dtype == np.float32
    for name in ("source", "vae", "frames"):
        assert len(list((inversion / name).glob("*.png"))) == 7
    manifest = json.loads((inversion / "manifest.json").read_text())
    assert manifest["config"]["inversion_prompt"] == "a red square" and manifest["fps"] == "12"
    assert "PSNR" in results[0].stderr and "SSIM" in results[0].stderr
    assert last_line(results[1]).parts[1] == "sd_tiny_ControlNet"


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_edit(work, checkpoint, technique):
    folder, _, _ = work
    script, flags = f"run_tokenflow_{technique}.py", edit_flags(checkpoint, technique)
    run_first = run_process if technique == "pnp" else run
    video = folder / last_line(run_first(script, *flags, cwd=folder))
    assert video == folder / "out" / f"{technique}_clip" / "edited.mp4"
    assert video_of(video) == (7, 12, 64, 64)
    assert video_of(video.parent / "comparison.mp4") == (7, 12, 192, 64)
    assert video_of(video.parent / "vae_reconstruction.mp4") == (7, 12, 64, 64)
    sheet = util.read_image(video.parent / "contact_sheet.png")
    assert sheet.shape == (3 * (64 + 18), 7 * 64, 3)
    if technique == "controlnet":
        assert video_of(video.parent / "control.mp4") == (7, 12, 64, 64)
    frames = util.load_frames(video.parent / "frames", range(7))
    written = yaml.safe_load((video.parent / "config.yaml").read_text())
    assert set(written) == {f.name for f in fields(TECHNIQUES[technique])}

    # The same edit again: the same folder, the same bytes. Another prompt: another folder.
    assert folder / last_line(run(script, *flags, cwd=folder)) == video
    assert folder / last_line(run(script, *flags, "--overwrite", cwd=folder)) == video
    assert np.array_equal(util.load_frames(video.parent / "frames", range(7)), frames)
    other = folder / last_line(run(script, *flags, "--prompt", "a dog", cwd=folder))
    assert other.parent.name == f"{technique}_clip_2"
    assert not np.array_equal(util.load_frames(other.parent / "frames", range(7)), frames)


def test_which_edits_are_the_same_and_use_kept_source_features(work, checkpoint):
    """What an edit is does not depend on memory and device; other edits say why they use no features."""
    folder, _, _ = work
    flags = [*edit_flags(checkpoint, "pnp"), "--output_path", "how"]
    kept = ["--keyframe_interval", 8]
    for changes, name, reason in [
        ([], "pnp_clip", "(interval)"),
        (["--batch_size", 1], "pnp_clip", None),
        (["--batch_size", "auto"], "pnp_clip", None),
        (["--device", "cpu", "--cpu_offload"], "pnp_clip", None),
        (kept, "pnp_clip_2", None),
        ([*kept, "--batch_size", 1], "pnp_clip_2", None),
        ([*kept, "--cpu_offload", "--output_path", "offloaded"], "pnp_clip", None),
        ([*kept, "--reuse_source", "false"], "pnp_clip_3", "reuse_source"),
        ([*kept, "--seed", 2], "pnp_clip_4", "(seed)"),
        (["--propagation", "previous"], "pnp_clip_5", "propagation previous"),
    ]:
        result = run("run_tokenflow_pnp.py", *flags, *changes, cwd=folder)
        assert last_line(result).parent.name == name, changes
        said = [line for line in result.stderr.splitlines() if "denoised along" in line]
        assert [reason in line for line in said] == ([True] if reason else []), result.stderr
    edited = [folder / "how" / "pnp_clip_2", folder / "offloaded" / "pnp_clip"]
    assert np.array_equal(*(util.load_frames(edit / "frames", range(7)) for edit in edited))


class ShapesEdits:
    """Edits of five frames of the sample clip on the trained checkpoint; inversions are shared."""

    def __init__(self, folder):
        self.folder, self.inverted = folder, set()

    def __call__(self, dtype="float32", invert=(), edit=(), steps=6, size=128, n_frames=5):
        """The edited frames (n_frames, size, size, 3)."""
        common = ["--data_path", ROOT / "data" / "shapes.mp4", "--model", CHECKPOINT]
        common += ["--n_frames", n_frames, "--keyframe_interval", 4, "--dtype", dtype]
        latents = "_".join([dtype, str(size), *invert])
        if latents not in self.inverted:
            flags = ["--H", size, "--W", size, "--steps", steps, "--save_steps", steps]
            flags += ["--save_dir", latents]
            flags += ["--inversion_prompt", "a red striped circle on a green dotted background"]
            last_line(run("preprocess.py", *common, *flags, *invert, cwd=self.folder))
            self.inverted.add(latents)
        flags = ["--n_inversion_steps", steps, "--n_timesteps", steps, "--latents_path", latents]
        flags += ["--prompt", "a blue striped circle on a green dotted background"]
        result = run("run_tokenflow_pnp.py", *common, *flags, *edit, cwd=self.folder)
        return util.load_frames(self.folder / last_line(result).parent / "frames", range(n_frames))


@pytest.fixture(scope="module")
def shapes_edits(tmp_path_factory):
    return ShapesEdits(tmp_path_factory.mktemp("shapes"))


def test_kept_source_features_do_not_change_the_edit(shapes_edits):
    """An edit that denoises the source stream itself gives the same frames.

    An inversion records features of latents that differ by up to its tolerance from those that it saves.
    """
    without = shapes_edits(edit=["--reuse_source", "false"])
    assert min(frame_psnr(shapes_edits(), without)) > 50


def test_half_precision_is_close_to_single(shapes_edits):
    # Rounding moves edges a little; another edit of the same clip has about 12 dB.
    # A small video, since processors without instructions for bfloat16 take fifteen times as long.
    small = {"steps": 4, "size": 64, "n_frames": 3}
    half, single = (shapes_edits(dtype, **small) for dtype in ("bfloat16", "float32"))
    assert min(frame_psnr(half, single)) > 30


def test_an_inversion_under_the_controlnet_is_preferred(work, checkpoint):
    """An edit uses the inversion under the ControlNet if it exists, and otherwise the plain one."""
    folder, _, _ = work
    flags = [*edit_flags(checkpoint, "controlnet"), "--output_path", "preferred"]
    for latents, name in (("latents", "sd_tiny_ControlNet"), ("plain", "sd_tiny")):
        (folder / latents).mkdir(exist_ok=True)
        if not (folder / latents / name).exists():
            (folder / latents / name).symlink_to(folder / "latents" / name)
        result = run("run_tokenflow_controlnet.py", *flags, "--latents_path", latents, cwd=folder)
        text = (folder / last_line(result).parent / "config.yaml").read_text()
        assert f'"conditioned": {str(name.endswith("ControlNet")).lower()}' in text


def test_features_are_kept_of_editing_steps_alone(work, checkpoint):
    """An inversion may take more steps than the edits it serves."""
    folder, flags, _ = work
    changes = ["--steps", 10, "--save_dir", "finer", "--batch_size", 3]
    video = folder / last_line(run("preprocess.py", *flags, *changes, cwd=folder))
    kept = sorted(path.name for path in (video.parent / "source_features").glob("nearest_*.npy"))
    assert kept == sorted(f"nearest_{t}.npy" for t in (1, 201, 401, 601, 801))
    edit = [*edit_flags(checkpoint, "sdedit"), "--latents_path", "finer", "--output_path", "finer"]
    edit += ["--n_inversion_steps", 10, "--keyframe_interval", 8]
    result = run("run_tokenflow_sdedit.py", *edit, cwd=folder)
    last_line(result)
    assert "denoised along" not in result.stderr


def test_without_a_reconstruction(work, checkpoint, monkeypatch):
    folder, flags, _ = work
    monkeypatch.setattr("tokenflow.inversion.invert.sample", None)  # not to be called
    changes = ["--no_reconstruction", "--save_dir", "bare"]
    path = folder / last_line(run("preprocess.py", *flags, *changes, cwd=folder))
    assert path.is_dir() and not (path / "frames").exists() and not (path / "inverted.mp4").exists()
    edit = [*edit_flags(checkpoint, "pnp"), "--latents_path", "bare", "--output_path", "bare"]
    video = folder / last_line(run("run_tokenflow_pnp.py", *edit, cwd=folder))
    assert video_of(video.parent / "comparison.mp4") == (7, 12, 128, 64)


def test_folder_input_with_stride(tmp_path, checkpoint, clip_frames):
    (tmp_path / "images").mkdir()
    util.save_frames(tmp_path / "images", 0, clip_frames)
    flags = ["--data_path", "images", "--model", checkpoint, "--H", 64, "--W", 64, "--steps", 2]
    flags += ["--save_steps", 2, "--n_frames", 0, "--start_frame", 1, "--stride", 2]
    video = tmp_path / last_line(run("preprocess.py", *flags, cwd=tmp_path))
    assert video.parent.name == "nframes_3" and video_of(video)[:2] == (3, 12)
    source = util.load_frames(video.parent / "source", range(3))
    assert np.array_equal(source, clip_frames[1::2])
    # It has no inversion_prompt, which an automatic mask compares the prompt with.
    edit = ["--data_path", "images", "--model", checkpoint, "--n_inversion_steps", 2]
    edit += ["--n_timesteps", 2, "--n_frames", 0, "--prompt", "a dog", "--mask", "auto"]
    result = run("run_tokenflow_pnp.py", *edit, cwd=tmp_path)
    refusal(result, "mask: auto", "--inversion_prompt", "--overwrite")
    assert not (tmp_path / "tokenflow-results").exists()
