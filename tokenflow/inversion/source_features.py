"""Source features: what edits need from the source stream, recorded in a reconstruction, kept on disk.

Keyframes do not depend on the prompt. Neither do the keyframe tokens that each frame takes (section 4.2)
or the features that Plug-and-Play injects. An edit that reads them denoises two streams instead of three.
"""

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from tokenflow.config import PreprocessConfig
from tokenflow.diffusion.ddim import Schedule
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.inversion.predictor import VideoNoisePredictor
from tokenflow.keyframe_cache import BlendedRows, KeyframeCache
from tokenflow.runtime.frame_array import FrameArray
from tokenflow.runtime.transfer import to_device
from tokenflow_utils import (
    INJECTED_RESNET,
    KeyframeSchedule,
    LayerProcessor,
    SourceFeatures,
    correspondences,
    flanking_blend,
    frame_self_attention,
    self_attentions_replaced,
)

log = logging.getLogger("tokenflow")

MAX_TOKENS = 1 << 15  # of a frame, as indices have 16 bits
LEVELS = 4  # resolutions of the UNet, each half the one before
LEVEL = re.compile(r"(down|up)_blocks\.(\d)|mid_block")


class SourceRecorder:
    """What the layers of a UNet record in the next pass, if anything."""

    def __init__(self) -> None:
        self.cache = KeyframeCache()  # of the keyframes that a segment's frames blend
        # The next pass is of keyframes (positions), of other frames (blended), or not recorded (neither).
        self.positions: list[int] | None = None
        self.blended: BlendedRows | None = None
        self.nearest: dict[str, torch.Tensor] = {}
        self.features: torch.Tensor | None = None

    @contextmanager
    def noting(
        self, positions: list[int] | None = None, blended: BlendedRows | None = None
    ) -> Iterator[None]:
        """Record keyframes at `positions`, or other frames and what they blend, in the block's passes."""
        self.positions, self.blended = positions, blended
        try:
            yield
        finally:
            self.positions, self.blended = None, None

    def feature_hook(self, module, args, output: torch.Tensor) -> None:
        """Record the residual block's output."""
        if self.blended is not None:
            self.features = output.half()


class RecordingAttention(LayerProcessor):
    """Plain self-attention that records keyframes' tokens, and other frames' correspondences to them."""

    def __init__(self, recorder: SourceRecorder, name: str) -> None:
        super().__init__(name)
        self.recorder = recorder

    @torch.compiler.disable
    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, *args, **kwargs
    ) -> torch.Tensor:
        """The layer's output for its input; both (n, s, d)."""
        recorder, cache = self.recorder, self.recorder.cache
        if recorder.positions is not None:
            cache.write(self.name, recorder.positions, hidden_states)
        elif recorder.blended is not None:
            key_tokens = cache.tensor(self.name)
            found = correspondences(hidden_states, key_tokens, recorder.blended)
            recorder.nearest[self.name] = found
        return frame_self_attention(attn, hidden_states)


@contextmanager
def install_recorder(unet: UNet2DConditionModel) -> Iterator[SourceRecorder]:
    """Install a recorder in every self-attention of `unet`, and take it out again at the end.

    Raises the errors of `self_attentions_replaced`.
    """
    recorder = SourceRecorder()
    with self_attentions_replaced(
        unet, lambda name: RecordingAttention(recorder, name), recorder.feature_hook
    ):
        yield recorder


class RecordingPredictor:
    """Predicts the noise of a segment's frames as `predictor` does, and keeps their source features.

    Its frames may blend keyframes outside the segment, one on each side, which then pass the UNet too.
    saved: maps a timestep and frame indices (n,) to the latents (n, 4, h, w) that the inversion found.
    later: calls a function that writes, now or while later passes are computed.
    """

    def __init__(
        self,
        predictor: VideoNoisePredictor,
        recorder: SourceRecorder,
        schedule: KeyframeSchedule,
        saved: Callable[[int, torch.Tensor], torch.Tensor],
        files: "SourceFeatureFiles",
        later: Callable[..., None] = lambda write, *arguments: write(*arguments),
    ) -> None:
        self.later = later
        self.predictor, self.recorder = predictor, recorder
        self.keyframes, self.saved, self.files = schedule.draw(), saved, files

    def __call__(self, latents: torch.Tensor, t: int, frames: torch.Tensor) -> torch.Tensor:
        """The noise (n, 4, h, w) in latents (n, 4, h, w) of frames (n,) that are neighbours in the video."""
        all_keyframes = self.keyframes[t]
        keyframes = all_keyframes[flanking_blend(frames, all_keyframes).positions.unique()]
        place = torch.searchsorted(frames, keyframes).clamp(max=len(frames) - 1)
        inside = frames[place] == keyframes
        of_keyframes = self.saved(t, keyframes).to(latents)
        of_keyframes[inside] = latents[place[inside]]
        rest = ~torch.isin(frames, keyframes)

        def of_keyframe(samples: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            with self.recorder.noting(positions=positions.tolist()):
                return self.predictor.predict_batch(samples, t, keyframes[positions])

        def of_other(samples: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
            blend, sd = flanking_blend(others, keyframes), self.predictor.sd
            where = sd.device, sd.dtype
            blended = self.recorder.cache.blended(blend.positions, blend.weights, *where)
            with self.recorder.noting(blended=blended):
                noise = self.predictor.predict_batch(samples, t, others)
            features = SourceFeatures(dict(self.recorder.nearest), self.recorder.features)
            self.later(self.files.write, t, others, features)
            return noise

        noise, batches = torch.empty_like(latents), self.predictor.batches
        positions = torch.arange(len(keyframes))
        self.recorder.cache.keep([])
        self.recorder.cache.positions += positions.tolist()
        noise[place[inside]] = batches.map(of_keyframe, of_keyframes, positions)[inside]
        if rest.any():
            noise[rest] = batches.map(of_other, latents[rest], frames[rest])
        return noise


@dataclass(frozen=True)
class SourceFeatureFiles:
    """Source features of all frames at each timestep: `nearest_<t>.npy` and `features_<t>.npy`."""

    folder: Path

    def create(
        self,
        unet: UNet2DConditionModel,
        latent_shape: tuple[int, ...],
        timesteps: Iterable[int],
    ) -> None:
        """Create the files for latents (N, 4, h, w) at the timesteps, unless they exist."""
        tokens = tokens_by_layer(unet, latent_shape)
        n_frames = latent_shape[0]
        for t in timesteps:
            shape = (n_frames, 2, sum(tokens.values()))
            FrameArray(self._file("nearest", t)).ensure(shape, torch.int16)
            shape = (n_frames, *features_shape(unet, latent_shape))
            FrameArray(self._file("features", t)).ensure(shape, torch.float16)
        (self.folder / "layers.json").write_text(json.dumps(tokens, indent=2) + "\n")

    def write(self, t: int, frames: torch.Tensor, source: SourceFeatures) -> None:
        """Write the features of the frames (n,)."""
        nearest = torch.cat([source.nearest[name] for name in self._layers()], dim=-1)  # n 2 tokens
        FrameArray(self._file("nearest", t))[frames] = (
            nearest.short()
        )  # before it leaves the device
        FrameArray(self._file("features", t))[frames] = source.features

    def read(
        self, t: int, frames: torch.Tensor, injected: bool, device: torch.device
    ) -> SourceFeatures:
        """Read the features of the frames (n,); most bytes are for Plug-and-Play, read only if `injected`."""
        layers = self._layers()
        nearest = to_device(FrameArray(self._file("nearest", t))[frames], device)
        per_layer = nearest.long().split(list(layers.values()), dim=-1)
        by_layer, features = dict(zip(layers, per_layer, strict=True)), None
        if injected:
            features = to_device(FrameArray(self._file("features", t))[frames], device)
        return SourceFeatures(by_layer, features)

    def written(self, timesteps: Iterable[int], frames: torch.Tensor) -> Iterator[bytes]:
        """The bytes of the frames (n,) in each file."""
        for t in timesteps:
            for kind in ("nearest", "features"):
                yield FrameArray(self._file(kind, t)).bytes_of(frames)

    def _layers(self) -> dict[str, int]:
        return json.loads((self.folder / "layers.json").read_text())

    def _file(self, kind: str, t: int) -> Path:
        return self.folder / f"{kind}_{t}.npy"


def can_keep_source_features(
    sd: StableDiffusion,
    folder: Path,
    config: PreprocessConfig,
    latent_shape: tuple[int, ...],
    editing: Schedule,
) -> bool:
    """Whether source features are wanted and fit on the disk of `folder`; logs the space that they take."""
    if not config.keep_source or config.inversion != "fixed_point":
        return False  # sampling does not retrace the latents of a naive inversion
    needed = bytes_needed(sd.unet, latent_shape, len(editing.timesteps))
    if latent_shape[-2] * latent_shape[-1] > MAX_TOKENS:
        log.warning(
            "source features of frames this large cannot be kept: edits will denoise the source too"
        )
        return False
    if needed > shutil.disk_usage(folder).free:
        log.warning(
            "source features are not kept, because they take %.0f MB, more disk than is free: "
            "edits will denoise the source too",
            needed / 1e6,
        )
        return False
    log.info("source features, which make edits faster, take %.0f MB of disk", needed / 1e6)
    return True


def tokens_by_layer(unet: UNet2DConditionModel, latent_shape: tuple[int, ...]) -> dict[str, int]:
    """The number of a frame's tokens in each self-attention, by name, for latents (N, 4, h, w)."""
    height, width = latent_shape[-2:]
    tokens = {}
    for name in unet.attn_processors:
        if name.endswith(".attn1.processor"):
            side, block = LEVEL.match(name).groups()
            down = {"down": int(block or 0), "up": LEVELS - 1 - int(block or 0)}.get(
                side, LEVELS - 1
            )
            tokens[name] = height * width // 4**down
    return tokens


def features_shape(unet: UNet2DConditionModel, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape (c, h, w) of what Plug-and-Play injects into a frame, for latents (N, 4, h, w)."""
    down = LEVELS - 1 - INJECTED_RESNET[0]
    channels = unet.config.block_out_channels[down]
    return channels, latent_shape[-2] // 2**down, latent_shape[-1] // 2**down


def bytes_needed(unet: UNet2DConditionModel, latent_shape: tuple[int, ...], n_steps: int) -> int:
    """Bytes that a `SourceFeatureFiles` takes for latents (N, 4, h, w) at `n_steps` timesteps."""
    tokens = sum(tokens_by_layer(unet, latent_shape).values())
    features = math.prod(features_shape(unet, latent_shape))
    return 2 * latent_shape[0] * n_steps * (2 * tokens + features)
