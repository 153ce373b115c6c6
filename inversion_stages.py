"""The stages of `preprocess.py`: read, invert, reconstruct, report; each from disk to disk.

Frames are inverted and reconstructed in segments that know nothing of each other, so processes can
share them, a killed run goes on with those that are missing, and memory does not grow with the video.
"""

import itertools
import logging
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from batches import Batches, balanced
from cli import UserError
from config import PreprocessConfig
from control import canny
from diffusion import (
    Control,
    Schedule,
    StableDiffusion,
    invert,
    load_scheduler,
    sample,
)
from inversion import CLEAN, Inversion, noisy
from metrics import frame_psnr, frame_ssim
from predictor import FramesPredictor
from source_recorder import RecordingPredictor
from source_store import MAX_TOKENS, bytes_needed
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
    folder.mkdir(exist_ok=True)
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


def segments(config: PreprocessConfig, n_frames: int) -> list[torch.Tensor]:
    """The frames of the video in runs of neighbours, the parts of its inversion."""
    return list(balanced(torch.arange(n_frames), config.frames_at_once))


def keeps_source(
    sd: StableDiffusion,
    folder: Path,
    config: PreprocessConfig,
    latent_shape: tuple[int, ...],
    editing: Schedule,
) -> bool:
    """Whether the source's features are kept in `folder`; says what they take."""
    if not config.keep_source or config.inversion != "fixed_point":
        return False  # sampling does not come back by the way that a naive inversion went
    needed = bytes_needed(sd.unet, latent_shape, len(editing.timesteps))
    if latent_shape[-2] * latent_shape[-1] > MAX_TOKENS:
        log.warning(
            "no source features are kept of frames this large: edits will denoise the source too"
        )
        return False
    if needed > shutil.disk_usage(folder).free:
        log.warning(
            "no source features are kept, which would take %.0f MB of disk, more than is free: "
            "edits will denoise the source too",
            needed / 1e6,
        )
        return False
    log.info("source features, which make edits faster, take %.0f MB of disk", needed / 1e6)
    return True


def noise_predictor(
    sd: StableDiffusion, inversion: Inversion, config: PreprocessConfig
) -> FramesPredictor:
    """Predicts the noise of the video's frames; one serves a whole run, which keeps its batch size."""
    control = partial(_control, sd, inversion, config) if sd.controlnet else None
    batches = Batches(config.frames_at_once, adapts=config.batch_size is None)
    return FramesPredictor(sd, config.inversion_prompt, batches, control)


def saved_latents(inversion: Inversion, t: int, frames: torch.Tensor) -> torch.Tensor:
    """The inverted latents (n, 4, h, w) of the frames (n,) at an editing timestep."""
    return inversion.latents(noisy(t))[frames]


def invert_segment(
    sd: StableDiffusion,
    predictor: FramesPredictor,
    inversion: Inversion,
    config: PreprocessConfig,
    schedule: Schedule,
    names: dict[int, str],
    frames: torch.Tensor,
) -> Iterator[None]:
    """Encode and invert the frames (n,); yields after each step.

    Keeps the clean latents and those of the timesteps in `names`, under those names, and the frames
    after the VAE's round trip.
    """
    clean = sd.encode_frames(load_frames(inversion.source, frames.tolist()))
    inversion.latents(CLEAN)[frames] = clean
    save_frames(inversion.vae, frames[0].item(), sd.decode_latents(clean))

    def predict_noise(latents: torch.Tensor, t: int, which: torch.Tensor) -> torch.Tensor:
        return predictor(latents, t, frames[which])

    fixed_point = config.inversion == "fixed_point"
    for t, noisier in invert(clean, schedule, predict_noise, fixed_point):
        if t in names:
            inversion.latents(names[t])[frames] = noisier
        yield


def reconstruct_segment(
    sd: StableDiffusion,
    predict_noise: FramesPredictor | RecordingPredictor,
    inversion: Inversion,
    config: PreprocessConfig,
    schedule: Schedule,
    frames: torch.Tensor,
) -> Iterator[None]:
    """Sample the frames (n,) back on the schedule of an edit; yields after each step.

    Writes what comes out. Where no reconstruction is wanted the noise is only predicted, for what a
    RecordingPredictor keeps.
    """
    if config.no_reconstruction:
        for t in schedule.timesteps:
            predict_noise(saved_latents(inversion, t, frames), t, frames)
            yield
        return
    latents = saved_latents(inversion, schedule.timesteps[0], frames)
    for step in sample(latents, schedule, lambda x, t: predict_noise(x, t, frames)):
        latents = step
        yield
    save_frames(inversion.reconstruction, frames[0].item(), sd.decode_latents(latents))


def inverted(inversion: Inversion, names: Iterable[str], frames: torch.Tensor) -> Iterator[bytes]:
    """What `invert_segment` left of the frames (n,) under those names."""
    for name in (CLEAN, *names):
        yield inversion.latents(name).bytes_of(frames)
    yield from pictures(inversion.vae, frames)


def reconstructed(
    inversion: Inversion, config: PreprocessConfig, editing: Schedule, frames: torch.Tensor
) -> Iterator[bytes]:
    """What `reconstruct_segment` left of the frames (n,)."""
    if not config.no_reconstruction:
        yield from pictures(inversion.reconstruction, frames)
    if inversion.source_store.folder.exists():
        yield from inversion.source_store.written(editing.timesteps, frames)


def pictures(folder: Path, frames: torch.Tensor) -> Iterator[bytes]:
    """The image files of the frames (n,)."""
    return (frame_path(folder, index).read_bytes() for index in frames.tolist())


def report(
    sd: StableDiffusion, inversion: Inversion, config: PreprocessConfig, n_frames: int
) -> str:
    """What a person should know of the reconstruction: how good it is and, if poor, why."""

    def compare(a: Path, b: Path) -> tuple[float, float]:
        scores = []
        for frames in segments(config, n_frames):
            pair = [load_frames(folder, frames.tolist()) for folder in (a, b)]
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
    saved = inversion.latents(CLEAN)
    frames = torch.arange(min(len(saved), config.frames_at_once))
    clean = saved[frames].to(sd.device)
    generator = torch.Generator().manual_seed(config.seed)
    noise = torch.randn(clean.shape, generator=generator).to(sd.device)
    t = sd.scheduler.config.num_train_timesteps // 2  # where the prompt matters most
    noisy = sd.scheduler.add_noise(clean, noise, torch.tensor(t))
    control = _control(sd, inversion, config, frames) if sd.controlnet else None

    def error(prompt: str) -> float:
        text = sd.encode_text(prompt).expand(len(clean), -1, -1)
        return (sd.predict_noise(noisy, t, text, control) - noise).square().mean().item()

    return error(config.inversion_prompt) > error("")


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
