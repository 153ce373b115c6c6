"""Everything about an edit that can be checked before anything is loaded or written."""

from functools import partial
from pathlib import Path

from tokenflow.config import ControlNetConfig, EditConfig
from tokenflow.control.conditions import control_identity
from tokenflow.control.detectors import check_detectors
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.controlnets import check_controlnets
from tokenflow.diffusion.ddim import Schedule
from tokenflow.diffusion.device import choose_device
from tokenflow.diffusion.lora import check_loras, lora_identity
from tokenflow.editing.edit import EditRun
from tokenflow.editing.find_inversion import conditions_of, find_inversion, preprocess_command
from tokenflow.editing.identity import identity_of
from tokenflow.editing.mask import check_mask
from tokenflow.editing.shared import Shared
from tokenflow.errors import UserError
from tokenflow.inversion.frames import FrameChoice, check_control_frames
from tokenflow.runtime.distributed import Processes
from util import fingerprint


def check_edit(config: EditConfig, technique: str, shared: Shared) -> EditRun:
    """The run that edits a video, after all that can be checked has been checked; it has no folder yet.

    technique: first part of the folder's name. shared: what other edits of the same video have made.
    """
    find = partial(Checkpoint.find, config.model_id, config.sd_version)
    checkpoint = shared.get("checkpoint", None, find)
    schedule = Schedule.of(checkpoint.scheduler, config.n_timesteps)
    conditions, find = (
        conditions_of(config),
        partial(find_inversion, config, checkpoint, schedule.timesteps),
    )
    inversion, n_frames = shared.get("inversion", (schedule.timesteps, conditions), find)
    if config.mask == "auto" and not inversion.prompt.strip():
        recompute = preprocess_command(
            config, inversion.manifest.config | {"inversion_prompt": "what the video shows"}
        )
        raise UserError(
            "mask: auto compares prompt with inversion_prompt, which is empty; recompute the inversion with: "
            f"{recompute} --overwrite"
        )
    if config.mask == "auto" and config.prompt.strip() == inversion.prompt.strip():
        raise UserError(
            "mask: auto compares prompt with inversion_prompt, which are the same; say in prompt what the "
            "edited video shows, or use --mask none"
        )
    device, dtype = choose_device(config.device, config.dtype)
    choice = FrameChoice.of(inversion.manifest.config)
    check_loras(config.lora, checkpoint.unet_config)
    files = [lora_identity(lora) for lora in config.lora]
    if isinstance(config, ControlNetConfig):
        check_controlnets(config.controlnet_ids)
        check_detectors(config)
        check = partial(check_control_frames, config, choice, n_frames)
        shared.get("conditions checked", conditions, check)
        files += [control_identity(config)] if config.control_path else []
    if config.mask_path:
        check = partial(check_mask, config.mask_path, choice, n_frames)
        shared.get("mask checked", config.mask, check)
        files.append(fingerprint(config.mask_path))
    identity, processes = identity_of(config, inversion, files), Processes(device)
    made_from = checkpoint, inversion, schedule, n_frames, identity
    name = f"{technique}_{Path(config.data_path).stem}"
    return EditRun(config, name, *made_from, processes, dtype, shared)
