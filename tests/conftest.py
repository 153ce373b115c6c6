"""Fixtures: a tiny random checkpoint on disk, loaded as a user's is, and short clips."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

# One thread: on busy cores two wait for each other, and they add floats in another order. Torch reads this
# when it is imported, here and in the processes that tests start.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# The tests are of the CPU, wherever they run: a GPU rounds otherwise. `benchmarks.sizes` looks at the GPU.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}

import numpy as np
import pytest
import torch
from loras import draw_factors
from test_cli import last_line, run
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

from shapes.checkpoint import build_random
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.video.write import write_video

SHAPES_CHECKPOINT = Path(__file__).parent.parent / "data" / "shapes-sd"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion of random weights, in diffusers layout."""
    return build_random(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def sd(checkpoint) -> StableDiffusion:
    """The tiny checkpoint and its ControlNet, loaded on the CPU in fp32."""
    controlnet = str(checkpoint / "controlnet")
    return Checkpoint.find(str(checkpoint)).load(
        torch.device("cpu"), torch.float32, controlnets=[controlnet]
    )


@pytest.fixture(scope="session")
def factors(sd) -> dict:
    """The factors of a LoRA for the tiny checkpoint."""
    return draw_factors(sd)


@pytest.fixture(scope="session")
def trained() -> StableDiffusion:
    """The shapes checkpoint with its ControlNet."""
    folder, device = str(SHAPES_CHECKPOINT), torch.device("cpu")
    return Checkpoint.find(folder).load(device, torch.float32, controlnets=[f"{folder}/controlnet"])


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


@pytest.fixture(scope="session")
def small(tmp_path_factory, checkpoint, clip) -> tuple[Path, list]:
    """A folder with an inversion of four frames of the clip in two steps, and the flags of edits of it."""
    folder = tmp_path_factory.mktemp("small")
    shutil.copy(clip, folder / "clip.mp4")
    common = ["--data_path", "clip.mp4", "--model", checkpoint, "--n_frames", 4]
    common += ["--keyframe_interval", 2]
    invert = ["--H", 64, "--W", 64, "--steps", 2, "--save_steps", 2]
    invert += ["--inversion_prompt", "a red square"]
    last_line(run("preprocess.py", *common, *invert, cwd=folder))
    edit = ["--prompt", "a blue circle", "--n_inversion_steps", 2, "--n_timesteps", 2]
    return folder, [*common, *edit]


@pytest.fixture
def passes(monkeypatch) -> SimpleNamespace:
    """`seen`: how many samples each pass of a UNet took so far; at that of `stop_at` a user interrupts."""
    passes, predict_noise = SimpleNamespace(seen=[], stop_at=None), StableDiffusion.predict_noise

    def count(self, latents, *args):
        passes.seen.append(len(latents))
        if len(passes.seen) == passes.stop_at:
            raise KeyboardInterrupt
        return predict_noise(self, latents, *args)

    monkeypatch.setattr(StableDiffusion, "predict_noise", count)
    return passes


@pytest.fixture(scope="session")
def texture() -> np.ndarray:
    """A smooth texture that moves by (2, 1) pixels a frame: uint8 RGB (6, 64, 64, 3)."""
    coarse = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, (96, 96), mode="bicubic").clamp(0, 1)[0]
    crops = [fine[:, 20 - n : 84 - n, 20 - 2 * n : 84 - 2 * n] for n in range(6)]
    return (255 * torch.stack(crops)).round().byte().permute(0, 2, 3, 1).numpy()


def build_tiny_clip(folder: Path, checkpoint: Path) -> Path:
    """Write a tiny CLIP of random weights, for images of 32x32 pixels, with the checkpoint's tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    layers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    config = CLIPConfig(
        text_config=layers | special | {"vocab_size": len(tokenizer), "intermediate_size": 64},
        vision_config=layers | {"image_size": 32, "patch_size": 8, "intermediate_size": 64},
        projection_dim=16,
    )
    return _save(folder, CLIPModel, config, tokenizer)


def build_tiny_dino(folder: Path) -> Path:
    """Write a tiny vision transformer of random weights, for images of 32x32 pixels."""
    layers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**layers, intermediate_size=64, image_size=32, patch_size=8)
    return _save(folder, ViTModel, config)


def _save(folder: Path, cls: type, config, *others) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part in (cls(config), *others):
            part.save_pretrained(folder)
    return folder
