"""From an inversion on disk to an edited video on disk, with any technique."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from cli import dump
from config import ControlNetConfig, EditConfig
from diffusion import (
    Schedule,
    StableDiffusion,
    check_checkpoint,
    choose_device,
    last,
    load,
    load_scheduler,
)
from editor import Source, Technique, edit, keyframes_of
from inversion import Inversion, find_inversion, noisy
from sheets import contact_sheet, moments
from tokenflow_utils import SourceFeatures
from util import (
    load_frames,
    run_folder,
    save_frames,
    staged,
    write_image,
    write_video_from_folders,
)

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

    def latents(self, name: str) -> torch.Tensor:
        """The inversion's latents of that name, of the frames that are edited: (N, 4, h, w)."""
        return torch.tensor(self.inversion.latents(name)[: self.n_frames])

    @property
    def first_latents(self) -> torch.Tensor:
        """The inverted latents (N, 4, h, w) of the first editing timestep."""
        return self.latents(noisy(self.schedule.timesteps[0]))

    @property
    def source(self) -> Source:
        """What the inversion knows of the source; its features too, if it kept them for this edit."""
        missed = self._why_no_features()
        if missed:
            log.info("the source is denoised along with the edit: %s", missed)
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
        return torch.from_numpy(self.inversion.latents(noisy(t))[frames.numpy()])

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
    log.info("loading %s on %s in %s", config.model_id, device, dtype)
    controlnet = config.controlnet_id if isinstance(config, ControlNetConfig) else None
    sd = load(config.model_id, controlnet, device, dtype, config.cpu_offload)

    run_name = f"{name}_{Path(config.data_path).stem}"
    made = f"{dump(config)}# of the inversion {json.dumps(inversion.manifest.config)}\n"
    with run_folder(Path(config.output_path), run_name, made) as folder:
        job = Edit(config, sd, inversion, schedule, n_frames, folder)
        technique = make_technique(job)
        prompts = (inversion.prompt, config.negative_prompt, config.prompt)
        steps = edit(sd, technique, job.source, prompts, config)
        n_steps = len(technique.schedule.timesteps)
        latents = last(tqdm(steps, "Editing", n_steps, unit="step"))
        frames = folder / "frames"
        with staged(frames) as partial:
            partial.mkdir()
            for start in tqdm(range(0, n_frames, DECODE_BATCH), "Decoding", unit="batch"):
                decoded = sd.decode_latents(latents[start : start + DECODE_BATCH])
                save_frames(partial, start, decoded)
        shown = {"source": inversion.source}
        if inversion.reconstruction.exists():
            shown["reconstruction"] = inversion.reconstruction
        shown[config.prompt] = frames
        comparison = folder / "comparison.mp4"
        write_video_from_folders(comparison, list(shown.values()), n_frames, inversion.fps)
        rows = {label: load_frames(f, moments(n_frames)) for label, f in shown.items()}
        write_image(folder / "contact_sheet.png", contact_sheet(rows))
        round_trip = folder / "vae_reconstruction.mp4"
        write_video_from_folders(round_trip, [inversion.vae], n_frames, inversion.fps)
        write_video_from_folders(folder / "edited.mp4", [frames], n_frames, inversion.fps)
    log.info("to compare: %s and %s", comparison, folder / "contact_sheet.png")
    return folder / "edited.mp4"
