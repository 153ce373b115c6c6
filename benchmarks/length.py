"""What length costs, and whether it shows: seconds a frame and peak memory against the number of frames.

    python -m benchmarks.length --quick

The commands run on clips of growing length, on a tiny random checkpoint. On the shapes checkpoint one
long clip is edited with windows of several sizes and with all keyframes jointly, and measured: the
warp error (x 1e-3) where two windows meet, elsewhere, and there in the joint edit, and how far the colours
of the object and of the background drift from the first frames to the last. Writes tables (Markdown and
JSON) and a plot. Sharpness is relative to the same clip's edit made frame by frame.
"""

import argparse
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.arguments import benchmark_parser
from benchmarks.baselines import FrameByFrame
from benchmarks.clips import SIZE, Clip, held_out_clips
from benchmarks.job import Job
from benchmarks.measures import along_motion, measure, with_sharpness
from benchmarks.meter import Cost, Meter
from benchmarks.report import length_plot, length_table, window_table, write_report
from shapes.checkpoint import build_random
from shapes.judge import Judge
from shapes.world import render
from tokenflow.config import PnPConfig, PreprocessConfig
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.device import choose_device
from tokenflow.editing.check import check_edit
from tokenflow.editing.shared import Shared
from tokenflow.editing.techniques import plug_and_play
from tokenflow.editing.windows import window_bounds
from tokenflow.evaluation.contact_sheet import contact_sheet, moments
from tokenflow.evaluation.metrics import warp_error
from tokenflow.inversion.invert import open_inversion
from util import write_image, write_video

LENGTHS = (24, 96, 384, 1536)  # frames
TINY_SIZE = 64  # pixels
ENDS = 24  # frames, whose colours are compared


def cost_rows(steps: int, warm_up: int) -> list[dict]:
    """Seconds a frame and peak memory of both commands, by length; the model's own part is 12 MB.

    Each is of a process that did the same to a clip of `warm_up` frames before, for it keeps kernels for
    each size of batch that it has met.
    """
    rows = []
    (clip,) = held_out_clips(1, max(LENGTHS))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shared = {"model": str(build_random(folder / "tiny")), "dtype": "float32", "device": "cpu"}
        configs = {}
        for n_frames in {warm_up, *LENGTHS}:
            video, latents = str(folder / f"{n_frames}.mp4"), str(folder / "latents")
            frames = (render(clip.scene, time, TINY_SIZE)[0] for time in range(n_frames))
            write_video(Path(video), frames, 24)
            shared |= {"data_path": video, "n_frames": n_frames, "overwrite": True}
            inversion = PreprocessConfig(
                H=TINY_SIZE, W=TINY_SIZE, steps=steps, save_steps=steps, save_dir=latents, **shared
            )
            edit = PnPConfig(
                prompt=clip.prompt,
                n_inversion_steps=steps,
                n_timesteps=steps,
                latents_path=latents,
                output_path=str(folder / "edits"),
                **shared,
            )
            configs[n_frames] = {"inversion": inversion, "editing": edit}
        runs = [(n_frames, stage) for n_frames in LENGTHS for stage in configs[n_frames]]
        for n_frames, stage in tqdm(runs, "Costs", unit="run"):
            # In a process of its own, for what ran before leaves memory that counts for nothing.
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                before, measured = configs[warm_up][stage], configs[n_frames][stage]
                cost = pool.submit(cost_of, before, measured).result()
            figures = {"seconds_per_frame": cost.seconds / n_frames, "peak_mb": cost.peak_mb}
            rows.append({"stage": stage, "frames": n_frames} | figures)
    return rows


def cost_of(*configs: PreprocessConfig | PnPConfig) -> Cost:
    """What the last of several runs costs; the others pay for what a process does and keeps once."""
    meter = Meter(torch.device("cpu"))
    for config in configs:
        with meter.stage("run"):
            if isinstance(config, PreprocessConfig):  # what `preprocess.py` does
                with open_inversion(config) as run:
                    run.read_frames()
                    run.invert()
                    run.reconstruct()
                    run.finish()
            else:  # what `run_tokenflow_pnp.py` does
                with check_edit(config, "pnp", Shared()).open() as run:
                    run.write(run.edit(plug_and_play(config, run.schedule, run.source)))
    return meter.stages["run"]


def quality_rows(args: argparse.Namespace, n_frames: int, sizes: list[int]) -> list[dict]:
    """How one long clip fares with windows of these sizes, the last of which holds all keyframes."""
    sd = Checkpoint.find(str(args.model)).load(*choose_device(args.device, args.dtype))
    judge = Judge.load(args.model / "judge.safetensors")
    config = PnPConfig(data_path="", prompt="unused", n_timesteps=args.steps)
    (clip,) = held_out_clips(1, n_frames)
    rows, edits = [], {}
    with tempfile.TemporaryDirectory() as folder:
        job = Job.prepare(sd, clip, config, Path(folder))
        job.reconstruct()
        alone = measure(clip, job.edit_pnp(FrameByFrame), judge)
        for size in tqdm(sizes, "Windows", unit="edit"):
            edits[size] = job.with_settings(keyframe_window=size).edit_pnp()
    errors = {
        size: 1e3 * along_motion(warp_error, clip, frames, 1) for size, frames in edits.items()
    }
    for size, frames in edits.items():
        meets = where_windows_meet(n_frames, config.interval, size)
        seams = {
            "warp_between": errors[size][meets],
            "warp_within": errors[size][~meets],
            "warp_between_jointly": errors[sizes[-1]][meets],
        }
        rows.append(
            {"window": "all" if size == sizes[-1] else str(size)}
            | with_sharpness(measure(clip, frames, judge), alone)
            | {
                name: float(values.mean()) if meets.any() else None
                for name, values in seams.items()
            }
            | {"colour_drift": colour_drift(clip, frames)}
        )
    shown = {"source": clip.frames} | {f"window of {size}": edits[size] for size in sizes[:-1]}
    shown["all keyframes jointly"] = edits[sizes[-1]]
    shown = {label: frames[moments(n_frames)] for label, frames in shown.items()}
    write_image(args.output / "length_sheet.png", contact_sheet(shown, clip.prompt))
    return rows


def where_windows_meet(n_frames: int, interval: int, size: int) -> np.ndarray:
    """Which of the frames but the last, bool, may be at the keyframe that two windows share."""
    interval_of = np.arange(n_frames - 1) // interval
    bounds = window_bounds(interval_of[-1] + 1, size)
    return np.isin(interval_of, bounds[1:-1])


def colour_drift(clip: Clip, frames: np.ndarray) -> float:
    """How far the mean colours of object and background are apart in the first and the last frames.

    Root mean square over both layers and three channels, in grey levels.
    """

    def colours(times: range) -> np.ndarray:
        masks = np.stack([render(clip.scene, time, SIZE)[1] for time in times])
        shown = frames[times.start : times.stop]
        return np.stack([shown[masks].mean(0), shown[~masks].mean(0)])  # layers 3

    first, last = range(ENDS), range(clip.n_frames - ENDS, clip.n_frames)
    return float(np.sqrt(np.square(colours(first) - colours(last)).mean()))


def report_so_far(args: argparse.Namespace, rows: list[dict], qualities: list[dict]) -> str:
    """Write what is measured so far, and return the tables."""
    tables = length_table(rows) + ("\n" + window_table(qualities) if qualities else "")
    write_report(args, "length", tables, {"rows": rows, "quality": qualities})
    length_plot(args.output / "length.png", rows)
    return tables


def main() -> None:
    """Measure, and write the report."""
    parser = benchmark_parser(__doc__, "runs/length")
    parser.add_argument(
        "--quick", action="store_true", help="fewer steps, and a shorter clip edited"
    )
    parser.add_argument("--steps", type=int, default=10, help="of the inversions and the edits")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rows = cost_rows(2, warm_up=144) if args.quick else cost_rows(4, warm_up=384)
    report_so_far(args, rows, [])
    n_frames, sizes = (72, [8]) if args.quick else (384, [6, 8, 14])
    print(report_so_far(args, rows, quality_rows(args, n_frames, [*sizes, n_frames])))


if __name__ == "__main__":
    main()
