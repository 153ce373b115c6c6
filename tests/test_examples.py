"""The scripts in examples/, as a user runs them."""

import os
import runpy
import shutil
import subprocess
import sys

import pytest
from test_cli import ROOT

from tokenflow.config import PnPConfig, PreprocessConfig

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
