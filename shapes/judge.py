"""A classifier that reads a scene's attributes back from a frame, trained on renderings only."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shapes.world import VALUES

BATCH = 48


class Judge(nn.Module):
    """Convolutional classifier with one answer per attribute of `VALUES`."""

    def __init__(self):
        super().__init__()
        layers = [nn.AvgPool2d(2)]
        for channels_in, channels_out in ((3, 32), (32, 48), (48, 96), (96, 128)):
            layers += [
                nn.Conv2d(channels_in, channels_out, 3, padding=1),
                nn.GroupNorm(8, channels_out),
                nn.SiLU(),
                nn.Conv2d(channels_out, channels_out, 3, stride=2, padding=1),
                nn.SiLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.heads = nn.Linear(2 * channels_out, sum(map(len, VALUES.values())))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, values) of each attribute for `images` (B, 3, 128, 128) in [0, 1]."""
        features = self.features(2 * images - 1)
        logits = self.heads(torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1))
        return logits.split([len(values) for values in VALUES.values()], dim=1)

    @torch.no_grad()
    def read(self, frames: np.ndarray) -> dict[str, list[str]]:
        """Each attribute's value in each uint8 frame (B, H, W, 3), e.g. {"shape": ["circle", ...], ...}."""
        images = torch.from_numpy(frames).to(next(self.parameters())).permute(0, 3, 1, 2) / 255
        images = F.interpolate(images, (128, 128), mode="area")
        return name_values(torch.stack([logits.argmax(1) for logits in self(images)], dim=1).cpu())

    @classmethod
    def load(cls, path: Path) -> "Judge":
        """The judge stored in the safetensors file `path`, in single precision."""
        judge = cls()
        judge.load_state_dict(load_file(path))
        return judge.float().requires_grad_(False).eval()

    def save(self, path: Path) -> None:
        """Write the weights to the safetensors file `path` in half precision."""
        save_file({name: value.half() for name, value in self.state_dict().items()}, path)


def name_values(labels: np.ndarray | Tensor) -> dict[str, list[str]]:
    """Each attribute's values, by name, for attribute indices (N, 5)."""
    return {
        name: [values[index] for index in labels[:, n].tolist()]
        for n, (name, values) in enumerate(VALUES.items())
    }


def score(answers: dict[str, list[str]], truth: dict[str, list[str]]) -> dict[str, float]:
    """Part of each attribute's answers that is right."""
    return {
        name: float(np.mean([a == b for a, b in zip(answers[name], truth[name], strict=True)]))
        for name in answers
    }


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """`images` (B, 3, H, W) as a decoder might distort them: flipped, blurred, dimmed, noisy."""

    def uniform(low: float, high: float) -> Tensor:
        drawn = torch.rand(len(images), 1, 1, 1, generator=generator)
        return (low + (high - low) * drawn).to(images.device)

    if torch.rand(1, generator=generator) < 0.5:
        images = images.flip(3)
    turns = torch.randint(4, (1,), generator=generator).item()
    images = images.rot90(turns, (2, 3))
    blurred = images
    for _ in range(2):
        blurred = F.avg_pool2d(F.pad(blurred, (1, 1, 1, 1), mode="replicate"), 3, 1)
    # A coarse copy stands for the blocks that the autoencoder's latents are made of.
    coarse = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4, mode="bilinear")
    images = images.lerp(blurred, uniform(0, 1)).lerp(coarse, uniform(0, 0.6))
    images = (images - 0.5) * uniform(0.8, 1.2) + 0.5 + uniform(-0.1, 0.1)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return images + noise * uniform(0, 0.06)


def judge_loss(
    judge: Judge, frames: np.ndarray, labels: np.ndarray, generator: torch.Generator
) -> Tensor:
    """Cross-entropy over all attributes on random `frames` (N, H, W, 3) with `labels` (N, 5)."""
    device = next(judge.parameters()).device
    chosen = torch.randint(len(frames), (BATCH,), generator=generator).numpy()
    images = torch.from_numpy(frames[chosen]).to(device).permute(0, 3, 1, 2) / 255
    truth = torch.from_numpy(labels[chosen]).to(device)
    answers = judge(augment(images, generator))
    losses = [
        F.cross_entropy(logits.float(), truth[:, n], label_smoothing=0.02)
        for n, logits in enumerate(answers)
    ]
    return torch.stack(losses).sum()
