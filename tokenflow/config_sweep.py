"""Sweeps: options with several values become a configuration for each combination of them."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, TypeVar

from tokenflow.cli import read_options
from tokenflow.config import HOW
from tokenflow.errors import UserError
from tokenflow.options import build, format_value, is_list

C = TypeVar("C")

MOST = 64  # edits in a sweep
# What all edits of a sweep share: where things are, the inversion, the checkpoint, and how they are computed.
SHARED = ("data_path", "latents_path", "output_path", "n_frames", "n_inversion_steps")
SHARED += ("sd_version", "model", "vae", "dtype", "clip_skip", "embeddings", "reuse_source", *HOW)


def parse_sweep(
    cls: type[C], description: str, default_yaml: str, argv: list[str] | None = None
) -> tuple[C, ...]:
    """As `cli.parse`, with a configuration for each combination of the options' values.

    Raises UserError for prompts that look like the words of one.
    """
    swept = {f.name for f in fields(cls)} - set(SHARED)
    flags, values = read_options(cls, description, default_yaml, argv, swept)
    prompts = flags.get("prompt", [])
    if len(prompts) > 1 and not any(" " in prompt.strip() for prompt in prompts):
        raise UserError(
            f"prompt: {' '.join(prompts)}: several prompts of one word each; put a prompt of several words "
            "in quotes, or list prompts of one word in a YAML file"
        )
    return combine(cls, {**values, **flags})


def combine(cls: type[C], values: Mapping[str, Any]) -> tuple[C, ...]:
    """A configuration of class `cls` for each combination, ordered by its fields; the last one varies first.

    values: of options, from YAML or flags. A list has several, but for an option that takes a list itself,
    of which a list of lists has several. Raises UserError, which names the combination.
    """
    several = {f.name: _list_values(f, values[f.name]) for f in fields(cls) if f.name in values}
    swept = {name: items for name, items in several.items() if len(items) > 1}
    for name in swept:
        if name in SHARED:
            raise UserError(f"{name}: the edits of a sweep share it; give one value")
    if (count := math.prod(map(len, swept.values()))) > MOST:
        raise UserError(f"{', '.join(swept)}: {count} combinations; a sweep has at most {MOST}")
    single = {**values, **{name: items[0] for name, items in several.items()}}
    configs = []
    for combination in itertools.product(*swept.values()):
        chosen = dict(zip(swept, combination, strict=True))
        try:
            configs.append(build(cls, single | chosen))
        except UserError as error:
            if not swept:
                raise
            raise UserError(f"{label(chosen)}: {error}") from error
    return tuple(configs)


def differences(options: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of several sets of options, what tells each from the others: those that all have, and not all alike."""
    first = options[0]
    names = [name for name in first if all(name in other for other in options)]
    names = [name for name in names if any(other[name] != first[name] for other in options)]
    return [{name: other[name] for name in names} for other in options]


def label(settings: Mapping[str, Any]) -> str:
    """Options and their values as words: `pnp_attn_t 0.3, lora none`."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in settings.items())


def _list_values(f: Field, value: Any) -> list[Any]:
    """The values that a list gives the option `f`, or the one that something else gives it."""
    is_sweep = isinstance(value, list) and (
        not is_list(f) or any(isinstance(v, list) for v in value)
    )
    if value == [] and is_sweep:
        raise UserError(f"{f.name}: its list is empty; give a value")
    return value if is_sweep else [value]
