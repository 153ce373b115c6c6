"""DDIM in both directions: noise schedules, one step, inversion and sampling."""

import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler

from tokenflow.errors import UserError

log = logging.getLogger("tokenflow")

# Latents have unit variance. With the miniature most steps end after one evaluation, with a movement of
# about 1e-3; only the second and third, at little noise, take more.
FIXED_POINT_TOLERANCE = 1e-2  # root mean square of a latent's last movement
FIXED_POINT_ITERATIONS = 3  # at most, for a frame in a step
MOST_UNCONVERGED = 0.01  # share of steps, from which on it is worth a warning
GUESSED_FROM = 3  # noise levels, from which the noise of the next step is extrapolated
PREDICTION_TYPES = ("epsilon", "v_prediction")

# Latents (n, 4, h, w), a timestep and the indices (n,) of their frames give the noise (n, 4, h, w), as
# `ddim_step` takes it.
NoisePredictor = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]

# Noise levels (of `alphas_cumprod`) and the latents (n, 4, h, w) there, the cleanest first.
Trajectory = Sequence[tuple[float, torch.Tensor]]


@dataclass(frozen=True)
class Schedule:
    """The noise levels that a number of DDIM steps visit, the noisiest first.

    `alphas` (the cumulative products) has one more entry than `timesteps`: the end of the last step.
    """

    timesteps: tuple[int, ...]
    alphas: tuple[float, ...]

    @classmethod
    def of(cls, scheduler: DDIMScheduler, n_steps: int) -> "Schedule":
        """The schedule of `n_steps` steps.

        Raises UserError if the checkpoint has fewer timesteps, or predicts noise where there is nothing else.
        """
        trained = scheduler.config.num_train_timesteps
        if n_steps > trained:
            raise UserError(
                f"{n_steps} steps are more than the {trained} of the checkpoint's noise schedule; "
                "ask for fewer"
            )
        scheduler.set_timesteps(n_steps)
        timesteps = tuple(scheduler.timesteps.tolist())
        alphas = [scheduler.alphas_cumprod[t].item() for t in timesteps]
        if 0 in alphas and scheduler.config.prediction_type == "epsilon":
            raise UserError(
                "the checkpoint's noise schedule begins with pure noise (rescale_betas_zero_snr), from which "
                "a checkpoint of prediction_type epsilon can take nothing; its configuration is wrong"
            )
        return cls(timesteps, (*alphas, float(scheduler.final_alpha_cumprod)))

    def last(self, n_steps: int) -> "Schedule":
        """The schedule of the last `n_steps` steps, which are the least noisy."""
        first = len(self.timesteps) - n_steps
        return Schedule(self.timesteps[first:], self.alphas[first:])

    def divide_inversion(self, ends: Collection[int]) -> list[list[tuple[int, float]]]:
        """The timesteps and alphas that an inversion steps to, the cleanest first.

        They are in parts, each of which ends at one of the timesteps `ends`.
        """
        parts = [[]]
        for level in reversed(list(zip(self.timesteps, self.alphas[:-1], strict=True))):
            parts[-1].append(level)
            if level[0] in ends:
                parts.append([])
        return parts[:-1]


def ddim_step(
    latents: torch.Tensor, noise: torch.Tensor, alpha_from: float, alpha_to: float
) -> torch.Tensor:
    """Move latents along their noise from one noise level to another (Song et al., 2010.02502, eq. 12).

    The same formula samples (`alpha_to` > `alpha_from`) and inverts (`alpha_to` < `alpha_from`).

    Latents of level 0 are pure noise (Lin et al., arXiv 2305.08891), and the noise in them says nothing of
    the clean latents. From and to that level, `noise` is the velocity there, -clean (Salimans and Ho,
    2202.00512).
    """
    if alpha_to == 0:
        return (latents + math.sqrt(alpha_from) * noise) / math.sqrt(1 - alpha_from)
    clean = predict_x0(latents, noise, alpha_from)
    noise = latents if alpha_from == 0 else noise
    return math.sqrt(alpha_to) * clean + math.sqrt(1 - alpha_to) * noise


def predict_x0(latents: torch.Tensor, noise: torch.Tensor, alpha: float) -> torch.Tensor:
    """The clean latents that latents of a noise level consist of, besides their noise (equation 9)."""
    if alpha == 0:  # see `ddim_step`
        return -noise
    return (latents - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)


def find_noise(latents: torch.Tensor, clean: torch.Tensor, alpha: float) -> torch.Tensor:
    """The noise in latents of a noise level, of which the clean latents are known (equation 9)."""
    if alpha == 0:  # see `ddim_step`
        return -clean
    return (latents - math.sqrt(alpha) * clean) / math.sqrt(1 - alpha)


def find_noise_between(
    start: torch.Tensor, end: torch.Tensor, alpha_from: float, alpha_to: float
) -> torch.Tensor:
    """The noise along which `ddim_step` moved latents from `start` to `end`; 0 between equal levels."""
    kept = math.sqrt(alpha_to / alpha_from)
    added = math.sqrt(1 - alpha_to) - kept * math.sqrt(1 - alpha_from)
    return (end - kept * start) / added if added else torch.zeros_like(end)


@dataclass
class Inverter:
    """DDIM inversion, which approximates each step or, with `is_fixed_point`, solves it by iteration.

    A sampling step uses the noise predicted at its noisier latents, which an inversion does not know yet.
    Naive inversion predicts the noise at the cleaner latents instead.
    steps, evaluations, unconverged: how many steps of single frames were solved, with how many evaluations,
    and how many of them moved further than the tolerance in the last one.
    """

    predict_noise: NoisePredictor
    is_fixed_point: bool = True
    steps: int = 0
    evaluations: int = 0
    unconverged: int = 0

    def invert(
        self, trajectory: Trajectory, levels: Iterable[tuple[int, float]], frames: torch.Tensor
    ) -> torch.Tensor:
        """The latents (n, 4, h, w) of the frames (n,) at the last of the noise levels (timestep, alpha).

        They begin at the end of a trajectory, whose last GUESSED_FROM levels help to guess the next noise.
        """
        trajectory = list(trajectory)
        for t, alpha in levels:
            alpha_from, latents = trajectory[-1]
            if self.is_fixed_point:
                guess = guess_noise(trajectory, alpha)
                noise = self._solve(latents, guess, alpha_from, alpha, t, frames)
            else:
                noise = self.predict_noise(latents, t, frames)
            trajectory.append((alpha, ddim_step(latents, noise, alpha_from, alpha)))
            check_finite(trajectory[-1][1], f"the latents of the inversion at timestep {t}")
        return trajectory[-1][1]

    def _solve(
        self,
        latents: torch.Tensor,
        guess: torch.Tensor,
        alpha_from: float,
        alpha_to: float,
        t: int,
        frames: torch.Tensor,
    ) -> torch.Tensor:
        """The noise (n, 4, h, w) that moves latents to a point where the same noise is predicted.

        Iterates noise = predict_noise(ddim_step(latents, noise), t) from a `guess` (Pan et al., AIDI,
        arXiv 2309.04907; Garibi et al., ReNoise, arXiv 2403.14602) until the latents move by less than
        FIXED_POINT_TOLERANCE. Frames that have converged are not evaluated again, and neither are frames
        that the last iteration moved further than the one before.
        """
        noise, moving = guess.clone(), torch.arange(len(latents))
        least = torch.full((len(latents),), math.inf)
        for _ in range(FIXED_POINT_ITERATIONS):
            before = ddim_step(latents[moving], noise[moving], alpha_from, alpha_to)
            predicted = self.predict_noise(before, t, frames[moving])
            self.evaluations += len(moving)
            change = ddim_step(latents[moving], predicted, alpha_from, alpha_to) - before
            movement = change.square().mean((1, 2, 3)).sqrt()
            nearer = movement < least[moving]
            noise[moving[nearer]], least[moving[nearer]] = predicted[nearer], movement[nearer]
            moving = moving[nearer & (movement > FIXED_POINT_TOLERANCE)]
            if not len(moving):
                break
        self.steps += len(latents)
        self.unconverged += (least > FIXED_POINT_TOLERANCE).sum().item()
        return noise

    def log(self) -> None:
        """Log how many evaluations the steps have taken, and warn if many did not converge."""
        if not self.steps:
            return
        mean, unconverged = self.evaluations / self.steps, self.unconverged / self.steps
        log.info("the inversion took %.2f UNet evaluations for each step of a frame", mean)
        if unconverged > MOST_UNCONVERGED:
            log.warning(
                "warning: %.0f %% of the steps did not converge in %d evaluations, so that an edit sees "
                "the source less exactly; use more --steps",
                100 * unconverged,
                FIXED_POINT_ITERATIONS,
            )


def guess_noise(trajectory: Trajectory, alpha: float) -> torch.Tensor:
    """The noise (n, 4, h, w) of the step from the end of a trajectory to level `alpha`, for `ddim_step`.

    Noise changes smoothly along a trajectory, so that the last two are extrapolated. Before the first step,
    when none is known, it is 0.
    """
    latest = trajectory[-GUESSED_FROM:]
    noises = [
        find_noise_between(start, end, alpha_from, alpha_to)
        for (alpha_from, start), (alpha_to, end) in itertools.pairwise(latest)
    ] or [torch.zeros_like(latest[-1][1])]
    guess = 2 * noises[-1] - noises[0]
    return guess if alpha > 0 else -predict_x0(latest[-1][1], guess, latest[-1][0])


def sample(
    latents: torch.Tensor, frames: torch.Tensor, schedule: Schedule, predict_noise: NoisePredictor
) -> Iterator[torch.Tensor]:
    """DDIM sampling of the frames (n,) from noise; yields the latents (n, 4, h, w) after each step."""
    for step, t in enumerate(schedule.timesteps):
        noise = predict_noise(latents, t, frames)
        latents = ddim_step(latents, noise, schedule.alphas[step], schedule.alphas[step + 1])
        check_finite(latents, f"the sampled latents at timestep {t} (step {step + 1})")
        yield latents


def check_finite(values: torch.Tensor, what: str) -> None:
    """Raise FloatingPointError, naming `what` and the remedy, unless all values are finite."""
    if not torch.isfinite(values).all():
        raise FloatingPointError(
            f"{what} hold non-finite values; run again with --dtype float32 or bfloat16, "
            "which do not overflow where float16 does (if it was float32, the checkpoint is broken)"
        )
