"""Quality of edits on clips whose motion and content are known exactly.

    python -m benchmarks.quality --quick

Edits held-out clips of the world of shapes with every method and measures how steady, how right and how
close to the source they are; writes a table (Markdown and JSON), a plot and a contact sheet.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.arguments import benchmark_parser
from benchmarks.baselines import ExtendedAttention, FrameByFrame
from benchmarks.clips import Clip, held_out_clips
from benchmarks.job import Job, reconstruction_psnr
from benchmarks.report import method_table, plot, reconstruction_table, write_report
from shapes.judge import Judge
from tokenflow.config import PnPConfig
from tokenflow.contact_sheet import contact_sheet, moments
from tokenflow.diffusion.checkpoints import choose_device, load
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.metrics import warp_error
from util import write_image

GAPS = (1, 8)  # frames between the two that a warp error compares
RECONSTRUCTION_STEPS = (10, 20, 50, 100)


METHODS: dict[str, Callable[[Job], np.ndarray]] = {
    "source": lambda job: job.clip.frames,
    "vae": lambda job: job.sd.decode_latents(job.clean),
    "per_frame": lambda job: job.edit_pnp(FrameByFrame),
    "extended_attention": lambda job: job.edit_pnp(ExtendedAttention),
    "tokenflow_previous": lambda job: job.with_settings(propagation="previous").edit_pnp(),
    "tokenflow_flanking": lambda job: job.edit_pnp(),
    "sdedit": lambda job: job.edit_sdedit(),
    "controlnet": lambda job: job.edit_controlnet(),
}


def measure(
    clip: Clip, frames: np.ndarray, judge: Judge, gaps: tuple[int, ...] = GAPS
) -> dict[str, float]:
    """Warp errors (x 1e-3), share of attributes right, PSNR (dB) of what should stay the same."""
    row = {}
    for gap in gaps:
        pairs = [(i, i + gap) for i in range(clip.n_frames - gap)]
        errors = [warp_error(frames[i], frames[j], *clip.flow(i, j)) for i, j in pairs]
        row[f"warp_{gap}"] = 1e3 * float(np.mean(errors))
    answers = judge.read(frames)
    for name, edited in (("edited_right", True), ("kept_right", False)):
        right = [
            answer == value
            for attribute, value in clip.truth(edited).items()
            for answer in answers[attribute]
        ]
        row[name] = float(np.mean(right))
    stays = np.stack([clip.stays(time) for time in range(clip.n_frames)])
    row["kept_psnr"] = float("nan")  # where the edit names everything, nothing should stay
    if stays.any():
        error = np.square((frames.astype(float) - clip.frames)[stays] / 255).mean()
        row["kept_psnr"] = float(-10 * np.log10(max(error, 1e-10)))
    return row


def parse_arguments() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = benchmark_parser(__doc__, "runs/quality")
    parser.add_argument("--quick", action="store_true", help="fewer clips, frames and steps")
    parser.add_argument(
        "--steps", type=int, default=50, help="of inversions and edits, if not quick"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; 1 on a GPU")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    return parser.parse_args()


def main() -> None:
    """Edit every clip with every method, measure, and write the report."""
    args = parse_arguments()
    n_clips, n_frames, n_steps = (4, 16, 20) if args.quick else (12, 24, args.steps)
    args.output.mkdir(parents=True, exist_ok=True)
    clips = held_out_clips(n_clips, n_frames)
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        edited = pool.map(partial(edit_clip, args, n_steps), clips)
        done = list(tqdm(edited, "Editing", n_clips, unit="clip"))
        steps = RECONSTRUCTION_STEPS[: 3 if args.quick else None]
        tasks = [(inversion, n) for inversion in ("fixed_point", "ddim") for n in steps]
        psnr = pool.map(partial(reconstruct_clips, args, clips[:2]), tasks)
        psnr = dict(zip(tasks, tqdm(psnr, "Reconstructing", len(tasks)), strict=True))

    rows = [{"method": name} | mean([rows[name] for rows, _ in done]) for name in METHODS]
    reconstruction = {
        inversion: {n: psnr[inversion, n] for n in steps} for inversion in ("fixed_point", "ddim")
    }
    table = method_table(rows) + "\n" + reconstruction_table(reconstruction)
    measured = [
        {"clip": clip.prompt, "kind": clip.kind, "rows": rows}
        for clip, (rows, _) in zip(clips, done, strict=True)
    ]
    report = {"rows": rows, "reconstruction_psnr": reconstruction, "clips": measured}
    write_report(args, "quality", table, report)
    plot(args.output / "quality.png", rows, reconstruction)
    for index, (clip, (_, shown)) in enumerate(zip(clips, done, strict=True)):
        sheet = contact_sheet(shown, f"{clip.source_prompt} -> {clip.prompt}")
        write_image(args.output / f"clip_{index:02d}.png", sheet)
    print(table)


def edit_clip(args: argparse.Namespace, n_steps: int, clip: Clip) -> tuple[dict, dict]:
    """By method, the measurements of a clip's edit, and some of its frames."""
    sd, judge = loaded(args), Judge.load(args.model / "judge.safetensors")
    config = PnPConfig(data_path="", prompt="unused", n_timesteps=n_steps)
    rows, shown = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        job = Job.prepare(sd, clip, config, Path(folder))
        job.reconstruct()
        for name, method in METHODS.items():
            start = time.perf_counter()
            frames = method(job)
            seconds = (time.perf_counter() - start) / clip.n_frames
            rows[name] = measure(clip, frames, judge) | {"seconds_per_frame": seconds}
            shown[name] = frames[moments(clip.n_frames)]
    return rows, shown


def reconstruct_clips(args: argparse.Namespace, clips: list[Clip], task: tuple[str, int]) -> float:
    """Mean PSNR (dB) of the clips' reconstructions, by kind of inversion and number of steps."""
    inversion, n_steps = task
    fixed_point = inversion == "fixed_point"
    sd = loaded(args)
    return float(np.mean([reconstruction_psnr(sd, clip, n_steps, fixed_point) for clip in clips]))


def loaded(args: argparse.Namespace) -> StableDiffusion:
    """The checkpoint, in a process that has its share of the machine's cores."""
    torch.set_num_threads(max(1, os.cpu_count() // args.workers))
    device, dtype = choose_device(args.device, args.dtype)
    return load(str(args.model), [str(args.model / "controlnet")], device, dtype)


def mean(rows: list[dict]) -> dict[str, float]:
    """The mean of every number in rows of the same keys."""
    return {key: float(np.nanmean([row[key] for row in rows])) for key in rows[0]}


if __name__ == "__main__":
    main()
