"""What TokenFlow is compared with: the same edits without its propagation."""

import torch

from editor import Denoiser


class FrameByFrame(Denoiser):
    """Each frame edited by itself, as an image: no extended attention, no propagation."""

    extended = False

    def predict_noise(self, latents: torch.Tensor, t: int) -> torch.Tensor:
        """The guided noise (N, 4, h, w) of all frames' latents (N, 4, h, w) at timestep `t`."""
        noise = torch.empty_like(latents)
        for frames in torch.arange(len(latents)).split(self.frames_at_once(len(latents))):
            self.flow.begin_joint_edit(
                t in self.attention_timesteps, t in self.feature_timesteps, self.extended
            )
            noise[frames] = self.guided_noise(latents, t, frames)
        return noise

    def frames_at_once(self, n_frames: int) -> int:
        """How many frames one pass edits."""
        return self.config.batch_size


class ExtendedAttention(FrameByFrame):
    """All frames edited jointly with extended attention, and nothing propagated."""

    extended = True

    def frames_at_once(self, n_frames: int) -> int:
        """All of them, since they attend to each other."""
        return n_frames
