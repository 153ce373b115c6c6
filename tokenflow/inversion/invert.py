"""From a video to its inversion on disk, stage by stage, by all processes of a run.

Frames pass in chunks. Processes can divide the chunks, a killed run is resumed with the missing chunks, and
memory does not grow with the length of the video.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from tqdm import tqdm

from tokenflow.config import PreprocessConfig
from tokenflow.control.control_images import ControlImages
from tokenflow.control.depth import DEPTH_VIDEO, load_depth_model, write_depth_video
from tokenflow.control.detectors import check_detectors
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.controlnets import check_controlnets
from tokenflow.diffusion.ddim import GUESSED_FROM, Inverter, Schedule, sample
from tokenflow.diffusion.device import choose_device
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.evaluation.report import PAGE
from tokenflow.evaluation.subject import RECONSTRUCTION, VAE
from tokenflow.evaluation.verdict import POOR_PSNR
from tokenflow.inversion.check import is_up_to_date, make_manifest, make_schedules
from tokenflow.inversion.files import CLEAN, DEPTH, VIDEO, FrameFiles, Inversion, Manifest, noisy
from tokenflow.inversion.frames import check_control_frames, choose_size
from tokenflow.inversion.predictor import VideoNoisePredictor
from tokenflow.inversion.recording import RecordingPredictor
from tokenflow.inversion.report import Quality, write_page
from tokenflow.inversion.source_features import can_keep_source_features
from tokenflow.inversion.stage import Stage
from tokenflow.propagation.keyframes import KeyframeSchedule
from tokenflow.runtime.ahead import WriteBehind
from tokenflow.runtime.batching import Batches, Limits, frames_per_pass, split_evenly
from tokenflow.runtime.digests import seal
from tokenflow.runtime.distributed import Processes
from tokenflow.runtime.frame_array import FrameArray
from tokenflow.runtime.run_folder import (
    Progress,
    can_resume,
    lock,
    remove,
    resume_folder,
    unfinished_path,
)
from tokenflow.video.write import write_video_from_folders
from util import load_frames, read_frames, save_frames

log = logging.getLogger("tokenflow")

FRAMES_AT_ONCE = 16  # on a CPU, if they fit in memory
FEW_STEPS = 20  # with fewer, fixed-point iteration has further to go from its guess in each


@contextmanager
def open_inversion(config: PreprocessConfig) -> Iterator["InversionRun"]:
    """The run that inverts a video; while the block lasts, no other run can work in its folder.

    Everything that can be checked is checked first. The inversion appears on disk when the block ends.
    """
    checkpoint = Checkpoint.find(config.model_id, config.sd_version, config.vae)
    height, width = choose_size(config, checkpoint)
    config = replace(config, H=height, W=width)
    schedule, editing = make_schedules(config, checkpoint.scheduler)
    device, dtype = choose_device(config.device, config.dtype)
    check_controlnets(config.controlnet_ids)
    manifest = make_manifest(config, checkpoint, schedule, editing)
    if config.controlnet_ids:
        check_detectors(config)
        check_control_frames(config, manifest.choice, manifest.n_frames)
    final = Inversion.of(config, manifest.n_frames)
    run = InversionRun(
        config=config,
        checkpoint=checkpoint,
        manifest=manifest,
        schedule=schedule,
        editing=editing,
        final=final,
        inversion=Inversion(unfinished_path(final.folder)),
        processes=Processes(device),
        dtype=dtype,
    )
    if is_up_to_date(final, manifest, config.overwrite):
        log.info("this inversion exists already; --overwrite recomputes it")
        yield replace(run, is_finished=True)
        return
    if config.inversion == "fixed_point" and config.steps < FEW_STEPS:
        log.info(
            "fewer than %d inversion steps save little: each takes more UNet evaluations, and the inversion "
            "is less exact",
            FEW_STEPS,
        )
    with ExitStack() as held:
        if run.processes.is_main:
            held.enter_context(lock(final.folder))
            is_up_to_date(final, manifest, config.overwrite)  # another run may have finished since
            identity = json.dumps(manifest.identity, sort_keys=True)
            resume = config.resume and not config.overwrite
            if run.inversion.folder.exists() and not (
                resume and can_resume(final.folder, identity)
            ):
                _ = run.sd  # what another run has left goes only if this one can begin
            held.enter_context(resume_folder(final.folder, identity, resume))
        run.processes.wait()
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
        files, frames = FrameFiles([], folder), torch.arange(n_frames)
        if self.processes.is_main and not self._progress.is_done("read", files.read(frames)):
            video, fps = Path(self.config.data_path), self.manifest.frame_rate
            self.manifest.choice.write(video, folder, n_frames)
            self.manifest.choice.write_sound(video, self.inversion.sound, n_frames, fps)
            self._progress.record("read", files.read(frames))

    def invert(self) -> None:
        """Encode the frames, invert them, and save their latents at every editing timestep.

        At each of these, frames pass the UNet in chunks, and their source features are recorded.
        """
        if self.processes.is_main:
            self._create_files()
            self._find_control_images()
            self._find_depth()
        self.processes.wait()
        self._encode()
        inversion, names = self.inversion, self.manifest.latents_by_timestep
        saved = [(self.schedule.alphas[-1], inversion.latents(CLEAN))]  # the noise levels so far
        with (
            self._stage("Inverting", len(names)) as stage,
            RecordingPredictor(
                self._predictor, self._kept_keyframes, inversion.source_features, stage.writer
            ).install() as recorder,
        ):
            inverter = Inverter(recorder, self.config.inversion == "fixed_point")
            for levels in self.schedule.divide_inversion(names):
                t, alpha = levels[-1]
                latents = inversion.latents(names[t])
                files = FrameFiles([latents, *recorder.arrays(t)], None)
                chunks = recorder.plan(t, self.manifest.n_frames, self._frames_per_pass)
                for frames in stage.missing(chunks, files, f"at_{t}"):
                    for passing in recorder.begin(t, frames):
                        trajectory = [(level, array[passing]) for level, array in saved]
                        inverted = inverter.invert(trajectory, levels, passing)
                    latents[frames] = inverted
                    stage.bar.update()
                saved = [*saved, (alpha, latents)][-GUESSED_FROM:]
                self.processes.wait()  # chunks of another timestep have other frames
        inverter.log()

    def _encode(self) -> None:
        """Save the clean latents, and the frames that the VAE makes of them."""
        inversion, clean = self.inversion, self.inversion.latents(CLEAN)
        with self._stage("Encoding") as stage:
            for frames in stage.missing(self._chunks, FrameFiles([clean], inversion.vae)):
                images = load_frames(inversion.source_frames, frames.tolist())
                latents = self.sd.encode_frames(images)
                clean[frames] = latents
                save_frames(inversion.vae, frames[0].item(), self.sd.decode_latents(latents))
                stage.bar.update()

    def reconstruct(self) -> None:
        """Sample the frames back from their noise."""
        if self.config.no_reconstruction:
            return
        inversion, timesteps = self.inversion, self.editing.timesteps
        files = FrameFiles([], inversion.reconstruction)
        with self._stage("Reconstructing", len(timesteps)) as stage:
            for frames in stage.missing(self._chunks, files, n_steps=len(timesteps)):
                latents = inversion.latents(noisy(timesteps[0]))[frames]
                for sampled in sample(latents, frames, self.editing, self._predictor):
                    latents = sampled
                    stage.bar.update()
                images = self.sd.decode_latents(latents)
                save_frames(inversion.reconstruction, frames[0].item(), images)

    def finish(self) -> None:
        """Write the video and the manifest, and say how good the reconstruction is."""
        if not self.processes.is_main:
            return
        inversion, manifest = self.inversion, self.manifest
        is_reconstructed = not self.config.no_reconstruction
        if is_reconstructed:
            video, folders = inversion.folder / VIDEO, [inversion.reconstruction]
            n_frames, fps = manifest.n_frames, manifest.frame_rate
            write_video_from_folders(video, folders, n_frames, fps, inversion.sound)
        else:
            remove(inversion.reconstruction)
        inversion.write_manifest(replace(manifest, keyframes=self._kept_keyframes))
        quality = Quality.measure(inversion, manifest.n_frames, self.processes.device)
        log.info(quality.describe())
        if is_reconstructed:
            write_page(inversion, manifest, quality.curves)
            self._warn_if_poor(quality)
            log.info("to look at: %s", self.final.folder / PAGE)
        seal(inversion.folder)
        remove(self._progress.folder)

    @cached_property
    def sd(self) -> StableDiffusion:
        """The checkpoint, loaded when it is first needed."""
        config = self.config
        sd = self.checkpoint.load(
            self.processes.device,
            self.dtype,
            controlnets=config.controlnet_ids,
            cpu_offload=config.cpu_offload,
            compiled=config.compile,
            clip_skip=config.clip_skip,
        )
        return replace(sd, limits=Limits(self._progress.folder))

    @cached_property
    def _predictor(self) -> VideoNoisePredictor:
        """One for the whole run, so that the prompt is encoded once."""
        return self._predictor_for(self.config.inversion_prompt)

    def _predictor_for(self, prompt: str) -> VideoNoisePredictor:
        adapts = self.config.batch_size is None
        return VideoNoisePredictor(
            self.sd,
            prompt,
            Batches(self._frames_per_pass, adapts, self.sd.limits, "inversion"),
            depth=self.inversion.depth,
            images=self._control_images if self.sd.controlnet else None,
            scales=self.config.control_scales,
        )

    @property
    def _frames_per_pass(self) -> int:
        chosen, device = self.config.batch_size, self.processes.device
        return frames_per_pass(chosen, FRAMES_AT_ONCE, n_streams=1, device=device)

    @property
    def _progress(self) -> Progress:
        return Progress(self.inversion.folder)

    @property
    def _control_images(self) -> ControlImages:
        return ControlImages(self._progress.folder, len(self.config.controlnet_ids))

    @property
    def _keeps_source_features(self) -> bool:
        return self.inversion.source_features.folder.exists()

    @property
    def _kept_keyframes(self) -> KeyframeSchedule | None:
        """The keyframes with which source features are kept, if they are."""
        if not self._keeps_source_features:
            return None
        return KeyframeSchedule(
            n_frames=self.manifest.n_frames,
            interval=self.config.keyframe_interval,
            timesteps=self.editing.timesteps,
            seed=self.config.seed,
        )

    @property
    def _chunks(self) -> tuple[torch.Tensor, ...]:
        """The frames in chunks that may pass at once."""
        return split_evenly(torch.arange(self.manifest.n_frames), self._frames_per_pass)

    @contextmanager
    def _stage(self, name: str, n_steps: int = 1) -> Iterator[Stage]:
        """Yield a stage of `n_steps` for each chunk; all processes are done when the block ends."""
        processes = self.processes
        total, hidden = n_steps * len(processes.share(self._chunks)), not processes.is_main
        with (
            WriteBehind() as writer,
            tqdm(total=total, desc=name, unit="step", disable=hidden) as bar,
        ):
            yield Stage(name, self._progress, processes, writer, bar)
        processes.wait()

    def _create_files(self) -> None:
        config, inversion = self.config, self.inversion
        shape = self.sd.latent_shape(self.manifest.n_frames, config.H, config.W)
        for name in (CLEAN, *self.manifest.latents_by_timestep.values()):
            inversion.latents(name).ensure(shape, torch.float32)
        for folder in (inversion.vae, inversion.reconstruction):
            folder.mkdir(exist_ok=True)
        if self._keeps_source_features or can_keep_source_features(
            self.sd, inversion.folder, config, shape, self.editing
        ):
            inversion.source_features.create(self.sd.unet, shape, self.editing.timesteps)

    def _find_control_images(self) -> None:
        if self.config.controlnet_ids:
            n_frames, own = self.manifest.n_frames, Path(self.config.control_path or "")
            self._control_images.find(
                self.config,
                partial(read_frames, self.inversion.source_frames, n_frames),
                partial(self.manifest.choice.fitted, own, n_frames),
                n_frames,
                self.processes.device,
            )

    def _find_depth(self) -> None:
        if not self.sd.takes_depth:
            return
        config, inversion, n_frames = self.config, self.inversion, self.manifest.n_frames
        parts = (None, None) if config.depth_model else ("depth_estimator", "feature_extractor")
        where = config.depth_model or self.checkpoint.weights.configuration.name
        model = load_depth_model(where, self.processes.device, parts)
        _, _, *size = self.sd.latent_shape(n_frames, config.H, config.W)
        depth = FrameArray(inversion.folder / DEPTH)
        depth.ensure((n_frames, 1, *size), torch.float32)
        model.write(partial(read_frames, inversion.source_frames, n_frames), depth)
        video, fps = inversion.folder / DEPTH_VIDEO, self.manifest.frame_rate
        write_depth_video(video, depth, n_frames, (config.H, config.W), fps)

    def _warn_if_poor(self, quality: Quality) -> None:
        """Say why a reconstruction is too poor to edit, and what to do."""
        if quality.psnr(RECONSTRUCTION) >= POOR_PSNR:
            return
        if quality.psnr(VAE) < POOR_PSNR:
            reason = "the VAE is the reason: use larger frames (--H, --W) or another checkpoint"
        elif self._is_better_without_prompt():
            reason = "the prompt is the reason: the model does better without --inversion_prompt"
        else:
            reason = "the inversion is the reason: use more --steps, or a better --inversion_prompt"
        log.info(
            f"warning: below {POOR_PSNR:.0f} dB a video is too poorly reconstructed to edit well; {reason}"
        )

    def _is_better_without_prompt(self) -> bool:
        clean = self.inversion.latents(CLEAN)
        clean = clean[torch.arange(min(len(clean), self._frames_per_pass))]
        empty, seed = self._predictor_for(""), self.config.seed
        return self._predictor.measure_error(clean, seed) > empty.measure_error(clean, seed)
