"""What a sweep of nine settings costs, and the same nine edits by a command each.

    python -m benchmarks.sweep

The sample clip is edited on the shapes checkpoint by Plug-and-Play, with three values of each of its
thresholds, once as a sweep and once setting by setting, with one `evaluate.py` over all in the end. The
frames must be the same.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks.report import markdown

ROOT = Path(__file__).parent.parent
CLIP = ("--data_path", ROOT / "data" / "shapes.mp4", "--model", ROOT / "data" / "shapes-sd")
ATTENTION, FEATURES = ("0.3", "0.5", "0.8"), ("0.4", "0.6", "0.8")


def timed(folder: Path, script: str, *flags: object) -> tuple[float, float, str]:
    """Run a command in `folder`: seconds by the clock, CPU seconds in user mode, and its last line."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    before, began = os.times().children_user, time.monotonic()
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.monotonic() - began
    return seconds, os.times().children_user - before, done.stdout.splitlines()[-1]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="of the inversion and of the edits")
    parser.add_argument("--folder", type=Path, help="keep what is written, in this new folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.folder:
            args.folder.mkdir(parents=True)
        print(table(args.folder or Path(folder), args.frames, args.steps), end="")


def table(folder: Path, n_frames: int, steps: int) -> str:
    """Both ways in `folder`, and what they cost, as Markdown."""
    common = *CLIP, "--n_frames", n_frames, "--dtype", "float32"
    invert = "--inversion_prompt", "a red striped circle on a green dotted background"
    invert += "--H", 128, "--W", 128, "--steps", steps, "--save_steps", steps
    timed(folder, "preprocess.py", *common, *invert)
    edit = *common, "--prompt", "a blue striped circle on a green dotted background"
    edit += "--n_inversion_steps", steps, "--n_timesteps", steps
    settings = list(itertools.product(ATTENTION, FEATURES))
    lists = "--pnp_attn_t", *ATTENTION, "--pnp_f_t", *FEATURES, "--output_path", "sweep"
    sweep = timed(folder, "run_tokenflow_pnp.py", *edit, *lists)
    alone = []
    for attention, features in tqdm(settings, "Edits", unit="edit"):
        one = "--pnp_attn_t", attention, "--pnp_f_t", features, "--output_path", "alone"
        alone.append(timed(folder, "run_tokenflow_pnp.py", *edit, *one))
    videos = [Path(path) for _, _, path in alone]
    for video in videos:
        swept = folder / "sweep" / video.relative_to("alone")
        assert swept.read_bytes() == (folder / video).read_bytes(), swept
    alone.append(timed(folder, "evaluate.py", "--edits", *(video.parent for video in videos)))
    costs = {
        f"{len(settings)} commands and one of evaluate.py": [
            sum(cost) for cost in zip(*(run[:2] for run in alone), strict=True)
        ],
        "one sweep": sweep[:2],
    }
    rows = [[name, *(f"{seconds:.0f}" for seconds in cost)] for name, cost in costs.items()]
    ratios = (sweep / commands for commands, sweep in zip(*costs.values(), strict=True))
    rows.append(["the sweep's share", *(f"{ratio:.2f}" for ratio in ratios)])
    return markdown(["", "seconds by the clock", "CPU seconds (user)"], rows)


if __name__ == "__main__":
    main()
