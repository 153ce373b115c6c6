"""Commands: flags and YAML become one validated dataclass, and a user's mistake becomes one line.

Nothing slow is imported here, so that `--help` and mistakes are answered at once.
"""

import argparse
import difflib
import errno
import functools
import io
import logging
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import MISSING, Field, asdict, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tokenflow.errors import UserError, is_out_of_memory, is_text

C, N = TypeVar("C"), TypeVar("N")

CONFIGS = Path(__file__).parent.parent / "configs"

# These errors of the system are not the user's mistake; all others concern a path that the user gave.
_DISK_FAILED = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_OUT_OF_MEMORY = (
    "the device is out of memory: use --batch_size auto, --cpu_offload, smaller frames or, in an edit, a "
    "smaller --keyframe_window"
)


def option(
    help: str,
    default: Any = MISSING,
    low: float = -math.inf,
    high: float = math.inf,
    choices: tuple[str, ...] = (),
    aliases: Mapping[str, str] = types.MappingProxyType({}),
    none: str = "None",
) -> Any:
    """A dataclass field that is also a YAML key and a flag; of a field that is a tuple, each takes a list.

    `low` and `high` are inclusive; `aliases` are other spellings of the choices; `none` is how a user
    spells None, or an empty tuple.
    """
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "aliases": aliases}
    return field(default=default, metadata=metadata | {"none": none})


def parse(
    cls: type[C], description: str, default_yaml: str | None = None, argv: list[str] | None = None
) -> C:
    """Read a configuration of class `cls` from `argv`, by default the command line.

    With a `default_yaml` in `configs/`, flags win over that file or the one that `--config_path` names.
    """
    flags, values = read_options(cls, description, default_yaml, argv)
    return build(cls, {**values, **flags})


def read_options(
    cls: type,
    description: str,
    default_yaml: str | None = None,
    argv: list[str] | None = None,
    several: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options for `cls` in flags, as strings, and those in YAML, neither of which is checked.

    several: every flag takes one or several values, and what it gives is a list of them.
    """
    flags = _parse_flags(cls, description, default_yaml, argv, several)
    values = _read_yaml(Path(flags.pop("config_path"))) if default_yaml else {}
    return flags, values


def build(cls: type[C], values: dict[str, Any]) -> C:
    """Check `values`, from YAML or strings from flags, and return a configuration of class `cls`.

    Raises UserError for an unknown or missing key, a wrong type, or a value out of range.
    """
    known = {f.name: f for f in fields(cls)}
    for key in values:
        if key not in known:
            raise UserError(f"unknown key {key!r}{_nearest(key, known)}")
    for name, f in known.items():
        if values.get(name) is None and f.default is MISSING:
            raise UserError(f"{name}: missing ({f.metadata['help']})")
    return cls(**{key: _convert(known[key], value) for key, value in values.items()})


def dump(config: Any) -> str:
    """The full configuration as YAML; the same configuration always gives the same text."""
    return yaml.safe_dump(asdict(config), sort_keys=True, allow_unicode=True)


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Make `main` a command, which a user's mistake ends with one line and exit status 2.

    If several processes run it, only the first prints and logs; the others print only their errors.
    """

    @functools.wraps(main)
    def wrapper() -> None:
        logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
        rank = int(os.environ.get("RANK", 0))
        logging.getLogger("tokenflow").setLevel(logging.ERROR if rank else logging.INFO)
        blame = f"error (process {rank})" if rank else "error"

        def end(error: object, status: int) -> typing.NoReturn:
            print(f"{blame}: {_one_line(str(error))}", file=sys.stderr)
            sys.exit(status)

        try:
            with redirect_stdout(io.StringIO()) if rank else nullcontext():
                main()
        except UserError as error:
            end(error, 2)
        except (FloatingPointError, ConnectionError) as error:
            end(error, 1)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            if error.errno in _DISK_FAILED:
                end(f"{where}{error.strerror}; the same command resumes the run", 1)
            end(f"{where}{error.strerror or error}; check that path, or give another", 2)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            end(_OUT_OF_MEMORY, 1)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapper


def _one_line(text: str) -> str:
    """Escape line ends and other unprintable characters, which paths may hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)


def _parse_flags(
    cls: type,
    description: str,
    default_yaml: str | None,
    argv: list[str] | None,
    several: bool,
) -> dict[str, Any]:
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if default_yaml is not None:
        parser.add_argument(
            "--config_path",
            default=str(CONFIGS / default_yaml),
            help=f"YAML file; flags win over it (default: configs/{default_yaml})",
        )
    for f in fields(cls):
        help = f.metadata["help"]
        if f.metadata["choices"]:
            help += f"; one of {', '.join(f.metadata['choices'])}"
        if f.default is not MISSING:
            help += f" (default: {spelt(f.default, f)})"
        if f.type is bool:  # such a flag may stand alone
            takes = {"nargs": "*"} if several else {"nargs": "?", "const": "true"}
        else:
            takes = {"nargs": "+"} if several or is_list(f) else {}
        parser.add_argument(
            f"--{f.name}",
            default=argparse.SUPPRESS,
            metavar="X",
            help=help.replace("%", "%%"),
            **takes,
        )
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        key = unknown[0].removeprefix("--").partition("=")[0]
        known = [f.name for f in fields(cls)]
        raise UserError(f"unknown flag {unknown[0]!r}{_nearest(key, known)}")
    return {key: ["true"] if value == [] else value for key, value in vars(flags).items()}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config_path: cannot read {path}: {error.strerror}") from error
    except Exception as error:  # PyYAML lets any error of its constructors through
        problem = " ".join(str(error).split())
        raise UserError(f"config_path: {path} is not YAML: {problem}") from error
    if not isinstance(values, dict):
        raise UserError(f"config_path: {path} must hold `key: value` lines")
    return {str(key): value for key, value in values.items()}


def _nearest(key: str, known: Collection[str]) -> str:
    match = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(known)}"


def is_list(f: Field) -> bool:
    """Whether field `f` takes one or several values."""
    return typing.get_origin(f.type) is tuple


def spelt(value: Any, f: Field) -> str:
    """A value of field `f` as a user writes it in a flag."""
    if value is None or value == ():
        return f.metadata["none"]
    return " ".join(map(str, value)) if is_list(f) else str(value)


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
    """Convert a value from YAML, or the text of a flag, to the type of field `f`."""

    def is_none(value: Any) -> bool:
        return value is None or value in ("", "None", "null", f.metadata["none"])

    if is_list(f):
        values = value if isinstance(value, list) else [value]
        if len(values) == 1 and is_none(values[0]):
            return ()
        return tuple(_convert_one(f, typing.get_args(f.type)[0], item) for item in values)
    if isinstance(f.type, types.UnionType):
        return None if is_none(value) else _convert_one(f, typing.get_args(f.type)[0], value)
    return _convert_one(f, f.type, value)


def _convert_one(f: Field, kind: type, value: Any) -> Any:
    """Convert one value of field `f` to `kind`."""
    wrong = UserError(f"{f.name}: {value!r} is not {_KINDS[kind]}")
    if kind is bool:
        if str(value).lower() not in ("true", "false"):
            raise wrong
        return str(value).lower() == "true"
    # YAML reads 2.1 as a number, so a version or a prompt may arrive as one.
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise wrong
    try:
        converted = kind(value)
    except (ValueError, OverflowError):
        raise wrong from None
    if kind is int and isinstance(value, float) and value != converted:
        raise wrong
    if kind is str:
        if not is_text(converted):
            raise UserError(f"{f.name}: {value!r} holds a NUL, or bytes that are no UTF-8")
        converted, choices = f.metadata["aliases"].get(converted, converted), f.metadata["choices"]
        if choices and converted not in choices:
            raise UserError(f"{f.name}: {converted!r} is none of {', '.join(choices)}")
        return converted
    low, high = f.metadata["low"], f.metadata["high"]
    if not (math.isfinite(converted) and low <= converted <= high):
        bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise UserError(f"{f.name}: {value} is out of range; it must be {bounds}")
    return converted


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
