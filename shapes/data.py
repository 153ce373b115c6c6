"""Still frames of random scenes, rendered once and kept in a file."""

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shapes.world import index_attributes, render, sample_scene

LAST_TIME = 48  # frames are taken at random times of clips this long
# How often each texture is drawn: plain is the easiest to learn, checkered the hardest.
TEXTURE_SHARES = {"plain": 0.18, "striped": 0.24, "dotted": 0.24, "checkered": 0.34}


def render_sample(seed: int) -> tuple[np.ndarray, str, list[int]]:
    """Frame uint8 (128, 128, 3), caption and attribute indices of random scene number `seed`."""
    rng = np.random.default_rng(seed)
    texture, background_texture = rng.choice(
        list(TEXTURE_SHARES), size=2, p=list(TEXTURE_SHARES.values())
    ).tolist()
    scene = sample_scene(rng, texture=texture, background_texture=background_texture)
    frame, _ = render(scene, rng.uniform(0, LAST_TIME))
    return frame, scene.attributes.caption(), index_attributes(scene.attributes)


def render_samples(seeds: range) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Frames uint8 (N, 128, 128, 3), N captions, and attribute indices (N, 5)."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        samples = pool.map(render_sample, seeds, chunksize=32)
        frames, captions, labels = zip(*tqdm(samples, total=len(seeds), desc="render"), strict=True)
    return np.stack(frames), list(captions), np.array(labels)


def load_samples(path: Path, seeds: range) -> tuple[np.ndarray, list[str], np.ndarray]:
    """As `render_samples`, kept in the `.npz` file `path`."""
    if not path.exists():
        frames, captions, labels = render_samples(seeds)
        unfinished = path.with_suffix(".part.npz")
        np.savez(unfinished, frames=frames, captions=captions, labels=labels)
        unfinished.rename(path)
    with np.load(path) as stored:
        return stored["frames"], stored["captions"].tolist(), stored["labels"]
