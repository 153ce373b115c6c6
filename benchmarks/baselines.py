"""What TokenFlow is compared with: the same edits without its propagation."""

from collections.abc import Iterator

import torch

from tokenflow.editing.denoise import Denoiser, Latents
from tokenflow.editing.guidance import guide
from tokenflow.runtime.frame_array import FrameArray
from tokenflow_utils import STREAMS, JointEdit


class FrameByFrame(Denoiser):
    """Each frame edited by itself, as an image: no extended attention, no propagation."""

    extended = False

    def predict(
        self,
        latents: Latents,
        step: int,
        chunks: list[torch.Tensor],
        memory: FrameArray | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """As `Denoiser.predict`, chunk by chunk."""
        planned = self.steps.plan(step)
        for frames in chunks:
            self.tokenflow.cache.keep([])
            self.tokenflow.task = JointEdit(
                frames.tolist(),
                inject_attention=planned.injects_attention,
                inject_features=planned.injects_features,
                extended=self.extended,
            )
            noise = self.predict_noise(latents[frames], planned.t, frames, STREAMS)
            yield frames, *guide(noise, self.find_scale(frames))


class ExtendedAttention(FrameByFrame):
    """All frames edited jointly with extended attention, and nothing propagated."""

    extended = True

    def divide(self, step: int) -> list[torch.Tensor]:
        """All frames together, since they attend to each other."""
        return [torch.arange(self.source.n_frames)]
