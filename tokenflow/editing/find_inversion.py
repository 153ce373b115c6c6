"""Which inversion an edit uses, and the command that computes one that is missing."""

import itertools
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenflow.config import ControlNetConfig, EditConfig
from tokenflow.control.conditions import control_identity
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.errors import DamagedError, UserError
from tokenflow.inversion.files import Inversion
from tokenflow.options import format_value
from util import fingerprint

# Options of the edit that an inversion under ControlNets must share.
CONDITIONS = ("control", "control_path", "canny_low", "canny_high", "depth_model")


def find_inversion(
    config: EditConfig, checkpoint: Checkpoint, timesteps: tuple[int, ...]
) -> tuple[Inversion, int]:
    """The inversion that an edit uses, and the number of frames to edit.

    timesteps: of the edit, the noisiest first. Of several inversions with enough frames, the shortest is
    used. Raises UserError if there is none or it does not fit the edit.
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
        raise UserError(f"{damage}; recompute it with: {command} --overwrite") from damage
    if config.n_frames > manifest.n_frames:
        raise UserError(
            f"n_frames: {config.n_frames} were asked for, but {inversion.folder} holds latents of "
            f"{manifest.n_frames} frames; ask for fewer, or run: "
            f"{preprocess_command(config, manifest.config)}"
        )
    _check_fits(config, checkpoint, inversion, timesteps)
    return inversion, config.n_frames or manifest.n_frames


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
        "clip_skip": config.clip_skip or None,
        "inversion_prompt": "what the video shows",
    }
    if like:
        options |= {key: like[key] for key in ("H", "W", "resize", "start_frame", "stride")}
        options |= {key: like.get(key) for key in ("inversion_prompt", "depth_model")}
    if isinstance(config, ControlNetConfig):
        options["controlnet"] = config.controlnet_ids
        options |= {key: getattr(config, key) for key in CONDITIONS}
    flags = [
        (f"--{key}", *map(str, value if isinstance(value, tuple) else [value]))
        for key, value in options.items()
        if value is not None
    ]
    return shlex.join(["python", "preprocess.py", *itertools.chain(*flags)])


def _list(config: EditConfig, name: str) -> list[Inversion]:
    folder = Path(config.latents_path) / name / Path(config.data_path).stem
    folder /= f"steps_{config.n_inversion_steps}"
    return [Inversion(path.parent) for path in folder.glob("nframes_*/manifest.json")]


def _no_latents(config: EditConfig) -> str:
    if not Path(config.data_path).exists():
        return f"data_path: {config.data_path}: no such file or folder, and no latents of it"
    other = sorted(
        path.name.removeprefix("steps_")
        for name in config.inversions
        for path in (Path(config.latents_path) / name / Path(config.data_path).stem).glob("steps_*")
    )
    hint = f" (there are some for n_inversion_steps {', '.join(other)})" if other else ""
    return (
        f"no latents of {config.data_path}{hint}; compute them with: {preprocess_command(config)}"
    )


def _check_fits(
    config: EditConfig, checkpoint: Checkpoint, inversion: Inversion, timesteps: tuple[int, ...]
) -> None:
    manifest, folder = inversion.manifest, inversion.folder
    inverted = manifest.config
    remedy = f"recompute them with: {preprocess_command(config, inverted)}"
    if Path(config.data_path).exists() and fingerprint(Path(config.data_path)) != manifest.source:
        raise UserError(f"the latents in {folder} are of another video; {remedy}")
    if checkpoint.identity != manifest.checkpoint:
        raise UserError(
            f"the latents in {folder} are of another model, {inverted['model']}; {remedy}"
        )
    if config.clip_skip != (skipped := inverted.get("clip_skip", 0)):
        raise UserError(
            f"clip_skip: {config.clip_skip}, but the latents in {folder} were computed with {skipped}; "
            f"use that, or {remedy}"
        )
    missing = [t for t in timesteps if t not in manifest.timesteps]
    if missing:
        raise UserError(
            f"n_timesteps: {config.n_timesteps} steps visit timestep {missing[0]}, whose latents "
            f"are not among the {len(manifest.timesteps)} saved in {folder}; {remedy}"
        )
    if isinstance(config, ControlNetConfig) and inverted["conditioned"]:
        conditions = json.loads(json.dumps(asdict(config)))  # as the manifest has them
        for key in CONDITIONS:
            if conditions[key] != inverted.get(key):
                raise UserError(
                    f"{key}: {format_value(conditions[key])}, but the inversion was conditioned with "
                    f"{format_value(inverted.get(key))}; use that, or {remedy}"
                )
        if control_identity(config) != inverted["control_frames"]:
            raise UserError(
                f"control_path: the frames in {config.control_path} have changed since the inversion was "
                f"conditioned with them; {remedy}"
            )
