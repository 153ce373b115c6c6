"""The stages of `preprocess.py`: read, encode, invert, reconstruct, report; each from disk to disk."""

import itertools
import logging
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cli import UserError
from config import PreprocessConfig
from control import canny
from diffusion import (
    Control,
    Schedule,
    StableDiffusion,
    invert,
    last,
    load_scheduler,
    sample,
)
from inversion import CLEAN, Inversion, noisy
from metrics import frame_psnr, frame_ssim
from predictor import FramesPredictor
from source_recorder import SourceRecorder, install_recorder
from source_store import MAX_TOKENS, bytes_needed
from tokenflow_utils import Keyframes
from util import decode_frames, fit_frame, frame_path, load_frames, save_frames, write_image

log = logging.getLogger("tokenflow")

# Below this PSNR (dB) textures and small objects of the source are lost, in an edit too.
POOR_PSNR = 20.0


def schedules(config: PreprocessConfig) -> tuple[Schedule, Schedule]:
    """The schedules of the inversion and of the editing steps whose latents are saved.

    Raises UserError when the inversion would not visit every editing timestep.
    """
    scheduler = load_scheduler(config.model_id)
    editing = Schedule.of(scheduler, config.save_steps)
    inversion = Schedule.of(scheduler, config.steps)
    if not set(editing.timesteps) <= set(inversion.timesteps):
        n_train = scheduler.config.num_train_timesteps
        fitting = [
            n
            for n in range(config.save_steps, n_train)
            if set(editing.timesteps) <= set(Schedule.of(scheduler, n).timesteps)
        ]
        raise UserError(
            f"steps: {config.steps} inversion steps do not visit all timesteps of "
            f"{config.save_steps} editing steps; these do: {', '.join(map(str, fitting))}"
        )
    return inversion, editing


def count_frames(config: PreprocessConfig) -> int:
    """The number of frames to use: `n_frames`, or for 0 all that there are."""
    return config.n_frames or sum(1 for _ in _used_frames(config))


def read_source(config: PreprocessConfig, folder: Path, n_frames: int) -> None:
    """Write the `n_frames` used frames, fitted to the wanted size, as PNG into `folder`."""
    folder.mkdir(parents=True)
    count = 0
    for frame in tqdm(_used_frames(config), "Reading", n_frames, unit="frame"):
        write_image(frame_path(folder, count), fit_frame(frame, config.H, config.W, config.resize))
        count += 1
    used = f"{config.data_path} from start_frame {config.start_frame} with stride {config.stride}"
    if count == 0:
        raise UserError(f"start_frame: there are no frames in {used}")
    if count < n_frames:
        raise UserError(
            f"n_frames: {n_frames} asked, but there are only {count} frames in {used}; "
            f"use --n_frames {count}, or 0 for all"
        )


def encode(sd: StableDiffusion, inversion: Inversion, n_frames: int, batch_size: int) -> None:
    """Encode the source frames to the clean latents, and decode those: the VAE's round trip."""
    inversion.vae.mkdir()
    clean = []
    for start, stop in tqdm(_batches(n_frames, batch_size), "Encoding", unit="batch"):
        clean.append(sd.encode_frames(load_frames(inversion.source, range(start, stop))))
        save_frames(inversion.vae, start, sd.decode_latents(clean[-1]))
    inversion.save_latents(CLEAN, torch.cat(clean).numpy())


def kept_keyframes(
    sd: StableDiffusion, inversion: Inversion, config: PreprocessConfig, editing: Schedule
) -> Keyframes | None:
    """The keyframes for which the source's features are kept; None if they are not. Says what it takes."""
    if not config.keep_source or config.inversion != "fixed_point":
        return None  # naive inversion looks at every frame before it is at the timestep
    shape = inversion.latents(CLEAN).shape
    needed = bytes_needed(sd.unet, shape, len(editing.timesteps))
    free = shutil.disk_usage(inversion.folder).free
    log.info("source features, which make edits faster, take %.0f MB of disk", needed / 1e6)
    if shape[-2] * shape[-1] > MAX_TOKENS:
        log.warning(
            "which frames of this size are too large for: edits will denoise the source too"
        )
        return None
    if needed > free:
        log.warning("which is more than there is: edits will denoise the source too")
        return None
    return Keyframes(shape[0], config.keyframe_interval, editing.timesteps, config.seed)


def invert_video(
    sd: StableDiffusion,
    inversion: Inversion,
    config: PreprocessConfig,
    schedule: Schedule,
    names: dict[int, str],
    keyframes: Keyframes | None,
) -> None:
    """Invert the clean latents; save those of the timesteps in `names`, under those names.

    With `keyframes` the source's features are kept on the way, for edits with those keyframes.
    """
    clean = torch.tensor(inversion.latents(CLEAN))
    fixed_point = config.inversion == "fixed_point"
    with (
        install_recorder(sd.unet, keyframes, inversion.source_store)
        if keyframes
        else nullcontext() as recorder
    ):
        predict_noise = _predictor(sd, inversion, config, recorder)
        steps = invert(clean, schedule, predict_noise, fixed_point)
        for t, noisier in tqdm(steps, "Inverting", len(schedule.timesteps), unit="step"):
            if t in names:
                inversion.save_latents(names[t], noisier.numpy())


def reconstruct(
    sd: StableDiffusion,
    inversion: Inversion,
    config: PreprocessConfig,
    schedule: Schedule,
) -> None:
    """Sample the video back on the schedule of an edit and write its frames."""
    inversion.reconstruction.mkdir()
    latents = torch.tensor(inversion.latents(noisy(schedule.timesteps[0])))
    steps = sample(latents, schedule, _predictor(sd, inversion, config))
    latents = last(tqdm(steps, "Reconstructing", len(schedule.timesteps), unit="step"))
    for start, stop in _batches(len(latents), config.batch_size):
        save_frames(inversion.reconstruction, start, sd.decode_latents(latents[start:stop]))


def report(
    sd: StableDiffusion, inversion: Inversion, config: PreprocessConfig, n_frames: int
) -> str:
    """What a person should know of the reconstruction: how good it is and, if poor, why."""

    def compare(a: Path, b: Path) -> tuple[float, float]:
        scores = []
        for start, stop in _batches(n_frames, config.batch_size):
            pair = [load_frames(folder, range(start, stop)) for folder in (a, b)]
            scores += zip(frame_psnr(*pair), frame_ssim(*pair), strict=True)
        return tuple(np.mean(scores, axis=0))

    vae = compare(inversion.vae, inversion.source)
    if not inversion.reconstruction.exists():
        return f"the VAE's round trip: PSNR {vae[0]:.2f} dB, SSIM {vae[1]:.3f} against the source"
    whole = compare(inversion.reconstruction, inversion.source)
    inverted = compare(inversion.reconstruction, inversion.vae)
    text = (
        f"reconstruction: PSNR {whole[0]:.2f} dB, SSIM {whole[1]:.3f} against the source; "
        f"PSNR {inverted[0]:.2f} dB, SSIM {inverted[1]:.3f} against the VAE's round trip, "
        f"which itself has PSNR {vae[0]:.2f} dB, SSIM {vae[1]:.3f}"
    )
    if whole[0] >= POOR_PSNR:
        return text
    text += (
        f"\nwarning: below {POOR_PSNR:.0f} dB a video is too poorly reconstructed to edit well; "
    )
    if vae[0] < POOR_PSNR:
        return text + "the VAE loses it: use larger frames (--H, --W) or another checkpoint"
    if _prompt_misleads(sd, inversion, config):
        return text + "the inversion prompt does not describe it: the model does better with none"
    return text + "the inversion loses it: use more --steps, or describe it in --inversion_prompt"


def _prompt_misleads(sd: StableDiffusion, inversion: Inversion, config: PreprocessConfig) -> bool:
    """Whether the model denoises the video worse with the inversion prompt than with none."""
    clean = torch.tensor(inversion.latents(CLEAN)[: config.batch_size], device=sd.device)
    generator = torch.Generator().manual_seed(config.seed)
    noise = torch.randn(clean.shape, generator=generator).to(sd.device)
    t = sd.scheduler.config.num_train_timesteps // 2  # where the prompt matters most
    noisy = sd.scheduler.add_noise(clean, noise, torch.tensor(t))
    frames = torch.arange(len(clean))
    control = _control(sd, inversion, config, frames) if sd.controlnet else None

    def error(prompt: str) -> float:
        text = sd.encode_text(prompt).expand(len(clean), -1, -1)
        return (sd.predict_noise(noisy, t, text, control) - noise).square().mean().item()

    return error(config.inversion_prompt) > error("")


def _predictor(
    sd: StableDiffusion,
    inversion: Inversion,
    config: PreprocessConfig,
    recorder: SourceRecorder | None = None,
) -> FramesPredictor:
    control = partial(_control, sd, inversion, config) if sd.controlnet else None
    return FramesPredictor(sd, config.inversion_prompt, config.batch_size, control, recorder)


def _control(
    sd: StableDiffusion, inversion: Inversion, config: PreprocessConfig, frames: torch.Tensor
) -> Control:
    shown = load_frames(inversion.source, frames.tolist())
    edges = canny(shown, config.canny_low, config.canny_high)
    return Control(sd.to_images(edges), torch.full((len(frames),), config.control_scale))


def _used_frames(config: PreprocessConfig) -> Iterator[np.ndarray]:
    stop = config.start_frame + config.n_frames * config.stride if config.n_frames else None
    frames = decode_frames(Path(config.data_path))
    return itertools.islice(frames, config.start_frame, stop, config.stride)


def _batches(n_frames: int, batch_size: int) -> list[tuple[int, int]]:
    starts = range(0, n_frames, batch_size)
    return [(start, min(start + batch_size, n_frames)) for start in starts]
