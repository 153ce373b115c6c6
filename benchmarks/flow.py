"""How far figures along an estimated optical flow can be trusted, on clips whose flow is known exactly.

    python -m benchmarks.flow

Estimates the flow of held-out clips of the world of shapes as evaluate.py does, and compares it, and the warp
errors along it, with the exact ones: of the source, of an ideal edit (the same scene with other attributes)
and of the ideal edit with a brightness that flickers. Writes a table (Markdown and JSON).
"""

from dataclasses import replace
from itertools import product

import numpy as np

from benchmarks.arguments import benchmark_parser
from benchmarks.clips import Clip, held_out_clips
from benchmarks.report import markdown, write_report
from tokenflow.evaluation.meters import GAPS
from tokenflow.evaluation.metrics import warp_error
from tokenflow.motion.optical_flow import DenseInverseSearch

FLICKER = 6.0  # grey levels, standard deviation of the brightness that is added to each frame
N_CLIPS, N_FRAMES = 7, 16


def accuracy(n_clips: int, n_frames: int, gaps: tuple[int, ...] = GAPS) -> list[dict[str, float]]:
    """One row for each gap and clip: the flow's errors, and warp errors (x 1e-3) along both flows."""
    clips = held_out_clips(n_clips, n_frames)
    return [_measure(clip, gap) for gap, clip in product(gaps, clips)]


def _measure(clip: Clip, gap: int) -> dict[str, float]:
    ideal = replace(clip, scene=clip.scene.with_attributes(**clip.changes)).frames
    added = np.random.default_rng(0).normal(0, FLICKER, (clip.n_frames, 1, 1, 1))
    flickering = (ideal + added).clip(0, 255).round().astype(np.uint8)
    videos = {"source": clip.frames, "ideal": ideal, "flickering": flickering}
    dis, rows = DenseInverseSearch(), []
    for i in range(clip.n_frames - gap):
        exact, visible = clip.find_flow(i, i + gap)
        estimated, valid = dis.find_valid(clip.frames[i], clip.frames[i + gap])
        error = np.hypot(*(estimated - exact).transpose(2, 0, 1))
        row = {
            "endpoint error": error[valid & visible].mean(),
            "share valid": valid.mean(),
            "not visible in both": (valid & ~visible).sum() / valid.sum(),
        }
        for name, frames in videos.items():
            pair = frames[i], frames[i + gap]
            row[f"{name}, exact"] = 1e3 * warp_error(*pair, exact, visible)
            row[f"{name}, dis"] = 1e3 * warp_error(*pair, estimated, valid)
        rows.append(row)
    return {"gap": gap} | {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def main() -> None:
    """Measure, write the table, and print it."""
    parser = benchmark_parser(__doc__, "runs/flow")
    args = parser.parse_args()
    rows = accuracy(N_CLIPS, N_FRAMES)
    names, cells = list(rows[0]), []
    for gap in GAPS:
        of_gap = [row for row in rows if row["gap"] == gap]
        means = (np.mean([row[name] for row in of_gap]) for name in names[1:])
        cells.append([f"{gap}", *(f"{mean:.2f}" for mean in means)])
    table = markdown(names, cells)
    write_report(args.output, "flow", table, {"rows": rows})
    print(table)


if __name__ == "__main__":
    main()
