"""Quality of edits on clips whose motion and content are known exactly.

Edits held-out clips of the world of shapes with every method and measures how steady, how right and how
close to the source they are; writes a table (Markdown and JSON), a plot and a contact sheet.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.baselines import ExtendedAttention, FrameByFrame
from benchmarks.clips import Clip, held_out_clips
from benchmarks.report import markdown_table, plot
from config import PnPConfig, SDEditConfig
from control import canny
from diffusion import Schedule, StableDiffusion, choose_device, invert, last, load, sample
from editor import Denoiser, Technique, TokenFlowDenoiser, edit
from metrics import frame_psnr, warp_error
from shapes.controlnet import CANNY_THRESHOLDS
from shapes.judge import Judge
from sheets import contact_sheet, moments
from techniques import controlnet, plug_and_play, sdedit
from util import write_image

GAPS = (1, 8)  # frames between the two that a warp error compares
RECONSTRUCTION_STEPS = (10, 20, 50, 100)
SDEDIT_START = 0.7


@dataclass(frozen=True)
class Job:
    """One clip with its inversion, ready for any method."""

    sd: StableDiffusion
    clip: Clip
    clean: torch.Tensor  # N 4 h w
    inverted: dict[int, torch.Tensor]  # by timestep, each N 4 h w
    schedule: Schedule
    config: PnPConfig

    @classmethod
    def prepare(cls, sd: StableDiffusion, clip: Clip, config: PnPConfig) -> "Job":
        """Encode and invert a clip on the editing steps."""
        schedule = Schedule.of(sd.scheduler, config.n_timesteps)
        clean = sd.encode_frames(clip.frames)
        inverted = dict(invert(clean, schedule, plain_predictor(sd, clip)))
        config = dataclasses.replace(config, prompt=clip.prompt)
        return cls(sd, clip, clean, inverted, schedule, config)

    def edit(
        self,
        technique: Technique,
        denoiser: type[Denoiser] = TokenFlowDenoiser,
        **changes: str,
    ) -> np.ndarray:
        """Edited frames (N, H, W, 3), with other values of the configuration in `changes`."""
        config = dataclasses.replace(self.config, **changes)
        prompts = (self.clip.source_prompt, config.negative_prompt, config.prompt)
        steps = edit(
            self.sd, technique, lambda t, f: self.inverted[t][f], prompts, config, denoiser
        )
        return self.sd.decode_latents(last(steps))

    @property
    def first_latents(self) -> torch.Tensor:
        """The inverted latents (N, 4, h, w) of the first editing timestep."""
        return self.inverted[self.schedule.timesteps[0]]

    def pnp(self) -> Technique:
        """Plug-and-Play."""
        return plug_and_play(self.config, self.schedule, self.first_latents)

    def sdedit(self) -> Technique:
        """SDEdit from the inversion's noise."""
        config = SDEditConfig(
            data_path="", prompt="", n_timesteps=self.config.n_timesteps, start=SDEDIT_START
        )
        first = self.schedule.timesteps[0]
        scheduler, inverted = self.sd.scheduler, self.first_latents
        return sdedit(config, self.schedule, scheduler, self.clean, inverted, first)

    def controlnet(self) -> Technique:
        """A Canny ControlNet on an inversion without it."""
        edges = self.sd.to_images(canny(self.clip.frames, *CANNY_THRESHOLDS))
        return controlnet(self.schedule, self.first_latents, lambda frames: edges[frames], 0.0, 1.0)


METHODS: dict[str, Callable[[Job], np.ndarray]] = {
    "source": lambda job: job.clip.frames,
    "vae": lambda job: job.sd.decode_latents(job.clean),
    "per_frame": lambda job: job.edit(job.pnp(), FrameByFrame),
    "extended_attention": lambda job: job.edit(job.pnp(), ExtendedAttention),
    "tokenflow_previous": lambda job: job.edit(job.pnp(), propagation="previous"),
    "tokenflow_flanking": lambda job: job.edit(job.pnp(), propagation="flanking"),
    "sdedit": lambda job: job.edit(job.sdedit()),
    "controlnet": lambda job: job.edit(job.controlnet()),
}


def plain_predictor(sd: StableDiffusion, clip: Clip) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Noise prediction under the source's caption, without guidance."""
    text = sd.encode_text(clip.source_prompt).expand(clip.n_frames, -1, -1)
    return lambda latents, t: sd.predict_noise(latents, t, text)


def measure(
    clip: Clip, frames: np.ndarray, judge: Judge, gaps: tuple[int, ...] = GAPS
) -> dict[str, float]:
    """Warp errors (x 1e-3), share of attributes right, PSNR (dB) of what should stay the same."""
    row = {}
    for gap in gaps:
        pairs = [(i, i + gap) for i in range(clip.n_frames - gap)]
        errors = [warp_error(frames[i], frames[j], *clip.flow(i, j)) for i, j in pairs]
        row[f"warp_{gap}"] = 1e3 * float(np.mean(errors))
    answers = judge.read(frames)
    for name, edited in (("edited_right", True), ("kept_right", False)):
        right = [
            answer == value
            for attribute, value in clip.truth(edited).items()
            for answer in answers[attribute]
        ]
        row[name] = float(np.mean(right))
    stays = np.stack([clip.stays(time) for time in range(clip.n_frames)])
    row["kept_psnr"] = float("nan")  # where the edit names everything, nothing should stay
    if stays.any():
        error = np.square((frames.astype(float) - clip.frames)[stays] / 255).mean()
        row["kept_psnr"] = float(-10 * np.log10(max(error, 1e-10)))
    return row


def reconstruction_psnr(sd: StableDiffusion, clip: Clip, n_steps: int) -> float:
    """PSNR (dB), against the VAE's round trip, of inverting and sampling in `n_steps` steps."""
    schedule, predict_noise = Schedule.of(sd.scheduler, n_steps), plain_predictor(sd, clip)
    clean = sd.encode_frames(clip.frames)
    _, noisiest = last(invert(clean, schedule, predict_noise))
    reconstructed = last(sample(noisiest, schedule, predict_noise))
    pair = sd.decode_latents(reconstructed), sd.decode_latents(clean)
    return float(np.mean(frame_psnr(*pair)))


def parse_arguments() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer clips, frames and steps")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--output", type=Path, default=Path("runs/quality"), help="folder")
    parser.add_argument("--model", type=Path, default=Path("data/shapes-sd"), help="checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    return parser.parse_args()


def main() -> None:
    """Edit every clip with every method, measure, and write the report."""
    args = parse_arguments()
    n_clips, n_frames, n_steps = (4, 16, 20) if args.quick else (12, 24, 50)
    device, dtype = choose_device(args.device, args.dtype)
    sd = load(str(args.model), str(args.model / "controlnet"), device, dtype)
    judge = Judge.load(args.model / "judge.safetensors")
    config = PnPConfig(data_path="", prompt="", n_timesteps=n_steps)
    args.output.mkdir(parents=True, exist_ok=True)

    measured, videos = {name: [] for name in METHODS}, []
    clips = held_out_clips(n_clips, n_frames)
    with tqdm(desc="Editing", total=n_clips * len(METHODS), unit="video") as bar:
        for clip in clips:
            job, edits = Job.prepare(sd, clip, config), {}
            for name, method in METHODS.items():
                start = time.perf_counter()
                edits[name] = method(job)
                seconds = (time.perf_counter() - start) / n_frames
                row = measure(clip, edits[name], judge) | {"seconds_per_frame": seconds}
                measured[name].append({"clip": clip.prompt, "kind": clip.kind} | row)
                bar.update()
            videos.append(edits)
    rows = [{"method": name} | _mean(values) for name, values in measured.items()]
    steps = RECONSTRUCTION_STEPS[: 3 if args.quick else None]
    reconstruction = {
        n: float(np.mean([reconstruction_psnr(sd, clip, n) for clip in clips[:2]]))
        for n in tqdm(steps, desc="Reconstructing")
    }

    table = markdown_table(rows, reconstruction)
    (args.output / "quality.md").write_text(table)
    report = {"rows": rows, "reconstruction_psnr": reconstruction, "clips": measured}
    for path in filter(None, (args.output / "quality.json", args.json)):
        path.write_text(json.dumps(report, indent=2))
    plot(args.output / "quality.png", rows, reconstruction)
    for index, (clip, edits) in enumerate(zip(clips, videos, strict=True)):
        shown = {name: frames[moments(len(frames))] for name, frames in edits.items()}
        sheet = contact_sheet(shown, f"{clip.source_prompt} -> {clip.prompt}")
        write_image(args.output / f"clip_{index:02d}.png", sheet)
    print(table)


def _mean(rows: list[dict]) -> dict[str, float]:
    keys = [key for key, value in rows[0].items() if isinstance(value, float)]
    return {key: float(np.nanmean([row[key] for row in rows])) for key in keys}


if __name__ == "__main__":
    main()
