"""An inversion on disk: what `preprocess.py` leaves and an edit finds again.

`<save_dir>/sd_<version or model>/<video>/steps_<steps>/nframes_<n>/` holds

- `latents/noisy_latents_<t>.npy`, (N, 4, h, w) fp32, for every editing timestep t;
- `latents/clean_latents.npy`, the encoded frames, and `latents/inverted_latents.npy`, the end of the
  inversion where that is no editing timestep; of the same shape;
- `source/`, `vae/` and `frames/`: the frames as they were encoded, after the VAE's round trip, and
  reconstructed from the noisiest latents; `inverted.mp4`, the latter as a video;
- `source_features/`: what edits need of the source stream (see `source_store`), where it was kept;
- `inversion_prompt.txt` and `manifest.json`, all that made them;
- `digests.json`, by which damage to any of these files is noticed.
"""

import itertools
import json
import shlex
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import torch

from cli import UserError
from config import ControlNetConfig, EditConfig, PreprocessConfig, inversion_name
from digests import DamagedError, check
from rows import Rows
from source_store import SourceStore
from tokenflow_utils import Keyframes
from util import fingerprint

# What decides how an inversion is made, but not which one it is.
HOW = ("batch_size", "device", "cpu_offload", "resume", "overwrite")

CLEAN = "clean_latents"
INVERTED = "inverted_latents"


@dataclass(frozen=True)
class Manifest:
    """Everything that made an inversion."""

    config: dict  # of the PreprocessConfig
    source: str  # fingerprint of the video
    checkpoint: str  # fingerprint of the UNet's weights, or the hub id
    fps: str  # frames per second of the frames used, as a fraction
    n_frames: int
    timesteps: tuple[int, ...]  # editing timesteps whose latents are saved, the noisiest first
    inverted: str  # name of the latents that the inversion ended with,
    inverted_timestep: int  # and their timestep
    keyframes: Keyframes | None = None  # for which the source's features are kept

    @property
    def identity(self) -> dict:
        """What decides which inversion this is; two with the same are the same."""
        config = {key: value for key, value in self.config.items() if key not in HOW}
        return {"config": config, "source": self.source, "checkpoint": self.checkpoint}

    @property
    def frame_rate(self) -> Fraction:
        """Frames per second of the frames used."""
        return Fraction(self.fps)


@dataclass(frozen=True)
class Inversion:
    """The files of one inversion."""

    folder: Path

    @classmethod
    def of(cls, config: PreprocessConfig, n_frames: int) -> "Inversion":
        """Where `preprocess.py` puts the inversion of `n_frames` frames."""
        conditioned = config.controlnet_id is not None
        name = inversion_name(config.model, config.sd_version, conditioned)
        video = Path(config.save_dir) / name / Path(config.data_path).stem
        return cls(video / f"steps_{config.steps}" / f"nframes_{n_frames}")

    @property
    def source(self) -> Path:
        """Folder of the source frames."""
        return self.folder / "source"

    @property
    def vae(self) -> Path:
        """Folder of the frames after the VAE's round trip."""
        return self.folder / "vae"

    @property
    def reconstruction(self) -> Path:
        """Folder of the reconstructed frames."""
        return self.folder / "frames"

    @property
    def source_store(self) -> SourceStore:
        """The source's features, where they are kept."""
        return SourceStore(self.folder / "source_features")

    @property
    def exists(self) -> bool:
        """Whether there is a finished inversion."""
        return (self.folder / "manifest.json").is_file()

    @property
    def manifest(self) -> Manifest:
        """What made the inversion; without it there is none. Raises DamagedError."""
        check(self.folder, "manifest.json".__eq__)
        stored = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        if stored.get("keyframes"):
            timesteps = tuple(stored["keyframes"].pop("timesteps"))
            stored["keyframes"] = Keyframes(**stored["keyframes"], timesteps=timesteps)
        return Manifest(**stored)

    @property
    def prompt(self) -> str:
        """The text that the inversion was conditioned on."""
        return (self.folder / "inversion_prompt.txt").read_text(encoding="utf-8")

    @property
    def control_scale(self) -> float:
        """Factor on the ControlNet's residuals while the video was inverted; 0 without one."""
        made = self.manifest.config
        return made["control_scale"] if made["conditioned"] else 0.0

    def write_manifest(self, manifest: Manifest) -> None:
        """Write the manifest and the prompt, which make the inversion valid."""
        prompt = manifest.config["inversion_prompt"]
        (self.folder / "inversion_prompt.txt").write_text(prompt, encoding="utf-8")
        text = json.dumps(asdict(manifest), indent=2, ensure_ascii=False)
        (self.folder / "manifest.json").write_text(text + "\n", encoding="utf-8")

    def check_for_edit(self, timesteps: tuple[int, ...]) -> None:
        """Check all files that an edit of these timesteps reads, but the source's features.

        Raises DamagedError.
        """
        manifest = self.manifest
        names = {CLEAN, manifest.inverted, *map(noisy, timesteps)}
        read = {"inversion_prompt.txt", *(f"latents/{name}.npy" for name in names)}
        check(self.folder, lambda name: name in read or name.endswith(".png"))

    def check_source_store(self) -> None:
        """Check the source's features. Raises DamagedError."""
        check(self.folder, lambda name: name.startswith(self.source_store.folder.name))

    def create_latents(self, name: str, shape: tuple[int, ...]) -> None:
        """Make room for latents (N, 4, h, w) of that name, where there is none."""
        Rows(self._latents_file(name)).ensure(shape, torch.float32)

    def latents(self, name: str) -> Rows:
        """Saved latents (N, 4, h, w); `noisy(t)`, `CLEAN` or `INVERTED` names them."""
        return Rows(self._latents_file(name))

    def _latents_file(self, name: str) -> Path:
        return self.folder / "latents" / f"{name}.npy"


def noisy(t: int) -> str:
    """Name of the latents of timestep `t`."""
    return f"noisy_latents_{t}"


def checkpoint_identity(model_id: str) -> str:
    """What tells one checkpoint from another: a hub id, or a fingerprint of a folder's UNet."""
    weights = sorted((Path(model_id) / "unet").glob("*.safetensors"))
    weights += sorted((Path(model_id) / "unet").glob("*.bin"))
    return fingerprint(weights[0]) if weights else model_id


def find_inversion(config: EditConfig, timesteps: tuple[int, ...]) -> tuple[Inversion, int]:
    """The inversion that an edit stands on, and the number of frames to edit.

    timesteps: of the edit, the noisiest first. Of several, the one with the fewest frames that are
    enough is taken. Raises UserError when there is none or it does not fit the edit.
    """
    found = [inversion for name in config.inversions for inversion in _list(config, name)]
    if not found:
        raise UserError(_no_latents(config))
    best = config.inversions[0]
    by_name = [i for i in found if i.folder.parents[2].name == best] or found
    manifest = None
    try:
        by_frames = sorted(by_name, key=lambda inversion: inversion.manifest.n_frames)
        enough = [i for i in by_frames if i.manifest.n_frames >= config.n_frames > 0]
        inversion = enough[0] if enough else by_frames[-1]
        manifest = inversion.manifest
        inversion.check_for_edit(tuple(t for t in timesteps if t in manifest.timesteps))
    except DamagedError as damage:
        command = preprocess_command(config, manifest.config if manifest else None)
        raise UserError(f"{damage}; make it again with: {command} --overwrite") from damage
    if config.n_frames > manifest.n_frames:
        raise UserError(
            f"n_frames: {config.n_frames} asked, but the latents in {inversion.folder} are of "
            f"{manifest.n_frames} frames; ask for fewer, or run: "
            f"{preprocess_command(config, manifest.config)}"
        )
    _check_fits(config, inversion, timesteps)
    return inversion, config.n_frames or manifest.n_frames


def preprocess_command(config: EditConfig, made: dict | None = None) -> str:
    """The command that makes the inversion an edit needs; like `made` (a manifest's), if there is one."""
    options = {
        "data_path": config.data_path,
        "steps": config.n_inversion_steps,
        "save_steps": config.n_timesteps,
        "n_frames": config.n_frames,
        "save_dir": config.latents_path,
        "sd_version": config.sd_version,
        "model": config.model,
        "controlnet": config.controlnet_id if isinstance(config, ControlNetConfig) else None,
        "inversion_prompt": "what the video shows",
    }
    if made:
        options |= {key: made[key] for key in ("H", "W", "resize", "start_frame", "stride")}
        options["inversion_prompt"] = made["inversion_prompt"]
    flags = [(f"--{key}", str(value)) for key, value in options.items() if value is not None]
    return shlex.join(["python", "preprocess.py", *itertools.chain(*flags)])


def _list(config: EditConfig, name: str) -> list[Inversion]:
    steps = Path(config.latents_path) / name / Path(config.data_path).stem
    steps /= f"steps_{config.n_inversion_steps}"
    return [Inversion(path.parent) for path in steps.glob("nframes_*/manifest.json")]


def _no_latents(config: EditConfig) -> str:
    if not Path(config.data_path).exists():
        return f"data_path: {config.data_path}: no such file or folder, and no latents of it"
    other = sorted(
        path.name.removeprefix("steps_")
        for name in config.inversions
        for path in (Path(config.latents_path) / name / Path(config.data_path).stem).glob("steps_*")
    )
    hint = f" (there are some for n_inversion_steps {', '.join(other)})" if other else ""
    return f"no latents of {config.data_path}{hint}; make them with: {preprocess_command(config)}"


def _check_fits(config: EditConfig, inversion: Inversion, timesteps: tuple[int, ...]) -> None:
    manifest, folder = inversion.manifest, inversion.folder
    made = manifest.config
    remake = f"make them again with: {preprocess_command(config, made)}"
    if Path(config.data_path).exists() and fingerprint(Path(config.data_path)) != manifest.source:
        raise UserError(f"the latents in {folder} were made from another video; {remake}")
    if checkpoint_identity(config.model_id) != manifest.checkpoint:
        raise UserError(
            f"the latents in {folder} were made with another model, {made['model']}; {remake}"
        )
    missing = [t for t in timesteps if t not in manifest.timesteps]
    if missing:
        raise UserError(
            f"n_timesteps: {config.n_timesteps} steps visit timestep {missing[0]}, whose latents "
            f"are not among the {len(manifest.timesteps)} saved in {folder}; {remake}"
        )
    if isinstance(config, ControlNetConfig) and made["conditioned"]:
        for key in ("control", "canny_low", "canny_high"):
            if getattr(config, key) != made[key]:
                raise UserError(
                    f"{key}: {getattr(config, key)}, but the inversion was conditioned with "
                    f"{made[key]}; use that, or {remake} --{key} {getattr(config, key)}"
                )
