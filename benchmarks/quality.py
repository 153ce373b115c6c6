"""Quality of edits on clips whose motion and content are known exactly.

    python -m benchmarks.quality --quick

Edits held-out clips of the world of shapes with every method and measures how steady, how sharp, how right
and how close to the source they are; writes tables (Markdown and JSON), a plot and contact sheets. What is
measured of an edit is kept, with some of its frames, in the folder `edits` of the output, and a run of the
same code, checkpoint and options takes it from there: a killed run goes on, and one of more clips or methods
adds to it.
"""

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.arguments import benchmark_parser
from benchmarks.clips import Clip, held_out_clips
from benchmarks.job import Job, reconstruction_psnr
from benchmarks.kept import digest_of_run, keep, kept_path
from benchmarks.measures import Row, difference, measure, summary, with_sharpness
from benchmarks.methods import BASE, FRAME_BY_FRAME, METHODS, chosen_methods
from benchmarks.report import method_table, plot, reconstruction_table, write_report
from shapes.judge import Judge
from tokenflow.config import PnPConfig
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.device import choose_device
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.evaluation.contact_sheet import contact_sheet, moments
from util import read_image, write_image

FULL = {"clips": 12, "frames": 24, "steps": 50}
QUICK = {"clips": 4, "frames": 20, "steps": 20}
RECONSTRUCTION_STEPS = (10, 20, 50, 100)


def parse_arguments() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = benchmark_parser(__doc__, "runs/quality")
    parser.add_argument("--quick", action="store_true", help=f"other defaults: {QUICK}")
    parser.add_argument("--clips", type=int, help="number of clips; more than 3 hold plain ones")
    parser.add_argument("--frames", type=int, help="of each clip")
    parser.add_argument("--steps", type=int, help="of the inversions and of the edits")
    parser.add_argument(
        "--methods",
        type=chosen_methods,
        default=list(METHODS),
        help="those to compare, separated by commas, as rows of the table name them; without all of "
        "them there are neither reconstructions nor a plot",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; 1 on a GPU")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.set_defaults(**FULL)
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def main() -> None:
    """Edit every clip with every method, measure, and write the report."""
    args = parse_arguments()
    clips, run = held_out_clips(args.clips, args.frames), digest_of_run(args)
    folder = args.output / "edits"
    folder.mkdir(parents=True, exist_ok=True)
    kept = [
        {
            name: kept_path(folder, f"clip_{index:02d}_{name}", run, clip, METHODS[name])
            for name in args.methods
        }
        for index, clip in enumerate(clips)
    ]
    reconstruction = {}
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        edited = pool.map(partial(edit_clip, args), clips, kept)
        done = list(tqdm(edited, "Editing", len(clips), unit="clip"))
        if args.methods == list(METHODS):
            steps = RECONSTRUCTION_STEPS[: 3 if args.quick else None]
            tasks = [(inversion, n) for inversion in FRAME_BY_FRAME for n in steps]
            psnr = pool.map(partial(reconstruct_clips, args, run, clips[:2]), tasks)
            psnr = dict(zip(tasks, tqdm(psnr, "Reconstructing", len(tasks)), strict=True))
            reconstruction = {i: {n: psnr[i, n] for n in steps} for i in FRAME_BY_FRAME}

    report = report_of(clips, done) | {"reconstruction_psnr": reconstruction}
    tables = tables_of(report)
    write_report(args, "quality", tables, report)
    if reconstruction:
        plot(args.output / "quality.png", report["rows"], reconstruction)
    for index, (clip, paths) in enumerate(zip(clips, kept, strict=True)):
        shown = {name: read_image(path.with_suffix(".png"))[None] for name, path in paths.items()}
        sheet = contact_sheet(shown, f"{clip.source_prompt} -> {clip.prompt}")
        write_image(args.output / f"clip_{index:02d}.png", sheet)
    print(tables)


def report_of(clips: list[Clip], done: list[dict[str, Row]]) -> dict:
    """Summaries by method of all, textured and plain clips, differences to `BASE`, and each clip's rows."""

    def rows(chosen: list[dict[str, Row]]) -> list[dict]:
        return [
            {"method": name} | summary([of[name] for of in chosen]) for name in done[0] if chosen
        ]

    def of_kind(plain: bool) -> list[dict]:
        return rows([of for clip, of in zip(clips, done, strict=True) if clip.is_plain == plain])

    base = [of[BASE] for of in done]
    differences = [
        {"method": name} | difference([of[name] for of in done], base)
        for name in done[0]
        if name != BASE
    ]
    measured = [
        {"clip": clip.prompt, "kind": clip.kind, "rows": of}
        for clip, of in zip(clips, done, strict=True)
    ]
    return {
        "rows": rows(done),
        "differences": differences,
        "textured": of_kind(plain=False),
        "plain": of_kind(plain=True),
        "clips": measured,
    }


def tables_of(report: dict) -> str:
    """The report as Markdown."""
    titles = {
        "rows": "method",
        "differences": f"more than `{BASE}`",
        "textured": "textured clips",
        "plain": "plain clips",
    }
    tables = [
        method_table(report[key], title, signed=key == "differences")
        for key, title in titles.items()
        if report[key]
    ]
    if report["reconstruction_psnr"]:
        tables.append(reconstruction_table(report["reconstruction_psnr"]))
    return "\n".join(tables)


def edit_clip(args: argparse.Namespace, clip: Clip, kept: dict[str, Path]) -> dict[str, Row]:
    """By method, the measures of a clip's edits, of which those that are not `kept` yet are made."""
    missing = {name: path for name, path in kept.items() if not path.exists()}
    if missing:
        make_edits(args, clip, missing)
    rows = {name: json.loads(path.read_text()) for name, path in kept.items()}
    return {
        name: with_sharpness(row, rows[FRAME_BY_FRAME[METHODS[name].inversion]])
        for name, row in rows.items()
    }


def make_edits(args: argparse.Namespace, clip: Clip, kept: dict[str, Path]) -> None:
    """Edit a clip with each method, and keep the measures, and some of the frames beside them."""
    sd, judge = loaded(args), Judge.load(args.model / "judge.safetensors")
    config = PnPConfig(data_path="", prompt="unused", n_timesteps=args.steps)
    jobs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in kept.items():
            method = METHODS[name]
            inversion = method.inversion
            if inversion not in jobs:
                jobs[inversion] = Job.prepare(sd, clip, config, Path(folder) / inversion, inversion)
                if inversion == "fixed_point":  # of which alone the commands keep source features
                    jobs[inversion].reconstruct()
            start = time.perf_counter()
            frames = method(jobs[inversion])
            seconds = (time.perf_counter() - start) / clip.n_frames
            shown = np.concatenate(frames[moments(clip.n_frames)], axis=1)
            write_image(path.with_suffix(".png"), shown)
            keep(path, measure(clip, frames, judge) | {"seconds_per_frame": seconds})


def reconstruct_clips(
    args: argparse.Namespace, run: str, clips: list[Clip], task: tuple[str, int]
) -> float:
    """Mean PSNR (dB) of the clips' reconstructions, by kind of inversion and number of steps."""
    inversion, n_steps = task
    name = f"reconstruction_{inversion}_{n_steps}"
    path = kept_path(args.output / "edits", name, run, *clips)
    if not path.exists():
        sd, fixed_point = loaded(args), inversion == "fixed_point"
        psnr = [reconstruction_psnr(sd, clip, n_steps, fixed_point) for clip in clips]
        keep(path, float(np.mean(psnr)))
    return json.loads(path.read_text())


def loaded(args: argparse.Namespace) -> StableDiffusion:
    """The checkpoint, in a process that takes its share of the machine's cores and no more than it may."""
    torch.set_num_threads(max(1, min(torch.get_num_threads(), os.cpu_count() // args.workers)))
    device, dtype = choose_device(args.device, args.dtype)
    return Checkpoint.find(str(args.model)).load(
        device, dtype, controlnets=[str(args.model / "controlnet")]
    )


if __name__ == "__main__":
    main()
