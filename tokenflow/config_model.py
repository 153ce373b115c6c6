"""Which checkpoint runs, where and in which precision: the options of all commands that run one."""

import re
from dataclasses import dataclass

from tokenflow.diffusion.versions import VERSIONS
from tokenflow.errors import UserError
from tokenflow.options import option

DTYPES = ("auto", "float32", "float16", "bfloat16")
SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Where the networks run."""

    device: str = "auto"
    """Device of the networks: auto, cpu, mps, cuda, or cuda:N for the GPU of index N. auto: the first of
    CUDA, MPS and the CPU that is available."""

    def __post_init__(self) -> None:
        if not re.fullmatch("auto|(cpu|mps|cuda)(:[0-9]{1,3})?", self.device):
            raise UserError(f"device: {self.device!r} is none of auto, cpu, mps, cuda, cuda:N")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(DeviceConfig):
    """Which checkpoint runs, where and in which precision."""

    sd_version: str = option("2.1", choices=tuple(VERSIONS))
    """Version of Stable Diffusion, downloaded from the Hugging Face hub at first use. -768: trained on 768
    x 768 pixels. depth: takes depth maps. ControlNet: 1.5 with its ControlNets."""
    model: str | None = None
    """Checkpoint in place of sd_version's: a hub id, a folder in diffusers layout, or a .safetensors or
    .ckpt file."""
    vae: str | None = None
    """VAE in place of the checkpoint's: a hub id, a folder in diffusers layout, or a file; in edits, as in
    their inversion."""
    dtype: str = option("auto", choices=DTYPES, aliases=SHORT_DTYPES)
    """Precision of the networks. auto: float16 on CUDA, bfloat16 on CPUs with instructions for it,
    otherwise float32."""
    cpu_offload: bool = False
    """Save GPU memory: only the network in use (UNet, VAE or text encoder) is on the GPU."""
    compile: bool = False
    """Compile the UNet with torch.compile, which takes minutes. Then a pass takes a quarter less time (on
    an H100)."""
    clip_skip: int = option(0, 0, 22)
    """Number of the text encoder's last layers to skip; in edits, as in their inversion. Clip skip 2 of web
    interfaces is 1 here."""
    seed: int = option(1, 0, 2**63 - 1)
    """Random seed of the keyframes, and of SDEdit's noise without use_ddim_noise. Edits with the seed of
    their inversion can use its source features."""
    resume: bool = True
    """Resume a killed run that had the same options. false: start from the beginning."""
    overwrite: bool = False
    """Recompute the result, even if it exists."""

    @property
    def model_id(self) -> str:
        """Hub id, folder or file of the checkpoint."""
        return self.model or VERSIONS[self.sd_version].model
