"""LyCORIS (Yeh et al., arXiv 2309.14859): its layers as the LoRAs that they equal, which diffusers reads.

Of LyCORIS it reads LoCon alone, and that without cores (Tucker's decomposition). A change of weights that is
not of low rank becomes the identity times itself.
"""

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import nn

UP, DOWN = "lora_up.weight", "lora_down.weight"
FACTORS = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")
KNOWN = {UP, DOWN, "lora_mid.weight", "alpha"}
KNOWN |= {f"{kind}_{factor}" for kind in ("hada", "lokr") for factor in FACTORS}

Tensors = dict[str, torch.Tensor]


def is_plain(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether diffusers reads these tensors of a file as they are meant.

    In kohya's format it takes one alpha for another where layers of the attention differ in it.
    """
    if not all(name.startswith(("lora_unet_", "lora_te")) for name in tensors):
        return True
    alphas = {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")}
    return len(alphas) < 2 and all(name.endswith((UP, DOWN, ".alpha")) for name in tensors)


def to_lora(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors of the LoRA, without alphas, that equals those of LyCORIS; both in kohya's format.

    Convolutions of LoHa and LoKr may come out flat; `unflatten` shapes them. Raises ValueError.
    """
    layers, converted = defaultdict(dict), {}
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".")
        if part not in KNOWN:
            raise ValueError(f"{name} is of none of LoRA, LoCon, LoHa, LoKr")
        layers[layer][part] = tensor
    for layer, parts in layers.items():
        dtype = next(tensor.dtype for tensor in parts.values() if tensor.ndim)
        up, down, rank = _factorize({part: tensor.float() for part, tensor in parts.items()})
        scale = float(parts["alpha"]) / rank if rank and "alpha" in parts else 1.0
        # Shared by both factors, since half precision has few digits for what is small.
        sign, root = math.copysign(1, scale), math.sqrt(abs(scale))
        converted[f"{layer}.{UP}"] = (sign * root * up).to(dtype)
        converted[f"{layer}.{DOWN}"] = (root * down).to(dtype)
    return converted


def unflatten(tensors: Tensors, networks: Mapping[str, nn.Module]) -> Tensors:
    """The tensors of a LoRA in diffusers' names, with those of convolutions in the shape of their weights."""
    shaped = dict(tensors)
    for part, network in networks.items():
        for name, module in network.named_modules():
            up, down = (f"{part}.{name}.lora.{which}.weight" for which in ("up", "down"))
            if isinstance(module, nn.Conv2d) and down in tensors:
                shaped[up] = tensors[up].reshape(*tensors[up].shape[:2], 1, 1)
                shaped[down] = tensors[down].reshape(-1, *module.weight.shape[1:])
    return shaped


def _factorize(parts: Tensors) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """Factors up and down of one layer's change, and the rank that divides its alpha, if any does."""
    if UP in parts:
        up, down = parts[UP], parts[DOWN]
        if (mid := parts.get("lora_mid.weight")) is not None:
            down = torch.einsum("ijkl, jr -> irkl", mid, down.flatten(1))
        return up, down, len(parts[DOWN])
    if "hada_w1_a" in parts:
        rank = len(parts["hada_w1_b"])
        if "hada_t1" in parts:
            change = _multiply(parts, "hada_{}1") * _multiply(parts, "hada_{}2")
            return _identity(change), change, rank
        # The product of two matrices of rank r, element by element, is of rank r * r.
        up = parts["hada_w1_a"][:, :, None] * parts["hada_w2_a"][:, None]
        down = parts["hada_w1_b"][:, None] * parts["hada_w2_b"]
        return up.flatten(1), down.flatten(0, 1), rank
    first, second = _multiply(parts, "lokr_{}1"), _multiply(parts, "lokr_{}2")
    first = first.view(*first.shape, *[1] * (second.ndim - 2))
    change = torch.kron(first, second.contiguous())
    ranks = [len(parts[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in parts]
    return _identity(change), change, next(iter(ranks), None)


def _multiply(parts: Tensors, name: str) -> torch.Tensor:
    """A matrix or a convolution from its factors, called `name` but for a letter: a, b and perhaps a core."""
    whole, core = name.format("w"), name.format("t")
    if whole in parts:
        return parts[whole]
    a, b = parts[f"{whole}_a"], parts[f"{whole}_b"]
    return torch.einsum("ijkl, ip, jr -> prkl", parts[core], a, b) if core in parts else a @ b


def _identity(change: torch.Tensor) -> torch.Tensor:
    """What leaves a change (out, in) or (out, in, k, k) as it is when it comes after it."""
    return torch.eye(len(change)).view(len(change), len(change), *[1] * (change.ndim - 2))
