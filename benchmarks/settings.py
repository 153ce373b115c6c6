"""What the defaults of an edit rest on: each key varied by itself, on held-out clips.

    python -m benchmarks.settings --clips 4 --frames 10

Edits clips of the world of shapes with TokenFlow while one key of the configuration takes other values,
and prints a Markdown table, the defaults' row first. Sharpness is relative to the edit with the defaults made
frame by frame.
"""

import tempfile
from pathlib import Path

from tqdm import tqdm

from benchmarks.arguments import benchmark_parser
from benchmarks.baselines import FrameByFrame
from benchmarks.clips import held_out_clips
from benchmarks.job import Job
from benchmarks.measures import measure, summary, with_sharpness
from benchmarks.report import method_table
from shapes.judge import Judge
from tokenflow.config import PnPConfig
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.device import choose_device

VARIED = {
    "guidance_scale": (3.0, 7.5, 10.0),
    "pnp_attn_t": (0.0, 0.25, 0.75),
    "pnp_f_t": (0.4, 0.6, 1.0),
    "propagation": ("previous",),
}


def main() -> None:
    """Edit every clip with every setting, measure, and write the table."""
    parser = benchmark_parser(__doc__, "runs/settings.md")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20, help="of the inversion and of the edits")
    args = parser.parse_args()
    sd = Checkpoint.find(str(args.model)).load(*choose_device(args.device, args.dtype))
    judge = Judge.load(args.model / "judge.safetensors")
    config = PnPConfig(data_path="", prompt="unused", n_timesteps=args.steps)
    changes = [{}] + [{key: value} for key, values in VARIED.items() for value in values]
    measured = [[] for _ in changes]
    with tqdm(desc="Editing", total=args.clips * len(changes), unit="video") as bar:
        for clip in held_out_clips(args.clips, args.frames):
            with tempfile.TemporaryDirectory() as folder:
                job = Job.prepare(sd, clip, config, Path(folder))
                job.reconstruct()
                alone = measure(clip, job.edit_pnp(FrameByFrame), judge)
                for change, rows in zip(changes, measured, strict=True):
                    frames = job.with_settings(**change).edit_pnp()
                    rows.append(with_sharpness(measure(clip, frames, judge), alone))
                    bar.update()
    rows = [
        {"method": " ".join(f"{k}: {v}" for k, v in change.items()) or "defaults"} | summary(rows)
        for change, rows in zip(changes, measured, strict=True)
    ]
    table = method_table(rows, "setting")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(table)
    print(table)


if __name__ == "__main__":
    main()
