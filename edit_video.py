"""From an inversion on disk to an edited video on disk, with any technique, by all processes of a run."""

import json
import logging
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from cli import UserError, dump
from config import ControlNetConfig, EditConfig
from denoiser import Source, keyframes_of
from diffusion import (
    Schedule,
    StableDiffusion,
    check_checkpoint,
    choose_device,
    load,
    load_scheduler,
)
from digests import DamagedError, check, seal
from editor import edit
from inversion import CLEAN, Inversion, find_inversion, noisy, preprocess_command
from processes import Processes
from rows import Rows
from runs import locked, partial_path, remove, run_folder, staged
from sheets import contact_sheet, moments
from techniques import Technique
from tokenflow_utils import SourceFeatures
from trajectory import Trajectory
from util import load_frames, save_frames, write_image, write_video_from_folders

log = logging.getLogger("tokenflow")

DECODE_BATCH = 8  # frames decoded before they are written


@dataclass(frozen=True)
class Edit:
    """What a technique may draw on."""

    config: EditConfig
    sd: StableDiffusion
    inversion: Inversion
    schedule: Schedule
    n_frames: int
    folder: Path
    processes: Processes

    def latents(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The inversion's latents of that name: (n, 4, h, w) for frame indices (n,)."""
        return self.inversion.latents(name).__getitem__

    @property
    def first_latents(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The inverted latents of the first editing timestep: (n, 4, h, w) for frame indices (n,)."""
        return self.latents(noisy(self.schedule.timesteps[0]))

    @property
    def source(self) -> Source:
        """What the inversion knows of the source; its features too, if it kept them for this edit."""
        missed = self._why_no_features()
        if missed:
            log.info("the source is denoised along with the edit: %s", missed)
            return Source(self._source_latents)
        try:
            self.inversion.check_source_store()
        except DamagedError as damage:
            command = preprocess_command(self.config, self.inversion.manifest.config)
            log.warning(
                "warning: %s; the source is denoised along with the edit instead; "
                "to keep its features again: %s --overwrite",
                damage,
                command,
            )
            return Source(self._source_latents)
        return Source(self._source_latents, self._source_features)

    def _why_no_features(self) -> str:
        """Why the source's features cannot be taken from the inversion; empty if they can."""
        kept = self.inversion.manifest.keyframes
        wanted = keyframes_of(self.config, self.sd.scheduler, self.n_frames)
        if not self.config.reuse_source:
            return "reuse_source is false"
        if self.config.propagation != "flanking":
            return f"nothing is kept for propagation {self.config.propagation}"
        if kept is None:
            return f"{self.inversion.folder} holds no source features (keep_source)"
        for name in ("n_frames", "interval", "seed", "timesteps"):
            if getattr(kept, name) != getattr(wanted, name):
                return f"the inversion kept its features for other keyframes ({name})"
        return ""

    def _source_latents(self, t: int, frames: torch.Tensor) -> torch.Tensor:
        return self.inversion.latents(noisy(t))[frames]

    def _source_features(self, t: int, frames: torch.Tensor) -> SourceFeatures:
        return self.inversion.source_store.read(t, frames, self.sd.device)


def run_edit(config: EditConfig, name: str, make_technique: Callable[[Edit], Technique]) -> Path:
    """Edit a video with the technique `name`; returns the path of the edited video.

    Beside it lie its frames, the VAE's round trip, comparisons and the configuration.
    """
    check_checkpoint(config.model_id)
    schedule = Schedule.of(load_scheduler(config.model_id), config.n_timesteps)
    inversion, n_frames = find_inversion(config, schedule.timesteps)
    device, dtype = choose_device(config.device, config.dtype)
    processes = Processes(device)

    run_name = f"{name}_{Path(config.data_path).stem}"
    chosen = replace(config, resume=True, overwrite=False)  # of one edit, whatever it began with
    made = f"{dump(chosen)}# of the inversion {json.dumps(inversion.manifest.identity)}\n"
    with ExitStack() as held:
        with processes.main_first():
            folder = held.enter_context(run_folder(Path(config.output_path), run_name, made))
        video, steps = folder / "edited.mp4", folder / ".steps"
        if video.exists() and not steps.exists() and not config.overwrite:
            _check_made(folder)
            log.info("this edit was there already; --overwrite makes it again")
            return video
        if processes.is_main:
            held.enter_context(locked(folder))
            if config.overwrite or not config.resume:
                remove(steps)
            steps.mkdir(exist_ok=True)
        processes.wait()
        log.info("loading %s on %s in %s", config.model_id, device, dtype)
        controlnet = config.controlnet_id if isinstance(config, ControlNetConfig) else None
        sd = load(config.model_id, controlnet, device, dtype, config.cpu_offload)
        job = Edit(config, sd, inversion, schedule, n_frames, folder, processes)
        edited = _edit(job, make_technique(job), steps)
        _decode(job, edited)
        if processes.is_main:
            _show(job, video)
            seal(folder)
            remove(steps)
    return video


def _check_made(folder: Path) -> None:
    try:
        check(folder)
    except DamagedError as damage:
        raise UserError(f"{damage}; --overwrite makes the edit again") from damage


def _edit(job: Edit, technique: Technique, steps: Path) -> Rows:
    """The edited latents, from the last step that lies in the folder `steps` on."""
    prompts = (job.inversion.prompt, job.config.negative_prompt, job.config.prompt)
    shape = (job.n_frames, *job.inversion.latents(CLEAN).shape[1:])
    trajectory = Trajectory(steps, shape, job.processes)
    n_steps, hidden = len(technique.schedule.timesteps), not job.processes.is_main
    steps = edit(job.sd, technique, job.source, prompts, job.config, trajectory)
    if done := next(steps):
        log.info("going on after step %d", done)
    for _ in tqdm(steps, "Editing", n_steps, initial=done, unit="step", disable=hidden):
        pass
    return trajectory.latents(n_steps)


def _decode(job: Edit, edited: Rows) -> None:
    """Write the edited frames."""
    processes, frames = job.processes, job.folder / "frames"
    with staged(frames) if processes.is_main else nullcontext(partial_path(frames)) as partial:
        if processes.is_main:
            partial.mkdir()
        processes.wait()
        batches = processes.share(torch.arange(job.n_frames).split(DECODE_BATCH))
        for batch in tqdm(batches, "Decoding", unit="batch", disable=not processes.is_main):
            save_frames(partial, batch[0].item(), job.sd.decode_latents(edited[batch]))
        processes.wait()


def _show(job: Edit, video: Path) -> None:
    """Write the videos, and at last the edited one."""
    inversion, folder, n_frames = job.inversion, job.folder, job.n_frames
    fps = inversion.manifest.frame_rate
    shown = {"source": inversion.source}
    if inversion.reconstruction.exists():
        shown["reconstruction"] = inversion.reconstruction
    shown[job.config.prompt] = folder / "frames"
    comparison, sheet = folder / "comparison.mp4", folder / "contact_sheet.png"
    write_video_from_folders(comparison, list(shown.values()), n_frames, fps)
    rows = {label: load_frames(f, moments(n_frames)) for label, f in shown.items()}
    write_image(sheet, contact_sheet(rows))
    write_video_from_folders(folder / "vae_reconstruction.mp4", [inversion.vae], n_frames, fps)
    write_video_from_folders(video, [folder / "frames"], n_frames, fps)
    log.info("to compare: %s and %s", comparison, sheet)
