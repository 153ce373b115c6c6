"""Everything about an inversion that can be checked before anything is loaded or written."""

from dataclasses import asdict
from pathlib import Path

from diffusers import DDIMScheduler

from tokenflow.config import PreprocessConfig
from tokenflow.control.control_images import control_identity, identify_networks
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.ddim import Schedule
from tokenflow.diffusion.layouts import as_json
from tokenflow.errors import DamagedError, UserError
from tokenflow.inversion.files import INVERTED, Inversion, Manifest, noisy
from tokenflow.inversion.frames import FrameChoice, find_frame_rate
from tokenflow.runtime.digests import check
from util import digest_content


def make_schedules(config: PreprocessConfig, scheduler: DDIMScheduler) -> tuple[Schedule, Schedule]:
    """The schedules of the inversion steps and of the editing steps, whose latents are saved.

    Raises UserError if the inversion would not visit every editing timestep.
    """
    editing = Schedule.of(scheduler, config.save_steps)
    inverting = Schedule.of(scheduler, config.steps)
    if not set(editing.timesteps) <= set(inverting.timesteps):
        fitting = [
            n
            for n in range(config.save_steps, scheduler.config.num_train_timesteps)
            if set(editing.timesteps) <= set(Schedule.of(scheduler, n).timesteps)
        ]
        raise UserError(
            f"steps: {config.steps} inversion steps do not visit all timesteps of "
            f"{config.save_steps} editing steps; these do: {', '.join(map(str, fitting))}"
        )
    return inverting, editing


def make_manifest(
    config: PreprocessConfig, checkpoint: Checkpoint, schedule: Schedule, editing: Schedule
) -> Manifest:
    """The manifest of the inversion that is to be computed, as yet without keyframes."""
    noisiest, video = schedule.timesteps[0], Path(config.data_path)
    at_least = config.n_frames and max(2, config.n_frames)  # a single frame has no rate
    options = {key: as_json(value) for key, value in asdict(config).items()}
    times = FrameChoice.of(options).times(video, at_least)
    options["conditioned"] = bool(config.controlnet_ids)
    options["control_frames"] = control_identity(config)
    options["networks"] = identify_networks(config)
    return Manifest(
        config=options,
        source=digest_content(video),
        checkpoint=checkpoint.identity,
        fps=str(find_frame_rate(video, times)),
        n_frames=config.n_frames or len(times),
        timesteps=editing.timesteps,
        inverted=noisy(noisiest) if noisiest in editing.timesteps else INVERTED,
        inverted_timestep=noisiest,
    )


def is_up_to_date(final: Inversion, manifest: Manifest, overwrite: bool) -> bool:
    """Whether this inversion exists and is undamaged.

    Raises UserError if it is damaged, or another one is there, unless `overwrite` asks to replace it.
    """
    if not final.exists:
        return False
    try:
        found = final.manifest
        if found.source != manifest.source:
            raise UserError(
                f"{final.folder} holds the inversion of another video of the same name; "
                "use another --save_dir, or delete that folder"
            )
        if overwrite:
            return False
        if difference := found.describe_difference(manifest):
            raise UserError(
                f"{final.folder} holds an inversion with {difference}; --overwrite replaces it, and another "
                "--save_dir keeps it"
            )
        check(final.folder)
    except DamagedError as damage:
        if overwrite:
            return False
        raise UserError(f"{damage}; --overwrite recomputes the inversion") from damage
    return True
