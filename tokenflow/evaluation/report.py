"""`report.html`: videos that play in step, metrics, curves and a verdict, in one file."""

import base64
import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np

from tokenflow.config_sweep import differences, label
from tokenflow.evaluation.contact_sheet import contact_sheet, moments
from tokenflow.evaluation.meters import METRICS, Curves, Means
from tokenflow.evaluation.subject import EDIT, NAMES, SOURCE
from tokenflow.evaluation.verdict import Finding
from tokenflow.options import format_value
from tokenflow.runtime.run_folder import remove, stage
from util import write_image

PAGE, PARTS = "report.html", "report"  # the page, and the folder of what it shows beside it
SHEET, TABLE = "edits.png", "edits.csv"  # of several edits, beside their page
TEMPLATE = Path(__file__).with_name("template")
# Half of a character, which a file's name may hold, becomes an escape that JSON reads.
TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}
DIGITS = 4  # of every number
FORMULA = tuple("=+-@\t\r\n")  # what a cell begins with that spreadsheets compute


@dataclass(frozen=True)
class Entry:
    """What the page shows of one edit, or of one reconstruction."""

    name: str
    prompt: str | None
    videos: dict[str, Path]  # by what they are, as NAMES lists them; H.264
    fps: Fraction
    n_frames: int
    metrics: Means
    curves: Curves
    findings: list[Finding]
    skipped: list[str]  # metrics that were not measured, and why
    options: dict[str, Any]
    pictures: dict[str, np.ndarray]  # small frames of the video's `moments`, by what they are

    def as_json(self) -> dict[str, Any]:
        """Everything that was measured, as JSON holds it."""
        plain = {
            "name": self.name,
            "prompt": self.prompt,
            "fps": float(self.fps),
            "n_frames": self.n_frames,
            "figures": self.metrics,
            "curves": self.curves,
            "findings": [asdict(finding) for finding in self.findings],
            "skipped": self.skipped,
            "options": self.options,
        }
        return _round(plain)


def write_report(path: Path, title: str, entries: list[Entry]) -> None:
    """Write the page of one or several edits, which refers to their videos by relative paths.

    Beside the page of several, also writes their contact sheet and a table of their metrics.
    """
    data = {"title": title, "names": NAMES, "entries": []}
    settings = differences([entry.options for entry in entries])
    if len(entries) > 1:
        path.parent.mkdir(parents=True, exist_ok=True)
        with stage(path.with_name(SHEET)) as unfinished:
            write_image(unfinished, draw_edits(entries, settings))
        write_table(path.with_name(TABLE), entries, settings)
        data["sheet"] = SHEET
    for entry, chosen in zip(entries, settings, strict=True):
        videos = {name: entry.videos[name] for name in NAMES if name in entry.videos}
        sheet = contact_sheet({NAMES[name]: shown for name, shown in entry.pictures.items()})
        data["entries"].append(
            entry.as_json()
            | {
                "settings": {name: format_value(value) for name, value in chosen.items()},
                "videos": {
                    name: quote(os.fsencode(os.path.relpath(video, path.parent)))
                    for name, video in videos.items()
                },
                "sheet": _as_url(sheet),
                "moments": moments(entry.n_frames),
            }
        )
    # JSON within a script must not close it.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    page = (TEMPLATE / "page.html").read_text(encoding="utf-8")
    for mark, part in (("/* style */", "page.css"), ("/* script */", "page.js")):
        page = page.replace(mark, (TEMPLATE / part).read_text(encoding="utf-8"))
    with stage(path) as unfinished:
        unfinished.write_text(page.replace("/* data */", text), **TEXT)


def write_measured(folder: Path, entry: Entry) -> None:
    """Write what was measured as JSON, for scripts, to `report/figures.json` in the `folder`."""
    text = json.dumps(entry.as_json(), indent=1, ensure_ascii=False)
    with stage(folder / PARTS / "figures.json") as unfinished:
        unfinished.write_text(f"{text}\n", **TEXT)


def discard_report(folder: Path) -> None:
    """Remove a report from a folder whose videos are made anew."""
    for name in (PAGE, PARTS):
        remove(folder / name)


def draw_edits(entries: Sequence[Entry], settings: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """A contact sheet of several edits, uint8 RGB, below the sources that they are of.

    settings: the options that tell each from the others.
    """
    rows, source = {}, None
    for entry, chosen in zip(entries, settings, strict=True):
        if not np.array_equal(source, entry.pictures[SOURCE]):
            source = entry.pictures[SOURCE]
            rows[f"source of {entry.name}" if rows else "source"] = source
        words = f"{entry.name}: {label(chosen)}" if chosen else entry.name
        rows[words] = entry.pictures[EDIT]
    return contact_sheet(rows)


def write_table(
    path: Path, entries: Sequence[Entry], settings: Sequence[Mapping[str, Any]]
) -> None:
    """Write the edits' metrics as comma-separated values. settings: as for `draw_edits`."""
    keys = [key for key in METRICS if any(EDIT in e.metrics.get(key, {}) for e in entries)]
    with stage(path) as unfinished, unfinished.open("w", newline="", **TEXT) as file:
        table = csv.writer(file)
        table.writerow(["edit", *settings[0], *keys])
        for entry, chosen in zip(entries, settings, strict=True):
            values = [_round(entry.metrics.get(key, {}).get(EDIT)) for key in keys]
            table.writerow([_as_cell(entry.name), *map(_as_cell, chosen.values()), *values])


def _as_cell(value: Any) -> Any:
    """An option's value as a cell; a quote in front keeps text from being a formula, as OWASP advises."""
    text = format_value(value)
    is_text = not isinstance(value, int | float)
    return f"'{text}" if is_text and text.startswith(FORMULA) else text


def _as_url(picture: np.ndarray) -> str:
    """A picture, uint8 RGB, as the address that holds it."""
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return "data:image/jpeg;base64," + base64.b64encode(encoded).decode()


def _round(value: Any) -> Any:
    """What JSON holds of a value, all numbers in it rounded."""
    return json.loads(json.dumps(value), parse_float=lambda n: float(f"{float(n):.{DIGITS}g}"))
