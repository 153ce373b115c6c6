"""DDIM in both directions: noise schedules, one step, inversion and sampling."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler

from tokenflow.errors import UserError

# Latents have unit variance. Most steps end after one evaluation, with a movement of about 2e-3.
FIXED_POINT_TOLERANCE = 3e-3  # root mean square of a latent's last movement
FIXED_POINT_ITERATIONS = 5  # at most, for a frame in a step
PREDICTION_TYPES = ("epsilon", "v_prediction")

# Latents (n, 4, h, w), a timestep and the indices (n,) of their frames give the noise (n, 4, h, w), as
# `ddim_step` takes it.
NoisePredictor = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]


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


def invert(
    latents: torch.Tensor,
    frames: torch.Tensor,
    schedule: Schedule,
    predict_noise: NoisePredictor,
    fixed_point: bool = False,
) -> Iterator[tuple[int, torch.Tensor]]:
    """DDIM inversion: from the clean latents (n, 4, h, w) of the frames (n,) to noise.

    Yields each timestep and its latents. A sampling step uses the noise predicted at its noisier latents,
    which an inversion does not know yet. Naive inversion predicts the noise at the cleaner latents instead;
    with `fixed_point`, all steps but the first use `fixed_point_noise`.
    """
    noise, before = None, None
    for step, t in reversed(list(enumerate(schedule.timesteps))):
        alphas = schedule.alphas[step + 1], schedule.alphas[step]
        if fixed_point and noise is not None:
            # The noise changes smoothly along a trajectory, so linear extrapolation is a close guess.
            guess = noise if before is None else 2 * noise - before
            if schedule.alphas[step] == 0:  # there it is no noise
                guess = predict_noise(latents, t, frames)
            before = noise
            noise = fixed_point_noise(latents, frames, guess, t, alphas, predict_noise)
        else:
            noise = predict_noise(latents, t, frames)
        latents = ddim_step(latents, noise, *alphas)
        check_finite(latents, f"the latents of the inversion at timestep {t}")
        yield t, latents


def fixed_point_noise(
    latents: torch.Tensor,
    frames: torch.Tensor,
    guess: torch.Tensor,
    t: int,
    alphas: tuple[float, float],
    predict_noise: NoisePredictor,
) -> torch.Tensor:
    """The noise (n, 4, h, w) that moves latents to a point where the same noise is predicted.

    Iterates noise = predict_noise(ddim_step(latents, noise), t) from a `guess` (Pan et al., AIDI,
    arXiv 2309.04907; Garibi et al., ReNoise, arXiv 2403.14602) until the latents move by less than
    FIXED_POINT_TOLERANCE. Frames that have converged are not evaluated again, and neither are frames that
    the last iteration moved further than the one before.
    """
    noise, moving = guess.clone(), torch.arange(len(latents))
    least = torch.full((len(latents),), math.inf)
    for _ in range(FIXED_POINT_ITERATIONS):
        before = ddim_step(latents[moving], noise[moving], *alphas)
        predicted = predict_noise(before, t, frames[moving])
        change = ddim_step(latents[moving], predicted, *alphas) - before
        movement = change.square().mean((1, 2, 3)).sqrt()
        nearer = movement < least[moving]
        noise[moving[nearer]], least[moving] = predicted[nearer], movement
        moving = moving[nearer & (movement > FIXED_POINT_TOLERANCE)]
        if not len(moving):
            break
    return noise


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
