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


def rename_unet(key: str, has_attention: set[str]) -> str:
    """What the original code calls a weight of the UNet; two residual blocks at each level.

    has_attention: the decoder's blocks that have some.
    """
    match key.split("."):
        case "down_blocks", level, "downsamplers", _, _, *rest:
            place = f"input_blocks.{3 * int(level) + 3}.0.op"
        case "down_blocks", level, kind, layer, *rest:
            place = f"input_blocks.{3 * int(level) + int(layer) + 1}.{int(kind == 'attentions')}"
        case "up_blocks", level, "upsamplers", _, *rest:
            place = f"output_blocks.{3 * int(level) + 2}.{1 + (level in has_attention)}"
        case "up_blocks", level, kind, layer, *rest:
            place = f"output_blocks.{3 * int(level) + int(layer)}.{int(kind == 'attentions')}"
        case "mid_block", kind, layer, *rest:
            place = f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}"
        case _:
            module, _, kind = key.rpartition(".")
            return f"{UNET_ENDS[module]}.{kind}"
    if ".resnets." in key:
        rest[0] = RESNET[rest[0]]
    return ".".join([place, *rest])


def rename_vae(key: str, n_levels: int) -> str:
    """What the original code calls a weight of the VAE, whose decoder counts levels from the output."""
    match key.split("."):
        case side, "mid_block", "resnets", layer, *rest:
            place = f"{side}.mid.block_{int(layer) + 1}"
        case side, "mid_block", "attentions", _, *rest, kind:
            place, rest = f"{side}.mid.attn_1", [VAE_ATTENTION[".".join(rest)], kind]
        case side, ("down_blocks" | "up_blocks") as blocks, level, kind, layer, *rest:
            way = blocks.removesuffix("_blocks")
            level = int(level) if way == "down" else n_levels - 1 - int(level)
            module = f"block.{layer}" if kind == "resnets" else f"{way}sample"
            place = f"{side}.{way}.{level}.{module}"
            rest[0] = rest[0].replace("conv_shortcut", "nin_shortcut")
        case _:
            return key.replace("conv_norm_out", "norm_out")
    return ".".join([place, *rest])


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
    has_attention = {
        key.split(".")[1] for key in unet if key.startswith("up_") and ".attn1." in key
    }
    n_levels = len({key.split(".")[2] for key in vae if key.startswith("decoder.up_blocks")})
    prefix = "model.diffusion_model."
    weights = {prefix + rename_unet(key, has_attention): value for key, value in unet.items()}
    for key, value in vae.items():
        name = f"first_stage_model.{rename_vae(key, n_levels)}"
        is_convolution = ".attn_1." in name and name.endswith("weight") and value.ndim == 2
        weights[name] = value[:, :, None, None].contiguous() if is_convolution else value
    if (folder / "text_encoder_2").exists():
        second = weights_of(folder / "text_encoder_2")
        weights |= clip(first, "conditioner.embedders.0.")
        weights |= open_clip(second, "conditioner.embedders.1.model.")
    elif _is_version_2(folder):
        weights |= open_clip(first, "cond_stage_model.model.")
    else:
        weights |= clip(first, "cond_stage_model.")
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
