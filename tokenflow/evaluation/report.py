"""`report.html`: videos in step, figures with their floors, curves and a verdict, in one file."""

import base64
import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np

from tokenflow.config_sweep import differences, label
from tokenflow.evaluation.contact_sheet import contact_sheet, moments
from tokenflow.evaluation.meters import (
    EDIT,
    FIGURES,
    PER_FRAME,
    RECONSTRUCTION,
    SOURCE,
    VAE,
    Curves,
    Values,
)
from tokenflow.evaluation.verdict import Finding
from tokenflow.options import format_value
from tokenflow.runtime.run_folder import remove, stage
from util import write_image

PAGE, PARTS = "report.html", "report"  # the page, and the folder of what it shows beside it
SHEET, TABLE = "edits.png", "edits.csv"  # of several edits, beside their page
TEMPLATE = Path(__file__).with_name("template")
NAMES = {
    SOURCE: "source",
    VAE: "VAE round trip",
    RECONSTRUCTION: "reconstruction",
    PER_FRAME: "frame by frame",
    EDIT: "edit",
}
DIGITS = 4  # of every number
THUMBNAIL = 160  # pixels, the longer side of a frame in a contact sheet


@dataclass(frozen=True)
class Entry:
    """What the page shows of one edit, or of one reconstruction."""

    name: str
    prompt: str | None
    videos: dict[str, Path]  # by what they are, as NAMES lists them; H.264
    fps: Fraction
    n_frames: int
    figures: Values
    curves: Curves
    findings: list[Finding]
    skipped: list[str]  # figures that were not measured, and why
    options: dict[str, Any]
    pictures: dict[str, np.ndarray]  # small frames of the video's `moments`, by what they are

    def measured(self) -> dict[str, Any]:
        """Everything that was measured, as JSON holds it."""
        plain = {
            "name": self.name,
            "prompt": self.prompt,
            "fps": float(self.fps),
            "n_frames": self.n_frames,
            "figures": self.figures,
            "curves": self.curves,
            "findings": [asdict(finding) for finding in self.findings],
            "skipped": self.skipped,
            "options": self.options,
        }
        return _rounded(plain)


def write_report(path: Path, title: str, entries: list[Entry]) -> None:
    """Write the page of one or several edits, which refers to their videos by relative paths.

    Beside the page of several, also writes their contact sheet and a table of their figures.
    """
    shown = {key: asdict(figure) for key, figure in FIGURES.items()}
    data = {"title": title, "names": NAMES, "figures": shown, "entries": []}
    apart = differences([entry.options for entry in entries])
    if len(entries) > 1:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path.with_name(SHEET), sheet_of_edits(entries, apart))
        write_table(path.with_name(TABLE), entries, apart)
        data["sheet"] = SHEET
    for entry, settings in zip(entries, apart, strict=True):
        videos = {
            name: quote(os.path.relpath(entry.videos[name], path.parent))
            for name in NAMES
            if name in entry.videos
        }
        rows = {NAMES[name]: pictures for name, pictures in entry.pictures.items()}
        more = {
            "settings": {name: format_value(value) for name, value in settings.items()},
            "videos": videos,
            "sheet": _as_url(contact_sheet(rows)),
            "moments": moments(entry.n_frames),
        }
        data["entries"].append(entry.measured() | more)
    # JSON within a script must not close it.
    text = json.dumps(data, ensure_ascii=False, sort_keys=False).replace("<", "\\u003c")
    page = (TEMPLATE / "page.html").read_text(encoding="utf-8")
    for mark, part in (("/* style */", "page.css"), ("/* script */", "page.js")):
        page = page.replace(mark, (TEMPLATE / part).read_text(encoding="utf-8"))
    with stage(path) as partial:
        partial.write_text(page.replace("/* data */", text), encoding="utf-8")


def write_measured(folder: Path, entry: Entry) -> None:
    """Write what was measured as JSON, for scripts, to `report/figures.json` in the `folder`."""
    with stage(folder / PARTS / "figures.json") as partial:
        partial.write_text(
            json.dumps(entry.measured(), indent=1, ensure_ascii=False) + "\n", "utf-8"
        )


def discard_report(folder: Path) -> None:
    """Remove a report from a folder whose videos are made anew."""
    for name in (PAGE, PARTS):
        remove(folder / name)


def sheet_of_edits(entries: Sequence[Entry], apart: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """A contact sheet of several edits, uint8 RGB, below the sources that they are of.

    apart: the options that tell each from the others.
    """
    rows, source = {}, None
    for entry, settings in zip(entries, apart, strict=True):
        if not np.array_equal(source, entry.pictures[SOURCE]):
            source = entry.pictures[SOURCE]
            rows[f"source of {entry.name}" if rows else "source"] = source
        words = f"{entry.name}: {label(settings)}" if settings else entry.name
        rows[words] = entry.pictures[EDIT]
    return contact_sheet(rows)


def write_table(path: Path, entries: Sequence[Entry], apart: Sequence[Mapping[str, Any]]) -> None:
    """Write the edits' figures as comma-separated values. apart: as for `sheet_of_edits`."""
    keys = [key for key in FIGURES if any(EDIT in e.figures.get(key, {}) for e in entries)]
    with stage(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["edit", *apart[0], *keys])
        for entry, settings in zip(entries, apart, strict=True):
            figures = [_rounded(entry.figures.get(key, {}).get(EDIT)) for key in keys]
            table.writerow([entry.name, *map(format_value, settings.values()), *figures])


def thumbnails(videos: Mapping[str, Iterable[np.ndarray]], n_frames: int) -> dict[str, np.ndarray]:
    """Frames of each video at the `moments`, made small: uint8 RGB (n, H, W, 3)."""
    shown = moments(n_frames)
    return {
        name: np.stack([_small(f) for i, f in enumerate(frames) if i in shown])
        for name, frames in videos.items()
    }


def _small(frame: np.ndarray) -> np.ndarray:
    scale = THUMBNAIL / max(frame.shape[:2])
    size = [max(1, round(n * scale)) for n in (frame.shape[1], frame.shape[0])]
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA) if scale < 1 else frame


def _as_url(picture: np.ndarray) -> str:
    """A picture, uint8 RGB, as the address that holds it."""
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return "data:image/jpeg;base64," + base64.b64encode(encoded).decode()


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
