"""The commands at Stable Diffusion's real sizes, with random weights: seconds and memory of each stage.

    python -m benchmarks.sizes --version 1.5

What `preprocess.py` and `run_tokenflow_pnp.py` do, from a video file to edited videos, with a checkpoint on
disk of a version's configuration. Nothing can be seen in what comes out. The UNet predicts little noise, so
that the fixed-point inversion needs one evaluation a step, as it mostly does with a trained one. On a GPU, of
versions that the census knows, also how near the edit comes to the measured peak of matrix products.
"""

import argparse
import gc
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.arguments import benchmark_parser
from benchmarks.clips import held_out_clips
from benchmarks.device import Workload, rows_of
from benchmarks.gpu import matmul_peak
from benchmarks.meter import Meter
from benchmarks.report import markdown, write_report
from benchmarks.sd15 import filled
from shapes.checkpoint import TINY, build_tokenizer
from shapes.versions import CONFIGURATIONS, build_on_meta, build_text_encoders, save_pipeline
from shapes.world import render
from tokenflow.config import PnPConfig, PreprocessConfig
from tokenflow.diffusion.device import choose_device
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.editing.sweep import open_edits
from tokenflow.editing.techniques import plug_and_play
from tokenflow.inversion.invert import open_inversion
from util import write_video

SMALL = {"frames": 4, "size": 64, "steps": 1}
QUIET = 0.02  # of the noise that a UNet of random weights predicts
FPS = 12


def save_random(folder: Path, version: str, device: torch.device, dtype: torch.dtype) -> None:
    """Write a checkpoint of a version in full size, in diffusers layout."""
    config, tokenizer = CONFIGURATIONS[version], build_tokenizer(["a"], TINY.prompt_tokens)
    unet, vae = build_on_meta(version)
    with torch.device("meta"):
        texts = build_text_encoders(config, tokenizer)
    vae, unet, *texts = (filled(network, device, dtype) for network in (vae, unet, *texts))
    unet.conv_out.weight.data *= QUIET
    save_pipeline(folder, config, tokenizer, unet, vae, texts)


def run_commands(args: argparse.Namespace, folder: Path, meter: Meter) -> None:
    """Invert and edit a clip as the commands do, and measure their stages; files go to the `folder`."""
    (clip,) = held_out_clips(1, args.frames)
    video, model = folder / "clip.mp4", str(folder / "checkpoint")
    frames = (render(clip.scene, time, args.size)[0] for time in range(args.frames))
    write_video(video, frames, FPS)
    common = {"data_path": str(video), "model": model, "device": args.device, "dtype": args.dtype}
    common |= {"n_frames": args.frames, "cpu_offload": args.cpu_offload, "compile": args.compile}
    inverting = PreprocessConfig(
        H=args.size,
        W=args.size,
        steps=args.steps,
        save_steps=args.steps,
        save_dir=str(folder / "latents"),
        **common,
    )
    with ExitStack() as held:
        with meter.stage("inversion: checks"):
            run = held.enter_context(open_inversion(inverting))
        with meter.stage("inversion: weights"):
            read_weights(run.sd)
            meter.watch(run.sd.unet)
        with meter.stage("inversion: frames read"):
            run.read_frames()
        with meter.stage("inversion"):
            run.invert()
        with meter.stage("reconstruction"):
            run.reconstruct()
        with meter.stage("inversion: video, report"):
            run.finish()
            held.close()
    del run
    gc.collect()
    editing = PnPConfig(
        prompt="a",
        n_timesteps=args.steps,
        n_inversion_steps=args.steps,
        latents_path=str(folder / "latents"),
        output_path=str(folder / "edits"),
        **common,
    )
    with ExitStack() as held:
        with meter.stage("edit: checks"):
            run = next(iter(held.enter_context(open_edits([editing], "pnp"))))
        with meter.stage("edit: weights"):
            read_weights(run.sd)
            meter.watch(run.sd.unet)
        with meter.stage("edit"):
            edited = run.edit(plug_and_play(run.config, run.schedule, run.source))
        with meter.stage("edit: decoding, videos"):
            run.write(edited)


def read_weights(sd: StableDiffusion) -> None:
    """Read what loading only maps to files on a CPU, lest the first pass be charged with it."""
    for network in filter(None, (sd.vae, sd.text_encoder, sd.text_encoder_2, sd.unet)):
        for parameter in network.parameters():
            parameter.sum()


def peak_share(args: argparse.Namespace, device: torch.device, seconds: float) -> str:
    """The operations of an edit beside those that products of matrices do in that time."""
    name = "sd15" if args.version == "1.5" else "sd21"
    _, edit = rows_of(Workload(name, args.size, args.size, args.frames))
    peak = matmul_peak(device, torch.float16) / 1e12
    done = edit["steps"] + edit["consensus"]
    return (
        f"The edit's {done:.0f} TFLOP in {seconds:.1f} s are {done / seconds:.0f} TFLOP/s, "
        f"{done / seconds / peak:.0%} of the {peak:.0f} that large products of matrices reach.\n"
    )


def main() -> None:
    """Build one version, run the commands, and write the report."""
    parser = benchmark_parser(__doc__, "runs/sizes")
    versions = [name for name in CONFIGURATIONS if name != "depth"]
    parser.add_argument("--version", default="1.5", choices=versions, help="whose sizes")
    parser.add_argument("--frames", type=int, default=40, help="of the clip")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=50, help="of the inversion and of the edit")
    parser.add_argument("--quick", action="store_true", help=f"other defaults: {SMALL}")
    parser.add_argument("--cpu_offload", action="store_true", help="as in the commands")
    parser.add_argument("--compile", action="store_true", help="as in the commands")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    if parser.parse_args().quick:
        parser.set_defaults(**SMALL)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    device, dtype = choose_device(args.device, args.dtype)
    meter = Meter(device)
    with tempfile.TemporaryDirectory() as folder:
        save_random(Path(folder) / "checkpoint", args.version, device, dtype)
        gc.collect()
        run_commands(args, Path(folder), meter)
    rows = [{"stage": name} | asdict(cost) for name, cost in meter.stages.items()]
    titles = ["stage", "seconds", "evaluations", "peak memory beyond the weights (GB)"]
    cells = [
        [r["stage"], f"{r['seconds']:.1f}", str(r["evaluations"]), f"{r['peak_mb'] / 1000:.2f}"]
        for r in rows
    ]
    what = f"Version {args.version}, {args.frames} frames of {args.size} x {args.size}, {args.steps} steps, "
    print(text := f"{what}{dtype} on {device}\n\n{markdown(titles, cells)}")
    if device.type == "cuda" and args.version in ("1.5", "2.1"):
        print(share := peak_share(args, device, meter.stages["edit"].seconds))
        text += "\n" + share
    write_report(args, args.version, text, {"rows": rows})


if __name__ == "__main__":
    main()
