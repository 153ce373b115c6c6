"""The training loop that every stage shares: resumable, and averaged."""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tokenflow.diffusion.device import choose_device

CHECKPOINT_SECONDS = 240
WARMUP_STEPS = 100


def fit(
    name: str,
    modules: dict[str, nn.Module],
    loss: Callable[[torch.Generator], Tensor],
    n_steps: int,
    work_dir: Path,
    learning_rate: float,
    seed: int,
) -> None:
    """Minimise `loss` over `modules` in `n_steps` steps, after which they have their averaged weights.

    `loss` gets a generator seeded for the step and returns a scalar. State is kept in `work_dir/<name>.pt`,
    from which an interrupted run goes on and a finished one is loaded.
    """
    path = work_dir / f"{name}.pt"
    live = nn.ModuleDict(modules)
    average = copy.deepcopy(live).requires_grad_(False).eval()
    device = next(live.parameters()).device
    _, dtype = choose_device(str(device), "auto")  # float32 where bfloat16 would be emulated
    optimizer = torch.optim.AdamW(live.parameters(), learning_rate, weight_decay=0.01, fused=True)
    first, mean_loss, generator = 0, None, torch.Generator()
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        first = state["step"]
        live.load_state_dict(state["live"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    live.train()
    written = time.monotonic()
    bar = tqdm(range(first, n_steps), name, initial=first, total=n_steps, mininterval=10)
    for step in bar:
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        for group in optimizer.param_groups:
            decayed = 0.5 + 0.5 * math.cos(math.pi * (step / n_steps))
            group["lr"] = learning_rate * warmup * decayed
        # A seed for each step, so that a resumed run draws what an uninterrupted one would have.
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32):
            value = loss(generator.manual_seed(seed * 1_000_000 + step))
        value.backward()
        nn.utils.clip_grad_norm_(live.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.999, (step + 2) / (step + 11))
        torch._foreach_lerp_(list(average.parameters()), list(live.parameters()), 1 - decay)
        current = value.item()
        mean_loss = current if mean_loss is None else 0.99 * mean_loss + 0.01 * current
        bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
        if step + 1 == n_steps or time.monotonic() - written > CHECKPOINT_SECONDS:
            state = {"step": step + 1, "optimizer": optimizer.state_dict()}
            state |= {"live": live.state_dict(), "average": average.state_dict()}
            torch.save(state, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
            written = time.monotonic()
    live.load_state_dict(average.state_dict())
    live.requires_grad_(False).eval()
