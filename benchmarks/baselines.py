"""What TokenFlow is compared with: the same edits without its propagation."""

from collections.abc import Iterator

import torch

from tokenflow.editing.denoise import Denoiser, Latents
from tokenflow_utils import JointEdit


class FrameByFrame(Denoiser):
    """Each frame edited by itself, as an image: no extended attention, no propagation."""

    extended = False

    def predict(
        self, latents: Latents, t: int, chunks: list[torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For the `chunks`, one by one: frames (n,) and their guided noise (n, 4, h, w)."""
        for frames in chunks:
            self.tokenflow.cache.keep([])
            self.tokenflow.task = JointEdit(
                frames.tolist(),
                inject_attention=t in self.attention_timesteps,
                inject_features=t in self.feature_timesteps,
                extended=self.extended,
            )
            yield frames, self.predict_guided_noise(latents, t, frames)


class ExtendedAttention(FrameByFrame):
    """All frames edited jointly with extended attention, and nothing propagated."""

    extended = True

    def plan(self, t: int) -> list[torch.Tensor]:
        """All frames together, since they attend to each other."""
        return [torch.arange(self.source.n_frames)]
