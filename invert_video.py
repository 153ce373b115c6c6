"""From a video to its inversion on disk, by all processes of a run."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import inversion_stages as stages
from cli import UserError
from config import PreprocessConfig
from diffusion import Schedule, StableDiffusion, check_checkpoint, choose_device, load
from digests import DamagedError, check, seal
from inversion import CLEAN, INVERTED, Inversion, Manifest, checkpoint_identity, noisy
from processes import Processes
from runs import Progress, locked, partial_path, remove, resumable
from source_recorder import RecordingPredictor, install_recorder
from tokenflow_utils import Keyframes
from util import fingerprint, frame_rate, write_video_from_folders

log = logging.getLogger("tokenflow")

VIDEO = "inverted.mp4"


def run_inversion(config: PreprocessConfig) -> Path:
    """Make the inversion of a video, or what is missing of it; returns what a person should look at.

    Everything that can be checked is checked first.
    """
    check_checkpoint(config.model_id, config.H, config.W)
    schedule, editing = stages.schedules(config)
    device, dtype = choose_device(config.device, config.dtype)
    manifest = _manifest(config, schedule, editing)
    final = Inversion.of(config, manifest.n_frames)
    if _is_made(final, manifest, config.overwrite):
        log.info("this inversion was there already; --overwrite makes it again")
    else:
        processes = Processes(device)
        with ExitStack() as held:
            if processes.is_main:
                held.enter_context(locked(final.folder))
                identity = json.dumps(manifest.identity, sort_keys=True)
                resume = config.resume and not config.overwrite
                held.enter_context(resumable(final.folder, identity, resume))
            processes.wait()
            partial = Inversion(partial_path(final.folder))
            run = _Run(config, manifest, partial, schedule, editing, processes)
            run.make(device, dtype)
    return final.folder if config.no_reconstruction else final.folder / VIDEO


def _is_made(final: Inversion, manifest: Manifest, overwrite: bool) -> bool:
    """Whether there is this very inversion, undamaged, and it is to stay."""
    if not final.exists:
        return False
    try:
        found = final.manifest
        if found.source != manifest.source:
            raise UserError(
                f"{final.folder} holds the inversion of another video of the same name; "
                "use another --save_dir, or delete that folder"
            )
        if overwrite or found.identity != manifest.identity:
            return False
        check(final.folder)
    except DamagedError as damage:
        if overwrite:
            return False
        raise UserError(f"{damage}; --overwrite makes the inversion again") from damage
    return True


@dataclass(frozen=True)
class _Run:
    """One process's part in making an inversion, from where an earlier run was killed."""

    config: PreprocessConfig
    manifest: Manifest
    inversion: Inversion
    schedule: Schedule
    editing: Schedule
    processes: Processes

    def make(self, device: torch.device, dtype: torch.dtype) -> None:
        """All stages; every process takes its segments of the video, and the main one does the rest."""
        config, inversion = self.config, self.inversion
        self._read_source()
        log.info("loading %s on %s in %s", config.model_id, device, dtype)
        sd = load(config.model_id, config.controlnet_id, device, dtype, config.cpu_offload)
        if self.processes.is_main:
            self._make_room(sd)
        self.processes.wait()
        keyframes = self._keyframes if inversion.source_store.folder.exists() else None

        predictor = stages.noise_predictor(sd, inversion, config)

        def invert(frames: torch.Tensor) -> Iterator[None]:
            return stages.invert_segment(
                sd, predictor, inversion, config, self.schedule, self._names, frames
            )

        written = partial(stages.inverted, inversion, self._names.values())
        self._each("Inverting", len(self.schedule.timesteps), invert, written)
        with install_recorder(sd.unet) if keyframes else nullcontext() as recorder:
            noting = predictor
            if keyframes:
                saved, store = partial(stages.saved_latents, inversion), inversion.source_store
                noting = RecordingPredictor(predictor, recorder, keyframes, saved, store)

            def reconstruct(frames: torch.Tensor) -> Iterator[None]:
                return stages.reconstruct_segment(
                    sd, noting, inversion, config, self.editing, frames
                )

            if keyframes or not config.no_reconstruction:
                written = partial(stages.reconstructed, inversion, config, self.editing)
                self._each("Reconstructing", len(self.editing.timesteps), reconstruct, written)
        if self.processes.is_main:
            self._finish(sd, keyframes)

    def _read_source(self) -> None:
        """Write the source's frames; the main process does."""
        folder, n_frames = self.inversion.source, self.manifest.n_frames
        progress, frames = Progress(self.inversion.folder), torch.arange(n_frames)
        if self.processes.is_main and not progress.is_done(
            "read", written=stages.pictures(folder, frames)
        ):
            stages.read_source(self.config, folder, n_frames)
            progress.done("read", written=stages.pictures(folder, frames))

    def _each(
        self,
        stage: str,
        n_steps: int,
        work: Callable[[torch.Tensor], Iterator[None]],
        written: Callable[[torch.Tensor], Iterator[bytes]],
    ) -> None:
        """Do the `work` of this process's segments, and wait for the other processes.

        written: what the work of a segment leaves.
        """
        progress = Progress(self.inversion.folder)
        parts = self.processes.share(stages.segments(self.config, self.manifest.n_frames))
        parts = [
            p for p in parts if not progress.is_done(stage, p[0].item(), len(p), written=written(p))
        ]
        hidden = not self.processes.is_main
        with tqdm(total=len(parts) * n_steps, desc=stage, unit="step", disable=hidden) as bar:
            for frames in parts:
                for _ in work(frames):
                    bar.update()
                progress.done(stage, frames[0].item(), len(frames), written=written(frames))
        self.processes.wait()

    def _make_room(self, sd: StableDiffusion) -> None:
        config, inversion = self.config, self.inversion
        shape = sd.latent_shape(self.manifest.n_frames, config.H, config.W)
        for name in (CLEAN, *self._names.values()):
            inversion.create_latents(name, shape)
        for folder in (inversion.vae, inversion.reconstruction):
            folder.mkdir(exist_ok=True)
        if stages.keeps_source(sd, inversion.folder, config, shape, self.editing):
            inversion.source_store.create(sd.unet, shape, self.editing.timesteps)

    def _finish(self, sd: StableDiffusion, keyframes: Keyframes | None) -> None:
        config, inversion, n_frames = self.config, self.inversion, self.manifest.n_frames
        if config.no_reconstruction:
            remove(inversion.reconstruction)
        else:
            fps = self.manifest.frame_rate
            write_video_from_folders(
                inversion.folder / VIDEO, [inversion.reconstruction], n_frames, fps
            )
        inversion.write_manifest(replace(self.manifest, keyframes=keyframes))
        log.info(stages.report(sd, inversion, config, n_frames))
        seal(inversion.folder)
        Progress(inversion.folder).remove()

    @property
    def _keyframes(self) -> Keyframes:
        config, timesteps = self.config, self.editing.timesteps
        return Keyframes(self.manifest.n_frames, config.keyframe_interval, timesteps, config.seed)

    @property
    def _names(self) -> dict[int, str]:
        """Names of the latents that are saved, by timestep."""
        names = {t: noisy(t) for t in self.editing.timesteps}
        return {self.manifest.inverted_timestep: self.manifest.inverted} | names


def _manifest(config: PreprocessConfig, schedule: Schedule, editing: Schedule) -> Manifest:
    """What will have made the inversion; its keyframes are left open."""
    noisiest = schedule.timesteps[0]
    fps = frame_rate(Path(config.data_path)) / config.stride
    return Manifest(
        config=asdict(config) | {"conditioned": config.controlnet_id is not None},
        source=fingerprint(Path(config.data_path)),
        checkpoint=checkpoint_identity(config.model_id),
        fps=str(fps),
        n_frames=stages.count_frames(config),
        timesteps=editing.timesteps,
        inverted=noisy(noisiest) if noisiest in editing.timesteps else INVERTED,
        inverted_timestep=noisiest,
    )
