"""One step of each stage with networks of the real sizes and random weights, and its peak memory.

python -m benchmarks.sizes --version XL --dtype bfloat16

Nothing can be seen in what comes out. Frames are 64 x 64 pixels, the smallest size of all versions.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.arguments import benchmark_parser
from benchmarks.clips import Clip, held_out_clips
from benchmarks.job import Job
from benchmarks.meter import Meter
from benchmarks.sd15 import filled
from shapes.checkpoint import TINY, build_scheduler, build_tokenizer
from shapes.versions import CONFIGURATIONS, build_on_meta, build_text_encoder
from tokenflow.config import PnPConfig
from tokenflow.diffusion.checkpoints import choose_device
from tokenflow.diffusion.stable_diffusion import StableDiffusion

N_FRAMES, INTERVAL = 4, 2


class SmallClip(Clip):
    """A clip of 64 x 64 pixels."""

    @property
    def frames(self) -> np.ndarray:
        """The source: uint8 RGB (N, 64, 64, 3)."""
        return np.ascontiguousarray(super().frames[:, ::2, ::2])


def random_sd(version: str, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
    """All networks of a version in full size with random weights."""
    config, tokenizer = CONFIGURATIONS[version], build_tokenizer(["a"], TINY.prompt_tokens)
    unet, vae = build_on_meta(version)
    with torch.device("meta"):
        texts = [
            build_text_encoder(text, tokenizer, pooled=bool(number))
            for number, text in enumerate(config.texts)
        ]
    vae, unet, *texts = (filled(network, device, dtype) for network in (vae, unet, *texts))
    second = {"tokenizer_2": tokenizer, "text_encoder_2": texts[1]} if config.is_xl else {}
    scheduler = type(build_scheduler()).from_config(build_scheduler().config, **config.scheduler)
    networks = vae, tokenizer, texts[0], unet, scheduler, None
    return StableDiffusion(*networks, device=device, dtype=dtype, **second)


def main() -> None:
    """Build one version, run one step of each stage, and write the report."""
    parser = benchmark_parser(__doc__, "runs/sizes")
    versions = [name for name in CONFIGURATIONS if name != "depth"]
    parser.add_argument("--version", default="1.5", choices=versions, help="whose sizes")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    device, dtype = choose_device(args.device, args.dtype)
    config = PnPConfig(
        data_path="", prompt="x", n_timesteps=1, batch_size=INTERVAL, pnp_attn_t=1, pnp_f_t=1
    )
    building = Meter(device)
    with building.stage("weights"):
        sd = random_sd(args.version, device, dtype)
    meter = Meter(device, sd.unet)
    (clip,) = held_out_clips(1, N_FRAMES)
    clip = SmallClip(clip.kind, clip.scene, clip.changes, N_FRAMES)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with meter.stage("encoding, inversion"):
            job = Job.prepare(sd, clip, config, Path(folder))
        with meter.stage("reconstruction, features kept"):
            job.reconstruct()
        with meter.stage("Plug-and-Play, decoding"):
            job.edit_pnp()
        with meter.stage("Plug-and-Play without kept features, decoding"):
            job.with_settings(reuse_source=False).edit_pnp()
    table = f"Version {args.version}, {N_FRAMES} frames of 64 x 64, {dtype} on {device}\n\n"
    table += "| stage | seconds | evaluations | peak memory (GB) |\n|---|---|---|---|\n"
    table += "".join(
        f"| {name} | {cost.seconds:.0f} | {cost.evaluations} | {cost.peak_mb / 1000:.2f} |\n"
        for name, cost in (building.stages | meter.stages).items()
    )
    (args.output / f"{args.version}.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
