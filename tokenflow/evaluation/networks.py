"""Meters that need a network: CLIP, DINO and LPIPS. Each is left out where its network cannot be loaded."""

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

from tokenflow.diffusion.parts import Repository
from tokenflow.diffusion.prompts import split_weights
from tokenflow.errors import UserError, blame
from tokenflow.evaluation.meters import Meter, Moments, Values
from util import fit_frame


def load(cls: type, model_id: str | None, option: str) -> Any:
    """A network or tokenizer of transformers' class `cls`, which an option names.

    Raises UserError if it cannot be loaded, also for None.
    """
    if model_id is None:
        raise UserError(f"{option} names no model")
    return Repository(model_id, option).load(cls.from_pretrained, None)


class Clip:
    """Meter of the CLIP score and of the temporal consistency."""

    @torch.inference_mode()
    def __init__(self, model_id: str | None, prompt: str | None, device: torch.device) -> None:
        """Without a prompt, only the temporal consistency is measured. Raises UserError."""
        self.network = network = load(CLIPModel, model_id, "clip").eval().to(device)
        self.before: torch.Tensor | None = None  # embeddings of the frames before, (videos, d)
        self.text: torch.Tensor | None = None  # the prompt's, (d,)
        if prompt is not None:
            tokenizer = load(CLIPTokenizer, model_id, "clip")
            length = network.config.text_config.max_position_embeddings
            words, _ = split_weights(prompt)
            tokens = tokenizer(words, truncation=True, max_length=length, return_tensors="pt")
            pooled = network.text_model(**tokens.to(device)).pooler_output
            self.text = F.normalize(network.text_projection(pooled)[0], dim=-1)

    @torch.inference_mode()
    def measure(self, recent: Moments) -> Values:
        """Cosine similarities (x 0.01) of the newest frame's CLIP embedding: with the prompt's, as in
        CLIPScore (Hessel et al., EMNLP 2021) without its factor, and with that of the frame before it, as
        TokenFlow and the papers that it compares itself with measure consistency. Frames are cropped to
        a square in their middle, as CLIP's own preprocessing does.
        """
        network, values = self.network, {}
        size = network.config.vision_config.image_size
        images = as_images(recent[-1], size, "crop", OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        pooled = network.vision_model(images.to(network.device)).pooler_output
        now = F.normalize(network.visual_projection(pooled), dim=-1)  # videos d
        if self.text is not None:
            values["clip_prompt"] = (100 * now @ self.text).tolist()
        if self.before is not None:
            values["clip_frames"] = (100 * now * self.before).sum(-1).tolist()
        self.before = now
        return values


class Structure:
    """Meter of the structure distance."""

    def __init__(self, model_id: str | None, device: torch.device) -> None:
        """Raises UserError."""
        self.network = load(ViTModel, model_id, "dino").eval().to(device)
        self.keys: torch.Tensor | None = None  # of the last layer, (videos, tokens, d)
        self.network.layers[-1].attention.k_proj.register_forward_hook(self._remember)

    @torch.inference_mode()
    def measure(self, recent: Moments) -> Values:
        """Structure distance (x 1e-3): mean squared difference of the self-similarities of two frames.

        A frame's self-similarity is the matrix of cosine similarities between the keys of all tokens in
        the last layer of a vision transformer trained by DINO: Tumanyan et al., "Splicing ViT Features for
        Semantic Appearance Transfer" (CVPR 2022), section 3.1. Frames are stretched to a square.
        """
        size = self.network.config.image_size
        images = as_images(recent[-1], size, "stretch", IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        self.network(images.to(self.network.device))
        keys = F.normalize(self.keys, dim=-1)
        source, *others = keys @ keys.mT  # tokens tokens, each
        distances = [1e3 * float((other - source).square().mean()) for other in others]
        return {"structure": [np.nan, *distances]}

    def _remember(self, module: torch.nn.Module, args: tuple, keys: torch.Tensor) -> None:
        self.keys = keys


class Lpips:
    """Meter of LPIPS."""

    def __init__(self, device: torch.device) -> None:
        """Raises UserError if the package `lpips` or the weights that it downloads are missing."""
        self.device = device
        # RuntimeError: torchvision, which lpips imports, is for another torch.
        with blame("the package lpips cannot be used", (ImportError, RuntimeError)):
            from lpips import LPIPS
        with blame("lpips cannot load its weights", (OSError, RuntimeError)):
            self.network = LPIPS(net="alex", verbose=False).eval().to(device)

    @torch.inference_mode()
    def measure(self, recent: Moments) -> Values:
        """LPIPS (Zhang et al., CVPR 2018, arXiv 1801.03924) of AlexNet between each newest frame and the
        source's, at full size; 0 if equal.
        """
        images = torch.from_numpy(recent[-1]).to(self.device).permute(0, 3, 1, 2) / 127.5 - 1
        source, others = images[:1], images[1:]  # videos 3 H W
        distances = self.network(others, source.expand_as(others)).flatten().tolist()
        return {"lpips": [np.nan, *distances]}


def as_images(
    frames: np.ndarray, size: int, mode: str, mean: list[float], std: list[float]
) -> torch.Tensor:
    """Frames uint8 (n, H, W, 3), fitted into a square, as networks take them: (n, 3, size, size)."""
    fitted = np.stack([fit_frame(frame, size, size, mode) for frame in frames])
    images = torch.from_numpy(fitted).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (images - mean) / std


def load_meters(
    clip: str | None, dino: str | None, prompt: str | None, device: torch.device
) -> tuple[list[Meter], list[str]]:
    """The meters whose networks can be loaded, and a line for each metric that is left out.

    clip, dino: hub ids or folders; None leaves their metrics out.
    """
    meters, skipped = [], []
    for title, cls, options in (
        ("CLIP score and temporal consistency", Clip, {"model_id": clip, "prompt": prompt}),
        ("structure distance", Structure, {"model_id": dino}),
        ("LPIPS", Lpips, {}),
    ):
        try:
            meters.append(cls(**options, device=device))
        except UserError as reason:
            skipped.append(f"{title}: {reason}")
    if prompt is None:
        skipped.append("CLIP score: there is no prompt")
    return meters, skipped
