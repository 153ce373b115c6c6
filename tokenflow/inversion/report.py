"""What a person should know about a reconstruction: how good it is and, if it is poor, why."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tokenflow.config import HOW, PreprocessConfig
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.evaluation.contact_sheet import thumbnails
from tokenflow.evaluation.meters import BesideSource, Curves, summarize
from tokenflow.evaluation.report import PAGE, PARTS, Entry, write_report
from tokenflow.evaluation.subject import RECONSTRUCTION, SOURCE, VAE
from tokenflow.evaluation.verdict import POOR_PSNR, verdict
from tokenflow.inversion.files import CLEAN, Inversion, Manifest
from tokenflow.inversion.predictor import VideoNoisePredictor
from tokenflow.runtime.ahead import in_parallel
from tokenflow.runtime.distributed import Processes
from tokenflow.runtime.frame_array import FrameArray
from tokenflow.runtime.run_folder import Progress
from util import decode_frames, frame_path, read_image, write_video_from_folders

KINDS = ("psnr", "ssim", "sharpness")


def compare(inversion: Inversion, config: PreprocessConfig, processes: Processes) -> FrameArray:
    """How close, by each of the KINDS, each frame of the VAE's round trip is to the source and, if there is
    one, of the reconstruction to the source and to the round trip: (N, 1 or 3, 3).

    Processes divide the frames, and compute on their devices.
    """
    source, vae, whole = inversion.source_frames, inversion.vae, inversion.reconstruction
    meter = BesideSource(processes.device)
    pairs = [(source, vae), (source, whole), (vae, whole)][: 1 if config.no_reconstruction else 3]
    scores = FrameArray(Progress(inversion.folder).folder / "scores.npy")
    frames = torch.arange(len(inversion.latents(CLEAN)))
    if processes.is_main:
        FrameArray.create(scores.path, (len(frames), len(pairs), len(KINDS)), torch.float64)
    processes.wait()

    def read(frame: torch.Tensor) -> tuple[torch.Tensor, dict[Path, np.ndarray]]:
        folders = set(sum(pairs, ()))
        return frame, {folder: read_image(frame_path(folder, frame.item())) for folder in folders}

    for frame, shown in in_parallel(read, processes.share(frames.split(1))):
        of_pairs = [meter.measure([np.stack([shown[a], shown[b]])]) for a, b in pairs]
        values = [[of_pair[kind][1] for kind in KINDS] for of_pair in of_pairs]
        scores[frame] = torch.tensor([values], dtype=torch.float64)
    processes.wait()
    return scores


def report_reconstruction(
    sd: StableDiffusion,
    inversion: Inversion,
    manifest: Manifest,
    config: PreprocessConfig,
    scores: FrameArray,
    noise_predictor: Callable[[str], VideoNoisePredictor],
) -> str:
    """How close the reconstruction and the VAE's round trip are to the source, in a sentence or two.

    If there is a reconstruction, also writes `report.html` into the inversion's folder.
    scores: from `compare`. noise_predictor: maps a prompt to a predictor of the noise of the video's frames.
    """
    clean = inversion.latents(CLEAN)
    by_pair = scores[torch.arange(len(clean))].permute(1, 2, 0)
    psnr = by_pair[:, 0].mean(-1).tolist()

    def closeness(pair: int) -> str:
        return f"PSNR {psnr[pair]:.2f} dB, SSIM {by_pair[pair, 1].mean():.3f}"

    if config.no_reconstruction:
        return f"the VAE's round trip: {closeness(0)} against the source"
    shown = VAE, RECONSTRUCTION
    curves = {
        k: dict(zip(shown, by_pair[:2, i].tolist(), strict=True)) for i, k in enumerate(KINDS)
    }
    write_page(inversion, manifest, curves)
    text = (
        f"reconstruction: {closeness(1)} against the source; "
        f"{closeness(2)} against the VAE's round trip, "
        f"which itself has {closeness(0)}"
    )
    if psnr[1] >= POOR_PSNR:
        return text
    text += (
        f"\nwarning: below {POOR_PSNR:.0f} dB a video is too poorly reconstructed to edit well; "
    )
    if psnr[0] < POOR_PSNR:
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


def write_page(inversion: Inversion, manifest: Manifest, curves: Curves) -> None:
    """Write `report.html` into an inversion's folder, with the source as a video that it shows."""
    fps = manifest.frame_rate
    pictures = {SOURCE: inversion.source_frames, VAE: inversion.vae}
    pictures[RECONSTRUCTION] = inversion.reconstruction
    source = inversion.folder / PARTS / "source.mp4"
    write_video_from_folders(source, [inversion.source_frames], manifest.n_frames, fps)
    metrics = summarize(curves, float(fps))
    # The same inversion in another folder, or computed in another way, has the same page.
    hidden = {*HOW, "save_dir"}
    entry = Entry(
        name=f"reconstruction of {Path(manifest.config['data_path']).stem}",
        prompt=manifest.config["inversion_prompt"],
        videos={SOURCE: source, RECONSTRUCTION: inversion.folder / "inverted.mp4"},
        fps=fps,
        n_frames=manifest.n_frames,
        metrics=metrics,
        curves=curves,
        findings=verdict(metrics),
        skipped=["temporal consistency and CLIP score: evaluate.py measures them for edits"],
        options={key: value for key, value in manifest.config.items() if key not in hidden},
        pictures={
            name: thumbnails(decode_frames(folder), manifest.n_frames)
            for name, folder in pictures.items()
        },
    )
    write_report(inversion.folder / PAGE, entry.name, [entry])
