"""Files of LoRAs of random weights for the tiny checkpoint."""

import safetensors.torch
import torch

RANK, ALPHA = 4, 2.0
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "resnets.1.conv2", "proj_in")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # as kohya's scripts train


def draw_factors(sd):
    """Random factors (up, down) of a LoRA, by network and layer."""
    generator = torch.Generator().manual_seed(0)

    def pair(weight):
        shape = RANK, *weight.shape[1:]
        up, down = (RANK, len(weight)), shape
        down, up = (0.8 * torch.randn(s, generator=generator) / s[1] ** 0.5 for s in (down, up))
        return up.T.reshape(len(weight), RANK, *[1] * (weight.dim() - 2)), down

    wanted = (("unet", sd.unet, LAYERS), ("text_encoder", sd.text_encoder, TEXT_LAYERS))
    factors = {}
    for part, network, layers in wanted:
        modules = [(name, of) for name, of in network.named_modules() if name.endswith(layers)]
        factors[part] = {name: pair(module.weight) for name, module in modules}
    return factors


def kohya(factors):
    """The tensors of a LoRA file as kohya's scripts write it."""
    tensors, prefixes = {}, {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
    for part, layers in factors.items():
        for name, (up, down) in layers.items():
            key = prefixes[part] + name.replace(".", "_")
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    return tensors


def write_tensors(path, tensors):
    """Write the file of a LoRA; returns its path."""
    safetensors.torch.save_file({key: t.contiguous() for key, t in tensors.items()}, path)
    return path


def compute_results(sd):
    """What the networks that LoRAs change compute: the tokens of a prompt, and the noise under it."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = sd.encode_text("a red circle")
    pooled = [] if text.pooled is None else [text.pooled]
    return text.tokens, *pooled, sd.predict_noise(latents, 500, text.expand(2))
