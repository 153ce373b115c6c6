"""From an inversion on disk to an edited video on disk, by all processes of a run."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tokenflow.config import ControlNetConfig, EditConfig
from tokenflow.control.conditions import Conditions, find_conditions
from tokenflow.control.depth import DEPTH_VIDEO, write_depth_video
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.controlnets import use_controlnets
from tokenflow.diffusion.ddim import Schedule
from tokenflow.diffusion.lora import use_loras
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.editing.checkpoint import EditCheckpoint
from tokenflow.editing.consensus import DISTANCES, Consensus, consensus_steps, followed_distances
from tokenflow.editing.denoise import (
    Denoiser,
    Edit,
    Source,
    TokenFlowDenoiser,
    denoise,
    keyframe_schedule,
)
from tokenflow.editing.find_inversion import conditions_of, preprocess_command
from tokenflow.editing.mask import Mask, given, relevance, write_relevant
from tokenflow.editing.shared import Shared
from tokenflow.editing.source_motion import dense_motion, kept_motion
from tokenflow.editing.techniques import LatentsOf, Technique
from tokenflow.errors import DamagedError, UserError
from tokenflow.evaluation.contact_sheet import contact_sheet, moments
from tokenflow.evaluation.report import discard_report
from tokenflow.inversion.files import CLEAN, Inversion, noisy
from tokenflow.inversion.frames import FrameChoice
from tokenflow.inversion.predictor import VideoNoisePredictor
from tokenflow.motion.dense import DenseMotion
from tokenflow.motion.fusion import FLICKER, Fusion
from tokenflow.runtime.batching import Batches
from tokenflow.runtime.digests import check, digest_of, seal
from tokenflow.runtime.distributed import Processes
from tokenflow.runtime.frame_array import FrameArray
from tokenflow.runtime.run_folder import lock, open_run_folder, remove, stage
from util import (
    load_frames,
    read_frames,
    save_frames,
    write_image,
    write_video,
    write_video_from_folders,
)

log = logging.getLogger("tokenflow")

DECODE_BATCH = 8  # frames decoded before they are written
STEPS = ".steps"  # folder of what a run needs until it is finished


@dataclass(frozen=True)
class EditRun:
    """One process's part in editing a video, resumed if an earlier run was killed.

    name: of its folder, unless another edit has it. identity: what tells it from other edits.
    scratch: folder of files that are of no use after it, but may be to the next edit of `shared`.
    """

    config: EditConfig
    name: str
    checkpoint: Checkpoint
    inversion: Inversion
    schedule: Schedule
    n_frames: int
    identity: str
    processes: Processes
    dtype: torch.dtype
    shared: Shared
    folder: Path | None = None
    scratch: Path | None = None
    is_finished: bool = False

    @contextmanager
    def opened(self, scratch: Path | None = None) -> Iterator["EditRun"]:
        """The run in its folder; while the block lasts, no other run can work there."""
        config, processes = self.config, self.processes
        with ExitStack() as held:
            where = Path(config.output_path), self.name, self.identity
            with processes.main_first():
                folder = held.enter_context(open_run_folder(*where))
            run = replace(self, folder=folder, scratch=scratch or folder / STEPS)
            if run.video.exists() and not run.checkpoints.exists() and not config.overwrite:
                try:
                    check(folder)
                except DamagedError as damage:
                    raise UserError(f"{damage}; --overwrite recomputes the edit") from damage
                log.info("this edit exists already; --overwrite recomputes it")
                yield replace(run, is_finished=True)
                return
            if processes.is_main:
                held.enter_context(lock(folder))
                if config.overwrite or not config.resume:
                    remove(run.checkpoints)
                run.checkpoints.mkdir(exist_ok=True)
            processes.wait()
            yield run

    @property
    def video(self) -> Path:
        """The edited video."""
        return self.folder / "edited.mp4"

    @property
    def checkpoints(self) -> Path:
        """Folder of the latents that a killed run is resumed from."""
        return self.folder / STEPS

    def edit(
        self, technique: Technique, denoiser: type[Denoiser] = TokenFlowDenoiser
    ) -> FrameArray:
        """Denoise step by step; returns the latents of the edited video.

        denoiser: how frames become consistent; benchmarks pass their baselines.
        """
        prompts = (self.inversion.prompt, self.config.negative_prompt, self.config.prompt)
        shape = (self.n_frames, *self.inversion.latents(CLEAN).shape[1:])
        checkpoint = EditCheckpoint(self.checkpoints, shape, self.processes)
        total, hidden = len(technique.schedule.timesteps), not self.processes.is_main
        if checkpoint.steps_done == total:
            log.info("resumed after the last step")
            return checkpoint.latents(total)
        agreed = consensus_steps(total, self.config.consensus_count)
        consensus = partial(Consensus.after, self.sd, self._near_and_far, agreed)
        about = prompts, self.config, consensus, self._mask()
        edit = Edit(self.sd, technique, self.source, *about)
        with denoiser.installed(edit) as installed:
            steps = denoise(installed, checkpoint)
            if done := next(steps):
                log.info("resumed after step %d", done)
            for _ in tqdm(steps, "Editing", total, initial=done, unit="step", disable=hidden):
                pass
        return checkpoint.latents(total)

    def write(self, edited: FrameArray) -> None:
        """Decode the edited latents; write frames, comparisons and, last of all, the edited video."""
        self._decode(edited)
        if self.processes.is_main:
            self._show()
            discard_report(self.folder)  # evaluate.py wrote it for an earlier run's frames
            seal(self.folder)
            remove(self.checkpoints)

    @cached_property
    def sd(self) -> StableDiffusion:
        """The checkpoint, loaded when it is first needed, with this edit's ControlNets and LoRAs."""
        config, get = self.config, self.shared.get
        controlnets = config.controlnet_ids if isinstance(config, ControlNetConfig) else ()
        loras = config.lora, config.lora_scales
        sd = get("networks", None, self._load)
        controlled = partial(use_controlnets, sd, controlnets)
        sd = get("ControlNets", controlnets, controlled)
        # Not all that it returns is shared, since the ControlNets of one edit would outlive it.
        adapted = get("LoRAs", loras, lambda: use_loras(sd, *loras).adapted)
        return replace(sd, adapted=adapted, limits=sd.limits.kept_in(self.checkpoints))

    def _load(self) -> StableDiffusion:
        config, device = self.config, self.processes.device
        log.info("loading %s on %s in %s", config.model_id, device, self.dtype)
        return self.checkpoint.load(
            device,
            self.dtype,
            cpu_offload=config.cpu_offload,
            compiled=config.compile,
            clip_skip=config.clip_skip,
        )

    def latents(self, name: str) -> LatentsOf:
        """The function from frames (n,) to the inversion's latents (n, 4, h, w) of that name."""
        return self.inversion.latents(name).__getitem__

    @property
    def first_latents(self) -> LatentsOf:
        """The function from frames (n,) to their inverted latents (n, 4, h, w) at the first editing step."""
        return self.latents(noisy(self.schedule.timesteps[0]))

    @property
    def source(self) -> Source:
        """What the inversion knows about the source, with its features if they fit this edit."""
        alone = Source(self.n_frames, self.inversion.noisy_latents, depth=self._depth)
        if self.config.correspondences == "flow":
            motion = kept_motion(self.inversion, self.config, self.n_frames, self.processes)
            alone = replace(alone, motion=motion)
        if missed := self._why_no_features():
            log.info("the source is denoised along with the edit: %s", missed)
            return alone
        try:
            self.shared.get("features", None, self.inversion.check_source_features)
        except DamagedError as damage:
            log.warning(
                "warning: %s; the source is denoised along with the edit instead; "
                "to recompute its features: %s --overwrite",
                damage,
                preprocess_command(self.config, self.inversion.manifest.config),
            )
            return alone
        read = partial(self.inversion.source_features.read, device=self.sd.device)
        return replace(alone, features=read)

    def find_conditions(self) -> None:
        """Find what the ControlNets are given of each frame, and show it as a video, side by side."""
        if self.processes.is_main:
            config, n_frames = self.config, self.n_frames
            frames = partial(read_frames, self.inversion.source_frames, n_frames)
            own = partial(self._choice.fitted, Path(config.control_path or ""), n_frames)
            where = n_frames, self._conditions, self.processes.device
            find = partial(find_conditions, config, frames, own, *where)
            self.shared.get("conditions", conditions_of(self.config), find)
            each = (self._conditions[torch.tensor([index])] for index in range(self.n_frames))
            frames = (np.concatenate(conditions[:, 0], axis=1) for conditions in each)
            write_video(self.folder / "control.mp4", frames, self.inversion.manifest.frame_rate)
        self.processes.wait()

    def control_images(self, frames: torch.Tensor) -> torch.Tensor:
        """The conditions of the frames (n,), as m networks take them: (m, n, 3, H, W) in [0, 1]."""
        return self.sd.to_images(self._conditions[frames])

    @property
    def _conditions(self) -> Conditions:
        return Conditions(self.scratch, len(self.config.controlnet_ids))

    @property
    def _depth(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The function from frames (n,) to their depth (n, 1, h, w), if the UNet takes it."""
        return self.inversion.depth.__getitem__ if self.sd.takes_depth else None

    @property
    def _choice(self) -> FrameChoice:
        return FrameChoice.of(self.inversion.manifest.config)

    def _why_no_features(self) -> str:
        """Why the source features in the inversion cannot be used; empty if they can."""
        kept = self.inversion.manifest.keyframes
        wanted = keyframe_schedule(self.config, self.sd.scheduler, self.n_frames)
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

    def _mask(self) -> Mask | None:
        if self.config.mask == "none":
            return None
        config = self.config
        key = config.mask, config.prompt, config.lora, config.lora_scales, config.n_timesteps
        name = f"mask_{digest_of([repr(key).encode()])}.npy"
        inside = self.shared.get("mask", key, partial(self._inside, self.scratch / name))
        return Mask(inside, self._source_latents, self.inversion.source_frame)

    def _inside(self, path: Path) -> FrameArray:
        """Where the edit may change the video, in a file for all processes, which a killed run has left."""
        if path.exists():
            return FrameArray(path)
        with stage(path, self.processes.is_main) as unfinished:
            self._write_inside(FrameArray(unfinished))
        self.processes.wait()
        return FrameArray(path)

    def _write_inside(self, inside: FrameArray) -> None:
        choice = self._choice
        if self.processes.is_main:
            shape = self.n_frames, 1, choice.H, choice.W
            FrameArray.create(inside.path, shape, torch.uint8)
        self.processes.wait()
        if self.config.mask == "auto":
            adapts = self.config.batch_size is None
            batches = Batches(self.config.frames_at_once, adapts, self.sd.limits, "inversion")
            prompts = self.inversion.prompt, self.config.prompt
            noises = tuple(
                VideoNoisePredictor(self.sd, prompt, batches, depth=self._depth)
                for prompt in prompts
            )
            about = self._source_latents, self.schedule.timesteps, noises
            relevant = partial(relevance, *about)
            scale = choice.H // self.inversion.latents(CLEAN).shape[2]
            shown = scale, self.inversion.source_frame, self.sd.device
            write_relevant(inside, self._near_and_far(), relevant, *shown)
        elif self.processes.is_main:
            masks = given(self.config.mask_path, choice, self.n_frames)
            for index, mask in enumerate(masks):
                inside[torch.tensor([index])] = mask[None, None]
        self.processes.wait()

    def _source_latents(self, t: int | None, frames: torch.Tensor) -> torch.Tensor:
        if t is None:
            return self.inversion.latents(CLEAN)[frames]
        return self.inversion.noisy_latents(t, frames)

    def _near_and_far(self) -> Fusion:
        return self._fusion("consensus", DISTANCES)

    def _fusion(self, name: str, distances: Sequence[int]) -> Fusion:
        parts = self._motion, distances, self.scratch / name / "pictures.npy", self.processes
        return self.shared.get(name, tuple(distances), partial(Fusion.along, *parts))

    @property
    def _motion(self) -> DenseMotion:
        """The source's motion between all frames that this edit averages, found when it first needs it."""
        distances = followed_distances(self.config)

        def find() -> DenseMotion:
            motion = dense_motion(self.inversion, self.n_frames, self.scratch)
            motion.find(distances, self.processes)
            return motion

        return self.shared.get("motion", tuple(distances), find)

    def _decode(self, edited: FrameArray) -> None:
        processes, frames, mask = self.processes, self.folder / "frames", self._mask()
        reach = self.config.fuse_distance
        fusion = self._fusion("fuse", range(1, reach + 1)) if reach else None

        def save(batch: torch.Tensor, finished: np.ndarray) -> None:
            shown = mask.composed(finished, batch) if mask else finished
            save_frames(unfinished, batch[0].item(), shown)

        with stage(frames, processes.is_main) as unfinished:
            if processes.is_main:
                unfinished.mkdir()
            processes.wait()
            batches = processes.share(torch.arange(self.n_frames).split(DECODE_BATCH))
            for batch in tqdm(batches, "Decoding", unit="batch", disable=not processes.is_main):
                decoded = self.sd.decode_latents(edited[batch])
                if fusion:
                    fusion.put(batch, decoded)
                else:
                    save(batch, decoded)
            processes.wait()
            for batch in batches if fusion else ():
                save(batch, fusion.fused(batch, self.sd.device, FLICKER))
            processes.wait()

    def _show(self) -> None:
        inversion, folder, n_frames = self.inversion, self.folder, self.n_frames
        fps = inversion.manifest.frame_rate
        shown = {"source": inversion.source_frames}
        if inversion.reconstruction.exists():
            shown["reconstruction"] = inversion.reconstruction
        shown[f"edit: {self.config.prompt}"] = folder / "frames"
        comparison, sheet = folder / "comparison.mp4", folder / "contact_sheet.png"
        write_video_from_folders(comparison, list(shown.values()), n_frames, fps)
        rows = {label: load_frames(f, moments(n_frames)) for label, f in shown.items()}
        write_image(sheet, contact_sheet(rows))
        write_video_from_folders(folder / "vae_reconstruction.mp4", [inversion.vae], n_frames, fps)
        if mask := self._mask():
            write_video(folder / "mask.mp4", mask.shown(), fps)
        if depth := inversion.depth:
            size = self._choice.H, self._choice.W
            write_depth_video(folder / DEPTH_VIDEO, depth, n_frames, size, fps)
        write_video_from_folders(self.video, [folder / "frames"], n_frames, fps)
        log.info("to compare: %s and %s", comparison, sheet)
