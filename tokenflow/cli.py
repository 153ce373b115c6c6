"""Commands: flags and YAML become one validated dataclass, and a user's mistake becomes one line.

Nothing slow is imported here, so that `--help` and mistakes are answered at once.
"""

import argparse
import errno
import functools
import io
import logging
import os
import sys
import typing
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import nullcontext, redirect_stdout
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tokenflow.errors import (
    DamagedError,
    UserError,
    blame,
    describe,
    is_out_of_memory,
    is_out_of_resources,
    make_printable,
)
from tokenflow.options import build, format_default, is_list, read_help, suggest
from tokenflow.runtime.launch import read_rank

C = TypeVar("C")

CONFIGS = Path(__file__).parent.parent / "configs"

# These errors of the system are not the user's mistake; all others concern a path that the user gave.
_DISK_FAILED = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_OUT_OF_MEMORY = (
    "the device is out of memory: use --batch_size auto, --cpu_offload, smaller frames or, in an edit, a "
    "smaller --keyframe_window"
)
_OUT_OF_RESOURCES = (
    "this machine has run out of memory, threads, open files or room for a file ({}); end other programs or "
    "raise the limit (ulimit), and run the same command again"
)


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
    swept: Collection[str] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options for `cls` in flags, as strings, and those in YAML, neither of which is checked.

    swept: options whose flags take one or several values, and give a list of them.
    """
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if default_yaml is not None:
        parser.add_argument(
            "--config_path",
            default=str(CONFIGS / default_yaml),
            help=f"YAML file of options. Flags win over it. (default: configs/{default_yaml})",
        )
    texts = read_help(cls)
    for f in fields(cls):
        _add_flag(parser, f, texts[f.name], f.name in swept)
    given, unknown = parser.parse_known_args(argv)
    if unknown and not unknown[0].startswith("-"):
        raise UserError(f"{unknown[0]!r} belongs to no flag; put a text of several words in quotes")
    if unknown:
        name = unknown[0].removeprefix("--").partition("=")[0]
        raise UserError(
            f"unknown flag {unknown[0]!r}{suggest(name, [f.name for f in fields(cls)])}"
        )
    flags = {name: ["true"] if value == [] else value for name, value in vars(given).items()}
    return flags, _read_yaml(Path(flags.pop("config_path"))) if default_yaml else {}


def command(main: Callable[[], str]) -> Callable[[], None]:
    """Make `main` a command, which prints the line that it returns; a user's mistake ends it with one line.

    If several processes run it, only the first prints and logs; the others print only their errors.
    """

    @functools.wraps(main)
    def wrapper() -> None:
        handler, blame = logging.StreamHandler(sys.stderr), "error"
        handler.setFormatter(_Formatter("%(message)s"))
        logging.basicConfig(handlers=[handler], force=True)
        try:
            if rank := read_rank():
                blame = f"error (process {rank})"
            logging.getLogger("tokenflow").setLevel(logging.ERROR if rank else logging.INFO)
            with redirect_stdout(io.StringIO()) if rank else nullcontext():
                _print_line(main())
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            from tqdm import tqdm  # here, because `--help` needs none

            text, status = _explain(error)
            # On a line of its own, though a progress bar stands unfinished.
            tqdm.write(f"{blame}: {make_printable(text)}", file=sys.stderr)
            sys.exit(status)

    return wrapper


def _explain(error: Exception) -> tuple[str, int]:
    """What to say about an error, and the exit status: 2 for a mistake. Raises other errors again."""
    if isinstance(error, UserError):
        return str(error), 2
    if is_out_of_memory(error):
        return _OUT_OF_MEMORY, 1
    if is_out_of_resources(error):
        return _OUT_OF_RESOURCES.format(describe(error)), 1
    if isinstance(error, DamagedError):
        return f"{error}; the same command writes it anew", 1
    if isinstance(error, FloatingPointError | ConnectionError):
        return str(error), 1
    if not isinstance(error, OSError):
        raise error
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in _DISK_FAILED:
        return f"{where}{error.strerror}; the same command resumes the run", 1
    return f"{where}{error.strerror or error}; check that path, or give another", 2


class _Formatter(logging.Formatter):
    """Names and prompts in messages cannot control the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging calls it)
        return make_printable(super().formatMessage(record))


def _print_line(text: str) -> None:
    """Print one line, in which what stdout cannot show is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(make_printable(text).encode(encoding, "backslashreplace").decode(encoding))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)


def _add_flag(parser: argparse.ArgumentParser, f: Field, help: str, is_swept: bool) -> None:
    """Add the flag of option `f`; if it is true or false, the flag may stand alone."""
    if choices := f.metadata.get("choices"):
        help += f" One of {', '.join(choices)}."
    if f.default is not MISSING:
        help += f" (default: {format_default(f)})"
    if f.type is bool:
        takes = {"nargs": "*"} if is_swept else {"nargs": "?", "const": "true"}
    else:
        takes = {"nargs": "+"} if is_swept or is_list(f) else {}
    help = help.replace("%", "%%")
    parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, metavar="X", help=help, **takes)


class _Loader(yaml.BaseLoader):
    """Reads texts, as flags are, lists and mappings: no number, date or truth value is made of a text."""

    def construct_scalar(self, node: yaml.ScalarNode) -> str | None:
        is_null = node.style is None and node.value in ("", "~", "null", "Null", "NULL")
        return None if is_null else super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        for key, times in Counter(str(key.value) for key, _ in node.value).items():
            if times > 1:
                raise yaml.YAMLError(f"{key} is given twice; keep one")
        return super().construct_mapping(node, deep)

    def compose_node(self, *args: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):  # a few of them can stand for billions of values
            raise yaml.YAMLError(f"*{self.peek_event().anchor} is an alias; write its value out")
        return super().compose_node(*args)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not os.path.isfile(path):  # others, such as pipes, may never end
        raise UserError(f"config_path: {path} is no file")
    kinds = OSError, ValueError, RecursionError, yaml.YAMLError
    with blame(f"config_path: {path} cannot be read", kinds):
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    if not isinstance(values, dict):
        raise UserError(f"config_path: {path} must hold `key: value` lines")
    return {str(key): value for key, value in values.items()}
