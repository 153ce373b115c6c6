"""Everything about an edit that can be checked before anything is loaded or written."""

from tokenflow.config import ControlNetConfig, EditConfig
from tokenflow.control.control_images import control_identity, identify_networks
from tokenflow.control.detectors import check_detectors
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.controlnets import check_controlnets
from tokenflow.diffusion.ddim import Schedule
from tokenflow.diffusion.device import choose_device
from tokenflow.diffusion.embeddings import identify_embeddings, read_embeddings
from tokenflow.diffusion.lora import check_loras, identify_lora
from tokenflow.editing.edit import EditRun
from tokenflow.editing.find_inversion import conditions_of, find_inversion, preprocess_command
from tokenflow.editing.identity import Identity
from tokenflow.editing.mask import check_mask
from tokenflow.editing.shared import Shared
from tokenflow.errors import UserError
from tokenflow.inversion.files import Inversion
from tokenflow.inversion.frames import FrameChoice, check_control_frames
from tokenflow.runtime.distributed import Processes
from util import digest_content


def check_edit(config: EditConfig, technique: str, shared: Shared) -> EditRun:
    """The run that edits a video, after all that can be checked has been checked; it has no folder yet.

    technique: first part of the folder's name. shared: what other edits of the same video have made.
    """
    checkpoint = shared.get(
        "checkpoint",
        None,
        lambda: Checkpoint.find(config.model_id, config.sd_version, config.vae),
    )
    schedule = Schedule.of(checkpoint.scheduler, config.n_timesteps)
    conditions = conditions_of(config)
    inversion, n_frames = shared.get(
        "inversion",
        (schedule.timesteps, conditions),
        lambda: find_inversion(config, checkpoint, schedule.timesteps),
    )
    if config.mask == "auto":
        _check_prompts(config, inversion)
    device, dtype = choose_device(config.device, config.dtype)
    choice = inversion.manifest.choice
    check_loras(config.lora, checkpoint.unet_config)
    files = [identify_lora(lora) for lora in config.lora]
    for file in config.embeddings:
        read_embeddings(file)  # before anything is loaded
        files.append(identify_embeddings(file))
    if isinstance(config, ControlNetConfig):
        check_controlnets(config.controlnet_ids)
        check_detectors(config)
        files += identify_networks(config)
        if config.control_path:
            identity = shared.get(
                "control frames",
                conditions,
                lambda: _identify_control_frames(config, choice, n_frames),
            )
            files.append(identity)
    if config.mask_path:
        identity = shared.get(
            "user's mask",
            config.mask,
            lambda: _identify_mask(config, choice, n_frames),
        )
        files.append(identity)
    return EditRun(
        config=config,
        name=f"{technique}_{inversion.folder.parents[1].name}",
        identity=Identity.of(config, inversion, files),
        checkpoint=checkpoint,
        inversion=inversion,
        n_frames=n_frames,
        schedule=schedule,
        processes=Processes(device),
        dtype=dtype,
        shared=shared,
    )


def _identify_control_frames(config: ControlNetConfig, choice: FrameChoice, n_frames: int) -> str:
    """What tells the frames of control_path from others, after they have been checked."""
    check_control_frames(config, choice, n_frames)
    return control_identity(config)


def _identify_mask(config: EditConfig, choice: FrameChoice, n_frames: int) -> str:
    """What tells a user's mask from others, after it has been checked."""
    check_mask(config.mask_path, choice, n_frames)
    return digest_content(config.mask_path)


def _check_prompts(config: EditConfig, inversion: Inversion) -> None:
    """Raise UserError for prompts whose difference is no mask."""
    if not inversion.prompt.strip():
        like = inversion.manifest.config | {"inversion_prompt": "what the video shows"}
        raise UserError(
            "mask: auto compares prompt with inversion_prompt, which is empty; recompute the inversion with: "
            f"{preprocess_command(config, like)} --overwrite"
        )
    if config.prompt.strip() == inversion.prompt.strip():
        raise UserError(
            "mask: auto compares prompt with inversion_prompt, which are the same; say in prompt what the "
            "edited video shows, or use --mask none"
        )
