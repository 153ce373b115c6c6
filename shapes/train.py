"""Train the miniature Stable Diffusion on the world of shapes and write it as a diffusers folder.

Stages: VAE; judge; text encoder alone; text encoder and UNet together, on latents encoded once;
Canny ControlNet; the VAE's decoder alone, which leaves the latents as they are. Each keeps its
state in --work_dir: run the same command again after an interruption and it goes on. A budget is a
number of steps, e.g. 4000, or of minutes, e.g. 12m; learning rates decay over it.

With --start, stages begin from the weights of a checkpoint of the same sizes, which may know fewer
words, and at lower learning rates. Its text encoder tells captions apart already, so that the stage
of its own is skipped: it would undo what the UNet knows of words. The judge always begins anew.
"""

import argparse
import copy
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from shapes.checkpoint import (
    SHAPES,
    build_controlnet,
    build_pipeline,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    save,
)
from shapes.controlnet import controlnet_loss, open_embedding
from shapes.data import load_samples, render_samples
from shapes.evaluate import sample
from shapes.fit import Budget, fit
from shapes.judge import Judge, accuracies, judge_loss, names_of
from shapes.text import start_text_encoder, text_loss, tokenize, vocabulary
from shapes.unet import unet_loss
from shapes.vae import encode, round_trip_psnr, vae_loss
from shapes.world import VALUES
from tokenflow.evaluation.contact_sheet import contact_sheet
from util import write_image

TRAINING_SEEDS = range(12_000)
HELD_OUT_SEEDS = range(1_000_000, 1_000_064)
START_RATE = 0.7  # of the learning rates of weights that come from a checkpoint
BUDGETS = {
    "vae": "4500",
    "judge": "2500",
    "text": "400",
    "unet": "8200",
    "controlnet": "1000",
    "decoder": "12400",
}
SHOWN = [
    "a red striped circle on a green dotted background",
    "a blue checkered square on a yellow striped background",
    "a yellow dotted triangle on a white checkered background",
    "a green striped square on a red plain background",
    "a blue dotted circle on a red checkered background",
    "a white plain triangle on a blue striped background",
    "a yellow striped circle on a green checkered background behind a black bar",
    "a green plain triangle on a grey plain background",
]


def parse_arguments() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default="data/shapes-sd", help="folder to write")
    parser.add_argument("--work_dir", type=Path, default="runs/shapes", help="folder of the state")
    parser.add_argument("--start", type=Path, help="folder of a checkpoint to start from")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise")
    for stage, budget in BUDGETS.items():
        parser.add_argument(
            f"--{stage}", type=Budget.parse, default=budget, metavar="BUDGET", help="to spend on it"
        )
    return parser.parse_args()


def scaled_latents(vae: AutoencoderKL, frames: np.ndarray, path: Path) -> torch.Tensor:
    """Latents (N, 4, 16, 16) of unit variance, kept in the file `path`; sets `vae`'s factor."""
    if not path.exists():
        torch.save(encode(vae, frames), path)
    latents = torch.load(path, map_location=vae.device, weights_only=True)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return latents * vae.config.scaling_factor


def write_checkpoint(folder: Path, modules: dict[str, nn.Module], tokenizer, judge: Judge) -> None:
    """Write a half-precision checkpoint with the judge in it, replacing `folder` at once."""
    partial_folder = folder.with_name(folder.name + ".part")
    halves = {name: copy.deepcopy(module).half() for name, module in modules.items()}
    save(partial_folder, tokenizer=tokenizer, **halves)
    judge.save(partial_folder / "judge.safetensors")
    shutil.rmtree(folder, ignore_errors=True)
    partial_folder.rename(folder)


def main() -> None:
    """Train all stages and write the checkpoint."""
    args = parse_arguments()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frames, captions, labels = load_samples(args.work_dir / "samples.npz", TRAINING_SEEDS)
    held_out, _, held_out_labels = render_samples(HELD_OUT_SEEDS)
    torch.manual_seed(args.seed)  # for the weights that training starts from
    tokenizer = build_tokenizer(vocabulary(), SHAPES.prompt_tokens)
    vae, unet = build_vae(SHAPES), build_unet(SHAPES)
    text_encoder = build_text_encoder(tokenizer, SHAPES)
    if args.start:
        for module, name in ((vae, "vae"), (unet, "unet")):
            stored = type(module).from_pretrained(args.start, subfolder=name)
            module.load_state_dict(stored.float().state_dict())
        start_text_encoder(text_encoder, tokenizer, args.start)
    rate = START_RATE if args.start else 1.0
    judge = Judge()
    for module in (vae, unet, text_encoder, judge):
        module.to(device)
    train = partial(fit, work_dir=args.work_dir, seed=args.seed)

    train("vae", {"vae": vae}, partial(vae_loss, vae, frames), args.vae, learning_rate=rate * 2e-3)
    print(f"VAE round trip: {round_trip_psnr(vae, held_out):.2f} dB")
    latents = scaled_latents(vae, frames, args.work_dir / "latents.pt")

    loss = partial(judge_loss, judge, frames, labels)
    train("judge", {"judge": judge}, loss, args.judge, learning_rate=2e-3)
    print("judge:", accuracies(judge.read(held_out), names_of(held_out_labels)))

    token_ids, empty_ids = tokenize(tokenizer, captions), tokenize(tokenizer, [""])
    if not args.start:
        heads = nn.Linear(SHAPES.text_width, sum(map(len, VALUES.values()))).to(device)
        loss = partial(text_loss, text_encoder, heads, token_ids, labels)
        train("text", {"text": text_encoder, "heads": heads}, loss, args.text, learning_rate=1e-3)

    def preview(average: nn.ModuleDict) -> None:
        """Keep a checkpoint of the averaged weights so far, and a PNG of a sample for each of SHOWN."""
        modules = {"vae": vae, **average}
        pipeline = build_pipeline(**modules, tokenizer=tokenizer)
        pipeline.set_progress_bar_config(disable=True)
        images = sample(pipeline, SHOWN, steps=20, guidance=7.5, seed=0)
        sheet = contact_sheet({"first four": images[:4], "last four": images[4:]})
        write_image(args.work_dir / "samples.png", sheet)
        modules["controlnet"] = build_controlnet(average["unet"], SHAPES)
        write_checkpoint(args.work_dir / "preview", modules, tokenizer, judge)

    unet.set_attn_processor(AttnProcessor())  # fused attention has a slow backward pass on CPUs
    scheduler = build_scheduler()
    modules = {"text_encoder": text_encoder, "unet": unet}
    loss = partial(unet_loss, unet, text_encoder, scheduler, latents, token_ids, empty_ids)
    train("unet", modules, loss, args.unet, learning_rate=rate * 5e-4, look=preview)

    controlnet = build_controlnet(unet, SHAPES).to(device)
    controlnet.set_attn_processor(AttnProcessor())
    if args.start:
        stored = ControlNetModel.from_pretrained(args.start, subfolder="controlnet")
        controlnet.load_state_dict(stored.float().state_dict())
    else:
        open_embedding(controlnet)
    with torch.no_grad():
        text = torch.cat([text_encoder(ids.to(device))[0] for ids in token_ids.split(500)])
    loss = partial(controlnet_loss, controlnet, unet, scheduler, frames, latents, text)
    train(
        "controlnet", {"controlnet": controlnet}, loss, args.controlnet, learning_rate=rate * 1e-3
    )

    decoder = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    for parts in decoder.values():
        parts.requires_grad_(True)
    loss = partial(vae_loss, vae, frames)
    train("decoder", decoder, loss, args.decoder, learning_rate=rate * 1e-3)
    print(f"VAE round trip: {round_trip_psnr(vae, held_out):.2f} dB")

    modules |= {"vae": vae, "controlnet": controlnet}
    write_checkpoint(args.output, modules, tokenizer, judge)


if __name__ == "__main__":
    main()
