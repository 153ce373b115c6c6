"""Quality of edits on clips whose motion and content are known exactly.

    python -m benchmarks.quality --quick

Edits held-out clips of the world of shapes with several methods, as the commands do, and measures how steady,
how sharp, how right and how close to the source they are; writes tables (Markdown and JSON) and contact
sheets. What is measured of an edit is kept, with some of its frames, in the folder `edits` of the output, and
a run of the same code, checkpoint and options takes it from there: a killed run goes on, and one of more
clips or methods adds to it.
"""

import argparse
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.arguments import benchmark_parser
from benchmarks.clips import SIZE, Clip, held_out_clips
from benchmarks.commands import Commands
from benchmarks.kept import JUDGE, digest_of_run, keep, kept_path
from benchmarks.measures import (
    Row,
    add_sharpness,
    compare,
    find_reconstruction_psnr,
    measure,
    summarize,
)
from benchmarks.methods import BASE, FRAME_BY_FRAME, METHODS, parse_methods
from benchmarks.report import method_table, write_report
from shapes.judge import Judge
from tokenflow.evaluation.contact_sheet import contact_sheet, moments
from util import read_image, write_image

FULL = {"clips": 12, "frames": 24, "steps": 50}
QUICK = {"clips": 4, "frames": 20, "steps": 20}
OTHER = ", other checkpoint"  # in names of rows
TABLES = {
    "rows": "method",
    "differences": f"more than `{BASE}`",
    "textured": "textured clips",
    "plain": "plain clips",
}


def parse_arguments() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = benchmark_parser(__doc__, "runs/quality")
    parser.add_argument("--quick", action="store_true", help=f"other defaults: {QUICK}")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="another checkpoint, on which nothing was tuned, whose rows stand below those of --model",
    )
    parser.add_argument("--clips", type=int, help="number of clips; more than 3 hold plain ones")
    parser.add_argument("--frames", type=int, help="of each clip")
    parser.add_argument("--steps", type=int, help="of the inversions and of the edits")
    parser.add_argument(
        "--methods",
        type=parse_methods,
        default="published",
        help="those to compare with the default, separated by commas: flags of run_tokenflow_pnp.py, such as "
        f"'--fuse 2', or of {', '.join(METHODS)}",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; 1 on a GPU")
    parser.set_defaults(**FULL)
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def main() -> None:
    """Edit every clip with every method, measure, and write the report."""
    args = parse_arguments()
    clips, folder = held_out_clips(args.clips, args.frames), args.output / "edits"
    folder.mkdir(parents=True, exist_ok=True)
    models = {"": args.model} | ({OTHER: args.checkpoint} if args.checkpoint else {})
    runs = {suffix: digest_of_run(args, model) for suffix, model in models.items()}
    kept = {
        suffix: [
            {
                name: kept_path(folder, f"clip_{index:02d}", run, clip, method)
                for name, method in args.methods.items()
            }
            for index, clip in enumerate(clips)
        ]
        for suffix, run in runs.items()
    }
    done = {}
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        for suffix, model in models.items():
            edited = pool.map(partial(edit_clip, args, model), clips, kept[suffix])
            done[suffix] = list(tqdm(edited, f"Editing{suffix}", len(clips), unit="clip"))
    report = summarize_clips(clips, interleave(done))
    tables = format_tables(report)
    write_report(args.output, "quality", tables, report)
    for index, (clip, paths) in enumerate(zip(clips, interleave(kept), strict=True)):
        shown = {name: read_image(path.with_suffix(".png"))[None] for name, path in paths.items()}
        shown = {"source": np.concatenate(clip.frames[moments(clip.n_frames)], 1)[None]} | shown
        sheet = contact_sheet(shown, f"{clip.source_prompt} -> {clip.prompt}")
        write_image(args.output / f"clip_{index:02d}.png", sheet)
    print(tables)


def interleave(by_suffix: dict[str, list[dict]]) -> list[dict]:
    """One dictionary for each clip, in which names have the suffix of their checkpoint, and take turns."""
    merged = []
    for of_clip in zip(*by_suffix.values(), strict=True):
        sides = dict(zip(by_suffix, of_clip, strict=True))
        merged.append({n + suffix: of[n] for n in of_clip[0] for suffix, of in sides.items()})
    return merged


def edit_clip(
    args: argparse.Namespace, model: Path, clip: Clip, kept: dict[str, Path]
) -> dict[str, Row]:
    """By method, the measures of a clip's edits, of which those that are not `kept` yet are made."""
    missing = {name: path for name, path in kept.items() if not path.exists()}
    if missing:
        make_edits(args, model, clip, missing)
    rows = {name: json.loads(path.read_text()) for name, path in kept.items()}
    return {
        name: add_sharpness(row, rows[FRAME_BY_FRAME[args.methods[name].inversion]])
        for name, row in rows.items()
    }


def make_edits(args: argparse.Namespace, model: Path, clip: Clip, kept: dict[str, Path]) -> None:
    """Edit a clip with each method, and keep the measures, and some of the frames beside them.

    All checkpoints have the same judge, that of --model.
    """
    # The process takes its share of the machine's cores, and no more than it may.
    torch.set_num_threads(max(1, min(torch.get_num_threads(), os.cpu_count() // args.workers)))
    judge = Judge.load(args.model / JUDGE)
    options = ["--device", args.device, "--dtype", args.dtype]
    with tempfile.TemporaryDirectory() as folder:
        commands = Commands(Path(folder), clip, SIZE, args.steps, model, options)
        for name, path in kept.items():
            method = args.methods[name]
            frames, stages = commands.edit(method), commands.meter.stages
            row = measure(clip, frames, judge)
            row["reconstruction_psnr"] = find_reconstruction_psnr(commands.invert(method.inversion))
            if cost := stages.pop("edit", None):
                row["seconds_per_frame"] = cost.seconds / clip.n_frames
            write_image(path.with_suffix(".png"), np.concatenate(frames[moments(len(frames))], 1))
            keep(path, row)


def summarize_clips(clips: list[Clip], done: list[dict[str, Row]]) -> dict[str, list[dict]]:
    """Summaries by method of all, textured and plain clips, differences to `BASE`, and each clip's rows."""

    def rows(chosen: list[dict[str, Row]]) -> list[dict]:
        names = done[0] if chosen else ()
        return [{"method": name} | summarize([of[name] for of in chosen]) for name in names]

    def of_kind(plain: bool) -> list[dict]:
        return rows([of for clip, of in zip(clips, done, strict=True) if clip.is_plain == plain])

    def compare_with_base(name: str) -> dict:
        base = BASE + (OTHER if name.endswith(OTHER) else "")
        return {"method": name} | compare([of[name] for of in done], [of[base] for of in done])

    return {
        "rows": rows(done),
        "differences": [
            compare_with_base(name) for name in done[0] if name not in (BASE, BASE + OTHER)
        ],
        "textured": of_kind(plain=False),
        "plain": of_kind(plain=True),
        "clips": [
            {"clip": clip.prompt, "kind": clip.kind, "rows": of}
            for clip, of in zip(clips, done, strict=True)
        ],
    }


def format_tables(report: dict[str, list[dict]]) -> str:
    """The report as Markdown."""
    return "\n".join(
        method_table(report[key], title, signed=key == "differences")
        for key, title in TABLES.items()
        if report[key]
    )


if __name__ == "__main__":
    main()
