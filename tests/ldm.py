"""Write a diffusers folder as a single file in the layout of the original code: the inverse of the loader."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
TEXT = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}

Weights = dict[str, torch.Tensor]


def weights_of(folder: Path) -> Weights:
    """The weights in a part of a diffusers folder."""
    return load_file(next(folder.glob("*.safetensors")))


def renamed(weights: Weights, names: dict[str, str], prefix: str) -> Weights:
    """The weights whose names begin with one of `names`, under the new names after `prefix`."""
    return {
        prefix + new + key.removeprefix(old): value
        for old, new in names.items()
        for key, value in weights.items()
        if key.startswith(old + ".")
    }


def unet_names(weights: Weights) -> dict[str, str]:
    """What each module of the UNet is called in the original code; two residual blocks at each level."""
    levels = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("down_blocks."))
    has = {".".join(key.split(".")[:4]) for key in weights}
    modules = dict(UNET_ENDS)

    def put(number: str, block: str, layer: int) -> None:
        modules[f"{block}.resnets.{layer}"] = f"{number}.0"
        if f"{block}.attentions.{layer}" in has:
            modules[f"{block}.attentions.{layer}"] = f"{number}.1"

    place = 1
    for level in range(levels):
        for layer in range(2):
            put(f"input_blocks.{place}", f"down_blocks.{level}", layer)
            place += 1
        modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
        place += 1
    for level in range(levels):
        for layer in range(3):
            put(f"output_blocks.{3 * level + layer}", f"up_blocks.{level}", layer)
        last = f"output_blocks.{3 * level + 2}.{1 + (f'up_blocks.{level}.attentions.2' in has)}"
        modules[f"up_blocks.{level}.upsamplers.0.conv"] = f"{last}.conv"
    middle = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}
    modules |= {f"mid_block.{ours}": f"middle_block.{theirs}" for ours, theirs in middle.items()}
    for name, original in list(modules.items()):
        if ".resnets." in name:
            del modules[name]
            modules |= {f"{name}.{ours}": f"{original}.{theirs}" for ours, theirs in RESNET.items()}
    return modules


def vae_names(weights: Weights) -> dict[str, str]:
    """What each module of the VAE is called in the original code."""
    modules = {name: name for name in ("quant_conv", "post_quant_conv")}
    for side, blocks, halve in (("encoder", "down", "down"), ("decoder", "up", "up")):
        levels = 1 + max(int(k.split(".")[2]) for k in weights if f"{side}.{blocks}_blocks" in k)
        modules |= {f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "conv_out")}
        modules[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for level in range(levels):
            theirs = level if side == "encoder" else levels - 1 - level
            here = f"{side}.{blocks}_blocks.{level}"
            there = f"{side}.{blocks}.{theirs}"
            modules[f"{here}.{halve}samplers.0.conv"] = f"{there}.{halve}sample.conv"
            for layer in range(3):
                resnet, block = f"{here}.resnets.{layer}", f"{there}.block.{layer}"
                modules[f"{resnet}.conv_shortcut"] = f"{block}.nin_shortcut"
                for part in ("norm1", "conv1", "norm2", "conv2"):
                    modules[f"{resnet}.{part}"] = f"{block}.{part}"
        for layer in range(2):
            for part in ("norm1", "conv1", "norm2", "conv2"):
                ours = f"{side}.mid_block.resnets.{layer}.{part}"
                modules[ours] = f"{side}.mid.block_{layer + 1}.{part}"
        for ours, theirs in VAE_ATTENTION.items():
            modules[f"{side}.mid_block.attentions.0.{ours}"] = f"{side}.mid.attn_1.{theirs}"
    return modules


def open_clip(weights: Weights, prefix: str) -> Weights:
    """A text encoder as OpenCLIP stores it: queries, keys and values in one matrix."""
    out = {}
    weights = {key.removeprefix("text_model."): value for key, value in weights.items()}
    for key, value in weights.items():
        if key == "text_projection.weight":
            out["text_projection"] = value.T.contiguous()
        elif key.startswith("embeddings."):
            is_token = key == "embeddings.token_embedding.weight"
            out["token_embedding.weight" if is_token else "positional_embedding"] = value
        elif key.startswith("final_layer_norm."):
            out["ln_final." + key.rpartition(".")[2]] = value
        else:
            _, _, number, rest = key.split(".", 3)
            block = f"transformer.resblocks.{number}."
            module, _, kind = rest.rpartition(".")
            if module in TEXT:
                out[f"{block}{TEXT[module]}.{kind}"] = value
            elif module == "self_attn.q_proj":
                joined = [weights[key.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
                out[f"{block}attn.in_proj_{kind}"] = torch.cat(joined)
    return {prefix + key: value for key, value in out.items()}


def clip(weights: Weights, prefix: str) -> Weights:
    """A text encoder as the CLIP of version 1 stores it."""
    return {
        f"{prefix}transformer.text_model.{key.removeprefix('text_model.')}": value
        for key, value in weights.items()
    }


def single_file(folder: Path) -> Weights:
    """All weights of a diffusers folder under their names in the original code."""
    unet, vae = weights_of(folder / "unet"), weights_of(folder / "vae")
    first = weights_of(folder / "text_encoder")
    weights = renamed(unet, unet_names(unet), "model.diffusion_model.")
    # The rest of an attention has the same names in both.
    weights |= renamed(vae, vae_names(vae), "first_stage_model.")
    for key, value in weights.items():
        if ".attn_1." in key and key.endswith("weight") and value.ndim == 2:
            weights[key] = value[:, :, None, None].contiguous()
    if (folder / "text_encoder_2").exists():
        second = weights_of(folder / "text_encoder_2")
        weights |= clip(first, "conditioner.embedders.0.")
        weights |= open_clip(second, "conditioner.embedders.1.model.")
    elif _is_version_2(folder):
        weights |= open_clip(first, "cond_stage_model.model.")
    else:
        weights |= clip(first, "cond_stage_model.")
    missing = len(unet) + len(vae) - sum(k.startswith(("model.", "first_")) for k in weights)
    assert not missing, f"{missing} weights were not renamed"
    return weights


def _is_version_2(folder: Path) -> bool:
    return '"use_linear_projection": true' in (folder / "unet" / "config.json").read_text()


def write_single_file(folder: Path, path: Path) -> None:
    """Write a diffusers folder as one .safetensors or .ckpt file."""
    weights = single_file(folder)
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights, "global_step": 1}, path)
