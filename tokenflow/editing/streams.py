"""What each stream of an edit is given in a pass of the UNet, and the noise that is predicted for it."""

from contextlib import nullcontext

import torch

from tokenflow.diffusion.stable_diffusion import Control, StableDiffusion, Text
from tokenflow.editing.source import Source
from tokenflow.editing.techniques import Technique
from tokenflow_utils import SOURCE, UNEDITED, TokenFlow

ORIGINAL = SOURCE, UNEDITED  # streams that LoRAs do not concern


class Streams:
    """The streams of an edit, each with its latents, prompt, conditions and network.

    prompts: for source, uncond and cond. The unedited stream has the edit's latents and conditions, and the
    source's prompt and network.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        technique: Technique,
        source: Source,
        prompts: tuple[str, str, str],
        tokenflow: TokenFlow,
    ) -> None:
        self.sd, self.technique, self.source, self.tokenflow = sd, technique, source, tokenflow
        with sd.original():
            unedited = sd.encode_text(prompts[SOURCE])
        uncond, cond = (sd.encode_text(prompt) for prompt in prompts[SOURCE + 1 :])
        self.text = unedited, uncond, cond, unedited  # by stream

    def predict_noise(
        self,
        edited: torch.Tensor,
        t: int,
        frames: torch.Tensor,
        streams: tuple[int, ...],
        together: bool = True,
    ) -> dict[int, torch.Tensor]:
        """The noise (n, 4, h, w) of the frames (n,), by stream.

        edited: the edit's latents (n, 4, h, w). streams: those that pass the UNet, ascending. together:
        whether in one pass; the original network's streams pass apart if LoRAs change it.
        """
        passes = [streams] if together else [(stream,) for stream in streams]
        if together and self.sd.adapted:
            original = tuple(stream for stream in streams if stream in ORIGINAL)
            passes = [original, tuple(stream for stream in streams if stream not in ORIGINAL)]
        controls, depth, noise = self.technique.control(frames), self.source.depth(frames), {}
        for passing in filter(None, passes):
            self.tokenflow.streams = passing
            source = self.source.latents(t, frames).to(edited) if SOURCE in passing else None
            samples = torch.cat([source if stream == SOURCE else edited for stream in passing])
            text = Text.cat([self.text[stream].expand(len(frames)) for stream in passing])
            control = None
            if controls:
                control = Control.cat([controls[stream != SOURCE] for stream in passing])
            seen = None if depth is None else depth.repeat(len(passing), 1, 1, 1)
            with self.sd.original() if passing[0] in ORIGINAL else nullcontext():
                predicted = self.sd.predict_noise(samples, t, text, control, seen)
            noise |= zip(passing, predicted.chunk(len(passing)), strict=True)
        return noise
