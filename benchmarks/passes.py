"""One plain pass of a UNet: as it is, and in ways that may be faster on a GPU.

    python -m benchmarks.passes --version 1.5

The weights are random ones of that version's size. For each way: how far its output is from the plain
pass's, the seconds of the first pass and of later ones, the share of the peak of large products of matrices,
and the kernels that take longest.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.arguments import benchmark_parser
from benchmarks.meter import find_peak, find_seconds
from benchmarks.random_checkpoint import VERSIONS, save_random
from benchmarks.report import markdown, write_report
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.device import choose_device

TIMESTEP, KERNELS = 501, 8
PLAIN, CUDNN = "plain", "cuDNN's attention"
ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
ORDER += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def leave(unet: UNet2DConditionModel) -> None:
    """Leave it as it is."""


def use_channels_last(unet: UNet2DConditionModel) -> None:
    """Keep channels last, as convolutions on tensor cores want them."""
    unet.to(memory_format=torch.channels_last)


def compile_regions(unet: UNet2DConditionModel) -> None:
    """Compile what TokenFlow leaves as it is, one by one; equal ones share a graph."""
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D | FeedForward):
            module.compile()


def compile_regions_channels_last(unet: UNet2DConditionModel) -> None:
    """Both. Compiled group normalisation keeps channels last, and CUDA's own does not."""
    use_channels_last(unet)
    compile_regions(unet)


WAYS: dict[str, Callable[[UNet2DConditionModel], None]] = {
    PLAIN: leave,
    CUDNN: leave,  # within the context of its pass
    "fused projections": UNet2DConditionModel.fuse_qkv_projections,
    "channels last": use_channels_last,
    "compiled regions": compile_regions,
    "compiled regions, channels last": compile_regions_channels_last,
    "compiled": UNet2DConditionModel.compile,
    "compiled, CUDA graphs": partial(UNet2DConditionModel.compile, mode="reduce-overhead"),
}


def main() -> None:
    """Measure every way, and write the report."""
    parser = benchmark_parser(__doc__, "runs/passes")
    parser.add_argument("--version", default="1.5", choices=VERSIONS, help="whose size")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--samples", type=int, default=15, help="in a pass")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="to measure")
    args = parser.parse_args()
    device, dtype = choose_device(args.device, args.dtype)
    peak, rows = find_peak(device, dtype), []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint.find(
            str(save_random(Path(folder) / "checkpoint", args.version, device, dtype))
        )
        for way in dict.fromkeys([PLAIN, *args.ways]):
            torch.compiler.reset()
            sd = checkpoint.load(device, dtype)
            latents = torch.randn(
                args.samples,
                sd.unet.config.in_channels,
                args.size // 8,
                args.size // 8,
                generator=torch.Generator().manual_seed(0),
            ).to(device, dtype)
            text = sd.encode_text("a").expand(args.samples)
            WAYS[way](sd.unet)
            with sdpa_kernel(ORDER, set_priority=True) if way == CUDNN else nullcontext():
                row, output = measure(partial(sd.predict_noise, latents, TIMESTEP, text))
            if way == PLAIN:
                expected = output.clone()
                with FlopCounterMode(display=False) as flops:
                    sd.predict_noise(latents, TIMESTEP, text)
            row["difference"] = ((output - expected).norm() / expected.norm()).item()
            row["share"] = flops.get_total_flops() / row["seconds"] / peak
            rows.append({"way": way} | row)
            write_report(args.output, args.version, format_rows(rows), {"rows": rows})
    print(format_rows(rows))


@torch.inference_mode()
def measure(run: Callable[[], torch.Tensor]) -> tuple[dict, torch.Tensor]:
    """Seconds of the first pass, of a later one, and of its longest kernels; and what it returns."""
    start = time.perf_counter()
    output = run().float()
    row = {"first": time.perf_counter() - start, "seconds": find_seconds(run)}
    with profile() as profiler:
        run()
    on_gpu = torch.cuda.is_available()
    kind = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = sorted(profiler.key_averages(), key=lambda of: getattr(of, kind), reverse=True)
    row["kernels"] = {of.key: getattr(of, kind) / 1e6 for of in kernels[:KERNELS]}
    return row, output


def format_rows(rows: list[dict]) -> str:
    """The report as Markdown."""
    cells = [
        [
            row["way"],
            f"{row['difference']:.1e}",
            f"{row['first']:.1f}",
            f"{1e3 * row['seconds']:.1f}",
            f"{row['share']:.0%}",
            ", ".join(f"{name[:40]} {1e3 * s:.1f}" for name, s in row["kernels"].items()),
        ]
        for row in rows
    ]
    titles = ["way", "difference", "first (s)", "later (ms)", "share of peak", "kernels (ms)"]
    return markdown(titles, cells)


if __name__ == "__main__":
    main()
