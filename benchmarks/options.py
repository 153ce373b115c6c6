"""Write docs/options.md: every option of every command, from the dataclasses of tokenflow/config.py.

python -m benchmarks.options
"""

import argparse
import types
import typing
from dataclasses import MISSING, Field, fields
from pathlib import Path

from benchmarks.report import markdown
from tokenflow.cli import is_list, spelt
from tokenflow.config import ControlNetConfig, EditConfig, PnPConfig, PreprocessConfig, SDEditConfig
from tokenflow.evaluation.config import EvaluateConfig

PAGE = Path(__file__).parent.parent / "docs" / "options.md"
INTRODUCTION = """\
# Options

*Written by `python -m benchmarks.options` from the dataclasses of
[config.py](../tokenflow/config.py), [config_model.py](../tokenflow/config_model.py),
[config_control.py](../tokenflow/config_control.py) and
[evaluation/config.py](../tokenflow/evaluation/config.py) of `tokenflow/`; change the text there.*

Every option is a flag, such as `--steps 25`. All commands but `preprocess.py` also read options from a YAML
file, whose default is named below and which `--config_path` replaces; a flag wins over the file. A flag that
is true or false may stand alone: `--cpu_offload` means `--cpu_offload true`. An option of several values
takes them one after another, `--control canny depth`, and in YAML as a list, `control: [canny, depth]`.
Several values of any other option of an edit are a [sweep](sweeps.md), which makes the edits of all
combinations: `--pnp_attn_t 0.3 0.5 0.8`, in YAML `pnp_attn_t: [0.3, 0.5, 0.8]`. `None`
is `null` in YAML. Unknown keys and values out of range are refused before anything is loaded.

The *source* is the video that is edited. An *inversion* is what `preprocess.py` computes from it: latents
from which Stable Diffusion samples the source again. *Steps* are denoising steps: inversion steps lead from
the source to noise, editing steps from noise to the edit. *Keyframes* are the frames that are edited jointly
at a step. *Source features* are what an edit needs of the source at each step; `preprocess.py` can keep them
on disk.
"""
TABLES = {
    "preprocess.py": (PreprocessConfig, "All options of the inversion."),
    "All edits": (EditConfig, "Options of each `run_tokenflow_*.py`."),
    "run_tokenflow_pnp.py": (PnPConfig, "config_pnp.yaml"),
    "run_tokenflow_sdedit.py": (SDEditConfig, "config_sdedit.yaml"),
    "run_tokenflow_controlnet.py": (ControlNetConfig, "config_controlnet.yaml"),
    "evaluate.py": (
        EvaluateConfig,
        "All options of the report. Default file: "
        "[configs/config_evaluate.yaml](../configs/config_evaluate.yaml).",
    ),
}


def page() -> str:
    """The whole page, as Markdown."""
    return INTRODUCTION + "".join(table(title, *about) for title, about in TABLES.items())


def table(title: str, cls: type, note: str) -> str:
    """A heading, a note or the default YAML file, and the options that a command has for itself."""
    options = fields(cls)
    if note.endswith(".yaml"):
        options = [f for f in options if f not in fields(EditConfig)]
        file = f"[configs/{note}](../configs/{note})"
        note = f"Options in addition to [those of all edits](#all-edits). Default file: {file}."
    # The required ones first, then those that only this class has.
    options = sorted(options, key=lambda f: (f.default is not MISSING, f.name not in vars(cls)))
    rows = ([f"`{f.name}`", default(f), allowed(f), f.metadata["help"]] for f in options)
    of_options = markdown(["key", "default", "allowed values", "meaning"], rows)
    return f"\n## {title}\n\n{note} Dataclass: `{cls.__name__}`.\n\n{of_options}"


def default(f: Field) -> str:
    """A field's default as a user writes it."""
    if f.default is MISSING:
        return "required"
    text = spelt(f.default, f)
    return f"`{text.lower() if f.type is bool else text}`" if text else "empty"


def allowed(f: Field) -> str:
    """The values that a field may take."""
    kind = typing.get_args(f.type)[0] if typing.get_args(f.type) else f.type
    if names := ("true", "false") if kind is bool else f.metadata["choices"]:
        several = "one or several of " if is_list(f) else ""
        return several + ", ".join(f"`{name}`" for name in (*names, *f.metadata["aliases"]))
    takes_none = isinstance(f.type, types.UnionType) or f.default == ()
    none = f"`{f.metadata['none']}` or " if takes_none else ""
    if is_list(f):
        return none + ("strings" if kind is str else f"numbers, {bounds(f)}")
    if kind is str:
        return f"{none}a string"
    return f"{none}a {'whole ' if kind is int else ''}number, {bounds(f)}"


def bounds(f: Field) -> str:
    """The least and the largest number that a field takes."""
    return " to ".join(readable(f.metadata[bound]) for bound in ("low", "high"))


def readable(bound: float) -> str:
    """A bound with separators, or as a power of two where it is too long to read."""
    return f"2^{bound.bit_length()} - 1" if bound > 10**9 else f"{bound:,}"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
