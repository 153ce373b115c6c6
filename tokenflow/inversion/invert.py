"""From a video to its inversion on disk, stage by stage, by all processes of a run.

Frames are inverted and reconstructed in independent segments. Processes can divide the segments, a killed
run is resumed with the missing segments, and memory does not grow with the length of the video.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from tqdm import tqdm

from tokenflow.config import PreprocessConfig
from tokenflow.control.conditions import Conditions, control_identity, find_conditions
from tokenflow.control.depth import DEPTH_VIDEO, find_depth, load_depth_model, write_depth_video
from tokenflow.control.detectors import check_detectors
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.ddim import NoisePredictor, Schedule, invert, sample
from tokenflow.diffusion.device import choose_device
from tokenflow.diffusion.layouts import as_json
from tokenflow.diffusion.stable_diffusion import Control, StableDiffusion
from tokenflow.errors import DamagedError, UserError
from tokenflow.evaluation.report import PAGE
from tokenflow.inversion.files import CLEAN, INVERTED, Inversion, Manifest, noisy
from tokenflow.inversion.frames import FrameChoice, check_control_frames
from tokenflow.inversion.predictor import VideoNoisePredictor
from tokenflow.inversion.report import compare, report_reconstruction
from tokenflow.inversion.source_features import RecordingPredictor, can_keep_source_features
from tokenflow.runtime.ahead import WriteBehind
from tokenflow.runtime.batching import Batches, Limits, balanced, frames_per_pass
from tokenflow.runtime.digests import check, seal
from tokenflow.runtime.distributed import Processes
from tokenflow.runtime.run_folder import Progress, lock, remove, resume_folder, unfinished_path
from tokenflow_utils import KeyframeSchedule
from util import (
    fingerprint,
    frame_path,
    frame_rate,
    load_frames,
    read_frames,
    save_frames,
    write_video_from_folders,
)

log = logging.getLogger("tokenflow")

VIDEO = "inverted.mp4"


@contextmanager
def open_inversion(config: PreprocessConfig) -> Iterator["InversionRun"]:
    """The run that inverts a video; while the block lasts, no other run can work in its folder.

    Everything that can be checked is checked first. The inversion appears on disk when the block ends.
    """
    checkpoint = Checkpoint.find(config.model_id, config.sd_version)
    if not (config.H and config.W):
        side = checkpoint.trained_side
        config = replace(config, H=config.H or side, W=config.W or side)
    checkpoint.check_size(config.H, config.W)
    schedule, editing = schedules(config, checkpoint.scheduler)
    device, dtype = choose_device(config.device, config.dtype)
    manifest = new_manifest(config, checkpoint, schedule, editing)
    if config.controlnet_ids:
        check_detectors(config)
        check_control_frames(config, FrameChoice.of(asdict(config)), manifest.n_frames)
    final = Inversion.of(config, manifest.n_frames)
    processes = Processes(device)
    inversion = Inversion(unfinished_path(final.folder))
    run = InversionRun(
        config, checkpoint, manifest, schedule, editing, final, inversion, processes, dtype
    )
    if is_there(final, manifest, config.overwrite):
        log.info("this inversion exists already; --overwrite recomputes it")
        yield replace(run, is_finished=True)
        return
    with ExitStack() as held:
        if processes.is_main:
            held.enter_context(lock(final.folder))
            identity = json.dumps(manifest.identity, sort_keys=True)
            resume = config.resume and not config.overwrite
            held.enter_context(resume_folder(final.folder, identity, resume))
        processes.wait()
        yield run


@dataclass(frozen=True)
class InversionRun:
    """One process's part in inverting a video, resumed if an earlier run was killed."""

    config: PreprocessConfig
    checkpoint: Checkpoint
    manifest: Manifest
    schedule: Schedule  # the inversion steps
    editing: Schedule  # the editing steps, whose latents are saved
    final: Inversion  # where the result will be
    inversion: Inversion  # where it is written first
    processes: Processes
    dtype: torch.dtype
    is_finished: bool = False

    @property
    def result(self) -> Path:
        """What a person should look at: the reconstruction or, without one, the folder."""
        return self.final.folder if self.config.no_reconstruction else self.final.folder / VIDEO

    def read_frames(self) -> None:
        """Write the frames to invert as images, in the main process alone."""
        folder, n_frames = self.inversion.source_frames, self.manifest.n_frames
        progress, frames = Progress(self.inversion.folder), torch.arange(n_frames)
        if self.processes.is_main and not progress.is_done(
            "read", written=pictures(folder, frames)
        ):
            self._choice.write(Path(self.config.data_path), folder, n_frames)
            progress.record("read", written=pictures(folder, frames))

    def invert(self) -> None:
        """Encode the frames, invert them, and save their latents at every editing timestep."""
        config, inversion = self.config, self.inversion
        if self.processes.is_main:
            self._create_files()
            self._see()
        self.processes.wait()
        predictor = self._predictor
        stage = "Inverting", len(self.schedule.timesteps), self._inverted
        for frames, bar in self._missing_segments(*stage):
            clean = self.sd.encode_frames(load_frames(inversion.source_frames, frames.tolist()))
            inversion.latents(CLEAN)[frames] = clean
            save_frames(inversion.vae, frames[0].item(), self.sd.decode_latents(clean))
            fixed_point = config.inversion == "fixed_point"
            for t, latents in invert(clean, frames, self.schedule, predictor, fixed_point):
                if t in self._names:
                    inversion.latents(self._names[t])[frames] = latents
                bar.update()

    def reconstruct(self) -> None:
        """Sample the frames back from their noise, and record the source features on the way.

        If only the features are wanted, the saved latents pass the UNet instead of sampled ones.
        """
        if self.config.no_reconstruction and not self._keeps_source_features:
            return
        stage = "Reconstructing", len(self.editing.timesteps), self._reconstructed
        saved = self.inversion.noisy_latents
        with WriteBehind() as writer, self._recording_predictor(writer) as predict_noise:
            for frames, bar in self._missing_segments(*stage):
                if self.config.no_reconstruction:
                    for t in self.editing.timesteps:
                        predict_noise(saved(t, frames), t, frames)
                        bar.update()
                else:
                    latents = saved(self.editing.timesteps[0], frames)
                    for sampled in sample(latents, frames, self.editing, predict_noise):
                        latents = sampled
                        bar.update()
                    folder = self.inversion.reconstruction
                    save_frames(folder, frames[0].item(), self.sd.decode_latents(latents))
                writer.flush()  # before the segment counts as done

    def finish(self) -> None:
        """Write the video and the manifest, and say how good the reconstruction is."""
        scores = compare(self.inversion, self.config, self.processes)
        if not self.processes.is_main:
            return
        inversion, n_frames = self.inversion, self.manifest.n_frames
        if self.config.no_reconstruction:
            remove(inversion.reconstruction)
        else:
            folders, fps = [inversion.reconstruction], self.manifest.frame_rate
            write_video_from_folders(inversion.folder / VIDEO, folders, n_frames, fps)
        kept = self._keyframe_schedule if self._keeps_source_features else None
        inversion.write_manifest(replace(self.manifest, keyframes=kept))
        about = inversion, self.manifest, self.config, scores
        log.info(report_reconstruction(self.sd, *about, self.noise_predictor))
        if not self.config.no_reconstruction:
            log.info("to look at: %s", self.final.folder / PAGE)
        seal(inversion.folder)
        remove(Progress(inversion.folder).folder)

    @cached_property
    def sd(self) -> StableDiffusion:
        """The checkpoint, loaded when it is first needed."""
        config, device = self.config, self.processes.device
        log.info("loading %s on %s in %s", config.model_id, device, self.dtype)
        sd = self.checkpoint.load(
            device,
            self.dtype,
            controlnets=config.controlnet_ids,
            cpu_offload=config.cpu_offload,
            compiled=config.compile,
            clip_skip=config.clip_skip,
        )
        return replace(sd, limits=Limits(Progress(self.inversion.folder).folder))

    def noise_predictor(self, prompt: str) -> VideoNoisePredictor:
        """A predictor of the noise of the video's frames under a prompt."""
        adapts = self.config.batch_size is None
        batches = Batches(self._frames_at_once, adapts, self.sd.limits, "inversion")
        control = self._control if self.sd.controlnet else None
        depth = self.inversion.depth.__getitem__ if self.sd.takes_depth else None
        return VideoNoisePredictor(self.sd, prompt, batches, control, depth)

    @property
    def _frames_at_once(self) -> int:
        chosen, default = self.config.batch_size, self.config.frames_at_once
        return frames_per_pass(chosen, default, 1, self.processes.device)

    @cached_property
    def _predictor(self) -> VideoNoisePredictor:
        """One for the whole run, so that a batch size that fits is found once."""
        return self.noise_predictor(self.config.inversion_prompt)

    def _control(self, frames: torch.Tensor) -> Control:
        images = self.sd.to_images(self._conditions[frames])
        return Control.of(images, self.config.control_scales)

    @property
    def _conditions(self) -> Conditions:
        folder = Progress(self.inversion.folder).folder
        return Conditions(folder, len(self.config.controlnet_ids))

    @property
    def _choice(self) -> FrameChoice:
        return FrameChoice.of(asdict(self.config))

    def _see(self) -> None:
        """Find what the ControlNets are given of the frames, and the depth that the UNet takes."""
        config, inversion, n_frames = self.config, self.inversion, self.manifest.n_frames
        frames = partial(read_frames, inversion.source_frames, n_frames)
        if config.controlnet_ids:
            own = partial(self._choice.fitted, Path(config.control_path or ""), n_frames)
            device = self.processes.device
            find_conditions(config, frames, own, n_frames, self._conditions, device)
        if not self.sd.takes_depth:
            return
        parts = (None, None) if config.depth_model else ("depth_estimator", "feature_extractor")
        where = config.depth_model or self.checkpoint.configuration
        model = load_depth_model(where, self.processes.device, parts)
        shape = self.sd.latent_shape(n_frames, config.H, config.W)
        depth = inversion.create_depth((n_frames, 1, *shape[2:]))
        find_depth(model, frames, depth)
        video, fps = inversion.folder / DEPTH_VIDEO, self.manifest.frame_rate
        write_depth_video(video, depth, n_frames, (config.H, config.W), fps)

    def _recording_predictor(self, writer: WriteBehind) -> AbstractContextManager[NoisePredictor]:
        """A predictor for the block, which also records the source features if they are kept."""
        if not self._keeps_source_features:
            return nullcontext(self._predictor)
        files, saved = self.inversion.source_features, self.inversion.noisy_latents
        where = self._keyframe_schedule, saved, files, writer.later
        return RecordingPredictor(self._predictor, *where).installed()

    def _missing_segments(
        self, stage: str, n_steps: int, written: Callable[[torch.Tensor], Iterator[bytes]]
    ) -> Iterator[tuple[torch.Tensor, tqdm]]:
        """Yield the frames (n,) of each segment that this process has yet to do, and a progress bar.

        A segment is recorded as done when the caller asks for the next one. At the end all processes wait
        for each other. written: maps a segment's frames to the bytes that the stage writes for them.
        """
        progress = Progress(self.inversion.folder)
        segments = balanced(torch.arange(self.manifest.n_frames), self._frames_at_once)
        missing = [
            frames
            for frames in self.processes.share(segments)
            if not progress.is_done(stage, frames[0].item(), len(frames), written=written(frames))
        ]
        total, hidden = len(missing) * n_steps, not self.processes.is_main
        with tqdm(total=total, desc=stage, unit="step", disable=hidden) as bar:
            for frames in missing:
                yield frames, bar
                progress.record(stage, frames[0].item(), len(frames), written=written(frames))
        self.processes.wait()

    def _inverted(self, frames: torch.Tensor) -> Iterator[bytes]:
        for name in (CLEAN, *self._names.values()):
            yield self.inversion.latents(name).bytes_of(frames)
        yield from pictures(self.inversion.vae, frames)

    def _reconstructed(self, frames: torch.Tensor) -> Iterator[bytes]:
        if not self.config.no_reconstruction:
            yield from pictures(self.inversion.reconstruction, frames)
        if self._keeps_source_features:
            yield from self.inversion.source_features.written(self.editing.timesteps, frames)

    def _create_files(self) -> None:
        config, inversion = self.config, self.inversion
        shape = self.sd.latent_shape(self.manifest.n_frames, config.H, config.W)
        for name in (CLEAN, *self._names.values()):
            inversion.latents(name).ensure(shape, torch.float32)
        for folder in (inversion.vae, inversion.reconstruction):
            folder.mkdir(exist_ok=True)
        parts = self.sd, inversion.folder, config, shape, self.editing
        if self._keeps_source_features or can_keep_source_features(*parts):
            inversion.source_features.create(self.sd.unet, shape, self.editing.timesteps)

    @property
    def _keeps_source_features(self) -> bool:
        return self.inversion.source_features.folder.exists()

    @property
    def _keyframe_schedule(self) -> KeyframeSchedule:
        config, timesteps = self.config, self.editing.timesteps
        return KeyframeSchedule(
            self.manifest.n_frames, config.keyframe_interval, timesteps, config.seed
        )

    @cached_property
    def _names(self) -> dict[int, str]:
        """Names of the saved latents, by timestep."""
        names = {t: noisy(t) for t in self.editing.timesteps}
        return {self.manifest.inverted_timestep: self.manifest.inverted} | names


def schedules(config: PreprocessConfig, scheduler: DDIMScheduler) -> tuple[Schedule, Schedule]:
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


def new_manifest(
    config: PreprocessConfig, checkpoint: Checkpoint, schedule: Schedule, editing: Schedule
) -> Manifest:
    """The manifest of the inversion that is to be computed, as yet without keyframes."""
    noisiest, video = schedule.timesteps[0], Path(config.data_path)
    fps = frame_rate(video) / config.stride  # first, because it refuses a missing video
    options = {key: as_json(value) for key, value in asdict(config).items()}
    return Manifest(
        config=options
        | {"conditioned": bool(config.controlnet_ids), "control_frames": control_identity(config)},
        source=fingerprint(video),
        checkpoint=checkpoint.identity,
        fps=str(fps),
        n_frames=config.n_frames or FrameChoice.of(asdict(config)).count(video),
        timesteps=editing.timesteps,
        inverted=noisy(noisiest) if noisiest in editing.timesteps else INVERTED,
        inverted_timestep=noisiest,
    )


def is_there(final: Inversion, manifest: Manifest, overwrite: bool) -> bool:
    """Whether this inversion exists, is undamaged, and is not to be overwritten."""
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
        raise UserError(f"{damage}; --overwrite recomputes the inversion") from damage
    return True


def pictures(folder: Path, frames: torch.Tensor) -> Iterator[bytes]:
    """The bytes of the frames' image files; frames (n,)."""
    return (frame_path(folder, index).read_bytes() for index in frames.tolist())
