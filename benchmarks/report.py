"""The table and the plot of the quality benchmark."""

from pathlib import Path

import numpy as np

COLUMNS = {
    "warp_1": ("warp error, gap 1", "{:.2f}"),
    "warp_8": ("gap 8", "{:.2f}"),
    "edited_right": ("edited right", "{:.0%}"),
    "kept_right": ("kept right", "{:.0%}"),
    "kept_psnr": ("PSNR of what stays (dB)", "{:.1f}"),
    "seconds_per_frame": ("seconds a frame", "{:.2f}"),
}


Reconstruction = dict[str, dict[int, float]]  # PSNR (dB) by inversion and number of steps


def markdown_table(rows: list[dict], reconstruction: Reconstruction) -> str:
    """The benchmark's rows, and the reconstruction's PSNR by number of steps, as Markdown."""
    titles = [title for title, _ in COLUMNS.values()]
    lines = ["| method | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for row in rows:
        cells = [form.format(row[key]) for key, (_, form) in COLUMNS.items()]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    steps = next(iter(reconstruction.values()))
    lines += ["", "| reconstruction PSNR (dB) | " + " | ".join(f"{n} steps" for n in steps) + " |"]
    lines.append("|---" * (len(steps) + 1) + "|")
    for inversion, values in reconstruction.items():
        cells = [f"{psnr:.1f}" for psnr in values.values()]
        lines.append(f"| {inversion} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


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
        for offset, key in zip((-0.2, 0.2), keys, strict=True):
            axes.barh(y + offset, [row[key] for row in rows], 0.4, label=COLUMNS[key][0])
        axes.set_yticks(y, names)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.legend()
    for inversion, values in reconstruction.items():
        steps.plot(list(values), list(values.values()), marker="o", label=inversion)
    steps.legend()
    steps.set_xscale("log")
    steps.set_xlabel("inversion steps")
    steps.set_ylabel("reconstruction PSNR (dB)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
