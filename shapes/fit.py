"""The training loop that every stage shares: resumable, averaged, and done when its budget is."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

CHECKPOINT_SECONDS = 240
WARMUP_STEPS = 100


@dataclass(frozen=True)
class Budget:
    """How long to train: a number of steps, or of minutes."""

    amount: float
    minutes: bool

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read "4000" (steps) or "12m" (minutes)."""
        return cls(float(text.removesuffix("m")), text.endswith("m"))

    def progress(self, step: int, seconds: float) -> float:
        """Part of the budget that is spent, 1 when all of it is."""
        return (seconds / 60 if self.minutes else step) / self.amount


def fit(
    name: str,
    modules: dict[str, nn.Module],
    loss: Callable[[torch.Generator], Tensor],
    budget: Budget,
    work_dir: Path,
    learning_rate: float,
    seed: int,
    look: Callable[[nn.ModuleDict], None] | None = None,
) -> None:
    """Minimise `loss` over `modules`, which have their averaged weights at the end.

    `loss` gets a generator seeded for the step and returns a scalar. State is kept in
    `work_dir/<name>.pt`, from which an interrupted run goes on and a finished one is loaded.
    `look`, if given, is called with the averaged modules each time state is written.
    """
    path = work_dir / f"{name}.pt"
    live = nn.ModuleDict(modules)
    average = copy.deepcopy(live).requires_grad_(False).eval()
    device = next(live.parameters()).device
    optimizer = torch.optim.AdamW(live.parameters(), learning_rate, weight_decay=0.01, fused=True)
    step, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        step, seconds = state["step"], state["seconds"]
        live.load_state_dict(state["live"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])

    def write() -> None:
        state = {"step": step, "seconds": seconds, "optimizer": optimizer.state_dict()}
        state |= {"live": live.state_dict(), "average": average.state_dict()}
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        if look is not None:
            look(average)

    generator = torch.Generator()
    written = seconds
    mean_loss = None
    live.train()
    bar = tqdm(desc=name, initial=step, mininterval=10)
    while (progress := budget.progress(step, seconds)) < 1:
        start = time.monotonic()
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warmup * (0.5 + 0.5 * math.cos(math.pi * progress))
        # A seed for each step, so that a resumed run draws what an uninterrupted one would have.
        value = loss(generator.manual_seed(seed * 1_000_000 + step))
        value.backward()
        nn.utils.clip_grad_norm_(live.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(live.parameters()), 1 - decay)
        current = value.item()
        mean_loss = current if mean_loss is None else 0.99 * mean_loss + 0.01 * current
        seconds += time.monotonic() - start
        bar.set_postfix(loss=f"{mean_loss:.4f}", spent=f"{progress:.0%}", refresh=False)
        bar.update()
        if seconds - written > CHECKPOINT_SECONDS:
            written = seconds
            write()
    bar.close()
    if mean_loss is not None:
        write()
    live.load_state_dict(average.state_dict())
    live.requires_grad_(False).eval()
