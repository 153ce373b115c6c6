"""Train the miniature Stable Diffusion on the world of shapes and write it as a diffusers folder.

Stages: VAE; judge; text encoder alone; text encoder and UNet together, on latents encoded once;
Canny ControlNet; the VAE's decoder alone, which leaves the latents as they are. Each keeps its
state in --work_dir: run the same command again after an interruption and it goes on.
"""

import argparse
import copy
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from shapes.checkpoint import (
    SHAPES,
    build_controlnet,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    save,
)
from shapes.data import load_samples, render_samples
from shapes.denoiser import (
    controlnet_loss,
    list_words,
    open_embedding,
    text_loss,
    tokenize,
    unet_loss,
)
from shapes.fit import fit
from shapes.judge import Judge, judge_loss, name_values, score
from shapes.vae import encode, measure_round_trip, vae_loss
from shapes.world import VALUES

TRAINING_SEEDS = range(12_000)
HELD_OUT_SEEDS = range(1_000_000, 1_000_064)
STEPS = dict(vae=4500, judge=2500, text=400, unet=8200, controlnet=1000, decoder=12400)


def scale_latents(vae: AutoencoderKL, frames: np.ndarray, path: Path) -> torch.Tensor:
    """Latents (N, 4, 16, 16) of unit variance, kept in the file `path`; sets `vae`'s factor."""
    if not path.exists():
        torch.save(encode(vae, frames), path)
    latents = torch.load(path, map_location=vae.device, weights_only=True)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return latents * vae.config.scaling_factor


def write_checkpoint(folder: Path, modules: dict[str, nn.Module], tokenizer, judge: Judge) -> None:
    """Write a half-precision checkpoint with the judge in it, replacing `folder` at once."""
    unfinished = folder.with_name(folder.name + ".part")
    halves = {name: copy.deepcopy(module).half() for name, module in modules.items()}
    save(unfinished, tokenizer=tokenizer, **halves)
    judge.save(unfinished / "judge.safetensors")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def main() -> None:
    """Train all stages and write the checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default="data/shapes-sd", help="folder to write")
    parser.add_argument("--work_dir", type=Path, default="runs/shapes", help="folder of the state")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise")
    parser.add_argument("--share", type=float, default=1.0, help=f"of the steps, {STEPS}")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frames, captions, labels = load_samples(args.work_dir / "samples.npz", TRAINING_SEEDS)
    held_out, _, held_out_labels = render_samples(HELD_OUT_SEEDS)
    torch.manual_seed(args.seed)  # for the weights that training starts from
    tokenizer = build_tokenizer(list_words(), SHAPES.prompt_tokens)
    vae, unet = build_vae(SHAPES.vae_channels), build_unet(SHAPES)
    text_encoder = build_text_encoder(tokenizer, SHAPES)
    judge = Judge()
    for module in (vae, unet, text_encoder, judge):
        module.to(device)

    def train(name: str, modules: dict[str, nn.Module], loss, learning_rate: float) -> None:
        n_steps = round(args.share * STEPS[name])
        fit(name, modules, loss, n_steps, args.work_dir, learning_rate, args.seed)

    train("vae", {"vae": vae}, partial(vae_loss, vae, frames), 2e-3)
    print(f"VAE round trip: {measure_round_trip(vae, held_out):.2f} dB")
    latents = scale_latents(vae, frames, args.work_dir / "latents.pt")

    train("judge", {"judge": judge}, partial(judge_loss, judge, frames, labels), 2e-3)
    print("judge:", score(judge.read(held_out), name_values(held_out_labels)))

    token_ids, empty_ids = tokenize(tokenizer, captions), tokenize(tokenizer, [""])
    heads = nn.Linear(SHAPES.text_width, sum(map(len, VALUES.values()))).to(device)
    loss = partial(text_loss, text_encoder, heads, token_ids, labels)
    train("text", {"text": text_encoder, "heads": heads}, loss, 1e-3)

    unet.set_attn_processor(AttnProcessor())  # fused attention has a slow backward pass on CPUs
    scheduler = build_scheduler()
    loss = partial(unet_loss, unet, text_encoder, scheduler, latents, token_ids, empty_ids)
    train("unet", {"text_encoder": text_encoder, "unet": unet}, loss, 5e-4)

    controlnet = build_controlnet(unet, SHAPES).to(device)
    controlnet.set_attn_processor(AttnProcessor())
    open_embedding(controlnet)
    with torch.no_grad():
        text = torch.cat([text_encoder(ids.to(device))[0] for ids in token_ids.split(500)])
    loss = partial(controlnet_loss, controlnet, unet, scheduler, frames, latents, text)
    train("controlnet", {"controlnet": controlnet}, loss, 1e-3)

    decoder = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    for parts in decoder.values():
        parts.requires_grad_(True)
    train("decoder", decoder, partial(vae_loss, vae, frames), 1e-3)
    print(f"VAE round trip: {measure_round_trip(vae, held_out):.2f} dB")

    modules = {"vae": vae, "text_encoder": text_encoder, "unet": unet, "controlnet": controlnet}
    write_checkpoint(args.output, modules, tokenizer, judge)


if __name__ == "__main__":
    main()
