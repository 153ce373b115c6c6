"""What a person should know about a reconstruction: how good it is and, if it is poor, why."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tokenflow.config import PreprocessConfig
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.inversion.files import CLEAN, Inversion
from tokenflow.inversion.predictor import VideoNoisePredictor
from tokenflow.metrics import frame_psnr, frame_ssim
from tokenflow.runtime.batching import balanced
from util import load_frames

# Below this PSNR (dB) textures and small objects of the source are lost, also in an edit.
POOR_PSNR = 20.0


def reconstruction_report(
    sd: StableDiffusion,
    inversion: Inversion,
    config: PreprocessConfig,
    noise_predictor: Callable[[str], VideoNoisePredictor],
) -> str:
    """How close the reconstruction and the VAE's round trip are to the source, in a sentence or two.

    noise_predictor: maps a prompt to a predictor of the noise of the video's frames.
    """
    clean = inversion.latents(CLEAN)

    def compare(a: Path, b: Path) -> tuple[float, float]:
        scores = []
        for frames in balanced(torch.arange(len(clean)), config.frames_at_once):
            pair = [load_frames(folder, frames.tolist()) for folder in (a, b)]
            scores += zip(frame_psnr(*pair), frame_ssim(*pair), strict=True)
        return tuple(np.mean(scores, axis=0))

    vae = compare(inversion.vae, inversion.source_frames)
    if not inversion.reconstruction.exists():
        return f"the VAE's round trip: PSNR {vae[0]:.2f} dB, SSIM {vae[1]:.3f} against the source"
    whole = compare(inversion.reconstruction, inversion.source_frames)
    inverted = compare(inversion.reconstruction, inversion.vae)
    text = (
        f"reconstruction: PSNR {whole[0]:.2f} dB, SSIM {whole[1]:.3f} against the source; "
        f"PSNR {inverted[0]:.2f} dB, SSIM {inverted[1]:.3f} against the VAE's round trip, "
        f"which itself has PSNR {vae[0]:.2f} dB, SSIM {vae[1]:.3f}"
    )
    if whole[0] >= POOR_PSNR:
        return text
    text += (
        f"\nwarning: below {POOR_PSNR:.0f} dB a video is too poorly reconstructed to edit well; "
    )
    if vae[0] < POOR_PSNR:
        return text + "the VAE is the reason: use larger frames (--H, --W) or another checkpoint"
    frames = torch.arange(min(len(clean), config.frames_at_once))
    predictors = [noise_predictor(prompt) for prompt in (config.inversion_prompt, "")]
    with_prompt, without = (noise_error(sd, p, clean[frames], config.seed) for p in predictors)
    if with_prompt > without:
        return text + "the prompt is the reason: the model does better without --inversion_prompt"
    return text + "the inversion is the reason: use more --steps, or a better --inversion_prompt"


def noise_error(
    sd: StableDiffusion, predictor: VideoNoisePredictor, clean: torch.Tensor, seed: int
) -> float:
    """Mean square error of the noise predicted in the first n frames' `clean` latents, after noising."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    t = sd.scheduler.config.num_train_timesteps // 2  # where the prompt matters most
    noised = sd.scheduler.add_noise(clean, noise, torch.tensor(t))
    predicted = predictor(noised, t, torch.arange(len(clean)))
    return (predicted - noise).square().mean().item()
