"""What a person should know about a reconstruction: how good it is and, if it is poor, why."""

from collections.abc import Callable

import torch

from tokenflow.config import PreprocessConfig
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.inversion.files import CLEAN, Inversion
from tokenflow.inversion.predictor import VideoNoisePredictor
from tokenflow.metrics import frame_psnr, frame_ssim
from tokenflow.runtime.batching import balanced
from tokenflow.runtime.distributed import Processes
from tokenflow.runtime.frame_array import FrameArray
from tokenflow.runtime.run_folder import Progress
from util import load_frames

# Below this PSNR (dB) textures and small objects of the source are lost, also in an edit.
POOR_PSNR = 20.0


def measure(
    inversion: Inversion, config: PreprocessConfig, processes: Processes, device: torch.device
) -> FrameArray:
    """PSNR and SSIM of each frame of the VAE's round trip against the source and, if there is one, of the
    reconstruction against the source and against the round trip: (N, 1 or 3, 2). Processes divide the frames.
    """
    source, vae, whole = inversion.source_frames, inversion.vae, inversion.reconstruction
    pairs = [(vae, source), (whole, source), (whole, vae)][: 1 if config.no_reconstruction else 3]
    scores = FrameArray(Progress(inversion.folder).folder / "scores.npy")
    all_frames = torch.arange(len(inversion.latents(CLEAN)))
    if processes.is_main:
        FrameArray.create(scores.path, (len(all_frames), len(pairs), 2), torch.float64)
    processes.wait()
    for frames in processes.share(balanced(all_frames, config.frames_at_once)):
        shown = {folder: load_frames(folder, frames.tolist()) for folder in set(sum(pairs, ()))}
        of_pairs = [
            [kind(shown[a], shown[b], device) for kind in (frame_psnr, frame_ssim)]
            for a, b in pairs
        ]
        scores[frames] = torch.tensor(of_pairs, dtype=torch.float64).permute(2, 0, 1)
    processes.wait()
    return scores


def reconstruction_report(
    sd: StableDiffusion,
    inversion: Inversion,
    config: PreprocessConfig,
    scores: FrameArray,
    noise_predictor: Callable[[str], VideoNoisePredictor],
) -> str:
    """How close the reconstruction and the VAE's round trip are to the source, in a sentence or two.

    scores: from `measure`. noise_predictor: maps a prompt to a predictor of the noise of the video's frames.
    """
    clean = inversion.latents(CLEAN)
    vae, *of_reconstruction = scores[torch.arange(len(clean))].mean(0).tolist()
    if not of_reconstruction:
        return f"the VAE's round trip: PSNR {vae[0]:.2f} dB, SSIM {vae[1]:.3f} against the source"
    whole, inverted = of_reconstruction
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
