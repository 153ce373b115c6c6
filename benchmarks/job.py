"""One held-out clip with its inversion, ready for any edit."""

import dataclasses
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.clips import Clip
from shapes.controlnet import CANNY_THRESHOLDS
from tokenflow.config import ControlNetConfig, PnPConfig, SDEditConfig
from tokenflow.control.detectors import detect_canny
from tokenflow.diffusion.ddim import Schedule, invert, last, sample
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.editing.checkpoint import EditCheckpoint
from tokenflow.editing.consensus import DISTANCES, Consensus, consensus_steps, followed_distances
from tokenflow.editing.denoise import (
    Denoiser,
    Edit,
    TokenFlowDenoiser,
    denoise,
    keyframe_schedule,
)
from tokenflow.editing.mask import Mask, relevance, write_relevant
from tokenflow.editing.source import Source
from tokenflow.editing.techniques import Technique, controlnet, plug_and_play, sdedit
from tokenflow.evaluation.metrics import frame_psnr
from tokenflow.inversion.files import CLEAN, noisy
from tokenflow.inversion.predictor import VideoNoisePredictor
from tokenflow.inversion.source_features import RecordingPredictor, SourceFeatureFiles
from tokenflow.motion.dense import DenseMotion
from tokenflow.motion.fusion import FLICKER, Fusion
from tokenflow.motion.pairs import KeptPairs
from tokenflow.motion.to_keyframes import SourceMotion, dis_between, furthest_keyframe
from tokenflow.runtime.batching import Batches
from tokenflow.runtime.distributed import Processes
from tokenflow.runtime.frame_array import FrameArray

SDEDIT_START = 0.7
INVERSION_BATCH = 16  # frames


@dataclass(frozen=True)
class Job:
    """One clip with its inversion, ready for any method."""

    sd: StableDiffusion
    clip: Clip
    clean: torch.Tensor  # N 4 h w
    inverted: dict[int, torch.Tensor]  # by timestep, each N 4 h w
    folder: Path  # for files
    schedule: Schedule
    config: PnPConfig
    exact_flow: bool = False  # whether correspondences that follow the flow follow the exact one

    @classmethod
    def prepare(
        cls,
        sd: StableDiffusion,
        clip: Clip,
        config: PnPConfig,
        folder: Path,
        inversion: str = "fixed_point",
    ) -> "Job":
        """Encode and invert a clip on the editing steps; files go to the `folder`.

        inversion: as in `PreprocessConfig`.
        """
        schedule = Schedule.of(sd.scheduler, config.n_timesteps)
        clean, frames = sd.encode_frames(clip.frames), torch.arange(clip.n_frames)
        fixed_point = inversion == "fixed_point"
        predictor = predictor_of(sd, clip.source_prompt)
        inverted = dict(invert(clean, frames, schedule, predictor, fixed_point))
        config = dataclasses.replace(config, prompt=clip.prompt)
        return cls(sd, clip, clean, inverted, folder, schedule, config)

    def reconstruct(self) -> torch.Tensor:
        """Latents (N, 4, h, w) sampled back; the source's features are kept on the way."""
        frames = torch.arange(self.clip.n_frames)
        keyframes = keyframe_schedule(self.config, self.sd.scheduler, self.clip.n_frames)
        self.files.create(self.sd.unet, self.clean.shape, self.schedule.timesteps)
        predictor, saved = predictor_of(self.sd, self.clip.source_prompt), self._source_latents
        with RecordingPredictor(predictor, keyframes, saved, self.files).install() as recording:
            return last(sample(self.first_latents(frames), frames, self.schedule, recording))

    @cached_property
    def latents(self) -> "Latents":
        """In place of the inversion on disk."""
        first = self.schedule.timesteps[0]
        manifest = SimpleNamespace(inverted=noisy(first), inverted_timestep=first)
        by_name = {CLEAN: self.clean} | {noisy(t): x for t, x in self.inverted.items()}
        return Latents(by_name, manifest)

    @property
    def files(self) -> SourceFeatureFiles:
        """The source's features, once `reconstruct` has kept them."""
        return SourceFeatureFiles(self.folder / "source")

    def with_settings(self, **changes) -> "Job":
        """The same job with other values in its configuration."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))

    def unedited(self) -> np.ndarray:
        """The source's frames (N, H, W, 3)."""
        return self.clip.frames

    def round_trip(self) -> np.ndarray:
        """The source's frames (N, H, W, 3) after the VAE's round trip."""
        return self.sd.decode_latents(self.clean)

    def edit_pnp(self, denoiser: type[Denoiser] = TokenFlowDenoiser) -> np.ndarray:
        """Frames (N, H, W, 3) edited with Plug-and-Play."""
        return self._edit(plug_and_play(self.config, self.schedule, self._source()), denoiser)

    def edit_sdedit(self) -> np.ndarray:
        """Frames (N, H, W, 3) edited with SDEdit from the inversion's noise."""
        steps = self.config.n_timesteps
        config = SDEditConfig(data_path="", prompt="unused", n_timesteps=steps, start=SDEDIT_START)
        return self._edit(sdedit(config, self.schedule, self._source(), self.sd.scheduler))

    def edit_controlnet(self) -> np.ndarray:
        """Frames (N, H, W, 3) edited with a Canny ControlNet, on an inversion without it."""
        edges = self.sd.to_images(detect_canny(self.clip.frames, *CANNY_THRESHOLDS))
        config = ControlNetConfig(data_path="", prompt="unused")
        images = lambda frames: edges[None, frames]  # noqa: E731
        return self._edit(controlnet(config, self.schedule, self._source(), images))

    def edit_along_exact_flow(self) -> np.ndarray:
        """Frames (N, H, W, 3) edited with Plug-and-Play; what follows the flow follows the exact one."""
        return dataclasses.replace(self, exact_flow=True).edit_pnp()

    def motion(self) -> SourceMotion:
        """The source's motion, estimated or exact, as an edit follows it."""
        n_frames, device = self.clip.n_frames, self.sd.device
        between, name = dis_between(self.clip.frames.__getitem__), "flow"
        if self.exact_flow:
            between, name = self.clip.exact_between, "exact_flow"
        cell = self.clip.frames.shape[1] // self.clean.shape[2]
        pairs = KeptPairs(self.folder / name, n_frames, (2, *self.clean.shape[2:], 2))
        apart = range(1, furthest_keyframe(self.config.interval, n_frames) + 1)
        pairs.create(apart, n_frames, Processes(device))
        return SourceMotion(pairs, between, cell, self.config.max_displacement)

    def first_latents(self, frames: torch.Tensor) -> torch.Tensor:
        """The inverted latents (n, 4, h, w) of the first editing timestep, of the frames (n,)."""
        return self.inverted[self.schedule.timesteps[0]][frames]

    def _edit(
        self, technique: Technique, denoiser: type[Denoiser] = TokenFlowDenoiser
    ) -> np.ndarray:
        prompts = (self.clip.source_prompt, self.config.negative_prompt, self.config.prompt)
        edit = Edit(self.sd, technique, self._source(), prompts, self.config)
        all_frames, processes = torch.arange(self.clip.n_frames), Processes(self.sd.device)
        with tempfile.TemporaryDirectory() as name:
            folder, n_steps = Path(name), len(technique.schedule.timesteps)
            motion = cache(partial(self._dense_motion, processes))

            def fusion_at(distances: Iterable[int]) -> Fusion:
                return Fusion.along(motion(), distances, folder / "pictures.npy", processes)

            near_and_far = cache(partial(fusion_at, DISTANCES))
            if denoiser is TokenFlowDenoiser:
                agreed = consensus_steps(n_steps, self.config.consensus_count)
                consensus = partial(Consensus.after, self.sd, near_and_far, agreed)
                edit = dataclasses.replace(edit, consensus=consensus)
            if self.config.mask == "auto":
                edit = dataclasses.replace(edit, mask=self._mask(near_and_far(), folder))
            checkpoint = EditCheckpoint(folder, self.clean.shape, processes)
            with denoiser.installed(edit) as installed:
                steps = last(denoise(installed, checkpoint))
            frames = self.sd.decode_latents(checkpoint.latents(steps)[all_frames])
            reach = self.config.fuse_distance
            if denoiser is TokenFlowDenoiser and reach:
                fusion = fusion_at(range(1, reach + 1))
                fusion.put(all_frames, frames)
                frames = fusion.fused(all_frames, self.sd.device, FLICKER)
            return edit.mask.composed(frames, all_frames) if edit.mask else frames

    def _dense_motion(self, processes: Processes) -> DenseMotion:
        frames, n_frames = self.clip.frames, self.clip.n_frames
        about = self.folder / "motion", frames.shape[:3], frames.__getitem__, n_frames
        motion = DenseMotion.kept_in(*about)
        motion.find(followed_distances(self.config), processes)
        return motion

    def _mask(self, fusion: Fusion, folder: Path) -> Mask:
        n_frames, *size, _ = self.clip.frames.shape
        inside = FrameArray.create(folder / "mask.npy", (n_frames, 1, *size), torch.uint8)
        prompts = self.clip.source_prompt, self.clip.prompt
        noises = tuple(predictor_of(self.sd, prompt) for prompt in prompts)
        relevant = partial(relevance, self._source_latents, self.schedule.timesteps, noises)
        source, scale = self.clip.frames.__getitem__, size[0] // self.clean.shape[2]
        write_relevant(inside, fusion, relevant, scale, source, self.sd.device)
        return Mask(inside, self._source_latents, source)

    def _source(self) -> Source:
        kept = self.files.folder.exists()
        reused = kept and self.config.reuse_source and self.config.propagation == "flanking"
        followed = self.motion() if self.config.correspondences == "flow" else None
        features = self.files if reused else None
        return Source(self.latents, self.clip.n_frames, features, followed)

    def _source_latents(self, t: int | None, frames: torch.Tensor) -> torch.Tensor:
        return (self.clean if t is None else self.inverted[t])[frames]


@dataclass(frozen=True)
class Latents:
    """In place of an `Inversion` on disk: its latents (N, 4, h, w), by name."""

    by_name: dict[str, torch.Tensor]
    manifest: SimpleNamespace | None = None
    depth = control_scales = None

    def latents(self, name: str) -> torch.Tensor:
        """The latents of all frames."""
        return self.by_name[name]


def predictor_of(sd: StableDiffusion, prompt: str) -> VideoNoisePredictor:
    """Predicts the noise of a clip's frames under a prompt."""
    return VideoNoisePredictor(sd, prompt, Batches(INVERSION_BATCH, adapts=False))


def reconstruction_psnr(sd: StableDiffusion, clip: Clip, n_steps: int, fixed_point: bool) -> float:
    """PSNR (dB), against the VAE's round trip, of inverting and sampling in `n_steps` steps."""
    schedule, predictor = Schedule.of(sd.scheduler, n_steps), predictor_of(sd, clip.source_prompt)
    clean, frames = sd.encode_frames(clip.frames), torch.arange(clip.n_frames)
    _, noisiest = last(invert(clean, frames, schedule, predictor, fixed_point))
    reconstructed = last(sample(noisiest, frames, schedule, predictor))
    pair = sd.decode_latents(reconstructed), sd.decode_latents(clean)
    return float(np.mean(frame_psnr(*pair)))
