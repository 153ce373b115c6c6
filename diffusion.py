"""Stable Diffusion: loading a checkpoint, text and VAE encoding, noise prediction, DDIM both ways."""

import functools
import json
import logging
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import numpy as np
import torch
import transformers
from accelerate import cpu_offload_with_hook
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import constants, model_info, try_to_load_from_cache
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer

from cli import UserError

# At once, or one frame: the VAE works at full resolution and needs the most memory.
VAE_PIXELS = 1 << 16
log = logging.getLogger("tokenflow")

HUB_TIMEOUT = 10  # seconds

# A latent is of unit variance. Most steps come to rest at their first evaluation (2e-3 is typical).
FIXED_POINT_TOLERANCE = 3e-3  # root mean square of a latent's last movement
FIXED_POINT_ITERATIONS = 5  # at most, of a frame at a step

# What makes a UNet Stable Diffusion's: the layers that TokenFlow and its injections name.
SD_LAYOUT = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}

# diffusers passes the hub a retired argument, which is no concern of the user's.
warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks.*")
# Files that are looked for in two places are no errors either; what is missing we say ourselves.
diffusers.utils.logging.set_verbosity(logging.CRITICAL)
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

T = TypeVar("T")
NoisePredictor = Callable[[torch.Tensor, int], torch.Tensor]
# The latents (n, 4, h, w) of some frames, a timestep, and which frames of the video (n,) they are.
FramesNoisePredictor = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Schedule:
    """The noise levels that a number of DDIM steps visits, the noisiest first.

    `alphas` (the cumulative products) has one entry more than `timesteps`: the end of the last step.
    """

    timesteps: tuple[int, ...]
    alphas: tuple[float, ...]

    @classmethod
    def of(cls, scheduler: DDIMScheduler, n_steps: int) -> "Schedule":
        """The schedule of `n_steps` steps."""
        scheduler.set_timesteps(n_steps)
        timesteps = tuple(scheduler.timesteps.tolist())
        alphas = [scheduler.alphas_cumprod[t].item() for t in timesteps]
        return cls(timesteps, (*alphas, float(scheduler.final_alpha_cumprod)))

    def last(self, n_steps: int) -> "Schedule":
        """Only the `n_steps` last, least noisy steps."""
        first = len(self.timesteps) - n_steps
        return Schedule(self.timesteps[first:], self.alphas[first:])


@dataclass(frozen=True)
class Control:
    """What conditions a ControlNet: images (n, 3, H, W) in [0, 1] and a factor (n,) on its residuals."""

    images: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def cat(cls, controls: Sequence["Control"]) -> "Control":
        """The conditions of several batches as those of one."""
        images, scales = zip(*((c.images, c.scale) for c in controls), strict=True)
        return cls(torch.cat(images), torch.cat(scales))


@dataclass(frozen=True)
class StableDiffusion:
    """The networks of one checkpoint on one device, and its noise schedule."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler
    controlnet: ControlNetModel | None
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def encode_text(self, prompt: str) -> torch.Tensor:
        """Embedding (1, l, d) of a prompt, cut or padded to the tokenizer's length."""
        length = self.tokenizer.model_max_length
        if len(self.tokenizer(prompt).input_ids) > length:
            log.warning("only the first %d tokens count of the prompt %r", length, prompt)
        tokens = self.tokenizer(
            prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return self.text_encoder(tokens.input_ids.to(self.device))[0]

    @torch.no_grad()
    def encode_frames(self, frames: np.ndarray) -> torch.Tensor:
        """Latents (n, 4, h, w), fp32 on the CPU, of uint8 RGB frames (n, H, W, 3): posterior means."""
        latents = []
        height, width = frames.shape[1:3]
        for start in range(0, len(frames), size := vae_batch_size(height, width)):
            images = self.to_images(frames[start : start + size])
            posterior = self.vae.encode(2 * images - 1).latent_dist
            latents.append(posterior.mean.float().cpu() * self.vae.config.scaling_factor)
        return torch.cat(latents)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> np.ndarray:
        """Uint8 RGB frames (n, H, W, 3) of latents (n, 4, h, w)."""
        frames = []
        size = vae_batch_size(*(self._pixels_of_latent * n for n in latents.shape[2:]))
        for batch in (latents / self.vae.config.scaling_factor).split(size):
            images = self.vae.decode(batch.to(self.device, self.dtype)).sample.float()
            check_finite(images, "the VAE's decoded frames")
            frames.append((images / 2 + 0.5).clamp(0, 1).mul(255).round().byte().cpu())
        return torch.cat(frames).permute(0, 2, 3, 1).numpy()

    def latent_shape(self, n_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape (N, 4, h, w) of the latents of frames of that size in pixels."""
        factor = self._pixels_of_latent
        return n_frames, self.vae.config.latent_channels, height // factor, width // factor

    @property
    def _pixels_of_latent(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def to_images(self, frames: np.ndarray) -> torch.Tensor:
        """Uint8 frames (n, H, W, 3) as images (n, 3, H, W) in [0, 1], as the networks take them."""
        images = torch.from_numpy(frames).permute(0, 3, 1, 2)
        return images.to(self.device).to(self.dtype) / 255

    @torch.no_grad()
    def predict_noise(
        self, latents: torch.Tensor, t: int, text: torch.Tensor, control: Control | None = None
    ) -> torch.Tensor:
        """The noise (n, 4, h, w) that the UNet sees in `latents` (n, 4, h, w); fp32 on their device.

        text: (n, l, d). control: conditions the ControlNet, whose residuals the UNet takes.
        """
        model_input = latents.to(self.device, self.dtype)
        residuals = (
            {} if control is None else self._control_residuals(model_input, t, text, control)
        )
        output = self.unet(model_input, t, encoder_hidden_states=text, **residuals).sample
        output = output.float().to(latents.device)
        if self.scheduler.config.prediction_type == "v_prediction":
            alpha = self.scheduler.alphas_cumprod[t].item()
            return math.sqrt(alpha) * output + math.sqrt(1 - alpha) * latents
        return output

    def _control_residuals(
        self, model_input: torch.Tensor, t: int, text: torch.Tensor, control: Control
    ) -> dict[str, Any]:
        scale = control.scale.to(self.device, self.dtype)[:, None, None, None]
        down, mid = self.controlnet(
            model_input,
            t,
            encoder_hidden_states=text,
            controlnet_cond=control.images,
            return_dict=False,
        )
        return {
            "down_block_additional_residuals": [scale * residual for residual in down],
            "mid_block_additional_residual": scale * mid,
        }


def vae_batch_size(height: int, width: int) -> int:
    """How many frames of that size (pixels) pass the VAE at once."""
    return max(1, VAE_PIXELS // (height * width))


def ddim_step(
    latents: torch.Tensor, noise: torch.Tensor, alpha_from: float, alpha_to: float
) -> torch.Tensor:
    """Move latents along their noise from one noise level to another (Song et al., 2010.02502, eq. 12).

    The same formula samples (`alpha_to` > `alpha_from`) and inverts (`alpha_to` < `alpha_from`).
    """
    clean = (latents - math.sqrt(1 - alpha_from) * noise) / math.sqrt(alpha_from)
    return math.sqrt(alpha_to) * clean + math.sqrt(1 - alpha_to) * noise


def invert(
    latents: torch.Tensor,
    schedule: Schedule,
    predict_noise: FramesNoisePredictor,
    fixed_point: bool = False,
) -> Iterator[tuple[int, torch.Tensor]]:
    """DDIM inversion: from clean latents (N, 4, h, w) to noise; yields each timestep and its latents.

    A sampling step uses the noise predicted at the latents it comes from, which an inversion does not
    know yet. Naive inversion predicts it at those it has; with `fixed_point` it is found by
    `fixed_point_noise`.
    """
    frames, noise, before = torch.arange(len(latents)), None, None
    for step, t in reversed(list(enumerate(schedule.timesteps))):
        alphas = schedule.alphas[step + 1], schedule.alphas[step]
        if fixed_point and noise is not None:
            # The noise changes smoothly along a trajectory, so that its line is a close guess.
            guess = noise if before is None else 2 * noise - before
            before = noise
            noise = fixed_point_noise(latents, guess, t, alphas, predict_noise)
        else:
            noise = predict_noise(latents, t, frames)
        latents = ddim_step(latents, noise, *alphas)
        check_finite(latents, f"the latents of the inversion at timestep {t}")
        yield t, latents


def fixed_point_noise(
    latents: torch.Tensor,
    guess: torch.Tensor,
    t: int,
    alphas: tuple[float, float],
    predict_noise: FramesNoisePredictor,
) -> torch.Tensor:
    """The noise (N, 4, h, w) that moves latents to where just that noise is predicted.

    Iterates noise = predict_noise(ddim_step(latents, noise), t) from a `guess` (Pan et al., AIDI,
    arXiv 2309.04907; Garibi et al., ReNoise, arXiv 2403.14602) until the latents move by less than
    FIXED_POINT_TOLERANCE. Frames at rest cost nothing more, and neither do those that an iteration
    leads further away.
    """
    noise, frames = guess.clone(), torch.arange(len(latents))
    least = torch.full((len(latents),), math.inf)
    for _ in range(FIXED_POINT_ITERATIONS):
        before = ddim_step(latents[frames], noise[frames], *alphas)
        predicted = predict_noise(before, t, frames)
        change = ddim_step(latents[frames], predicted, *alphas) - before
        movement = change.square().mean((1, 2, 3)).sqrt()
        nearer = movement < least[frames]
        noise[frames[nearer]], least[frames] = predicted[nearer], movement
        frames = frames[nearer & (movement > FIXED_POINT_TOLERANCE)]
        if not len(frames):
            break
    return noise


def sample(
    latents: torch.Tensor, schedule: Schedule, predict_noise: NoisePredictor
) -> Iterator[torch.Tensor]:
    """DDIM sampling from noise to clean latents; yields the latents after each step."""
    for step, t in enumerate(schedule.timesteps):
        noise = predict_noise(latents, t)
        latents = ddim_step(latents, noise, schedule.alphas[step], schedule.alphas[step + 1])
        check_finite(latents, f"the sampled latents at timestep {t} (step {step + 1})")
        yield latents


def last(trajectory: Iterable[T]) -> T:
    """Run a trajectory to its end and return only that."""
    return deque(trajectory, maxlen=1).pop()


def check_finite(values: torch.Tensor, what: str) -> None:
    """Raise FloatingPointError, naming `what` and the remedy, unless all values are finite."""
    if not torch.isfinite(values).all():
        raise FloatingPointError(
            f"{what} hold non-finite values; run again with --dtype float32 or bfloat16, "
            "which do not overflow where float16 does (in float32: the checkpoint is broken)"
        )


def check_checkpoint(model_id: str, height: int | None = None, width: int | None = None) -> None:
    """Refuse, before weights are loaded, a checkpoint or a frame size (pixels) that cannot work."""
    unet = _find(UNet2DConditionModel.load_config, model_id, "unet")
    for key, expected in SD_LAYOUT.items():
        found = list(unet[key]) if isinstance(unet.get(key), tuple | list) else unet.get(key)
        if found != expected:
            raise UserError(
                f"{model_id}: its UNet is not of Stable Diffusion 1 or 2's layout: "
                f"{key} is {found}, not {expected}"
            )
    vae = _find(AutoencoderKL.load_config, model_id, "vae")
    halvings = len(vae["block_out_channels"]) - 1 + len(unet["block_out_channels"]) - 1
    multiple = 2**halvings
    for name, size in {"H": height, "W": width}.items():
        if size is not None and size % multiple:
            nearest = max(multiple, round(size / multiple) * multiple)
            raise UserError(
                f"{name}: {size} is no multiple of {multiple}; the nearest valid size is {nearest}"
            )


def load_scheduler(model_id: str) -> DDIMScheduler:
    """The checkpoint's noise schedule with DDIM's steps."""
    return _find(DDIMScheduler.from_pretrained, model_id, "scheduler")


def load(
    model_id: str,
    controlnet_id: str | None,
    device: torch.device,
    dtype: torch.dtype,
    cpu_offload: bool = False,
) -> StableDiffusion:
    """Load a checkpoint, and a ControlNet, from a hub id or a folder in diffusers layout.

    With `cpu_offload` of the VAE, the text encoder and the UNet only one is on the device at a time.
    """

    def network(cls: type, model: str, subfolder: str | None, dtype_key: str) -> torch.nn.Module:
        return _load_weights(cls, model, subfolder, dtype, dtype_key).eval()

    sd = StableDiffusion(
        vae=network(AutoencoderKL, model_id, "vae", "torch_dtype"),
        tokenizer=_find(CLIPTokenizer.from_pretrained, model_id, "tokenizer"),
        text_encoder=network(CLIPTextModel, model_id, "text_encoder", "dtype"),
        unet=network(UNet2DConditionModel, model_id, "unet", "torch_dtype"),
        scheduler=load_scheduler(model_id),
        controlnet=network(ControlNetModel, controlnet_id, None, "torch_dtype").to(device)
        if controlnet_id
        else None,
        device=device,
        dtype=dtype,
    )
    networks = sd.vae, sd.text_encoder, sd.unet
    if cpu_offload:
        hooks = [cpu_offload_with_hook(part, device)[1] for part in networks]
        # In the order of a run, and round again: whichever begins sends the one before away.
        for hook, before in zip(hooks, hooks[-1:] + hooks[:-1], strict=True):
            hook.hook.prev_module_hook = before
    else:
        for part in networks:
            part.to(device)
    return sd


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and precision that the configuration's `device` and `dtype` stand for.

    Half precision is chosen where it is faster and safe: on CUDA, and on CPUs with units for bfloat16.
    """
    # The same seed must give the same bytes, so cuDNN may not choose algorithms by a race.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    if device == "auto":
        has_mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    chosen = torch.device(device)
    available = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }[chosen.type]
    if (chosen.index or 0) >= available:
        raise UserError(f"device: {device} is not to be had on this machine; use auto or cpu")
    if dtype == "auto":
        return chosen, _natural_dtype(chosen)
    return chosen, getattr(torch, dtype)


def _natural_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.float16
    # Without such units bfloat16 is emulated, which is slower; no public function tells them apart.
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def _load_weights(
    cls: type, model_id: str, subfolder: str | None, dtype: torch.dtype, dtype_key: str
) -> torch.nn.Module:
    """Weights in the variant nearest to `dtype`; not every repository has both."""
    half = dtype != torch.float32
    variants = [{"variant": variant} for variant in (("fp16", None) if half else (None, "fp16"))]
    return _find(cls.from_pretrained, model_id, subfolder, variants, **{dtype_key: dtype})


def _find(
    get: Callable[..., Any],
    model_id: str,
    subfolder: str | None,
    variants: Sequence[dict[str, Any]] = ({},),
    **options: Any,
) -> Any:
    """Call `get` on a checkpoint's part: what is on disk first, so that the hub is asked for the rest."""
    for local_only in (True, False):
        if not local_only and not _on_hub(model_id):
            break
        for variant in variants:
            where = {"subfolder": subfolder or "", "local_files_only": local_only}
            try:
                return get(model_id, **where, **variant, **options)
            except MemoryError:
                raise
            except Exception as error:  # each loader has its own ways to say what it misses
                failure = error
    _refuse_broken(_local_folder(model_id, subfolder or ""), failure)
    part = f" (its {subfolder})" if subfolder else ""
    if Path(model_id).is_dir():
        raise UserError(f"model: the folder {model_id} holds no such checkpoint{part}")
    raise UserError(
        f"model: {model_id}{part} is neither a folder nor in {constants.HF_HUB_CACHE}, and cannot be "
        "downloaded; check the id and the network, or give --model a folder in diffusers layout"
    )


def _local_folder(model_id: str, subfolder: str) -> Path:
    """Where a checkpoint's part lies on disk, or would lie."""
    if Path(model_id).is_dir():
        return Path(model_id) / subfolder
    for name in ("config.json", "scheduler_config.json", "tokenizer_config.json"):
        cached = try_to_load_from_cache(model_id, f"{subfolder}/{name}".lstrip("/"))
        if isinstance(cached, str):
            return Path(cached).parent
    return Path(constants.HF_HUB_CACHE) / model_id / subfolder


def _refuse_broken(folder: Path, failure: Exception) -> None:
    """Raise UserError if the part of a checkpoint in `folder` is there, but cannot be read."""
    files = sorted(path for path in folder.glob("*") if path.is_file())
    for path in files:
        if reason := _broken(path):
            raise UserError(
                f"model: {path} is broken: {reason}; copy or download the checkpoint again"
            ) from failure
    if any(path.suffix in (".safetensors", ".bin") for path in files):
        reason = str(failure).strip().partition("\n")[0]
        raise UserError(f"model: {folder} cannot be loaded: {reason}") from failure


def _broken(path: Path) -> str:
    """Why a file of a checkpoint cannot be read; empty if it can."""
    try:
        if path.stat().st_size == 0:
            return "it is empty"
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix == ".bin":
            torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # each format has its own ways to be broken
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""


@functools.cache
def _on_hub(model_id: str) -> bool:
    """Whether the hub can be reached and knows the model; asked once, without the loaders' retries."""
    if Path(model_id).is_dir():
        return False
    try:
        model_info(model_id, timeout=HUB_TIMEOUT)
    except Exception:  # each HTTP client has its own ways to say that there is no network
        return False
    return True
