"""From an inversion on disk to an edited video on disk, by all processes of a run."""

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tokenflow.config import EditConfig
from tokenflow.control.control_images import ControlImages
from tokenflow.control.depth import DEPTH_VIDEO, write_depth_video
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.ddim import Schedule
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.editing.checkpoint import EditCheckpoint, KeptArray
from tokenflow.editing.consensus import DISTANCES, Consensus, choose_steps
from tokenflow.editing.denoise import Denoiser, Edit, TokenFlowDenoiser, denoise
from tokenflow.editing.find_inversion import conditions_of
from tokenflow.editing.identity import Identity
from tokenflow.editing.mask import Mask, read_mask, write_mask
from tokenflow.editing.relevance import PromptDifference, Relevance
from tokenflow.editing.shared import Shared
from tokenflow.editing.source import Source, find_features, find_flow, open_motion
from tokenflow.editing.steps import plan_keyframes
from tokenflow.editing.techniques import Technique
from tokenflow.errors import DamagedError, UserError
from tokenflow.evaluation.contact_sheet import contact_sheet, moments
from tokenflow.evaluation.report import discard_report
from tokenflow.inversion.files import CLEAN, Inversion
from tokenflow.inversion.predictor import VideoNoisePredictor
from tokenflow.motion.fusion import FLICKER, Fusion
from tokenflow.runtime.batching import Batches
from tokenflow.runtime.digests import check, digest_of, seal
from tokenflow.runtime.distributed import Processes
from tokenflow.runtime.frame_array import FrameArray
from tokenflow.runtime.run_folder import open_run_folder, remove, stage
from tokenflow.video.write import write_video, write_video_from_folders
from util import load_frames, read_frames, save_frames, write_image

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
    identity: Identity
    checkpoint: Checkpoint
    inversion: Inversion
    n_frames: int
    schedule: Schedule
    processes: Processes
    dtype: torch.dtype
    shared: Shared
    folder: Path | None = None
    scratch: Path | None = None
    is_finished: bool = False

    @contextmanager
    def open(self, scratch: Path | None = None) -> Iterator["EditRun"]:
        """The run in its folder; while the block lasts, no other run can work there."""
        config, processes = self.config, self.processes
        with ExitStack() as held:
            with processes.main_first():
                claimed = open_run_folder(
                    Path(config.output_path), self.name, self.identity.text, processes.is_main
                )
                folder = held.enter_context(claimed)
            run = replace(self, folder=folder, scratch=scratch or folder / STEPS)
            if run.video.exists() and not run.steps.exists() and not config.overwrite:
                try:
                    check(folder)
                except DamagedError as damage:
                    raise UserError(f"{damage}; --overwrite recomputes the edit") from damage
                log.info("this edit exists already; --overwrite recomputes it")
                yield replace(run, is_finished=True)
                return
            if processes.is_main:
                if config.overwrite or not config.resume:
                    remove(run.steps)
                run.steps.mkdir(exist_ok=True)
            processes.wait()
            yield run

    def check_inversion(self) -> None:
        """Raise UserError if the inversion is no longer the one that was found; what was read of it goes."""
        folder = self.inversion.folder
        with suppress(DamagedError):
            if Inversion(folder).manifest == self.inversion.manifest:
                return
        if self.folder:
            remove(self.video)  # else it would count as finished
            remove(self.steps)
        raise UserError(f"{folder}: it was replaced while this edit read it; repeat the command")

    @property
    def video(self) -> Path:
        """The edited video."""
        return self.folder / "edited.mp4"

    @property
    def steps(self) -> Path:
        """Folder of the latents that a killed run is resumed from."""
        return self.folder / STEPS

    @cached_property
    def source(self) -> Source:
        """The source video, as it was inverted."""
        return Source(self.inversion, self.n_frames)

    @cached_property
    def sd(self) -> StableDiffusion:
        """The checkpoint, loaded when it is first needed, with this edit's ControlNets and LoRAs."""
        sd = self.shared.load(self.checkpoint, self.config, self.processes.device, self.dtype)
        return replace(sd, limits=sd.limits.keep_in(self.steps))

    def find_control_images(self) -> None:
        """Find the control images, and show them as a video, side by side."""
        if self.processes.is_main:
            config, images, n_frames = self.config, self._control_images, self.n_frames
            manifest = self.inversion.manifest
            self.shared.get(
                "control images",
                conditions_of(config),
                lambda: images.find(
                    config,
                    frames=partial(read_frames, self.inversion.source_frames, n_frames),
                    own=partial(manifest.choice.fitted, Path(config.control_path or ""), n_frames),
                    n_frames=n_frames,
                    device=self.processes.device,
                ),
            )
            write_video(self.folder / "control.mp4", images.show(n_frames), manifest.frame_rate)
        self.processes.wait()

    def control_images(self, frames: torch.Tensor) -> torch.Tensor:
        """The control images of the frames (n,), as m networks take them: (m, n, 3, H, W) in [0, 1]."""
        return self.sd.to_images(self._control_images[frames])

    @property
    def _control_images(self) -> ControlImages:
        return ControlImages(self.scratch, len(self.config.controlnet_ids))

    def edit(
        self, technique: Technique, denoiser: type[Denoiser] = TokenFlowDenoiser
    ) -> FrameArray:
        """Denoise step by step; returns the latents of the edited video.

        denoiser: how frames become consistent; benchmarks pass their baselines.
        """
        config, total = self.config, len(technique.schedule.timesteps)
        shape = (self.n_frames, *self.inversion.latents(CLEAN).shape[1:])
        checkpoint = EditCheckpoint(self.steps, shape, self.processes)
        if checkpoint.steps_done == total:
            log.info("resumed after the last step")
            return checkpoint.latents(total)
        edit = Edit(
            sd=self.sd,
            technique=technique,
            source=self._find_source(),
            prompts=(self.inversion.prompt, config.negative_prompt, config.prompt),
            config=config,
            consensus=Consensus(
                self.sd, self._consensus_fusion, choose_steps(total, config.resolve("consensus"))
            ),
            mask=self._mask,
            relevance=self._relevance,
        )
        hidden = not self.processes.is_main
        with denoiser.install(edit) as installed:
            steps = denoise(installed, checkpoint)
            if done := next(steps):
                log.info("resumed after step %d", done)
            for _ in tqdm(steps, "Editing", total, initial=done, unit="step", disable=hidden):
                pass
        return checkpoint.latents(total)

    def _find_source(self) -> Source:
        """The source with its features, if they were kept for this edit, and the optical flow it follows."""
        config, flow = self.config, None
        if config.correspondences == "flow":
            flow = find_flow(self.source, config, self.processes, self.scratch)
        keyframes = plan_keyframes(config, self.sd.scheduler, self.n_frames)
        features = find_features(self.inversion, config, keyframes, self.shared)
        return replace(self.source, features=features, flow=flow)

    @property
    def _relevance(self) -> Relevance | None:
        """Where guidance acts, if not everywhere."""
        config, shown = self.config, self.inversion.prompt.strip()
        strength = config.resolve("relevance")
        if strength and config.guidance_scale != 1 and shown and shown != config.prompt.strip():
            return Relevance(self._differences, strength)
        return None

    @property
    def _differences(self) -> FrameArray:
        """How differently prompt and inversion_prompt see the source: (N, 1, h, w)."""
        return self._keep("differences", self._prompt_key, self._compare_prompts)

    def _compare_prompts(self, kept: KeptArray) -> FrameArray:
        config, sd, depth = self.config, self.sd, self.inversion.depth
        adapts = config.batch_size is None
        batches = Batches(config.frames_at_once, adapts, sd.limits, "inversion")
        with sd.original():
            unedited = VideoNoisePredictor(sd, self.inversion.prompt, batches, depth)
        edited = VideoNoisePredictor(sd, config.prompt, batches, depth)
        timesteps, shape = self.schedule.timesteps, self.inversion.latents(CLEAN).shape
        with kept.write((self.n_frames, 1, *shape[2:]), torch.float32) as differences:
            difference = PromptDifference(sd, self.source, timesteps, unedited, edited)
            difference.write(differences, self.processes)
        return FrameArray(kept.path)

    @cached_property
    def _mask(self) -> Mask | None:
        """Where the edit may change the video, if not everywhere."""
        if self.config.mask == "none":
            return None
        key = self.config.mask, self._prompt_key
        return Mask(self._keep("mask", key, self._find_mask), self.source)

    @property
    def _prompt_key(self) -> Hashable:
        """What decides where the prompts differ, besides the inversion."""
        config = self.config
        return config.prompt, config.lora, config.lora_scales, config.n_timesteps

    def _keep(
        self, name: str, key: Hashable, make: Callable[[KeptArray], FrameArray]
    ) -> FrameArray:
        """What `make` makes of all frames, or made for the same `key` in this sweep or before a kill."""
        path = self.scratch / f"{name}_{digest_of([repr(key).encode()])}.npy"
        kept = KeptArray(path, self.processes)
        return self.shared.get(name, key, lambda: kept.find() or make(kept))

    def _find_mask(self, kept: KeptArray) -> FrameArray:
        config, source, choice = self.config, self.source, self.inversion.manifest.choice
        with kept.write((self.n_frames, 1, choice.H, choice.W), torch.uint8) as inside:
            if config.mask == "auto":
                fusion, device = self._consensus_fusion, self.processes.device
                write_mask(inside, self._differences, source, fusion, device)
            elif self.processes.is_main:
                masks = read_mask(config.mask_path, choice, self.n_frames)
                for index, mask in enumerate(masks):
                    inside[torch.tensor([index])] = mask[None, None]
        return FrameArray(kept.path)

    @property
    def _consensus_fusion(self) -> Fusion:
        """Averages frames with others near and far, in a consensus and in an automatic mask."""
        return self._fusion("consensus", DISTANCES)

    def _fusion(self, name: str, distances: Sequence[int]) -> Fusion:
        source, scratch = self.source, self.scratch
        motion = self.shared.get("motion", source.n_frames, lambda: open_motion(source, scratch))
        return Fusion(motion, distances, scratch / name / "pictures.npy", self.processes)

    def write(self, edited: FrameArray) -> None:
        """Decode the edited latents; write frames, comparisons and, last of all, the edited video."""
        processes = self.processes
        with stage(self.folder / "frames", processes.is_main) as unfinished:
            if processes.is_main:
                unfinished.mkdir()
            processes.wait()
            for frames, pictures in self._decode(edited):
                if self._mask:
                    pictures = self._mask.compose(pictures, frames)
                save_frames(unfinished, frames[0].item(), pictures)
            processes.wait()
        if processes.is_main:
            self._write_videos()
            self.check_inversion()
            discard_report(self.folder)  # evaluate.py wrote it for an earlier run's frames
            seal(self.folder)
            remove(self.steps)

    def _decode(self, edited: FrameArray) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        """Yield frames (n,) and their pictures, uint8 RGB (n, H, W, 3), averaged if the edit fuses them."""
        reach, processes = self.config.resolve("fuse"), self.processes
        fusion = self._fusion("fuse", range(1, reach + 1)) if reach else None
        if fusion:
            fusion.begin()
        batches = processes.share(torch.arange(self.n_frames).split(DECODE_BATCH))
        for frames in tqdm(batches, "Decoding", unit="batch", disable=not processes.is_main):
            pictures = self.sd.decode_latents(edited[frames])
            if fusion:
                fusion.put(frames, pictures)
            else:
                yield frames, pictures
        if fusion:
            processes.wait()
            for frames in batches:
                yield frames, fusion.average(frames, self.sd.device, FLICKER)

    def _write_videos(self) -> None:
        inversion, folder, n_frames = self.inversion, self.folder, self.n_frames
        fps, sound = inversion.manifest.frame_rate, self._find_sound()
        shown = {"source": inversion.source_frames}
        if inversion.reconstruction.exists():
            shown["reconstruction"] = inversion.reconstruction
        shown[f"edit: {self.config.prompt}"] = folder / "frames"
        comparison, sheet = folder / "comparison.mp4", folder / "contact_sheet.png"
        write_video_from_folders(comparison, list(shown.values()), n_frames, fps, sound)
        rows = {label: load_frames(f, moments(n_frames)) for label, f in shown.items()}
        write_image(sheet, contact_sheet(rows))
        write_video_from_folders(folder / "vae_reconstruction.mp4", [inversion.vae], n_frames, fps)
        if self._mask:
            write_video(folder / "mask.mp4", self._mask.show(), fps)
        if depth := inversion.depth:
            size = inversion.manifest.choice.H, inversion.manifest.choice.W
            write_depth_video(folder / DEPTH_VIDEO, depth, n_frames, size, fps)
        write_video_from_folders(self.video, [folder / "frames"], n_frames, fps, sound)
        log.info("to compare: %s and %s", comparison, sheet)

    def _find_sound(self) -> Path | None:
        """The source's sound, if it is wanted and undamaged."""
        if not self.config.sound:
            return None
        try:
            self.inversion.check_sound()
        except DamagedError as damage:
            log.warning("warning: %s; the edit has no sound", damage)
            return None
        return self.inversion.sound
