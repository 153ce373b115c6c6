"""Measure a checkpoint of the world of shapes: do samples show what their captions say?

    python -m shapes.evaluate --checkpoint data/shapes-sd

Samples random captions by DDIM, and prints the part of them in which the judge reads each attribute
as the caption has it. The judge's own accuracy and the autoencoder's PSNR are on held-out scenes.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from tqdm import tqdm

from shapes.data import render_samples
from shapes.judge import Judge, name_values, score
from shapes.vae import measure_round_trip
from shapes.world import index_attributes, sample_attributes
from tokenflow.evaluation.contact_sheet import contact_sheet
from util import write_image

HELD_OUT_SEEDS = range(2_000_000, 2_000_256)
BATCH = 25
GUIDANCE = 7.5
SHOWN, COLUMNS = 40, 8  # samples on the sheet, and in one of its rows


def sample(pipeline: StableDiffusionPipeline, captions: list[str], steps: int) -> np.ndarray:
    """Samples of `captions`, uint8 (N, 128, 128, 3)."""
    generator = torch.Generator().manual_seed(0)
    frames = []
    for start in tqdm(range(0, len(captions), BATCH), desc="sample"):
        images = pipeline(
            captions[start : start + BATCH],
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=generator,
            output_type="np",
        ).images
        frames.append(np.round(images * 255).astype(np.uint8))
    return np.concatenate(frames)


def main() -> None:
    """Sample, judge, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("data/shapes-sd"))
    parser.add_argument("--captions", type=int, default=200, help="number of captions")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--sheet", type=Path, help="write a picture of some samples to this file")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = StableDiffusionPipeline.from_pretrained(args.checkpoint, dtype=torch.float32)
    pipeline.to(device).set_progress_bar_config(disable=True)
    judge = Judge.load(args.checkpoint / "judge.safetensors").to(device)

    held_out, _, labels = render_samples(HELD_OUT_SEEDS)
    rng = np.random.default_rng(0)
    wanted = [sample_attributes(rng) for _ in range(args.captions)]
    captions = [attributes.caption() for attributes in wanted]
    samples = sample(pipeline, captions, args.steps)
    truth = name_values(np.array([index_attributes(attributes) for attributes in wanted]))
    results = {
        "samples": score(judge.read(samples), truth),
        "judge": score(judge.read(held_out), name_values(labels)),
        "vae_psnr": measure_round_trip(pipeline.vae, held_out[:64]),
    }
    print(json.dumps(results, indent=2))
    if args.sheet:
        starts = range(0, min(SHOWN, len(samples)) - COLUMNS + 1, COLUMNS)
        rows = {f"from caption {n + 1}": samples[n : n + COLUMNS] for n in starts}
        write_image(args.sheet, contact_sheet(rows))


if __name__ == "__main__":
    main()
