"""What tells edits apart: the text that is stored as `config.yaml` in the folder of each."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import yaml

from tokenflow.config import HOW, EditConfig
from tokenflow.config_sweep import differences
from tokenflow.inversion.files import Inversion
from tokenflow.options import dump

# Comments below the options, so that the file stays one that --config_path accepts.
INVERSION_NOTE, FILE_NOTE = "# of the inversion ", "# of the file "


def identity_of(config: EditConfig, inversion: Inversion, files: Iterable[str]) -> str:
    """The identity of an edit of an inversion. files: fingerprints of all other files that it reads."""
    inverted = json.dumps(inversion.manifest.identity)
    notes = [f"{INVERSION_NOTE}{inverted}\n", *(f"{FILE_NOTE}{name}\n" for name in files)]
    return dump(without_how(config)) + "".join(notes)


def identity_of_sweep(identities: Sequence[str]) -> str:
    """The identity of several edits together: that of one, with lists of the options that tell them apart."""
    options = [yaml.safe_load(text) for text in identities]
    lists: dict[str, list] = {}
    for settings in differences(options):
        for name, value in settings.items():
            of_name = lists.setdefault(name, [])
            of_name += [value] * (value not in of_name)
    lines = [line for text in identities for line in text.splitlines(keepends=True)]
    notes = dict.fromkeys(line for line in lines if line.startswith((INVERSION_NOTE, FILE_NOTE)))
    return yaml.safe_dump(options[0] | lists, sort_keys=True, allow_unicode=True) + "".join(notes)


def read_identity(text: str) -> tuple[dict[str, Any], dict]:
    """The options in the identity of an edit, and the identity of its inversion."""
    _, _, notes = text.partition(INVERSION_NOTE)
    return yaml.safe_load(text), json.loads(notes.partition("\n")[0])


def without_how(config: EditConfig) -> EditConfig:
    """The configuration that all runs of the same edit share, however they compute it (HOW).

    Without a keyframe_interval, batch_size decides about it, and so about the edit.
    """
    shared = {f.name: f.default for f in fields(config) if f.name in (*HOW, "keyframe_interval")}
    default = replace(config, **shared)
    if default.interval == config.interval:
        return default
    return replace(default, keyframe_interval=config.interval)
