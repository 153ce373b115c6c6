"""Options: fields of dataclasses, each of which is a YAML key and a flag, and what a user may give for it."""

import ast
import difflib
import inspect
import itertools
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, field, fields
from typing import Any, TypeVar

import yaml

from tokenflow.errors import UserError, is_text

C, N = TypeVar("C"), TypeVar("N")

TRUTH_VALUES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def option(
    default: Any = MISSING,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    aliases: Mapping[str, str] = types.MappingProxyType({}),
    none: str = "None",
) -> Any:
    """A field of a dataclass whose values are bounded, of several choices, or have other names.

    `low` and `high` are inclusive; `aliases` are other names of the choices; `none` is what a user
    writes for None, or for an empty tuple.
    """
    metadata = {"low": low, "high": high, "choices": choices, "aliases": aliases, "none": none}
    return field(default=default, metadata=metadata)


def read_help(cls: type) -> dict[str, str]:
    """What each option of `cls` means: the string below its field, of which a subclass may have its own."""
    texts = {}
    for owner in reversed(cls.__mro__[:-1]):
        body = ast.parse(inspect.getsource(owner)).body[0].body
        for line, below in itertools.pairwise(body):
            match line, below:
                case ast.AnnAssign(target=target), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[target.id] = " ".join(text.split())
    return texts


def build(cls: type[C], values: Mapping[str, Any]) -> C:
    """Check `values`, from YAML or strings from flags, and return a configuration of class `cls`.

    Raises UserError for an unknown or missing key, a wrong type, or a value out of range.
    """
    known = {f.name: f for f in fields(cls)}
    for key in values:
        if key not in known:
            raise UserError(f"unknown key {key!r}{suggest(key, known)}")
    for name, f in known.items():
        if values.get(name) is None and f.default is MISSING:
            raise UserError(f"{name}: missing. {read_help(cls)[name]}")
    return cls(**{key: _convert(known[key], value) for key, value in values.items()})


def dump(config: Any) -> str:
    """The full configuration as YAML; the same configuration always gives the same text."""
    return yaml.safe_dump(asdict(config), sort_keys=True, allow_unicode=True)


def suggest(key: str, known: Collection[str]) -> str:
    """The end of a line about an unknown `key`: the most similar known one, or all."""
    match = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(known)}"


def is_list(f: Field) -> bool:
    """Whether option `f` takes one or several values."""
    return typing.get_origin(f.type) is tuple


def format_value(value: Any, none: str = "none") -> str:
    """A value of an option as words. none: what stands for None, an empty text or an empty list."""
    if isinstance(value, list | tuple):
        value = " ".join(map(str, value))
    return none if value is None or value == "" else str(value)


def format_default(f: Field) -> str:
    """The default of option `f` as a user writes it."""
    text = format_value(f.default, "empty" if f.type is str else f.metadata.get("none", "None"))
    return text.lower() if f.type is bool else text


def for_each(name: str, numbers: Sequence[N], of: str, items: Sequence) -> tuple[N, ...]:
    """The option `name` for each of the `items` of the option `of`: one number serves all of them.

    Raises UserError if there are neither one nor as many as items.
    """
    if len(numbers) not in (1, len(items)):
        raise UserError(
            f"{name}: {len(numbers)} numbers for {len(items)} of {of}; give one for all, or one for each"
        )
    return tuple(numbers) * len(items) if len(numbers) == 1 else tuple(numbers)


def _convert(f: Field, value: Any) -> Any:
    """Convert a value from YAML, or the text of a flag, to the type of option `f`."""
    kinds = typing.get_args(f.type) or (f.type,)
    items = value if is_list(f) and isinstance(value, list) else [value]
    is_none = items in ([None], [""], ["None"], ["null"], [f.metadata.get("none")])
    if is_none and is_list(f):
        return ()
    if is_none and types.NoneType in kinds:
        return None
    if value is None:  # null in YAML
        return f.default
    converted = tuple(_convert_one(f, kinds[0], item) for item in items)
    return converted if is_list(f) else converted[0]


def _convert_one(f: Field, kind: type, value: Any) -> Any:
    """Convert one value of option `f` to `kind`."""
    text = str(value).lower() if kind is bool else str(value)
    wrong = UserError(f"{f.name}: {value!r:.200} is not {_KINDS[kind]}")
    if not isinstance(value, str | int | float) or (kind is bool and text not in TRUTH_VALUES):
        raise wrong
    if kind is bool:
        return TRUTH_VALUES[text]
    if kind is str:
        if not is_text(text):
            raise UserError(f"{f.name}: {value!r} holds a NUL, or bytes that are no UTF-8")
        text, choices = f.metadata.get("aliases", {}).get(text, text), f.metadata.get("choices")
        if choices and text not in choices:
            raise UserError(f"{f.name}: {text!r} is none of {', '.join(choices)}")
        return text
    try:
        number = kind(text)
    except ValueError:
        raise wrong from None
    if "_" in text:  # 1_0 would be 10
        raise wrong
    low, high = f.metadata["low"], f.metadata["high"]
    if not low <= number <= high:
        raise UserError(f"{f.name}: {text} is out of range; it must be between {low} and {high}")
    return number
