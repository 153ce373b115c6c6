"""What each pass of an inversion and an edit asks of a GPU: copies that are waited for, kernels, memory.

    python -m benchmarks.device

The product's own code runs at the sizes of Stable Diffusion. Without a GPU its tensors there are fakes, and
everything is counted that does not take time; with one the passes run with random weights, and are timed.
A row is one kind of pass: the most that any pass of the kind took; then a row for each edit, in TFLOP. Writes
both tables (Markdown and JSON).
"""

import argparse
import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, MultiControlNetModel, UNet2DConditionModel
from tqdm import tqdm

from benchmarks.census import CPU, Census, Counts
from benchmarks.gpu import fused_kernel, matmul_peak
from benchmarks.job import Latents
from benchmarks.report import markdown, write_report
from benchmarks.sd15 import TEXT
from shapes.checkpoint import BOS, build_scheduler, build_text_encoder, build_tokenizer
from tokenflow.config import PnPConfig, PreprocessConfig
from tokenflow.diffusion.ddim import Schedule
from tokenflow.diffusion.stable_diffusion import Control, StableDiffusion
from tokenflow.editing.checkpoint import EditCheckpoint
from tokenflow.editing.consensus import STRIDE, Consensus
from tokenflow.editing.denoise import (
    Edit,
    TokenFlowDenoiser,
    denoise,
    keyframe_schedule,
)
from tokenflow.editing.source import Source
from tokenflow.editing.techniques import plug_and_play
from tokenflow.inversion.files import noisy
from tokenflow.inversion.predictor import VideoNoisePredictor
from tokenflow.inversion.source_features import RecordingPredictor, SourceFeatureFiles
from tokenflow.motion.dense import DenseMotion
from tokenflow.motion.fusion import Fusion
from tokenflow.runtime.batching import Batches, frames_per_pass, split_evenly
from tokenflow.runtime.distributed import Processes
from tokenflow.runtime.frame_array import FrameArray
from tokenflow_utils import JointEdit

UNETS = {
    "sd15": {"attention_head_dim": 8, "cross_attention_dim": 768},
    "sd21": {
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
}
TEXT_LAYERS = {768: 12, 1024: 23}  # of Stable Diffusion's encoders, by their width
SIZES = [("sd15", 512, 512), ("sd21", 512, 512), ("sd21", 768, 768), ("sd21", 512, 896)]
LENGTHS = 40, 400  # frames
SEGMENTS = 4  # of an inversion that are looked at; they are alike


@dataclass
class Row:
    """The most that any pass of a kind took; flops and least seconds by streams and shape of the input."""

    most: dict[str, int]
    flops: dict[tuple, int] = field(default_factory=dict)
    seconds: dict[tuple, float] = field(default_factory=dict)

    def add(self, counts: Counts, what: tuple, seconds: float) -> None:
        """Take in a pass of those streams and that shape."""
        for name, value in dataclasses.asdict(counts).items():
            self.most[name] = max(value, self.most.get(name, 0))
        self.flops[what] = counts.flops
        self.seconds[what] = min(seconds, self.seconds.get(what, seconds))

    @property
    def shapes(self) -> int:
        """Distinct shapes of the inputs."""
        return len({shape for _, shape in self.seconds})


class Tally:
    """Divides what a census counts between the passes of a stage, by kind."""

    def __init__(self, census: Census, timed: bool = False) -> None:
        self.census, self.timed = census, timed
        self.rows: dict[tuple[str, str], Row] = {}
        self.flops = 0  # of all passes, those that are not repeated included
        self._passes: list[tuple[tuple[str, str], Counts, tuple, float]] = []
        self.stage, self.kind, self._seen = "", "", {}

    @contextmanager
    def passes(self, stage: str, kind: str) -> Iterator[None]:
        """What happens in the block belongs to its passes; what follows the last one is a part of it."""
        self.census.take()
        self.stage, self.kind, self._passes = stage, kind, []
        self._start = self._now()
        yield
        rest = self.census.take()
        for number, (key, counts, what, seconds) in enumerate(self._passes, 1):
            is_last = number == len(self._passes)
            counts = plus(counts, rest) if is_last else counts
            self.rows.setdefault(key, Row({})).add(counts, what, seconds)
            self.flops += counts.flops

    def end_pass(self, shape: tuple[int, ...], streams: tuple[int, ...] = ()) -> None:
        """A pass of an input of that shape, in which these streams are, is over."""
        now, key = self._now(), (self.stage, self.kind)
        self._passes.append((key, self.census.take(), (streams, shape), now - self._start))
        self._start = now

    def is_repeated(self, streams: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        """Whether a pass of this kind, streams and shape was seen often enough; then it only counts."""
        key = self.stage, self.kind, streams, shape
        self._seen[key] = self._seen.get(key, 0) + 1
        is_repeated = self._seen[key] > (3 if self.timed else 1)
        self.flops += self.rows[self.stage, self.kind].flops[streams, shape] if is_repeated else 0
        return is_repeated

    def _now(self) -> float:
        if self.timed:
            torch.cuda.synchronize(self.census.device)
        return time.perf_counter()


def plus(one: Counts, other: Counts) -> Counts:
    """What was counted in both."""
    sums = {f.name: getattr(one, f.name) + getattr(other, f.name) for f in dataclasses.fields(one)}
    return Counts(**sums | {"peak_bytes": max(one.peak_bytes, other.peak_bytes)})


@dataclass(frozen=True, kw_only=True)
class TalliedDiffusion(StableDiffusion):
    """Stable Diffusion whose UNet passes are told apart by a tally."""

    tally: Tally
    # Told by what edits: the streams of the pass, and whether it leaves nothing behind.
    state: dict = field(default_factory=dict)

    def predict_noise(
        self, latents: torch.Tensor, t: int, text, control=None, depth=None
    ) -> torch.Tensor:
        """As everywhere. A propagation that was seen is not repeated: on fakes it is the same."""
        flow = self.state.get("flow")
        shape = tuple(latents.shape)
        if flow and flow.joint is None and self.tally.is_repeated(flow.streams, shape):
            return torch.zeros_like(latents)
        noise = super().predict_noise(latents, t, text, control, depth)
        self.tally.end_pass(shape, flow.streams if flow else ())
        return noise


class TalliedDenoiser(TokenFlowDenoiser):
    """TokenFlow whose passes are told apart."""

    def _edit_jointly(self, latents, t: int, frames: torch.Tensor, joint: JointEdit) -> None:
        self.sd.state["flow"] = self.tokenflow
        is_whole = len(joint.edited) == len(self._keyframes[t])
        with self.sd.tally.passes("editing", "joint" if is_whole else "joint, windowed"):
            super()._edit_jointly(latents, t, frames, joint)

    def _propagate(self, latents, t: int, *blend: torch.Tensor) -> torch.Tensor:
        kind = "three streams" if self.source.features is None else "kept features"
        with self.sd.tally.passes("editing", f"propagation, {kind}"):
            return super()._propagate(latents, t, *blend)


@dataclass(frozen=True)
class Workload:
    """A checkpoint, frames of a size in pixels, and how many."""

    checkpoint: str
    height: int
    width: int
    n_frames: int
    config: PnPConfig = PnPConfig(data_path="", prompt="unused", pnp_attn_t=1, pnp_f_t=1)

    @property
    def names(self) -> dict:
        """What a row says of it."""
        size = f"{self.height}x{self.width}"
        return {"checkpoint": self.checkpoint, "size": size, "frames": self.n_frames}


def build_networks(checkpoint: str) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """UNet and VAE of the checkpoint's configuration."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )
    return UNet2DConditionModel(sample_size=64, **UNETS[checkpoint]), vae


def with_control(sd: "TalliedDiffusion") -> "TalliedDiffusion":
    """The same networks and a ControlNet that fits the UNet, on the census's device."""
    with torch.device("meta"):
        control = ControlNetModel.from_unet(sd.unet, load_weights_from_unet=False)
    control = MultiControlNetModel([sd.tally.census.on_device(control, sd.dtype)])
    return dataclasses.replace(sd, controlnet=control)


def tallied(
    tally: Tally,
    build: Callable[[], tuple[UNet2DConditionModel, AutoencoderKL]],
    dtype: torch.dtype = torch.float16,
) -> TalliedDiffusion:
    """Networks on the census's device; the text encoder is CLIP's of the UNet's width."""
    census = tally.census
    with torch.device("meta"):
        unet, vae = build()
        width = unet.config.cross_attention_dim
        tokenizer = build_tokenizer([BOS], TEXT.prompt_tokens)
        layers = TEXT_LAYERS.get(width, 1)
        text = build_text_encoder(
            tokenizer, dataclasses.replace(TEXT, text_width=width, text_layers=layers)
        )
    unet, vae, text = (census.on_device(network, dtype) for network in (unet, vae, text))
    networks = vae, tokenizer, text, unet, build_scheduler(), None
    return TalliedDiffusion(*networks, device=census.device, dtype=dtype, tally=tally)


def pass_with_control(
    sd: TalliedDiffusion, saved: FrameArray, t: int, frames: torch.Tensor, image: np.ndarray
) -> None:
    """A pass of the UNet with a ControlNet, which is on the device for it alone."""
    edges = image.repeat(len(frames), 0)[None]
    predictor = VideoNoisePredictor(
        with_control(sd), "", Batches(len(frames)), lambda _: Control.of(sd.to_images(edges), [1.0])
    )
    with sd.tally.passes("inversion", "with ControlNet"):
        predictor(saved[frames], t, frames)


def consensus_of_a_frame(sd: TalliedDiffusion, clean: torch.Tensor, folder: Path) -> None:
    """What a consensus takes of one frame, with the latents `clean` (1, 4, h, w) and four neighbours."""
    image = sd.decode_latents(clean)[0]
    video = 5, *image.shape[:2]
    motion = DenseMotion.kept_in(folder / "motion", video, lambda index: image, 5)
    motion.find(range(1, 5), Processes(CPU))
    fusion = Fusion.along(motion, range(1, 5), folder / "pictures.npy", Processes(CPU))
    consensus = Consensus(sd, fusion, first=0, stride=5)
    with sd.tally.passes("editing", "consensus of a frame"):
        consensus.note(torch.tensor([0]), clean)
        next(consensus.corrections(1))
        sd.tally.end_pass(tuple(clean.shape))


def run(sd: TalliedDiffusion, workload: Workload, folder: Path) -> int:
    """One step of each stage; files go to the `folder`. Returns the edit's operations in its step."""
    n_frames, tally = workload.n_frames, sd.tally
    shape = sd.latent_shape(n_frames, workload.height, workload.width)
    config, schedule = workload.config, Schedule.of(sd.scheduler, workload.config.n_timesteps)
    t = schedule.timesteps[0]
    saved = FrameArray.create(folder / "latents.npy", shape, torch.float32)
    image = np.zeros((1, workload.height, workload.width, 3), np.uint8)
    with tally.passes("encoding", "VAE"):
        clean = sd.encode_frames(image)
        tally.end_pass(image.shape)
    with tally.passes("decoding", "VAE"):
        sd.decode_latents(clean)
        tally.end_pass(tuple(clean.shape))

    inverting = PreprocessConfig(data_path="", H=workload.height, W=workload.width)
    at_once = frames_per_pass(None, inverting.frames_at_once, 1, sd.device)
    predictor = VideoNoisePredictor(sd, "", Batches(at_once, adapts=False))
    segments = split_evenly(torch.arange(n_frames), at_once)[:SEGMENTS]
    for frames in segments:
        with tally.passes("inversion", "plain"):
            predictor(saved[frames], t, frames)
    with tally.passes("text", "prompt"):
        sd.encode_text("")
        tally.end_pass((1, sd.tokenizer.model_max_length))
    pass_with_control(sd, saved, t, segments[0], image)

    files = SourceFeatureFiles(folder / "source")
    files.create(sd.unet, shape, [t])
    kept = Latents(dict.fromkeys(map(noisy, schedule.timesteps), saved))
    source = Source(kept, n_frames)
    keyframes = keyframe_schedule(config, sd.scheduler, n_frames)
    recording = RecordingPredictor(predictor, keyframes, source.latents, files)
    with recording.install():
        for frames in segments:
            with tally.passes("reconstruction", "features kept"):
                recording(saved[frames], t, frames)

    consensus_of_a_frame(sd, clean, folder)
    technique = plug_and_play(config, schedule, source)
    for known in (source, dataclasses.replace(source, features=files)):
        edit, tally.flops = Edit(sd, technique, known, ("", "", ""), config), 0
        with tempfile.TemporaryDirectory(dir=folder) as steps:
            checkpoint = EditCheckpoint(Path(steps), shape, Processes(CPU))
            with TalliedDenoiser.installed(edit) as denoiser:
                running = denoise(denoiser, checkpoint)
                assert [next(running), next(running)] == [0, 1]
    return tally.flops


def edit_of(workload: Workload, rows: dict[tuple[str, str], dict], step: int) -> dict:
    """The parts of a whole edit with kept features, in TFLOP. step: operations in one of its steps."""
    config, n_frames = workload.config, workload.n_frames
    count = config.consensus_count
    # The last consensus averages all frames, those before it one in each STRIDE.
    averaged = n_frames * (1 + (count - 1) / STRIDE) if count else 0
    parts = {
        "steps": config.n_timesteps * step,
        "consensus": averaged * rows["editing", "consensus of a frame"]["flops"],
        "decoding": n_frames * rows["decoding", "VAE"]["flops"],
    }
    share = parts["consensus"] / sum(parts.values())
    return workload.names | {k: v / 1e12 for k, v in parts.items()} | {"consensus_share": share}


@torch.no_grad()
def rows_of(workload: Workload, build: Callable | None = None) -> tuple[list[dict], dict]:
    """A row for each kind of pass, and one of the edit; `build` makes other networks for a checkpoint."""
    has_gpu = torch.cuda.is_available()
    census = Census(torch.device("cuda:0"))
    sd = tallied(Tally(census), build or partial(build_networks, workload.checkpoint))
    with census, tempfile.TemporaryDirectory() as folder:
        step = run(sd, workload, Path(folder))
    rows = {
        key: workload.names | {"stage": key[0], "kind": key[1]} | row.most | {"shapes": row.shapes}
        for key, row in sd.tally.rows.items()
    }
    if has_gpu:
        timed = dataclasses.replace(sd, tally=Tally(census, timed=True), state={})
        peak = matmul_peak(census.device, sd.dtype)
        with tempfile.TemporaryDirectory() as folder:
            run(timed, workload, Path(folder))
        for key, row in timed.tally.rows.items():
            seconds = max(row.seconds.values())
            share = rows[key]["flops"] / seconds / peak
            rows[key] |= {"seconds": seconds, "peak_share": share}
    return list(rows.values()), edit_of(workload, rows, step)


def tables_of(report: dict[str, list[dict]]) -> str:
    """The report as Markdown."""
    return "\n".join(map(table_of, report.values()))


def table_of(rows: list[dict]) -> str:
    """The rows as Markdown."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    values = ([row.get(name, "") for name in columns] for row in rows)
    cells = ([f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in values)
    return markdown(columns, cells)


def main() -> None:
    """Count everything and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/device"), help="for the report")
    parser.add_argument("--quick", action="store_true", help="SD 1.5 and 40 frames alone")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    workloads = [Workload(*size, n_frames) for size in SIZES for n_frames in LENGTHS]
    report = {"rows": [], "edits": []}
    for workload in tqdm(workloads[:1] if args.quick else workloads, unit="workload"):
        rows, edit = rows_of(workload)
        report["rows"] += rows
        report["edits"].append(edit)
        write_report(args, "device", tables_of(report), report)
    if torch.cuda.is_available():
        report["fused_kernel"] = fused_kernel(torch.device("cuda:0"))
        write_report(args, "device", tables_of(report), report)
    print((args.output / "device.md").read_text())


if __name__ == "__main__":
    main()
