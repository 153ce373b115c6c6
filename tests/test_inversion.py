"""Inversion and sampling, and that neither depends on how frames are batched."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import inversion_stages as stages
from cli import UserError
from config import PreprocessConfig
from diffusion import Schedule, check_finite, ddim_step, invert, sample
from inversion import CLEAN, Inversion, noisy
from shapes.checkpoint import build_scheduler


def latents_of(sd, n=2):
    return torch.randn(n, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def test_steps_undo_each_other():
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    there = ddim_step(latents, noise, 0.9, 0.3)
    torch.testing.assert_close(ddim_step(there, noise, 0.3, 0.9), latents)


def test_schedule_is_stable_diffusions(sd):
    schedule = Schedule.of(sd.scheduler, 50)
    assert schedule.timesteps[:2] == (981, 961) and schedule.timesteps[-1] == 1
    assert len(schedule.alphas) == 51 and list(schedule.alphas) == sorted(schedule.alphas)
    assert schedule.last(2).timesteps == (21, 1)


def test_sampling_equals_diffusers(sd):
    schedule, text = Schedule.of(sd.scheduler, 10), sd.encode_text("a circle")
    ours = theirs = latents_of(sd)

    def predict(latents, t):
        return sd.predict_noise(latents, t, text.expand(len(latents), -1, -1))

    *_, ours = sample(ours, schedule, predict)
    sd.scheduler.set_timesteps(10)
    for t in sd.scheduler.timesteps:
        theirs = sd.scheduler.step(predict(theirs, t), t, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_sampling_undoes_inversion():
    """For Gaussian data of deviation s the noise and the whole path are known in closed form."""
    alphas = build_scheduler().alphas_cumprod
    s, latents = 2.0, 2 * torch.randn(1000, generator=torch.Generator().manual_seed(0))

    def predict(x, t):
        return (1 - alphas[t]).sqrt() * x / (alphas[t] * s**2 + 1 - alphas[t])

    errors, ends = [], []
    for n_steps in (20, 200):
        schedule = Schedule.of(build_scheduler(), n_steps)
        *_, (t, noisiest) = invert(latents, schedule, lambda x, t, frames: predict(x, t))
        *_, back = sample(noisiest, schedule, predict)
        errors.append((back - latents).abs().max().item())
        a, b = schedule.alphas[0], schedule.alphas[-1]
        exact = latents * ((a * s**2 + 1 - a) / (b * s**2 + 1 - b)) ** 0.5
        ends.append((noisiest - exact).abs().max().item())
    # DDIM is of first order: with a tenth of the step size, about a tenth of the error.
    assert errors[1] < errors[0] / 6 and ends[1] < ends[0] / 6 and errors[1] < 0.05


def test_fixed_point_inversion_is_undone_by_sampling():
    """Where naive inversion is of first order, this is exact to its tolerance, at few evaluations."""
    alphas = build_scheduler().alphas_cumprod
    s, latents = 2.0, 2 * torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents[5] = 0  # has nothing to move: its first evaluation of a step is its last
    evaluations = torch.zeros(6)

    def predict(x, t):
        return (1 - alphas[t]).sqrt() * x / (alphas[t] * s**2 + 1 - alphas[t])

    def counted(x, t, frames):
        evaluations[frames] += 1
        return predict(x, t)

    schedule = Schedule.of(build_scheduler(), 20)
    errors = []
    for fixed_point in (False, True):
        *_, (_, noisiest) = invert(latents, schedule, counted, fixed_point)
        *_, back = sample(noisiest, schedule, predict)
        errors.append((back - latents).square().mean().sqrt().item())
    assert errors[1] < errors[0] / 15 and errors[1] < 0.005
    assert evaluations[5] == 20 + 20 and 20 + 20 < evaluations[0] < 20 + 25


def test_v_prediction_is_turned_into_noise(sd):
    latents, text, t = latents_of(sd), sd.encode_text("").expand(2, -1, -1), 500
    as_noise = sd.predict_noise(latents, t, text)
    v_scheduler = DDIMScheduler.from_config(sd.scheduler.config, prediction_type="v_prediction")
    alpha = sd.scheduler.alphas_cumprod[t]
    expected = alpha.sqrt() * as_noise + (1 - alpha).sqrt() * latents
    sd = dataclasses.replace(sd, scheduler=v_scheduler)
    torch.testing.assert_close(sd.predict_noise(latents, t, text), expected)


def inverted(sd, clip, folder, inversion, batch_size):
    """The latents of all timesteps, inverted from disk to disk in batches of that size."""
    config = PreprocessConfig(
        data_path=str(clip), H=128, W=128, batch_size=batch_size, inversion=inversion
    )
    schedule, made = Schedule.of(sd.scheduler, 5), Inversion(folder)
    folder.mkdir()
    made.vae.mkdir()
    stages.read_source(config, made.source, 7)
    names = {t: noisy(t) for t in schedule.timesteps}
    for name in (CLEAN, *names.values()):
        made.create_latents(name, sd.latent_shape(7, 128, 128))
    predictor = stages.noise_predictor(sd, made, config)
    for frames in stages.segments(config, 7):
        for _ in stages.invert_segment(sd, predictor, made, config, schedule, names, frames):
            pass
    return [made.latents(name)[torch.arange(7)] for name in (CLEAN, *names.values())]


@pytest.mark.parametrize("inversion", ["ddim", "fixed_point"])
def test_latents_do_not_depend_on_the_batch_size(sd, trained, clip, tmp_path, inversion):
    # Random weights amplify rounding, and what is not trained has no fixed point to find.
    sd = trained if inversion == "fixed_point" else sd
    whole = inverted(sd, clip, tmp_path / "whole", inversion, 7)
    for batch_size in (1, 3):
        parts = inverted(sd, clip, tmp_path / f"by_{batch_size}", inversion, batch_size)
        for some, all_at_once in zip(parts, whole, strict=True):
            assert some.shape == (7, 4, 16, 16) and some.dtype == torch.float32
            # Frames that were mixed up would differ by about 1.
            np.testing.assert_allclose(some, all_at_once, atol=5e-3)


def test_non_finite_values_stop_the_run(sd):
    schedule = Schedule.of(sd.scheduler, 5)
    with pytest.raises(FloatingPointError, match=r"timestep 201 .*--dtype"):
        for _ in invert(
            latents_of(sd), schedule, lambda x, t, _: x * (float("inf") if t > 200 else 1)
        ):
            pass
    check_finite(torch.ones(1), "ones")


def test_steps_that_miss_editing_timesteps(checkpoint):
    config = PreprocessConfig(data_path="", model=str(checkpoint), steps=70, save_steps=50)
    with pytest.raises(
        UserError, match=r"70 .* 50 editing steps; these do: 50, 99, 100, .* 250, .* 500"
    ):
        stages.schedules(config)
