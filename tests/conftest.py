"""Fixtures: a tiny random checkpoint on disk, loaded as a user's is, and short clips."""

import os
from pathlib import Path

# One thread: on busy cores two wait for each other, and they add floats in another order. Torch reads this
# when it is imported, here and in the processes that tests start.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import numpy as np
import pytest
import torch

# Without a GPU, triton interprets its kernels; it decides so when they are imported.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))

from shapes.checkpoint import build_random
from tokenflow.diffusion.checkpoints import load
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from util import write_video

SHAPES_CHECKPOINT = Path(__file__).parent.parent / "data" / "shapes-sd"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion of random weights, in diffusers layout."""
    return build_random(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def sd(checkpoint) -> StableDiffusion:
    """The tiny checkpoint and its ControlNet, loaded on the CPU in fp32."""
    controlnet = str(checkpoint / "controlnet")
    return load(str(checkpoint), [controlnet], torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def trained() -> StableDiffusion:
    """The shapes checkpoint with its ControlNet."""
    folder, device = str(SHAPES_CHECKPOINT), torch.device("cpu")
    return load(folder, [f"{folder}/controlnet"], device, torch.float32)


@pytest.fixture(scope="session")
def clip_frames() -> np.ndarray:
    """A coloured square that moves over a gradient: uint8 RGB (7, 64, 64, 3)."""
    row = np.linspace(40, 200, 64)
    gradient = np.stack(np.broadcast_arrays(row, row[:, None], 90), -1)
    frames = np.stack([gradient.astype(np.uint8)] * 7)
    for index, frame in enumerate(frames):
        frame[20:44, 8 + 5 * index : 30 + 5 * index] = (220, 60, 30)
    return frames


@pytest.fixture(scope="session")
def clip(tmp_path_factory, clip_frames) -> Path:
    """The clip as an mp4 of 12 frames a second."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_video(path, clip_frames, 12)
    return path
