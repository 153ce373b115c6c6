"""What a person should know about a reconstruction: how good it is and, if it is poor, why."""

from collections.abc import Callable
from pathlib import Path

import torch

from tokenflow.config import PreprocessConfig
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.evaluation.figures import (
    RECONSTRUCTION,
    SOURCE,
    VAE,
    Curves,
    beside_source,
    measure,
    summarize,
)
from tokenflow.evaluation.report import PAGE, PARTS, Entry, thumbnails, write_report
from tokenflow.evaluation.verdict import POOR_PSNR, verdict
from tokenflow.inversion.files import CLEAN, HOW, Inversion, Manifest
from tokenflow.inversion.predictor import VideoNoisePredictor
from util import decode_frames, write_video_from_folders


def pictures_of(inversion: Inversion) -> dict[str, Path]:
    """The folders of an inversion's frames, by what they show; the reconstruction may be missing."""
    reconstruction = inversion.reconstruction
    pictures = {SOURCE: inversion.source_frames, VAE: inversion.vae}
    return pictures | ({RECONSTRUCTION: reconstruction} if reconstruction.exists() else {})


def compare(folders: dict[str, Path]) -> Curves:
    """How close the frames of the other folders are to those of the one that is the SOURCE."""
    return measure({name: decode_frames(f) for name, f in folders.items()}, [beside_source])


def report_reconstruction(
    sd: StableDiffusion,
    inversion: Inversion,
    manifest: Manifest,
    config: PreprocessConfig,
    noise_predictor: Callable[[str], VideoNoisePredictor],
) -> str:
    """How close the reconstruction and the VAE's round trip are to the source, in a sentence or two.

    If there is a reconstruction, also writes `report.html` into the inversion's folder.
    noise_predictor: maps a prompt to a predictor of the noise of the video's frames.
    """
    curves = compare(pictures_of(inversion))

    def closeness(curves: Curves, name: str) -> str:
        figures = summarize(curves, 1)
        return f"PSNR {figures['psnr'][name]:.2f} dB, SSIM {figures['ssim'][name]:.3f}"

    if RECONSTRUCTION not in curves["psnr"]:
        return f"the VAE's round trip: {closeness(curves, VAE)} against the source"
    write_page(inversion, manifest, curves)
    to_vae = compare({SOURCE: inversion.vae, RECONSTRUCTION: inversion.reconstruction})
    text = (
        f"reconstruction: {closeness(curves, RECONSTRUCTION)} against the source; "
        f"{closeness(to_vae, RECONSTRUCTION)} against the VAE's round trip, "
        f"which itself has {closeness(curves, VAE)}"
    )
    psnr = summarize(curves, 1)["psnr"]
    if psnr[RECONSTRUCTION] >= POOR_PSNR:
        return text
    text += (
        f"\nwarning: below {POOR_PSNR:.0f} dB a video is too poorly reconstructed to edit well; "
    )
    if psnr[VAE] < POOR_PSNR:
        return text + "the VAE is the reason: use larger frames (--H, --W) or another checkpoint"
    clean = inversion.latents(CLEAN)
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
    fps, pictures = manifest.frame_rate, pictures_of(inversion)
    source = inversion.folder / PARTS / "source.mp4"
    write_video_from_folders(source, [inversion.source_frames], manifest.n_frames, fps)
    figures = summarize(curves, float(fps))
    # The same inversion in another folder, or computed in another way, has the same page.
    hidden = {*HOW, "save_dir"}
    entry = Entry(
        name=f"reconstruction of {Path(manifest.config['data_path']).stem}",
        prompt=manifest.config["inversion_prompt"],
        videos={SOURCE: source, RECONSTRUCTION: inversion.folder / "inverted.mp4"},
        fps=fps,
        n_frames=manifest.n_frames,
        figures=figures,
        curves=curves,
        findings=verdict(figures),
        skipped=["all but the reconstruction's figures: evaluate.py measures them, of edits"],
        options={key: value for key, value in manifest.config.items() if key not in hidden},
        pictures=thumbnails(
            {name: decode_frames(folder) for name, folder in pictures.items()}, manifest.n_frames
        ),
    )
    write_report(inversion.folder / PAGE, entry.name, [entry])
