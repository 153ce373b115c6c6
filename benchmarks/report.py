"""The tables, plots and files of the benchmarks."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

COLUMNS = {
    "warp_1": ("warp error, gap 1", "{:.2f}"),
    "warp_8": ("gap 8", "{:.2f}"),
    "warp_16": ("gap 16", "{:.2f}"),
    "sharpness": ("sharpness", "{:.2f}"),
    "sharpness_inside": ("inside", "{:.2f}"),
    "drift": ("drift (grey levels)", "{:.2f}"),
    "edited_right": ("edited right", "{:.0%}"),
    "kept_right": ("kept right", "{:.0%}"),
    "kept_psnr": ("PSNR of what stays (dB)", "{:.1f}"),
}


Reconstruction = dict[str, dict[int, float]]  # PSNR (dB) by inversion and number of steps


def write_report(args: argparse.Namespace, name: str, table: str, report: dict) -> None:
    """Write `name.md` and `name.json` into the folder `--output`, the latter to `--json` too."""
    (args.output / f"{name}.md").write_text(table)
    for path in filter(None, (args.output / f"{name}.json", args.json)):
        path.write_text(json.dumps(report, indent=2) + "\n")


def markdown(titles: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table as Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (titles, *rows)]
    return "\n".join([lines[0], "|---" * len(titles) + "|", *lines[1:]]) + "\n"


def method_table(rows: list[dict], title: str = "method", signed: bool = False) -> str:
    """The quality of each row's method, with standard errors, as Markdown; `signed`: of differences."""
    columns = {key: column for key, column in COLUMNS.items() if key in rows[0]}
    cells = (
        [
            row["method"],
            *(
                _cell(row[key], row[f"{key}_se"], form, signed)
                for key, (_, form) in columns.items()
            ),
        ]
        for row in rows
    )
    return markdown([title, *(name for name, _ in columns.values())], cells)


def _cell(value: float | None, error: float | None, form: str, signed: bool) -> str:
    if value is None:
        return ""
    shown = (form.replace(":", ":+") if signed else form).format(value)
    return shown if error is None else f"{shown} ± {form.format(error)}"


def reconstruction_table(reconstruction: Reconstruction) -> str:
    """The reconstruction's PSNR by inversion and number of steps, as Markdown."""
    steps = [f"{n} steps" for n in next(iter(reconstruction.values()))]
    rows = ([name, *(f"{psnr:.1f}" for psnr in v.values())] for name, v in reconstruction.items())
    return markdown(["reconstruction PSNR (dB)", *steps], rows)


def plot(path: Path, rows: list[dict], reconstruction: Reconstruction) -> None:
    """Draw steadiness beside rightness for each method, and reconstruction against steps."""
    import matplotlib.pyplot as plt  # only reports need it

    figure, (errors, right, steps) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    y = np.arange(len(rows))
    names = [row["method"] for row in rows]
    for axes, keys, label in (
        (errors, ("warp_1", "warp_8"), "warp error x 1e-3 (less is steadier)"),
        (right, ("edited_right", "kept_right"), "share of attributes right"),
    ):
        for offset, key in zip((-0.2, 0.2), (k for k in keys if k in rows[0]), strict=False):
            errors_of = [row[f"{key}_se"] or 0 for row in rows]
            means = [row[key] for row in rows]
            axes.barh(y + offset, means, 0.4, xerr=errors_of, label=COLUMNS[key][0])
        axes.set_yticks(y, names)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.legend()
    for inversion, values in reconstruction.items():
        steps.plot(list(values), list(values.values()), marker="o", label=inversion)
    steps.legend()
    steps.set(xscale="log", xlabel="inversion steps", ylabel="reconstruction PSNR (dB)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def speed_table(rows: list[dict], quality: dict[str, dict[str, float]]) -> str:
    """Costs by checkpoint, stage and method, with ratios, and the quality beside them, as Markdown."""
    titles = ["checkpoint, stage", "method", "seconds", "evaluations", "peak MB"]
    titles += ["times less than published", "seconds / floor"]
    by_key = {(row["checkpoint"], row["stage"], row["method"]): row for row in rows}
    costs = []
    for (checkpoint, stage, method), row in by_key.items():
        base = by_key.get((checkpoint, stage, "published"))
        bare = by_key.get((checkpoint, stage, "floor"))
        ratio = (
            f"{base['seconds'] / row['seconds']:.2f} ({base['evaluations'] / row['evaluations']:.2f}"
            f" evaluations, {base['peak_mb'] / max(row['peak_mb'], 1):.2f} peak)"
            if base and method not in ("published", "floor")
            else ""
        )
        over = f"{row['seconds'] / bare['seconds']:.2f}" if bare and method == "ours" else ""
        figures = (f"{row['seconds']:.1f}", f"{row['evaluations']:.0f}", f"{row['peak_mb']:.0f}")
        costs.append([f"{checkpoint}, {stage}", method, *figures, ratio, over])
    names = list(next(iter(quality.values())))
    measured = ([method, *(f"{v[name]:.2f}" for name in names)] for method, v in quality.items())
    return markdown(titles, costs) + "\n" + markdown(["shapes", *names], measured)


def length_table(rows: list[dict]) -> str:
    """Costs by stage and length, as Markdown."""
    lengths = sorted({row["frames"] for row in rows})
    by_stage = {row["stage"]: [row["stage"]] for row in rows}
    for row in rows:
        by_stage[row["stage"]].append(f"{row['seconds_per_frame']:.3f}, {row['peak_mb']:.0f}")
    titles = ["seconds a frame, peak MB", *(f"{n} frames" for n in lengths)]
    return markdown(titles, by_stage.values())


def window_table(rows: list[dict]) -> str:
    """The quality of a long edit by size of the window, as Markdown."""
    names = [name for name in rows[0] if name != "window"]
    cells = (
        [row["window"], *("" if row[name] is None else f"{row[name]:.2f}" for name in names)]
        for row in rows
    )
    return markdown(["keyframe_window", *names], cells)


def length_plot(path: Path, rows: list[dict]) -> None:
    """Draw seconds a frame and peak memory against the number of frames."""
    import matplotlib.pyplot as plt  # only reports need it

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    columns = {"seconds_per_frame": "seconds a frame", "peak_mb": "peak memory (MB)"}
    for axis, (key, label) in zip(axes, columns.items(), strict=True):
        for stage in dict.fromkeys(row["stage"] for row in rows):
            points = [(row["frames"], row[key]) for row in rows if row["stage"] == stage]
            axis.plot(*zip(*points, strict=True), marker="o", label=stage)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set(xlabel="frames", ylabel=label)
        axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
