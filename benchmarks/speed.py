"""Cost of whole edits, beside the published algorithm and frame-by-frame editing.

    python -m benchmarks.speed --quick

What the commands do, from images to edited videos, on the shapes checkpoint, with the quality of the same
edits beside it; or with `--version` on a checkpoint of random weights of that size. Methods take turns over
several clips, and a cost is the median over them. Writes tables (Markdown and JSON).
"""

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median

import numpy as np
from tqdm import tqdm

from benchmarks.arguments import benchmark_parser
from benchmarks.clips import Clip, held_out_clips
from benchmarks.commands import Commands, Method
from benchmarks.measures import measure, summarize
from benchmarks.meter import Meter
from benchmarks.methods import METHODS
from benchmarks.random_checkpoint import VERSIONS, save_random
from benchmarks.report import markdown, method_table, write_report
from shapes.judge import Judge
from tests.reference import Reference
from tokenflow.config import PnPConfig
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.device import choose_device

SMALL = {"clips": 1, "frames": 6, "published_steps": 100}
STAGES = ("inversion", "reconstruction", "edit")
PUBLISHED = "published"


def main() -> None:
    """Measure everything and write the report."""
    parser = benchmark_parser(__doc__, "runs/speed")
    parser.add_argument("--version", choices=VERSIONS, help="random weights of this version's size")
    parser.add_argument("--clips", type=int, default=2, help="over which methods take turns")
    parser.add_argument("--frames", type=int, default=16, help="of each clip")
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=50, help="of our inversion and of the edits")
    parser.add_argument(
        "--published_steps", type=int, default=500, help="of the published inversion"
    )
    parser.add_argument("--quick", action="store_true", help=f"other defaults: {SMALL}")
    if parser.parse_args().quick:
        parser.set_defaults(**SMALL)
    args = parser.parse_args()
    device, dtype = choose_device(args.device, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        if args.version:
            args.model = save_random(Path(folder) / "checkpoint", args.version, device, dtype)
        costs, rows = measure_methods(args)
    quality = [{"method": method} | summarize(of) for method, of in rows.items() if of]
    tables = format_costs(costs) + ("\n" + method_table(quality) if quality else "")
    report = {"costs": costs, "quality": quality}
    write_report(args.output, args.version or "shapes", tables, report)
    print(tables)


def measure_methods(
    args: argparse.Namespace,
) -> tuple[dict[str, dict[str, dict]], dict[str, list[dict]]]:
    """By method: the median costs of its stages; and its edits' quality, one row for each clip."""
    half = max(1, args.steps // 2)
    methods = {
        PUBLISHED: None,
        "ours": Method(),
        "fast": Method(  # configs/fast.yaml
            f"--n_inversion_steps {half} --n_timesteps {half} --alternate true",
            f"--steps {half} --save_steps {half}",
        ),
        "frame by frame": METHODS["per_frame"],
    }
    device, _ = choose_device(args.device, args.dtype)
    judge = None if args.version else Judge.load(args.model / "judge.safetensors")
    options = ["--device", args.device, "--dtype", args.dtype]
    costs, rows = {name: {} for name in methods}, {name: [] for name in methods}
    # Every other clip: edits of colour and of the background, which Plug-and-Play can do.
    for clip in tqdm(held_out_clips(2 * args.clips, args.frames)[::2], "Clips", unit="clip"):
        with tempfile.TemporaryDirectory() as folder:
            for name, method in methods.items():
                meter = Meter(device)
                if name == PUBLISHED:
                    frames = edit_as_published(args, clip, meter)
                else:
                    commands = Commands(
                        Path(folder), clip, args.size, args.steps, args.model, options, meter
                    )
                    frames = commands.edit(method)
                for stage in set(STAGES) & set(meter.stages):
                    costs[name].setdefault(stage, []).append(asdict(meter.stages[stage]))
                if judge:
                    rows[name].append(measure(clip, frames, judge))
    medians = {
        name: {
            stage: {key: median(cost[key] for cost in of_clips) for key in of_clips[0]}
            for stage, of_clips in stages.items()
        }
        for name, stages in costs.items()
    }
    return medians, rows


def edit_as_published(args: argparse.Namespace, clip: Clip, meter: Meter) -> np.ndarray:
    """The frames (N, H, W, 3) of an edit by the published algorithm, with the settings of our defaults."""
    sd = Checkpoint.find(str(args.model)).load(*choose_device(args.device, args.dtype))
    meter.watch(sd.unet)
    source = np.stack(list(clip.draw(args.size)))
    with meter.stage("inversion"):
        reference = Reference(sd, source, clip.source_prompt, args.published_steps)
    with meter.stage("reconstruction"):
        reference.reconstruct()
    with meter.stage("edit"):
        return reference.edit(
            clip.prompt,
            n_steps=args.steps,
            attention_steps=int(args.steps * PnPConfig.pnp_attn_t),
            feature_steps=int(args.steps * PnPConfig.pnp_f_t),
            guidance_scale=PnPConfig.guidance_scale,
        )


def format_costs(costs: dict[str, dict[str, dict]]) -> str:
    """Seconds, how many times less than published, evaluations and peak memory, as Markdown."""
    rows = []
    for stage in STAGES:
        row, published = [stage], costs[PUBLISHED][stage]["seconds"]
        for of_method in costs.values():
            cost = of_method.get(stage)
            row.append(
                f"{cost['seconds']:.1f} s ({published / cost['seconds']:.1f}x), "
                f"{cost['evaluations']:.0f}, {cost['peak_mb']:.0f} MB"
                if cost
                else ""
            )
        rows.append(row)
    return markdown(["stage", *costs], rows)


if __name__ == "__main__":
    main()
