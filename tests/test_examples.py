"""The scripts in examples/, as a user runs them, and the README's moving picture."""

import os
import runpy
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from test_cli import ROOT

from benchmarks.picture import SIDE, write_picture
from tokenflow.config import PnPConfig, PreprocessConfig
from util import save_frames

SMALL = "--model {model} --n_frames 3 --dtype float32"


@pytest.fixture
def folder(tmp_path, clip):
    """A folder with a clip whose name has a space."""
    shutil.copy(clip, tmp_path / "a clip.mp4")
    return tmp_path


def run_example(script, *arguments, folder, checkpoint):
    small = SMALL.format(model=checkpoint)
    environment = os.environ | {
        "PYTHON": sys.executable,
        "INVERT": f"{small} --H 64 --W 64 --steps 2 --save_steps 2",
        "EDIT": f"{small} --n_inversion_steps 2 --n_timesteps 2",
        "EVALUATE": "--clip None --dino None",
    }
    command = [ROOT / "examples" / script, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_many_prompts(folder, checkpoint):
    (folder / "prompts.txt").write_text("a blue circle\n\na 'red' circle, twice  as large")
    arguments = "a clip.mp4", "a red circle", "prompts.txt"
    result = run_example("many_prompts.sh", *arguments, folder=folder, checkpoint=checkpoint)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "tokenflow-results/report.html\n"
    page = (folder / "tokenflow-results" / "report.html").read_text()
    assert "a blue circle" in page and "a 'red' circle, twice  as large" in page


def test_edit(folder, checkpoint, monkeypatch):
    """From Python."""
    monkeypatch.chdir(folder)
    edit_video = runpy.run_path(str(ROOT / "examples" / "edit.py"))["edit_video"]
    shared = {"data_path": "a clip.mp4", "model": str(checkpoint), "n_frames": 3}
    shared["dtype"] = "float32"
    sizes = {"H": 64, "W": 64, "steps": 2, "save_steps": 2}
    inverting = PreprocessConfig(inversion_prompt="a red square", **shared, **sizes)
    editing = PnPConfig(prompt="a blue square", n_inversion_steps=2, n_timesteps=2, **shared)
    for _ in range(2):  # the second time, there is nothing to do
        assert str(edit_video(inverting, editing)) == "tokenflow-results/pnp_a clip/edited.mp4"
    assert (folder / "tokenflow-results/pnp_a clip/edited.mp4").is_file()


def test_many_videos(folder, checkpoint):
    """A line that fails does not stop the next."""
    (folder / "videos.tsv").write_text(
        "# video\twhat it shows\twhat the edit shows\n"
        "none.mp4\ta square\ta circle\n"
        "a clip.mp4\ta red square\ta blue square"
    )
    result = run_example("many_videos.sh", "videos.tsv", folder=folder, checkpoint=checkpoint)
    assert result.returncode == 1 and "failed: none.mp4" in result.stderr
    assert result.stdout == "tokenflow-results/pnp_a clip/report.html\n", result.stderr
    assert (folder / result.stdout.strip()).is_file()


def test_moving_picture(tmp_path, clip_frames):
    """Videos side by side, each below its title; the shortest decides how many frames there are."""
    for name, frames in (("a", clip_frames), ("b", clip_frames[:5, ::-1])):
        (tmp_path / name).mkdir()
        save_frames(tmp_path / name, 0, frames)
    folders = {"the source": tmp_path / "a", "edit": tmp_path / "b"}
    write_picture(tmp_path / "both.webp", folders, fps=10)
    _, animation = cv2.imreadanimation(str(tmp_path / "both.webp"))
    assert np.array(animation.durations).ravel().tolist() == [100] * 5
    shown = np.stack(animation.frames)[:, -SIDE:, :, 2::-1]  # blue, green, red and perhaps alpha
    large = [
        cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for frame in clip_frames[:5]
    ]
    expected = np.concatenate([large, np.flip(large, 1)], axis=2)
    assert abs(shown.astype(int) - expected).mean() < 5
