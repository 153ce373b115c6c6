"""What tells edits apart, and the `config.yaml` in the folder of each, which ends with it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from tokenflow.config import HOW, EditConfig
from tokenflow.config_sweep import differences
from tokenflow.errors import DamagedError
from tokenflow.inversion.files import Inversion
from tokenflow.options import dump
from tokenflow.runtime.digests import digest_of

# Where things lie, which tells no edits apart: what lies there does.
PATHS = (
    "data_path",
    "latents_path",
    "output_path",
    "model",
    "vae",
    "lora",
    "embeddings",
    "controlnet",
    "control_path",
)
# What is read of the options of an edit that is finished.
READ = {"data_path": str, "latents_path": str, "prompt": str, "n_inversion_steps": int}
# Comments below the options, so that the file stays one that --config_path accepts.
INVERSION_NOTE, FILE_NOTE, IDENTITY_NOTE = "# of the inversion ", "# of the file ", "# identity "


@dataclass(frozen=True)
class Identity:
    """What tells an edit, or a sweep of several, from others.

    digest: of what decides the result; edits of the same digest are equal. text: the `config.yaml`.
    """

    digest: str
    text: str

    @classmethod
    def of(cls, config: EditConfig, inversion: Inversion, files: Iterable[str]) -> "Identity":
        """The identity of an edit of an inversion. files: identities of all other files that it reads."""
        config, inverted = without_how(config), json.dumps(inversion.manifest.identity)
        options = {key: value for key, value in asdict(config).items() if key not in PATHS}
        for key in ("mask", "depth_model"):  # which may also be words, or a hub id
            if options.get(key) and Path(options[key]).exists():
                options[key] = "of the user"
        notes = [f"{INVERSION_NOTE}{inverted}\n", *(f"{FILE_NOTE}{name}\n" for name in files)]
        digest = digest_of([json.dumps(options, sort_keys=True).encode(), *map(str.encode, notes)])
        return cls(digest, "".join([dump(config), *notes, f"{IDENTITY_NOTE}{digest}\n"]))

    @classmethod
    def of_sweep(cls, edits: Sequence["Identity"]) -> "Identity":
        """That of several edits together: the options of one, with lists of those that tell them apart."""
        options = [yaml.safe_load(edit.text) for edit in edits]
        lists: dict[str, list] = {}
        for settings in differences(options):
            for name, value in settings.items():
                of_name = lists.setdefault(name, [])
                of_name += [value] * (value not in of_name)
        lines = [line for edit in edits for line in edit.text.splitlines(keepends=True)]
        notes = dict.fromkeys(
            line for line in lines if line.startswith((INVERSION_NOTE, FILE_NOTE))
        )
        text = yaml.safe_dump(options[0] | lists, sort_keys=True, allow_unicode=True)
        digest = digest_of(edit.digest.encode() for edit in edits)
        return cls(digest, "".join([text, *notes, f"{IDENTITY_NOTE}{digest}\n"]))


def read_identity(path: Path) -> tuple[dict[str, Any], dict]:
    """The options in the `config.yaml` of an edit, and the identity of its inversion. Raises DamagedError."""
    try:
        text = path.read_text(encoding="utf-8")
        options, notes = yaml.safe_load(text), text.partition(INVERSION_NOTE)[2]
        wrong = [name for name, kind in READ.items() if not isinstance(options[name], kind)]
        if not wrong:
            return options, json.loads(notes.partition("\n")[0])
    except (ValueError, LookupError, TypeError, yaml.YAMLError):
        pass
    raise DamagedError(f"{path} is not as this version of the code writes it")


def without_how(config: EditConfig) -> EditConfig:
    """The configuration that all runs of the same edit share, however they compute it (HOW)."""
    return replace(config, **{f.name: f.default for f in fields(config) if f.name in HOW})
