"""Where tokens are found in keyframes, by likeness or by optical flow, and what edits gain by either.

    python -m benchmarks.correspondence --clips 3 --frames 24 --steps 20

On held-out clips of the world of shapes, whose flow is known exactly: how far correspondences by likeness,
along the estimated flow and along the exact flow are from the truth, by resolution of the attention and by
timestep; edits with each, with and without consensus; and the seconds that searches take at Stable
Diffusion's size. Writes tables (Markdown and JSON) and a plot. What is measured is kept, so that a killed run
goes on.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.arguments import benchmark_parser
from benchmarks.clips import Clip, held_out_clips
from benchmarks.job import Job
from benchmarks.kept import digest_of_run, keep, kept_path
from benchmarks.methods import METHODS, chosen_methods
from benchmarks.quality import edit_clip, loaded, report_of
from benchmarks.report import COLUMNS, markdown, method_table, write_report
from shapes.world import render
from tokenflow.config import PnPConfig
from tokenflow.editing.denoise import keyframe_schedule
from tokenflow.motion.optical_flow import both_ways, dis_flow
from tokenflow.propagation.cache import BlendedRows
from tokenflow.propagation.correspondences import (
    FlowCorrespondences,
    find_correspondences,
    follow_flow,
)
from tokenflow_utils import flanking_blend

# The last leaves each token where it is, as if nothing moved.
WAYS = "tokens", "flow", "exact_flow", "same_place"
EDITS = ("default", "flow", "exact_flow", *(f"{m}_unaveraged" for m in ("flow", "exact_flow")))
EDITS += ("unaveraged",)
# Of Stable Diffusion 1.5 at 512x512 pixels: tokens of a frame, channels, self-attentions.
SD15 = ((4096, 320, 5), (1024, 640, 5), (256, 1280, 5), (64, 1280, 1))
SEARCHING = 2  # frames, each in two keyframes


def main() -> None:
    """Measure, and write and print the report."""
    parser = benchmark_parser(__doc__, "runs/correspondence")
    parser.add_argument("--clips", type=int, default=3)
    parser.add_argument("--frames", type=int, default=24, help="of each clip")
    parser.add_argument("--steps", type=int, default=20, help="of the inversions and of the edits")
    parser.add_argument("--workers", type=int, default=1, help="processes; 1 on a GPU")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--plot", type=Path, help="where the plot goes, instead of --output")
    args = parser.parse_args()
    clips, run = held_out_clips(args.clips, args.frames), digest_of_run(args)
    folder, names = args.output / "measured", chosen_methods(",".join(EDITS))
    folder.mkdir(parents=True, exist_ok=True)
    edits = [
        {n: kept_path(folder, f"clip_{i:02d}_{n}", run, clip, METHODS[n]) for n in names}
        for i, clip in enumerate(clips)
    ]
    code = Path(__file__).read_text()
    found = [kept_path(folder, f"clip_{i:02d}_found", run, c, code) for i, c in enumerate(clips)]
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        errors = pool.map(partial(kept_errors, args), clips, found)
        errors = sum(tqdm(errors, "Comparing", len(clips), unit="clip"), [])
        edited = pool.map(partial(edit_clip, args), clips, edits)
        edited = list(tqdm(edited, "Editing", len(clips), unit="clip"))

    followed = np.mean([row["followed"] for row in errors if row["way"] == "flow"])
    report = report_of(clips, edited)
    report |= {"errors": errors, "seconds": seconds(clips[0], float(followed))}
    tables = tables_of(report)
    write_report(args, "correspondence", tables, report)
    plot(args.plot or args.output / "correspondence.png", report)
    print(tables)


def kept_errors(args: argparse.Namespace, clip: Clip, path: Path) -> list[dict]:
    """The `errors` of a clip, which are measured unless they are kept."""
    if not path.exists():
        config = PnPConfig(data_path="", prompt="unused", n_timesteps=args.steps)
        with tempfile.TemporaryDirectory() as folder:
            job = Job.prepare(loaded(args), clip, config, Path(folder))
            job.reconstruct()
            keep(path, list(errors(job)))
    return json.loads(path.read_text())


def errors(job: Job) -> Iterator[dict]:
    """How wrong a clip's correspondences are at each timestep and resolution, in each of the ways.

    For all frames and the keyframes that they blend, over the tokens whose centre is seen in both: `median`,
    the median distance in pixels to where the exact flow leads their centre, and `beyond`, the share that is
    more than the side of a token away. A correspondence leads to a token's centre, so a distance of up to
    0.7 sides is only rounding. `followed`: share of all tokens that follow the flow. `side`: in pixels.
    """
    exact = replace(job, exact_flow=True)
    truth = exact.with_settings(max_displacement=math.inf).motion()
    motions = {"flow": job.motion(), "exact_flow": exact.motion()}
    frames = torch.arange(job.clip.n_frames)
    for t, keyframes in keyframe_schedule(job.config, job.sd.scheduler, len(frames)).draw().items():
        rest = frames[~torch.isin(frames, keyframes)]
        blend = flanking_blend(rest, keyframes)
        at, blended = blend.weights.nonzero().T
        pairs = rest[at], keyframes[blend.positions[at, blended]][:, None]
        true = truth(*pairs)[:, 0]  # m h w 2
        flows = {way: motion(*pairs)[:, 0] for way, motion in motions.items()}
        kept = job.files.read(t, rest, False, torch.device("cpu")).nearest
        for n_tokens in sorted({layer.shape[-1] for layer in kept.values()}):
            of_size = (layer for layer in kept.values() if layer.shape[-1] == n_tokens)
            nearest = torch.stack([layer[at, blended] for layer in of_size])  # layers m s
            side = math.isqrt(math.prod(true.shape[1:3]) // n_tokens)
            moved = true[:, side // 2 :: side, side // 2 :: side].flatten(1, 2)  # m s 2
            fails, stays = torch.tensor(-1), torch.arange(n_tokens)
            of_way = {"tokens": fails, "same_place": stays}
            of_way |= {way: follow_flow(flow, n_tokens) for way, flow in flows.items()}
            for way in WAYS:
                led = of_way[way]
                found = torch.where(led < 0, nearest, led)
                apart = distances(found, moved, side)
                apart = apart[apart.isfinite()]
                yield {
                    "timestep": t,
                    "side": side * truth.cell,
                    "way": way,
                    "median": apart.median().item() * truth.cell,
                    "beyond": (apart > side).float().mean().item(),
                    "followed": (led >= 0).float().mean().item(),
                }


def distances(found: torch.Tensor, true: torch.Tensor, side: int) -> torch.Tensor:
    """From tokens that were found (..., s) to where the flow (..., s, 2) leads: (..., s), in cells."""
    own = torch.arange(found.shape[-1])
    width = math.isqrt(len(own))
    moved = found % width - own % width, found // width - own // width
    return (side * torch.stack(moved, -1) - true).norm(dim=-1)


def seconds(clip: Clip, followed: float) -> dict[str, float]:
    """Seconds of the searches of two frames in a pass of SD 1.5's size, and of a pair's flow at 512x512.

    followed: share of the tokens for which the flow holds; they are drawn at random, and so are the tokens.
    """
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    rows, weights = torch.tensor([[0, 1]] * SEARCHING), torch.full((SEARCHING, 2), 0.5)
    blended, spent = BlendedRows.of(rows, weights, cpu), {"tokens": 0.0, "flow": 0.0}
    for n_tokens, channels, n_layers in SD15:
        tokens = torch.randn(SEARCHING, n_tokens, channels, generator=generator)
        keys = F.normalize(tokens, dim=-1)
        fails = torch.rand(SEARCHING, 2, n_tokens, generator=generator) >= followed
        led = FlowCorrespondences.of(-fails.long(), rows, weights, cpu)
        for way, search in (
            ("tokens", partial(find_correspondences, tokens, keys, blended)),
            ("flow", partial(led.find, tokens, keys)),
        ):
            start = time.perf_counter()
            search()
            spent[way] += n_layers * (time.perf_counter() - start)
    pair = [render(clip.scene, moment, 512)[0] for moment in (0, 8)]
    start = time.perf_counter()
    both_ways(dis_flow(), *pair)
    return spent | {"flow of a pair": time.perf_counter() - start}


def mean_errors(rows: list[dict], *keys: str) -> dict[tuple, dict[str, float]]:
    """The means of the errors, by the values of the keys."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return {
        group: {
            name: float(np.mean([r[name] for r in of])) for name in ("median", "beyond", "followed")
        }
        for group, of in groups.items()
    }


def tables_of(report: dict) -> str:
    """The report as Markdown."""

    def table(key: str, title: str, decreasing: bool) -> str:
        means = mean_errors(report["errors"], key, "way")
        values = sorted({value for value, _ in means}, reverse=decreasing)
        cells = (
            [
                f"{value}",
                *(
                    f"{means[value, way]['median']:.1f}, {means[value, way]['beyond']:.0%}"
                    for way in WAYS
                ),
            ]
            for value in values
        )
        return markdown([title, *WAYS], cells)

    followed = mean_errors(report["errors"], "side", "way")
    share = (
        [f"{side}", f"{of['followed']:.0%}"]
        for (side, way), of in followed.items()
        if way == "flow"
    )
    spent = ([name, f"{value:.2f}"] for name, value in report["seconds"].items())
    return "\n".join(
        [
            table("side", "median error (px), beyond one token; by side of a token (px)", False),
            table("timestep", "the same, by timestep", True),
            markdown(["side of a token (px)", "tokens that follow the flow"], share),
            method_table(report["rows"]),
            method_table(report["differences"], "more than `default`", signed=True),
            markdown(["search", "seconds"], spent),
        ]
    )


def plot(path: Path, report: dict) -> None:
    """Draw errors against timesteps and resolutions, and the edits' warp errors."""
    import matplotlib.pyplot as plt  # only reports need it

    figure, (times, sizes, edits) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    by_time = mean_errors(report["errors"], "timestep", "side", "way")
    by_side = mean_errors(report["errors"], "side", "way")
    sides = sorted({row["side"] for row in report["errors"]})
    steps = sorted({row["timestep"] for row in report["errors"]})
    for colour, side in enumerate(sides):
        for way, style in zip(WAYS[:2], ("-", "--"), strict=True):
            shares = [by_time[t, side, way]["beyond"] for t in steps]
            times.plot(steps, shares, style, color=f"C{colour}", label=f"{way}, {side} px")
    times.set(xlabel="timestep", ylabel="share further off than one token", ylim=(0, None))
    times.legend(fontsize="small", ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    for place, way in enumerate(WAYS[:3]):
        medians = [by_side[side, way]["median"] for side in sides]
        sizes.bar(np.arange(len(sides)) + 0.27 * (place - 1), medians, 0.27, label=way)
    sizes.set_xticks(range(len(sides)), [f"{side}" for side in sides])
    sizes.set(xlabel="side of a token (pixels)", ylabel="median error (pixels)")
    sizes.legend(loc="lower right")
    rows = [row for row in report["rows"] if row["method"] in EDITS]
    gaps = [key for key in ("warp_1", "warp_8", "warp_16") if key in rows[0]]
    for place, key in enumerate(gaps):
        y = np.arange(len(rows)) + 0.27 * (place - 1)
        edits.barh(
            y,
            [row[key] for row in rows],
            0.27,
            xerr=[row[f"{key}_se"] or 0 for row in rows],
            label=COLUMNS[key][0],
        )
    edits.set_yticks(range(len(rows)), [row["method"] for row in rows])
    edits.invert_yaxis()
    edits.set_xlabel("warp error x 1e-3 (less is steadier)")
    edits.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
