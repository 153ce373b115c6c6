"""The commands at real sizes, with random weights: seconds, UNet evaluations and memory of each stage.

    python -m benchmarks.sizes --version 1.5

What `preprocess.py` and `run_tokenflow_pnp.py` do, from images to edited videos, with a checkpoint on disk
of a version's configuration. Nothing can be seen in what comes out. On a GPU the commands run a second time,
which counts operations and how often the host waits for the GPU; then follow the share of the peak of matrix
products that the edit reaches, and the fused search for nearest tokens beside its reference.
"""

import argparse
import gc
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks.arguments import benchmark_parser
from benchmarks.clips import held_out_clips
from benchmarks.commands import Commands, Method
from benchmarks.meter import Meter, find_peak, find_seconds
from benchmarks.random_checkpoint import VERSIONS, save_random
from benchmarks.report import markdown, write_report
from tokenflow.diffusion.device import choose_device
from tokenflow.propagation.nearest import find_nearest, find_nearest_in_blocks

SMALL = {"frames": 4, "size": 64, "steps": 1}
FORMS = {
    "seconds": "{:.1f}",
    "evaluations": "{}",
    "peak_mb": "{:.0f}",
    "tflop": "{:.1f}",
    "blocking": "{}",
}


def main() -> None:
    """Build one version, run the commands, and write the report."""
    parser = benchmark_parser(__doc__, "runs/sizes")
    parser.add_argument("--version", default="1.5", choices=VERSIONS, help="whose sizes")
    parser.add_argument("--frames", type=int, default=40, help="of the clip")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=50, help="of the inversion and of the edit")
    parser.add_argument("--quick", action="store_true", help=f"other defaults: {SMALL}")
    parser.add_argument("--cpu_offload", action="store_true", help="as in the commands")
    parser.add_argument("--compile", action="store_true", help="as in the commands")
    if parser.parse_args().quick:
        parser.set_defaults(**SMALL)
    args = parser.parse_args()
    device, dtype = choose_device(args.device, args.dtype)
    meter = Meter(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random(folder / "checkpoint", args.version, device, dtype)
        gc.collect()
        run_commands(args, folder, meter)
        rows = {stage: asdict(cost) for stage, cost in meter.stages.items()}
        if device.type == "cuda":
            counting = Meter(device, counts=True)
            run_commands(args, folder, counting)
            for stage, cost in counting.stages.items():
                rows[stage] |= {"tflop": cost.tflop, "blocking": cost.blocking}
    report = {"rows": rows} | (
        compare_with_peak(device, rows["edit"]) if device.type == "cuda" else {}
    )
    size = f"{args.frames} frames of {args.size} x {args.size}, {args.steps} steps"
    text = f"Version {args.version}, {size}, {dtype} on {device}\n\n{format_report(report)}"
    write_report(args.output, args.version, text, report)
    print(text)


def run_commands(args: argparse.Namespace, folder: Path, meter: Meter) -> None:
    """Invert and edit a clip as the commands do, and measure their stages."""
    (clip,) = held_out_clips(1, args.frames)
    options = ["--device", args.device, "--dtype", args.dtype]
    options += ["--cpu_offload"] * args.cpu_offload + ["--compile"] * args.compile
    with tempfile.TemporaryDirectory(dir=folder) as work:
        commands = Commands(
            Path(work), clip, args.size, args.steps, folder / "checkpoint", options, meter
        )
        commands.edit(Method())
    gc.collect()


def compare_with_peak(device: torch.device, edit: dict) -> dict:
    """What the GPU can do at best, and the fused search for nearest tokens beside its reference."""
    peak = find_peak(device, torch.float16) / 1e12
    searches = []
    for n_tokens, depth in ((4096, 320), (1024, 640), (256, 1280)):
        tokens = torch.randn(8, n_tokens, depth, device=device, dtype=torch.float16)
        keys = torch.randn(n_tokens, depth, device=device, dtype=torch.float16)
        ways = {"fused": find_nearest, "reference": find_nearest_in_blocks}
        found = {name: way(tokens, keys) for name, way in ways.items()}
        seconds = {name: find_seconds(partial(way, tokens, keys)) for name, way in ways.items()}
        equal = (found["fused"] == found["reference"]).float().mean().item()
        searches.append({"tokens": n_tokens, "channels": depth, "equal": equal} | seconds)
    return {
        "peak_tflops": peak,
        "share": edit["tflop"] / edit["seconds"] / peak,
        "searches": searches,
    }


def format_report(report: dict) -> str:
    """The report as Markdown."""
    on_gpu = "searches" in report
    titles = ["seconds", "evaluations", "peak memory beyond what was held (MB)"]
    titles += ["TFLOP", "waits for the GPU"] * on_gpu
    rows = [
        [stage, *(form.format(cost[key]) for key, form in list(FORMS.items())[: len(titles)])]
        for stage, cost in report["rows"].items()
    ]
    text = markdown(["stage", *titles], rows)
    if on_gpu:
        text += (
            f"\nThe edit reaches {report['share']:.0%} of the {report['peak_tflops']:.0f} TFLOP/s of large "
            "products of matrices.\n\n"
        )
        titles = ["tokens", "channels", "equal", "fused (ms)", "reference (ms)"]
        rows = [
            [
                *(f"{row[key]}" for key in ("tokens", "channels")),
                f"{row['equal']:.2%}",
                *(f"{1e3 * row[key]:.2f}" for key in ("fused", "reference")),
            ]
            for row in report["searches"]
        ]
        text += markdown(titles, rows)
    return text


if __name__ == "__main__":
    main()
