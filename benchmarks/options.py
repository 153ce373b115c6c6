"""Write docs/options.md: every option of every command, from the dataclasses of tokenflow/config*.py.

python -m benchmarks.options
"""

import argparse
import typing
from dataclasses import MISSING, Field, fields
from pathlib import Path

from tokenflow.config import (
    MAX_FRAMES,
    ControlNetConfig,
    EditConfig,
    PnPConfig,
    PreprocessConfig,
    SDEditConfig,
)
from tokenflow.config_control import ControlConfig
from tokenflow.config_evaluate import EvaluateConfig
from tokenflow.config_model import DeviceConfig, ModelConfig
from tokenflow.options import format_default, read_help

PAGE = Path(__file__).parent.parent / "docs" / "options.md"
FIRST = "\n## preprocess.py\n"  # before it, the page is written by hand
CHECKPOINTS, CONTROL = "[checkpoint](#checkpoint)", "[control images](#control-images)"
EDITS = "[all edits](#all-edits)"
TABLES = {
    "preprocess.py": (PreprocessConfig, f"Also {CHECKPOINTS} and {CONTROL}."),
    "All edits": (EditConfig, f"Also {CHECKPOINTS}."),
    "run_tokenflow_pnp.py": (PnPConfig, f"Also {EDITS}."),
    "run_tokenflow_sdedit.py": (SDEditConfig, f"Also {EDITS}."),
    "run_tokenflow_controlnet.py": (ControlNetConfig, f"Also {EDITS} and {CONTROL}."),
    "Checkpoint": (
        ModelConfig,
        "Of `preprocess.py` and all edits; `device` of `evaluate.py`, too.",
    ),
    "Control images": (ControlConfig, "Of `preprocess.py` and `run_tokenflow_controlnet.py`."),
    "evaluate.py": (EvaluateConfig, f"Also `device`, as of the {CHECKPOINTS}."),
}


def page() -> str:
    """The whole page, as Markdown."""
    introduction = PAGE.read_text(encoding="utf-8").partition(FIRST)[0]
    return introduction + "".join(table(title, *about) for title, about in TABLES.items())


def table(title: str, cls: type, note: str) -> str:
    """A heading, a note, and the options that a class has for itself, the required ones first."""
    own = cls.__annotations__ | (DeviceConfig.__annotations__ if cls is ModelConfig else {})
    options, texts = [f for f in fields(cls) if f.name in own], read_help(cls)
    lines = [f"\n## {title}\n\n{note}\n\nkey | default | values | meaning\n---|---|---|---\n"]
    for f in sorted(options, key=lambda f: f.default is not MISSING):
        default = "required" if f.default is MISSING else format_default(f)
        lines.append(f"`{f.name}` | {default} | {allowed(f)} | {texts[f.name]}\n")
    return "".join(lines)


def allowed(f: Field) -> str:
    """The values that an option may take, if it is neither a text, nor true or false."""
    kind = typing.get_args(f.type)[0] if typing.get_args(f.type) else f.type
    if choices := f.metadata.get("choices"):
        return ", ".join((*choices, *f.metadata["aliases"]))
    if kind not in (int, float):
        return ""
    low, high = (kind(f.metadata[bound]) for bound in ("low", "high"))
    return f"{low} or more" if high >= MAX_FRAMES else f"{low} to {high:,}"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
