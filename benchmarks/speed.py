"""Cost of whole edits, beside the published algorithm, frame-by-frame editing and the bare UNet.

    python -m benchmarks.speed --quick

On the shapes checkpoint everything from frames to edited frames, with the quality of the same edits
beside it; on a random UNet of Stable Diffusion 1.5's size the editing stage alone. Methods take turns
over several clips, and a figure is the median over them. Writes a table (Markdown and JSON).
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.arguments import benchmark_parser
from benchmarks.baselines import FrameByFrame
from benchmarks.clips import Clip, held_out_clips
from benchmarks.job import Job, Latents, predictor_of
from benchmarks.measures import mean, measure
from benchmarks.meter import Cost, Meter
from benchmarks.published import published_edit
from benchmarks.report import speed_table, write_report
from benchmarks.sd15 import random_sd15
from shapes.judge import Judge
from tokenflow.cli import parse
from tokenflow.config import PnPConfig
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.ddim import Schedule, invert, last, sample
from tokenflow.diffusion.device import choose_device
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.editing.checkpoint import EditCheckpoint
from tokenflow.editing.denoise import (
    FILLED_CPU,
    Denoiser,
    Edit,
    TokenFlowDenoiser,
    denoise,
    keyframe_schedule,
)
from tokenflow.editing.source import Source
from tokenflow.editing.techniques import plug_and_play
from tokenflow.evaluation.metrics import frame_psnr
from tokenflow.inversion.files import noisy
from tokenflow.inversion.predictor import VideoNoisePredictor
from tokenflow.inversion.source_features import RecordingPredictor, SourceFeatureFiles
from tokenflow.runtime.batching import MOST_SAMPLES, Batches
from tokenflow.runtime.distributed import Processes

PUBLISHED_STEPS = 500
STAGES = ("inversion", "reconstruction", "editing")


@dataclass(frozen=True)
class Pictures:
    """What a method made of a clip: reconstructed latents (N, 4, h, w), edited frames (N, H, W, 3)."""

    reconstructed: torch.Tensor
    edited: np.ndarray


def published(meter: Meter, sd: StableDiffusion, clip: Clip, config: PnPConfig) -> Pictures:
    """500 naive steps there, 500 back, and an edit by the published algorithm."""
    schedule = Schedule.of(sd.scheduler, PUBLISHED_STEPS)
    editing = Schedule.of(sd.scheduler, config.n_timesteps)
    predictor, frames = predictor_of(sd, clip.source_prompt), torch.arange(clip.n_frames)
    with meter.stage("inversion"):
        clean = sd.encode_frames(clip.frames)
        inverted = dict(invert(clean, frames, schedule, predictor))
    with meter.stage("reconstruction"):
        noisiest = inverted[schedule.timesteps[0]]
        reconstructed = last(sample(noisiest, frames, schedule, predictor))
        sd.decode_latents(reconstructed)
    config = dataclasses.replace(config, prompt=clip.prompt)
    prompts = (clip.source_prompt, config.negative_prompt, config.prompt)
    kept = Latents({noisy(t): x for t, x in inverted.items()})
    source = Source(kept, clip.n_frames)
    technique = plug_and_play(config, editing, source)
    edit = Edit(sd, technique, source, prompts, config)
    with meter.stage("editing"):
        edited = sd.decode_latents(last(published_edit(edit)))
    return Pictures(reconstructed, edited)


def ours(
    meter: Meter, sd: StableDiffusion, clip: Clip, config: PnPConfig, folder: Path
) -> tuple[Pictures, Job]:
    """What the commands do, with that configuration of the edit."""
    with meter.stage("inversion"):
        job = Job.prepare(sd, clip, config, folder)
    with meter.stage("reconstruction"):
        reconstructed = job.reconstruct()
        sd.decode_latents(reconstructed)
    with meter.stage("editing"):
        edited = job.edit_pnp()
    return Pictures(reconstructed, edited), job


def quality(sd: StableDiffusion, clip: Clip, judge: Judge, pictures: Pictures) -> dict[str, float]:
    """Of the edit and of the reconstruction, whose PSNR is against the VAE's round trip."""
    round_trip = sd.decode_latents(sd.encode_frames(clip.frames))
    reconstructed = sd.decode_latents(pictures.reconstructed)
    psnr = float(np.mean(frame_psnr(reconstructed, round_trip)))
    return {"reconstruction_psnr": psnr} | measure(clip, pictures.edited, judge)


def floor(sd: StableDiffusion, costs: dict[str, Cost], latent_size: int) -> dict[str, Cost]:
    """The same numbers of plain UNet evaluations, at the faster of two batch sizes."""
    text = sd.encode_text("")

    def seconds_of_one(batch_size: int) -> float:
        latents = torch.randn(batch_size, 4, latent_size, latent_size)
        start = time.perf_counter()
        sd.predict_noise(latents, 500, text.expand(batch_size))
        return (time.perf_counter() - start) / batch_size

    filling = max(1, FILLED_CPU // latent_size**2) if sd.device.type == "cpu" else MOST_SAMPLES // 2
    sizes = {filling, 2 * filling}
    best = min(seconds_of_one(size) for size in sizes)
    return {
        stage: Cost(best * cost.evaluations, cost.evaluations, 0.0) for stage, cost in costs.items()
    }


def shapes_rounds(args: argparse.Namespace) -> tuple[dict, dict]:
    """Costs by method and stage, and qualities by method, a list of one entry for each clip."""
    n_clips, n_frames = (1, 6) if args.quick else (2, 16)
    sd = Checkpoint.find(str(args.model)).load(*choose_device(args.device, args.dtype))
    judge, meter = Judge.load(args.model / "judge.safetensors"), Meter(sd.device, sd.unet)
    at_defaults = PnPConfig(data_path="", prompt="unused")
    fast = parse(PnPConfig, "", "fast.yaml", ["--data_path", "", "--prompt", "unused"])
    costs, qualities = {}, {}

    def note(method: str, pictures: Pictures | None = None) -> None:
        for stage, cost in meter.stages.items():
            costs.setdefault(method, {}).setdefault(stage, []).append(cost)
        if pictures:
            qualities.setdefault(method, []).append(quality(sd, clip, judge, pictures))
        meter.stages = {}

    # Every other clip: edits of colour and of the background, which Plug-and-Play can do.
    for clip in tqdm(held_out_clips(2 * n_clips, n_frames)[::2], "Shapes", unit="clip"):
        note("published", published(meter, sd, clip, at_defaults))
        with tempfile.TemporaryDirectory() as folder:
            pictures, job = ours(meter, sd, clip, at_defaults, Path(folder))
            done = meter.stages
            note("ours", pictures)
            with meter.stage("editing"):
                edited = job.edit_pnp(FrameByFrame)
            note("per_frame", Pictures(pictures.reconstructed, edited))
        meter.stages = floor(sd, done, job.clean.shape[-1])
        note("floor")
        with tempfile.TemporaryDirectory() as folder:
            note("fast", ours(meter, sd, clip, fast, Path(folder))[0])
    return costs, qualities


def sd15_rounds(args: argparse.Namespace) -> dict:
    """Costs by method of the editing stage, a list of one entry for each round."""
    device, dtype = choose_device(args.device, args.dtype)
    if device.type == "cuda":
        size, n_frames, interval, n_steps = 64, 40, 8, 50
    else:
        size, n_frames, interval, n_steps = (32, 4, 2, 1) if args.quick else (64, 10, 2, 1)
    sd = random_sd15(device, dtype)
    meter = Meter(device, sd.unet)
    always = {"pnp_attn_t": 1, "pnp_f_t": 1}
    config = PnPConfig(
        data_path="", prompt="unused", n_timesteps=n_steps, batch_size=interval, **always
    )
    schedule, costs = Schedule.of(sd.scheduler, n_steps), {}
    generator = torch.Generator().manual_seed(0)
    still, moving = torch.randn(2, n_frames, 4, size, size, generator=generator)
    inverted = still[:1] + 0.3 * moving  # frames of one video resemble each other
    with tempfile.TemporaryDirectory() as folder:
        files, processes = SourceFeatureFiles(Path(folder) / "source"), Processes(device)
        files.create(sd.unet, inverted.shape, schedule.timesteps)
        keyframes = keyframe_schedule(config, sd.scheduler, n_frames)
        kept = Latents(dict.fromkeys(map(noisy, schedule.timesteps), inverted))
        three = Source(kept, n_frames)
        technique = plug_and_play(config, schedule, three)
        predictor = VideoNoisePredictor(sd, "", Batches(interval, adapts=False))
        recording = RecordingPredictor(predictor, keyframes, three.latents, files)
        with recording.install():
            for t in schedule.timesteps:
                recording(inverted, t, torch.arange(n_frames))
        two = Source(kept, n_frames, files)

        def edit_from(source: Source) -> Edit:
            return Edit(sd, technique, source, ("", "", ""), config)

        def tokenflow(source: Source, denoiser: type[Denoiser] = TokenFlowDenoiser) -> Iterator:
            with tempfile.TemporaryDirectory(dir=folder) as steps:
                checkpoint = EditCheckpoint(Path(steps), inverted.shape, processes)
                with denoiser.installed(edit_from(source)) as installed:
                    yield from denoise(installed, checkpoint)

        runs = {
            "published": lambda: published_edit(edit_from(three)),
            "ours": lambda: tokenflow(two),
            "per_frame": lambda: tokenflow(three, FrameByFrame),
        }
        for _ in tqdm(range(2), "SD 1.5", unit="round"):
            for method, steps in runs.items():
                with meter.stage("editing"):
                    last(steps())
                costs.setdefault(method, {"editing": []})["editing"].append(meter.stages["editing"])
            floored = floor(sd, {"editing": costs["ours"]["editing"][-1]}, size)["editing"]
            costs.setdefault("floor", {"editing": []})["editing"].append(floored)
    return costs


def to_rows(checkpoint: str, costs: dict[str, dict[str, list[Cost]]]) -> list[dict]:
    """Medians over the rounds, and for methods with all stages their sum."""
    rows = []
    for method, stages in costs.items():
        merged = {
            stage: Cost(*(median(v) for v in zip(*map(dataclasses.astuple, rounds), strict=True)))
            for stage, rounds in stages.items()
        }
        if set(merged) == set(STAGES):
            parts = list(merged.values())
            merged["end_to_end"] = Cost(
                sum(c.seconds for c in parts),
                sum(c.evaluations for c in parts),
                max(c.peak_mb for c in parts),
            )
        for stage, cost in merged.items():
            rows.append(
                {"checkpoint": checkpoint, "method": method, "stage": stage}
                | dataclasses.asdict(cost)
            )
    return rows


def report_so_far(args: argparse.Namespace, rows: list[dict], qualities: dict) -> str:
    """Write what is measured so far, and return the table."""
    means = {method: mean(values) for method, values in qualities.items()}
    table = speed_table(rows, means)
    write_report(args, "speed", table, {"rows": rows, "quality": means})
    return table


def main() -> None:
    """Time everything and write the report."""
    parser = benchmark_parser(__doc__, "runs/speed")
    parser.add_argument("--quick", action="store_true", help="one short clip, and small frames")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    costs, qualities = shapes_rounds(args)
    rows = to_rows("shapes", costs)
    report_so_far(args, rows, qualities)
    rows += to_rows("sd15", sd15_rounds(args))
    print(report_so_far(args, rows, qualities))


if __name__ == "__main__":
    main()
