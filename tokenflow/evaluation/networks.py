"""Figures that need a network of their own: CLIP, DINO and LPIPS, each left out where it is not to be had."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTokenizer, ViTModel
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from tokenflow.diffusion.parts import on_hub
from tokenflow.evaluation.meters import SOURCE, Meter, Recent, Values
from util import fit_frame


class Unavailable(Exception):
    """A network that is not to be had; the text says why."""


def load(cls: type, model_id: str | None) -> Any:
    """A network or tokenizer of transformers' class `cls`, from a folder, the cache or the hub.

    Raises Unavailable, also for None.
    """
    if model_id is None:
        raise Unavailable("no model was named")
    for local_only in (True, False):
        if not local_only and not on_hub(model_id):
            break
        try:
            return cls.from_pretrained(model_id, local_files_only=local_only)
        except Exception as error:  # a missing or broken file is reported in many ways
            failure = str(error).strip().partition("\n")[0].rstrip(".")
    if not Path(model_id).is_dir():
        failure = "it is neither a folder nor downloaded, and cannot be downloaded"
    raise Unavailable(f"{model_id} cannot be loaded ({failure})")


class Clip:
    """Meter of the agreement with the prompt and of the frame consistency."""

    def __init__(self, model_id: str | None, prompt: str | None, device: torch.device) -> None:
        """Without a prompt, only the frame consistency is measured. Raises Unavailable."""
        self.network = load(CLIPModel, model_id).eval().to(device)
        self.before: dict[str, torch.Tensor] = {}
        self.text = (
            None if prompt is None else self._embed_text(load(CLIPTokenizer, model_id), prompt)
        )

    def __call__(self, recent: Recent) -> Values:
        """Cosine similarities (x 0.01) of the newest frame's CLIP embedding: with the prompt's, as in
        CLIPScore (Hessel et al., EMNLP 2021) without its factor, and with that of the frame before it, as
        TokenFlow and the papers that it compares itself with measure consistency. Frames are cropped to
        a square in their middle, as CLIP's own preprocessing does.
        """
        newest = self._embed_frames(np.stack([frames[-1] for frames in recent.values()]))
        now = dict(zip(recent, newest, strict=True))
        values = {}
        if self.text is not None:
            values["clip_prompt"] = {name: 100 * float(e @ self.text) for name, e in now.items()}
        if self.before:
            values["clip_frames"] = {n: 100 * float(e @ self.before[n]) for n, e in now.items()}
        self.before = now
        return values

    @torch.inference_mode()
    def _embed_frames(self, frames: np.ndarray) -> torch.Tensor:
        network, size = self.network, self.network.config.vision_config.image_size
        images = as_images(frames, size, "crop", OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        pooled = network.vision_model(images.to(network.device)).pooler_output
        return F.normalize(network.visual_projection(pooled), dim=-1)  # n d

    @torch.inference_mode()
    def _embed_text(self, tokenizer: CLIPTokenizer, prompt: str) -> torch.Tensor:
        network = self.network
        length = network.config.text_config.max_position_embeddings
        tokens = tokenizer(prompt, truncation=True, max_length=length, return_tensors="pt")
        pooled = network.text_model(**tokens.to(network.device)).pooler_output
        return F.normalize(network.text_projection(pooled)[0], dim=-1)  # d


class Structure:
    """Meter of the structure distance."""

    def __init__(self, model_id: str | None, device: torch.device) -> None:
        """Raises Unavailable."""
        self.network = load(ViTModel, model_id).eval().to(device)
        self.keys: torch.Tensor | None = None
        self.network.layers[-1].attention.k_proj.register_forward_hook(self._remember)

    def __call__(self, recent: Recent) -> Values:
        """Structure distance (x 1e-3): mean square difference of the self-similarities of two frames.

        A frame's self-similarity is the matrix of cosine similarities between the keys of all tokens in
        the last layer of a vision transformer trained by DINO: Tumanyan et al., "Splicing ViT Features for
        Semantic Appearance Transfer" (CVPR 2022), section 3.1. Frames are stretched to a square.
        """
        newest = np.stack([frames[-1] for frames in recent.values()])
        by_name = dict(zip(recent, self._similarities(newest), strict=True))
        source = by_name.pop(SOURCE)
        distances = {name: (s - source).square().mean() for name, s in by_name.items()}
        return {"structure": {name: 1e3 * float(d) for name, d in distances.items()}}

    @torch.inference_mode()
    def _similarities(self, frames: np.ndarray) -> torch.Tensor:
        size = self.network.config.image_size
        images = as_images(frames, size, "stretch", IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        self.network(images.to(self.network.device))
        keys = F.normalize(self.keys, dim=-1)
        return keys @ keys.mT  # n tokens tokens

    def _remember(self, module: torch.nn.Module, args: tuple, keys: torch.Tensor) -> None:
        self.keys = keys  # n tokens d


class Lpips:
    """Meter of LPIPS."""

    def __init__(self, device: torch.device) -> None:
        """Raises Unavailable, if the package `lpips` or the weights that it downloads are missing."""
        self.device = device
        try:
            from lpips import LPIPS

            self.network = LPIPS(net="alex", verbose=False).eval().to(device)
        except (ImportError, RuntimeError) as error:  # the latter: torchvision is for another torch
            raise Unavailable(f"the package lpips cannot be used ({error})") from error
        except OSError as error:
            raise Unavailable(f"lpips cannot download its weights ({error})") from error

    @torch.inference_mode()
    def __call__(self, recent: Recent) -> Values:
        """LPIPS (Zhang et al., CVPR 2018, arXiv 1801.03924) of AlexNet between each newest frame and the
        source's, at full size; 0 if equal.
        """
        images = torch.from_numpy(np.stack([frames[-1] for frames in recent.values()]))
        images = images.to(self.device).permute(0, 3, 1, 2) / 127.5 - 1  # n 3 H W
        source, others = images[:1], images[1:]
        distances = self.network(others, source.expand_as(others)).flatten().tolist()
        names = [name for name in recent if name != SOURCE]
        return {"lpips": dict(zip(names, distances, strict=True))}


def as_images(
    frames: np.ndarray, size: int, mode: str, mean: list[float], std: list[float]
) -> torch.Tensor:
    """Frames uint8 (n, H, W, 3), fitted into a square, as networks take them: (n, 3, size, size)."""
    fitted = np.stack([fit_frame(frame, size, size, mode) for frame in frames])
    images = torch.from_numpy(fitted).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (images - mean) / std


def available(
    clip: str | None, dino: str | None, prompt: str | None, device: torch.device
) -> tuple[list[Meter], list[str]]:
    """The meters whose networks are to be had, and a line for each figure that is left out.

    clip, dino: hub ids or folders; None leaves their figures out.
    """
    wanted = {
        "agreement with the prompt, frame consistency": lambda: Clip(clip, prompt, device),
        "structure distance": lambda: Structure(dino, device),
        "LPIPS": lambda: Lpips(device),
    }
    meters, skipped = [], []
    for about, make in wanted.items():
        try:
            meters.append(make())
        except Unavailable as reason:
            skipped.append(f"{about}: {reason}")
    if prompt is None:
        skipped.append("agreement with the prompt: there is no prompt")
    return meters, skipped
