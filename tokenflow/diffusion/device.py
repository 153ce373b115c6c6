"""Where networks run, and in which precision."""

import torch

from tokenflow.errors import UserError


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and the precision that the options `device` and `dtype` stand for.

    The dtype auto is half precision where that is faster and safe: on CUDA, and on CPUs with instructions for
    bfloat16. Raises UserError for a device that this machine does not have.
    """
    # The same random seed must give the same bytes, so cuDNN may not choose algorithms by timing them.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    has_mps = torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    chosen = torch.device(device)
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(has_mps)}[chosen.type]
    # torch stores the index in one byte, so it would take cuda:256 for cuda:0.
    if int(device.partition(":")[2] or 0) >= available:
        raise UserError(f"device: {device} is unavailable on this machine; use auto or cpu")
    if dtype != "auto":
        return chosen, getattr(torch, dtype)
    if chosen.type == "cuda":
        return chosen, torch.float16
    # A CPU without such instructions emulates bfloat16, slowly; no public function tells whether it has them.
    if chosen.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return chosen, torch.bfloat16
    return chosen, torch.float32
