"""How much memory of a GPU a run needs, known from configurations, before any weights are loaded.

The formula is fitted to what `python -m benchmarks.device` counts; tests/test_device.py holds it to that.
It is of tensors: CUDA and its libraries take some hundred MB of their own. For Stable Diffusion XL it has not
been counted: what is known of its layers goes in, with the values of 1 and 2.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import ControlNetModel
from torch import nn

from tokenflow.config import EditConfig, PreprocessConfig
from tokenflow.diffusion.checkpoints import networks_on_meta, vae_dtype
from tokenflow.diffusion.layouts import tokens_by_layer

log = logging.getLogger("tokenflow")

CUDA = torch.device("cuda")
# Values that live at once at the peak of a pass.
UNET_VALUES = 26.0  # for each sample, latent pixel and channel of the UNet's first level
CONTROL_VALUES = 7.0  # as well, for each ControlNet that conditions it
VAE_VALUES = 6.0  # for each frame, pixel and channel of the VAE's first level
STREAMS = 3
MOST_SAMPLES = 32  # of a pass on a GPU; more are not expected to be more efficient


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device: of weights, and of what passes hold.

    offloaded: of each network that is elsewhere, under cpu_offload, while another one is used. others: of all
    other networks together. sample: of one sample in a pass of the UNet. frame: of one frame in the VAE.
    keyframe: the tokens of one keyframe in all self-attentions, of which the cache holds several kinds.
    """

    offloaded: tuple[int, ...]
    others: int
    sample: int
    frame: int
    keyframe: int

    @classmethod
    def of(cls, networks: Sequence[nn.Module], pixels: int, dtype: torch.dtype) -> "Footprint":
        """For frames of that many pixels. networks: UNet, VAE, text encoders and ControlNets; they may be on
        the meta device."""
        unet, vae, *rest = networks
        size, vae_size = dtype.itemsize, vae_dtype(unet.config, vae.config, dtype).itemsize
        controls = [network for network in rest if isinstance(network, ControlNetModel)]
        texts = [network for network in rest if network not in controls]
        channels, vae_channels = unet.config.block_out_channels, vae.config.block_out_channels
        latent_pixels = pixels // 4 ** (len(vae_channels) - 1)
        values = UNET_VALUES + CONTROL_VALUES * len(controls)
        widths = (
            tokens * unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
            for name, tokens in tokens_by_layer(unet, (1, latent_pixels)).items()
        )
        return cls(
            (size * count(unet), vae_size * count(vae), *(size * count(text) for text in texts)),
            size * sum(map(count, controls)),
            int(values * channels[0] * latent_pixels * size),
            int(VAE_VALUES * vae_channels[0] * pixels * vae_size),
            size * sum(widths),
        )

    def weights(self, cpu_offload: bool) -> int:
        """Bytes of the networks that are on the device at the same time."""
        return self.others + (max if cpu_offload else sum)(self.offloaded)

    def peak(self, n_samples: int, n_kept: int, cpu_offload: bool) -> int:
        """Bytes at the peak of passes of so many samples, beside tokens of keyframes, kept n times in all."""
        passing = n_samples * self.sample + n_kept * self.keyframe
        return self.weights(cpu_offload) + max(self.frame, passing)


def count(network: nn.Module) -> int:
    """The number of a network's parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def samples_in_pass(n_frames: int, n_streams: int) -> int:
    """The samples of a pass on a GPU: frames of all streams, or of one if all are too many."""
    together = n_frames * n_streams
    return together if together <= MOST_SAMPLES else n_frames


def frames_at_once(
    config: PreprocessConfig | EditConfig, n_streams: int, device: torch.device
) -> int:
    """Frames in one UNet pass, if they fit in memory; it is the same for all processes of a run."""
    if device.type == "cuda" and config.batch_size is None:
        return MOST_SAMPLES // n_streams
    return config.frames_at_once


def bytes_needed(config: PreprocessConfig | EditConfig, footprint: Footprint, n_frames: int) -> int:
    """Bytes of a GPU that a run needs at its peak, if nothing is divided because memory ran out."""
    if isinstance(config, PreprocessConfig):
        samples = min(frames_at_once(config, 1, CUDA), n_frames)
    else:
        together = min(-(-n_frames // config.interval), config.keyframe_window)
        at_once = min(frames_at_once(config, STREAMS, CUDA), n_frames)
        samples = max(samples_in_pass(n, STREAMS) for n in (together, at_once))
    return footprint.peak(samples, kept_keyframes(config, n_frames), config.cpu_offload)


def kept_keyframes(config: PreprocessConfig | EditConfig, n_frames: int) -> int:
    """How often a run on a GPU keeps the tokens of a keyframe at a time, all kinds of tokens together."""
    if isinstance(config, PreprocessConfig):
        at_once = min(frames_at_once(config, 1, CUDA), n_frames)
        return at_once // config.keyframe_interval + 2 if config.keep_source else 0
    n_keyframes = -(-n_frames // config.interval)
    # Source tokens, and outputs of two streams; in windows also keys and values of two streams.
    kinds = 3 if n_keyframes <= config.keyframe_window else 7
    return kinds * min(n_keyframes, config.keyframe_window)


def free_bytes(device: torch.device) -> int | None:
    """Free bytes of a GPU; None if the device is none, or not there."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info(device)[0]


def plan_memory(
    config: PreprocessConfig | EditConfig,
    controlnets: Sequence[str],
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
    networks = networks_on_meta(config.model_id, controlnets, config.sd_version)
    if isinstance(config, EditConfig):  # other batches would change its keyframes
        config = replace(config, keyframe_interval=config.interval)

    def needs(dtype: torch.dtype = dtype, **changes) -> int:
        footprint = Footprint.of(networks, pixels, dtype)
        return bytes_needed(replace(config, **changes), footprint, n_frames)

    needed, footprint = needs(), Footprint.of(networks, pixels, dtype)
    kept = kept_keyframes(config, n_frames) * footprint.keyframe
    left = free - footprint.weights(config.cpu_offload) - kept
    samples, frames = max(1, left // footprint.sample), max(1, left // footprint.frame)
    text = f"the run needs about {needed / 1e9:.1f} GB of the GPU's memory; {free / 1e9:.1f} GB are free"
    if needed <= free:
        log.info(text)
    else:
        ways = {"--cpu_offload": needs(cpu_offload=True), "--dtype float16": needs(torch.float16)}
        if isinstance(config, EditConfig):
            ways["--keyframe_window 6"] = needs(keyframe_window=6)
        if config.batch_size is None:
            text += ", so fewer frames pass at once"
        else:
            ways["--batch_size 1"] = needs(batch_size=1)
        lower = sorted((less, way) for way, less in ways.items() if less < needed)
        advice = "".join(f"{way} ({less / 1e9:.1f} GB), " for less, way in lower)
        log.warning("warning: %s; less with %s%ssmaller frames", text, advice, "or " * bool(lower))
    vae = {"encoding": frames, "decoding": frames}
    return vae | {"inversion": samples, "joint": samples, "propagation": max(1, samples // STREAMS)}
