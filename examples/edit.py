"""Invert and edit a video from Python. A killed run goes on where it was stopped, as with the commands.

python examples/edit.py wolf.mp4 "a wolf in the snow" "a robotic wolf in the snow"
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tokenflow.config import PnPConfig, PreprocessConfig
from tokenflow.editing.sweep import open_edits
from tokenflow.editing.techniques import PlugAndPlay
from tokenflow.inversion.invert import open_inversion


def edit_video(inverting: PreprocessConfig, editing: PnPConfig) -> Path:
    """Invert a video and edit it; returns the path of the edited video."""
    with open_inversion(inverting) as run:
        if not run.is_finished:
            run.read_frames()
            run.invert()
            run.reconstruct()
            run.finish()
    with open_edits([editing], "pnp") as edits:
        for run in edits:
            if not run.is_finished:
                run.write(run.edit(PlugAndPlay(run.config, run.schedule, run.source)))
    return edits.result


if __name__ == "__main__":
    video, shown, prompt = sys.argv[1:]
    inverting = PreprocessConfig(data_path=video, inversion_prompt=shown)
    print(edit_video(inverting, PnPConfig(data_path=video, prompt=prompt)))
