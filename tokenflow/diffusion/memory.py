"""How much memory of a GPU a run needs, known from configurations, before any weights are loaded.

The formula is fitted to what `python -m benchmarks.device` counts; tests/test_device.py holds it to that.
It is of tensors: CUDA and its libraries take some hundred MB of their own. For Stable Diffusion XL it has not
been counted: what is known of its layers goes in, with the values of 1 and 2.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import mul

import torch
from diffusers import ControlNetModel
from torch import nn

from tokenflow.config import EditConfig, PreprocessConfig
from tokenflow.diffusion.checkpoints import networks_on_meta, vae_dtype

log = logging.getLogger("tokenflow")

# Values that live at once at the peak of a pass.
UNET_VALUES = 26.0  # for each sample, latent pixel and channel of the UNet's first level
CONTROL_VALUES = 7.0  # as well, if a ControlNet conditions it
VAE_VALUES = 6.0  # for each frame, pixel and channel of the VAE's first level
STREAMS = 3
MOST_SAMPLES = 32  # of a pass on a GPU, which hardly gains from more


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device: of each network's weights, and of what passes hold.

    sample: of one sample in a pass of the UNet. frame: of one frame in the VAE. keyframe: the tokens of one
    keyframe in all self-attentions, of which the cache holds several kinds.
    """

    weights: tuple[int, ...]
    sample: int
    frame: int
    keyframe: int

    @classmethod
    def of(cls, networks: Sequence[nn.Module], pixels: int, dtype: torch.dtype) -> "Footprint":
        """For frames of that many pixels. networks: UNet, VAE, text encoders and, if there is one, a
        ControlNet; they may be on the meta device."""
        unet, vae, *others = networks
        n_controls = sum(isinstance(network, ControlNetModel) for network in others)
        size, vae_channels = dtype.itemsize, vae.config.block_out_channels
        vae_size = vae_dtype(unet.config, vae.config, dtype).itemsize
        channels = unet.config.block_out_channels
        latent_pixels = pixels // 4 ** (len(vae_channels) - 1)
        values = UNET_VALUES + CONTROL_VALUES * n_controls
        depths = unet.config.transformer_layers_per_block
        depths = [depths] * len(channels) if isinstance(depths, int) else depths
        # Blocks of self-attentions at each level: two on the way down and three on the way up, if it has any,
        # and one between both ways.
        blocks = [5 * ("CrossAttn" in kind) for kind in unet.config.down_block_types]
        blocks[-1] += 1
        levels = enumerate(zip(blocks, depths, channels, strict=True))
        tokens = sum(math.prod(parts) * latent_pixels // 4**level for level, parts in levels)
        sizes = size, vae_size, *[size] * len(others)
        counts = (sum(p.numel() for p in network.parameters()) for network in networks)
        return cls(
            tuple(map(mul, sizes, counts)),
            int(values * channels[0] * latent_pixels * size),
            int(VAE_VALUES * vae_channels[0] * pixels * vae_size),
            tokens * size,
        )

    def weights_at_once(self, cpu_offload: bool) -> int:
        """Bytes of the networks that are on the device at the same time."""
        return max(self.weights) if cpu_offload else sum(self.weights)

    def peak(self, n_samples: int, n_kept: int, cpu_offload: bool = False) -> int:
        """Bytes at the peak of passes of so many samples, beside tokens of keyframes, kept n times in all."""
        return self.weights_at_once(cpu_offload) + max(
            self.frame, n_samples * self.sample + n_kept * self.keyframe
        )


def samples_in_pass(n_frames: int, n_streams: int) -> int:
    """The samples of a pass on a GPU: frames of all streams, or of one if all are too many."""
    together = n_frames * n_streams
    return together if together <= MOST_SAMPLES else n_frames


def frames_at_once(config: PreprocessConfig | EditConfig, n_streams: int, on_gpu: bool) -> int:
    """Frames in one UNet pass, if they fit in memory; it is the same for all processes of a run."""
    if on_gpu and config.batch_size is None:
        return max(MOST_SAMPLES // n_streams, 1)
    return config.frames_at_once


def kept_keyframes(config: PreprocessConfig | EditConfig, n_frames: int) -> int:
    """How often a run on a GPU keeps the tokens of a keyframe at a time, all kinds of tokens together."""
    if isinstance(config, PreprocessConfig):
        at_once = min(frames_at_once(config, 1, on_gpu=True), n_frames)
        return at_once // config.keyframe_interval + 2 if config.keep_source else 0
    n_keyframes = -(-n_frames // config.interval)
    # Source tokens, and outputs of two streams; in windows also keys and values of two streams.
    kinds = 3 if n_keyframes <= config.keyframe_window else 7
    return kinds * min(n_keyframes, config.keyframe_window)


def bytes_needed(config: PreprocessConfig | EditConfig, footprint: Footprint, n_frames: int) -> int:
    """Bytes of a GPU that a run needs at its peak, if nothing is divided because memory ran out."""
    if isinstance(config, PreprocessConfig):
        samples = min(frames_at_once(config, 1, on_gpu=True), n_frames)
    else:
        together = min(-(-n_frames // config.interval), config.keyframe_window)
        at_once = min(frames_at_once(config, STREAMS, on_gpu=True), n_frames)
        samples = max(samples_in_pass(n, STREAMS) for n in (together, at_once))
    return footprint.peak(samples, kept_keyframes(config, n_frames), config.cpu_offload)


def fitting(
    config: PreprocessConfig | EditConfig, footprint: Footprint, n_frames: int, free: int
) -> dict[str, int]:
    """How many items of each kind of pass fit into the free bytes; at least one."""
    kept = kept_keyframes(config, n_frames) * footprint.keyframe
    left = free - footprint.weights_at_once(config.cpu_offload) - kept
    samples = max(1, left // footprint.sample)
    return {"inversion": samples, "joint": samples, "propagation": max(1, samples // STREAMS)}


def free_bytes(device: torch.device) -> int | None:
    """Free bytes of a GPU; None if the device is none, or not there."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info(device)[0]


def plan_memory(
    config: PreprocessConfig | EditConfig,
    device: torch.device,
    dtype: torch.dtype,
    pixels: int,
    n_frames: int,
) -> dict[str, int]:
    """Log how much memory of a GPU a run on frames of so many pixels needs and, if too much, what lowers it.

    Returns how many items fit at once, by the kind of pass; empty without a GPU.
    """
    if (free := free_bytes(device)) is None:
        return {}
    networks = networks_on_meta(
        config.model_id, getattr(config, "controlnet_id", None), config.sd_version
    )

    def needs(config: PreprocessConfig | EditConfig, dtype: torch.dtype) -> int:
        return bytes_needed(config, Footprint.of(networks, pixels, dtype), n_frames)

    fits = fitting(config, Footprint.of(networks, pixels, dtype), n_frames, free)
    needed = needs(config, dtype)
    text = f"the run needs about {needed / 1e9:.1f} GB of the GPU's memory; {free / 1e9:.1f} GB are free"
    if needed <= free:
        log.info(text)
        return fits
    ways = {"--cpu_offload": needs(replace(config, cpu_offload=True), dtype)}
    ways["--dtype float16"] = needs(config, torch.float16)
    if isinstance(config, EditConfig):
        ways["--keyframe_window 6"] = needs(replace(config, keyframe_window=6), dtype)
        one = replace(config, batch_size=1, keyframe_interval=config.interval)
    else:
        one = replace(config, batch_size=1)
    ways["--batch_size 1"] = needs(one, dtype)
    lower = {
        way: needs for way, needs in sorted(ways.items(), key=lambda x: x[1]) if needs < needed
    }
    advice = ", ".join(f"{way} ({needs / 1e9:.1f} GB)" for way, needs in lower.items())
    log.warning("warning: %s; less with %s, or smaller frames", text, advice or "--n_frames")
    return fits
