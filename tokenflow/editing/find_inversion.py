"""Which inversion an edit uses, and the command that computes one that is missing."""

import shlex
from pathlib import Path
from typing import Any

from tokenflow.config import ControlNetConfig, EditConfig
from tokenflow.control.control_images import control_identity
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.layouts import as_json
from tokenflow.errors import DamagedError, UserError
from tokenflow.inversion.files import Inversion, name_model, name_video
from tokenflow.options import format_value
from util import digest_content

# Options of the edit that an inversion under ControlNets must share.
CONDITIONS = ("control", "control_path", "canny_low", "canny_high", "depth_model")


def find_inversion(
    config: EditConfig, checkpoint: Checkpoint, timesteps: tuple[int, ...]
) -> tuple[Inversion, int]:
    """The inversion that an edit uses, and the number of frames to edit.

    timesteps: of the edit, the noisiest first. Of several inversions with enough frames, the shortest is
    used. Raises UserError if there is none or it does not fit the edit.
    """
    found = next(filter(None, (_list(config, name) for name in _name_models(config))), None)
    if not found:
        raise UserError(_why_none(config))
    longest = max(found)
    enough = [length for length in found if length >= config.n_frames > 0]
    inversion, like = found[min(enough, default=longest)], None
    try:
        manifest = inversion.manifest
        like = manifest.config
        inversion.check_for_edit(tuple(t for t in timesteps if t in manifest.timesteps))
    except DamagedError as damage:
        command = preprocess_command(config, like)
        raise UserError(f"{damage}; recompute it with: {command} --overwrite") from damage
    command = preprocess_command(config, like)
    if config.n_frames > longest:
        raise UserError(
            f"n_frames: {config.n_frames} were asked for, but {inversion.folder} holds latents of {longest} "
            f"frames; ask for fewer, or run: {command}"
        )
    if misfit := _find_misfit(config, checkpoint, inversion, timesteps):
        raise UserError(f"{misfit}recompute them with: {command}")
    return inversion, config.n_frames or longest


def conditions_of(config: EditConfig) -> tuple[Any, ...]:
    """The options that decide what the ControlNets of an edit are given, if it has any."""
    return tuple(getattr(config, key, None) for key in CONDITIONS)


def preprocess_command(config: EditConfig, like: dict | None = None) -> str:
    """The command that computes the inversion an edit needs.

    like: the configuration of another inversion of the same video, whose prompt and frames are reused.
    """
    options = {
        "data_path": config.data_path,
        "steps": config.n_inversion_steps,
        "save_steps": config.n_timesteps,
        "n_frames": config.n_frames,
        "save_dir": config.latents_path,
        "sd_version": config.sd_version,
        "model": config.model,
        "vae": config.vae,
        "clip_skip": config.clip_skip or None,
        "inversion_prompt": "what the video shows",
    }
    if like:
        options |= {key: like[key] for key in ("H", "W", "resize", "start_frame", "stride", "fps")}
        options |= {key: like.get(key) for key in ("inversion_prompt", "depth_model")}
    if isinstance(config, ControlNetConfig):
        options["controlnet"] = config.controlnet_ids
        options |= {key: getattr(config, key) for key in CONDITIONS}
    words = ["python", "preprocess.py"]
    for key, value in options.items():
        if value is not None:
            words += [f"--{key}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def _name_models(config: EditConfig) -> list[str]:
    """The names of models under which an edit's inversion may be, the preferred one first."""
    plain = "1.5" if config.sd_version == "ControlNet" else config.sd_version
    names = [name_model(config.model, plain, conditioned=False)]
    if isinstance(config, ControlNetConfig):
        names.insert(0, name_model(config.model, config.sd_version, conditioned=True))
    return names


def _folder(config: EditConfig, name: str) -> Path:
    """The folder of a video's inversions under one name of a model."""
    folder, video = Path(config.latents_path) / name, Path(config.data_path)
    if not video.exists() and (folder / video.name).is_dir():  # it was a folder
        return folder / video.name
    return folder / name_video(config.data_path)


def _list(config: EditConfig, name: str) -> dict[int, Inversion]:
    """The inversions that an edit may use, by their number of frames."""
    folder = _folder(config, name) / f"steps_{config.n_inversion_steps}"
    names = (path.parent.name for path in folder.glob("nframes_*/manifest.json"))
    lengths = [n for name in names if (n := name.removeprefix("nframes_")).isdecimal()]
    return {int(length): Inversion(folder / f"nframes_{length}") for length in lengths}


def _why_none(config: EditConfig) -> str:
    video = config.data_path
    if not Path(video).exists():
        return f"data_path: {video}: no such file or folder, and no latents of it"
    folders = (
        path for name in _name_models(config) for path in _folder(config, name).glob("steps_*")
    )
    steps = ", ".join(sorted(path.name.removeprefix("steps_") for path in folders))
    hint = f" (there are some for n_inversion_steps {steps})" if steps else ""
    return f"no latents of {video}{hint}; compute them with: {preprocess_command(config)}"


def _find_misfit(
    config: EditConfig, checkpoint: Checkpoint, inversion: Inversion, timesteps: tuple[int, ...]
) -> str:
    """What does not fit an edit, as a line that the remedy completes; empty if all fits."""
    manifest, inverted = inversion.manifest, inversion.manifest.config
    latents = f"the latents in {inversion.folder}"
    video = Path(config.data_path)
    if video.exists() and digest_content(video) != manifest.source:
        return f"{latents} are of another video; "
    if checkpoint.identity != manifest.checkpoint:
        if config.vae != (vae := inverted["vae"]):
            return f"vae: {format_value(config.vae)}, but {latents} are of {format_value(vae)}; use that, or "
        return f"{latents} are of another model, {inverted['model']}; "
    if config.clip_skip != (skipped := inverted.get("clip_skip", 0)):
        return f"clip_skip: {config.clip_skip}, but {latents} were computed with {skipped}; use that, or "
    if missing := [t for t in timesteps if t not in manifest.timesteps]:
        return (
            f"n_timesteps: {config.n_timesteps} steps visit timestep {missing[0]}, whose latents are not "
            f"among the {len(manifest.timesteps)} saved in {inversion.folder}; "
        )
    if isinstance(config, ControlNetConfig) and inverted["conditioned"]:
        for key in CONDITIONS:
            wanted, used = as_json(getattr(config, key)), inverted.get(key)
            if wanted != used:
                return (
                    f"{key}: {format_value(wanted)}, but the inversion was conditioned with "
                    f"{format_value(used)}; use that, or "
                )
        if control_identity(config) != inverted["control_frames"]:
            return (
                f"control_path: the frames in {config.control_path} have changed since the inversion was "
                "conditioned with them; "
            )
    return ""
