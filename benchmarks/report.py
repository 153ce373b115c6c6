"""The tables and files of the benchmarks."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

COLUMNS = {
    "warp_1": ("warp error, gap 1", "{:.2f}"),
    "warp_8": ("gap 8", "{:.2f}"),
    "warp_16": ("gap 16", "{:.2f}"),
    "visible_1": ("visible error, gap 1", "{:.2f}"),
    "visible_8": ("gap 8", "{:.2f}"),
    "visible_16": ("gap 16", "{:.2f}"),
    "sharpness": ("sharpness", "{:.2f}"),
    "sharpness_by_spread": ("by spread", "{:.2f}"),
    "drift": ("drift (grey levels)", "{:.2f}"),
    "colour_drift": ("colour drift (grey levels)", "{:.1f}"),
    "edited_right": ("edited right", "{:.0%}"),
    "kept_right": ("kept right", "{:.0%}"),
    "kept_psnr": ("PSNR of what stays (dB)", "{:.1f}"),
    "reconstruction_psnr": ("reconstruction PSNR (dB)", "{:.1f}"),
}


def write_report(folder: Path, name: str, table: str, report: dict) -> None:
    """Write `name.md` and `name.json` into a folder, which need not be there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(table)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")


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
