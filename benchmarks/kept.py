"""Measurements kept on disk under a digest of all that decides them, so that none is taken twice."""

import argparse
import json
from pathlib import Path

from tokenflow.diffusion.device import choose_device
from tokenflow.runtime.digests import digest_of
from tokenflow.runtime.run_folder import stage

ROOT = Path(__file__).parent.parent
# What edits and their measures are made by. How methods are defined goes into the name of what they made,
# and reports change nothing that is measured.
CODE = ("*.py", "configs/*.yaml", "tokenflow/**/*.py", "shapes/*.py")
JUDGE = "judge.safetensors"
MODULES = ("baselines", "clips", "commands", "measures")


def digest_of_run(args: argparse.Namespace, model: Path) -> str:
    """The digest of what decides the measurements of a checkpoint: code, weights, judge, device and steps."""
    patterns = (*CODE, *(f"benchmarks/{name}.py" for name in MODULES))
    code = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    checkpoint = [path for path in sorted(model.rglob("*")) if path.is_file()]
    options = repr((choose_device(args.device, args.dtype), args.steps)).encode()
    files = [*code, *checkpoint, args.model / JUDGE]
    return digest_of([options, *(path.read_bytes() for path in files)])


def kept_path(folder: Path, name: str, *decides) -> Path:
    """Where the measurement of that name is kept; `decides`: whatever it depends on, told apart by `repr`."""
    return folder / f"{name}_{digest_of([repr(decides).encode()])[:16]}.json"


def keep(path: Path, measured: dict | float) -> None:
    """Write a measurement, which appears whole or not at all."""
    with stage(path) as unfinished:
        unfinished.write_text(json.dumps(measured))
