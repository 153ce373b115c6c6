"""Which checkpoint runs, where and in which precision: the options of all commands that run one."""

import re
from dataclasses import dataclass

from tokenflow.cli import option
from tokenflow.diffusion.versions import VERSIONS
from tokenflow.errors import UserError

DTYPES = ("auto", "float32", "float16", "bfloat16")
SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def check_device(device: str) -> None:
    """Raise UserError for a `device` that no machine has."""
    if not re.fullmatch("auto|(cpu|mps|cuda)(:[0-9]{1,3})?", device):
        raise UserError(f"device: {device!r} is none of auto, cpu, mps, cuda, cuda:N")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which checkpoint runs, where and in which precision."""

    sd_version: str = option(
        "version of Stable Diffusion, downloaded from the Hugging Face hub at first use; -768: those for "
        "frames of 768 x 768 pixels, depth: one that takes the frames' depth too, ControlNet: version 1.5 "
        "with its ControlNets",
        "2.1",
        choices=tuple(VERSIONS),
    )
    model: str | None = option(
        "checkpoint to use instead of the one of sd_version: a hub id, a folder in diffusers layout, or a "
        "single .safetensors or .ckpt file (docs/checkpoints.md)",
        None,
    )
    device: str = option(
        "where the networks run: auto, cpu, mps, cuda, or cuda:N for the GPU of index N; "
        "auto: the first of CUDA, MPS and the CPU that is available",
        "auto",
    )
    dtype: str = option(
        "precision of the networks; auto: float16 on CUDA, bfloat16 on CPUs with instructions for it, "
        "else float32",
        "auto",
        choices=DTYPES,
        aliases=SHORT_DTYPES,
    )
    cpu_offload: bool = option(
        "save GPU memory: of the UNet, the VAE and the text encoder, only the one in use is on the "
        "device, and the others are in main memory",
        False,
    )
    compile: bool = option(
        "compile the UNet with torch.compile, for a GPU and long videos: it takes minutes at first, and then "
        "a plain pass takes a quarter less time (on an H100)",
        False,
    )
    clip_skip: int = option(
        "layers of the text encoder that are left out at its end; edits need the clip_skip of their "
        "inversion (the web interfaces count one more: their clip skip 2 is 1 here)",
        0,
        low=0,
        high=22,
    )
    seed: int = option(
        "seed of all random draws: which frames are keyframes, and the noise of SDEdit without "
        "use_ddim_noise; kept source features serve only edits with the seed of preprocess.py",
        1,
        low=0,
        high=2**63 - 1,
    )
    resume: bool = option(
        "resume a killed run with the same options; false: start it from the beginning", True
    )
    overwrite: bool = option("recompute the result, even if it exists", False)

    def __post_init__(self) -> None:
        check_device(self.device)

    @property
    def model_id(self) -> str:
        """Hub id, folder or file of the checkpoint."""
        return self.model or VERSIONS[self.sd_version].model
