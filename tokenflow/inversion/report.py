"""How good a reconstruction is: what is measured of it, in a sentence and as a page."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tokenflow.config import HOW
from tokenflow.evaluation.contact_sheet import thumbnails
from tokenflow.evaluation.meters import BesideSource, Curves, measure, name_curves, summarize
from tokenflow.evaluation.report import PAGE, PARTS, Entry, write_report
from tokenflow.evaluation.subject import RECONSTRUCTION, SOURCE, VAE
from tokenflow.evaluation.verdict import verdict
from tokenflow.inversion.files import VIDEO, Inversion, Manifest, name_video
from tokenflow.video.write import write_video_from_folders
from util import read_frames


@dataclass(frozen=True)
class Quality:
    """PSNR, SSIM and sharpness of each frame of the VAE's round trip and of the reconstruction, if any.

    curves: against the source. against_vae: of the reconstruction against the VAE's round trip.
    """

    curves: Curves
    against_vae: Curves

    @classmethod
    def measure(cls, inversion: Inversion, n_frames: int, device: torch.device) -> "Quality":
        """Compare the frames of an inversion; PSNR and SSIM are computed on a device."""
        videos = inversion.list_videos()
        curves = compare(videos, n_frames, device)
        del videos[SOURCE]
        return cls(curves, compare(videos, n_frames, device) if len(videos) > 1 else {})

    def psnr(self, name: str) -> float:
        """The mean PSNR of a video against the source."""
        return float(np.mean(self.curves["psnr"][name]))

    def describe(self) -> str:
        """How close both videos are, in a sentence."""
        vae = self._describe(self.curves, VAE)
        if not self.against_vae:
            return f"the VAE's round trip: {vae} against the source"
        return (
            f"reconstruction: {self._describe(self.curves, RECONSTRUCTION)} against the source; "
            f"{self._describe(self.against_vae, RECONSTRUCTION)} against the VAE's round trip, "
            f"which itself has {vae}"
        )

    @staticmethod
    def _describe(curves: Curves, name: str) -> str:
        psnr, ssim = (np.mean(curves[kind][name]) for kind in ("psnr", "ssim"))
        return f"PSNR {psnr:.2f} dB, SSIM {ssim:.3f}"


def compare(folders: dict[str, Path], n_frames: int, device: torch.device) -> Curves:
    """PSNR, SSIM and sharpness of the frames in several folders against those in the first one."""
    videos = (read_frames(folder, n_frames) for folder in folders.values())
    moments = map(np.stack, zip(*videos, strict=True))
    measured = measure(moments, [BesideSource(device)])
    return name_curves(measured, {name: column for column, name in enumerate(folders)})


def write_page(inversion: Inversion, manifest: Manifest, curves: Curves) -> None:
    """Write `report.html` into an inversion's folder, with the source as a video that it shows."""
    fps, n_frames = manifest.frame_rate, manifest.n_frames
    source = inversion.folder / PARTS / "source.mp4"
    write_video_from_folders(source, [inversion.source_frames], n_frames, fps)
    metrics = summarize(curves, float(fps))
    # The same inversion in another folder, or computed in another way, has the same page.
    hidden = {*HOW, "save_dir"}
    entry = Entry(
        name=f"reconstruction of {name_video(manifest.config['data_path'])}",
        prompt=manifest.config["inversion_prompt"],
        videos={SOURCE: source, RECONSTRUCTION: inversion.folder / VIDEO},
        fps=fps,
        n_frames=n_frames,
        metrics=metrics,
        curves=curves,
        findings=verdict(metrics),
        skipped=["temporal consistency and CLIP score: evaluate.py measures them for edits"],
        options={key: value for key, value in manifest.config.items() if key not in hidden},
        pictures={
            name: thumbnails(read_frames(folder, n_frames), n_frames)
            for name, folder in inversion.list_videos().items()
        },
    )
    write_report(inversion.folder / PAGE, entry.name, [entry])
