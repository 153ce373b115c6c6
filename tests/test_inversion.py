"""Inversion and sampling, which do not depend on how frames are batched."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHAPES_CHECKPOINT
from diffusers import DDIMScheduler
from test_cli import last_line, run

from shapes.checkpoint import build_scheduler
from tokenflow.config import SDEditConfig
from tokenflow.diffusion.ddim import (
    Inverter,
    Schedule,
    check_finite,
    ddim_step,
    find_noise_between,
    sample,
)
from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.editing.techniques import SDEdit
from tokenflow.inversion.files import name_video
from tokenflow.inversion.predictor import VideoNoisePredictor
from tokenflow.runtime.batching import Batches

FRAMES, SPREAD, ALPHAS = torch.arange(1000), 2.0, build_scheduler().alphas_cumprod


def draw_latents(n=2):
    return torch.randn(n, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def noise_of_gaussians(x, t, frames):
    """The noise in data of standard deviation SPREAD."""
    alpha = ALPHAS[t]
    return (1 - alpha).sqrt() * x / (alpha * SPREAD**2 + 1 - alpha)


def invert(latents, schedule, predict, is_fixed_point=False):
    """The noisiest latents (n, ...) of a whole inversion, and the counts of what made them."""
    inverter, start = Inverter(predict, is_fixed_point), (schedule.alphas[-1], latents)
    (levels,) = schedule.divide_inversion(schedule.timesteps[:1])
    return inverter.invert([start], levels, FRAMES[: len(latents)]), inverter


def test_steps_undo_each_other():
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    there = ddim_step(latents, noise, 0.9, 0.3)
    torch.testing.assert_close(ddim_step(there, noise, 0.3, 0.9), latents)
    torch.testing.assert_close(find_noise_between(latents, there, 0.9, 0.3), noise)
    assert not find_noise_between(latents, latents, 0.9, 0.9).any()


def test_schedule_is_stable_diffusions(sd):
    schedule = Schedule.of(sd.scheduler, 50)
    assert schedule.timesteps[:2] == (981, 961) and schedule.timesteps[-1] == 1
    assert len(schedule.alphas) == 51 and list(schedule.alphas) == sorted(schedule.alphas)
    assert schedule.last(2).timesteps == (21, 1)


def zero_terminal_snr():
    """The schedule of checkpoints that were trained on pure noise too, and of velocity."""
    return DDIMScheduler.from_config(
        build_scheduler().config,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


@pytest.mark.parametrize("scheduler", [build_scheduler(), zero_terminal_snr()])
def test_sampling_equals_diffusers(sd, scheduler):
    """From noise, and from pure noise, where `predict_noise` turns a velocity into the noise."""
    sd = dataclasses.replace(sd, scheduler=scheduler)
    schedule, text = Schedule.of(scheduler, 10), sd.encode_text("a circle").expand(2)
    ours = theirs = draw_latents()
    *_, ours = sample(ours, FRAMES[:2], schedule, lambda x, t, _: sd.predict_noise(x, t, text))
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = sd.unet(theirs, t, encoder_hidden_states=text.tokens).sample
        theirs = scheduler.step(output, t, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_sampling_undoes_inversion():
    """For Gaussian data of deviation SPREAD, noise and trajectory are known in closed form."""
    latents = SPREAD * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    errors, ends = [], []
    for n_steps in (20, 200):
        schedule = Schedule.of(build_scheduler(), n_steps)
        noisiest, _ = invert(latents, schedule, noise_of_gaussians)
        *_, back = sample(noisiest, FRAMES, schedule, noise_of_gaussians)
        errors.append((back - latents).abs().max().item())
        a, b = schedule.alphas[0], schedule.alphas[-1]
        exact = latents * ((a * SPREAD**2 + 1 - a) / (b * SPREAD**2 + 1 - b)) ** 0.5
        ends.append((noisiest - exact).abs().max().item())
    # DDIM is of first order: with a tenth of the step size, about a tenth of the error.
    assert errors[1] < errors[0] / 6 and ends[1] < ends[0] / 6 and errors[1] < 0.05


def test_fixed_point_inversion_is_undone_by_sampling():
    """Naive inversion has first-order error; fixed-point inversion meets its tolerance in few evaluations."""
    latents = SPREAD * torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents[5] = 0  # never moves, so each step evaluates it once
    evaluations = torch.zeros(6)

    def counted(x, t, frames):
        evaluations[frames] += 1
        return noise_of_gaussians(x, t, frames)

    schedule = Schedule.of(build_scheduler(), 20)
    errors = []
    for is_fixed_point in (False, True):
        evaluations[:] = 0
        noisiest, inverter = invert(latents, schedule, counted, is_fixed_point)
        *_, back = sample(noisiest, FRAMES, schedule, noise_of_gaussians)
        errors.append((back - latents).square().mean().sqrt().item())
    assert errors[1] < errors[0] / 15 and errors[1] < 0.005
    assert evaluations[5] == 20 and 20 < evaluations[0] < 25
    assert (inverter.steps, inverter.evaluations) == (6 * 20, evaluations.sum())


def test_an_inversion_goes_on_from_saved_latents():
    """From those of every second step, which is what a run has on disk, it ends where it would without."""
    latents = SPREAD * torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    schedule = Schedule.of(build_scheduler(), 40)
    whole, at_once = invert(latents, schedule, noise_of_gaussians, is_fixed_point=True)
    ends, inverter = schedule.timesteps[::2], Inverter(noise_of_gaussians)
    saved = [(schedule.alphas[-1], latents)]
    for levels in schedule.divide_inversion(ends):
        saved.append((levels[-1][1], inverter.invert(saved, levels, FRAMES[:6])))
    assert [alpha for alpha, _ in saved[:0:-1]] == list(schedule.alphas[:-1:2])
    assert (saved[-1][1] - whole).square().mean().sqrt() < 5e-3
    assert inverter.evaluations <= 1.1 * at_once.evaluations


@pytest.mark.parametrize("is_fixed_point, tolerance", [(False, 0.1), (True, 5e-3)])
def test_inversion_into_pure_noise_is_undone(is_fixed_point, tolerance):
    """For Gaussian data of mean m and standard deviation s, as above; its noise has unit variance."""
    scheduler = zero_terminal_snr()
    m, s = 1.0, 0.5
    latents = m + s * torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def predict(x, t, frames):
        alpha = scheduler.alphas_cumprod[t]
        variance = alpha * s**2 + 1 - alpha
        clean = m + alpha.sqrt() * s**2 * (x - alpha.sqrt() * m) / variance
        return -clean if alpha == 0 else (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()

    schedule = Schedule.of(scheduler, 50)
    noisiest, _ = invert(latents, schedule, predict, is_fixed_point)
    assert (
        schedule.timesteps[0] == 999
        and abs(noisiest.mean()) < 0.2
        and abs(noisiest.std() - 1) < 0.2
    )
    *_, back = sample(noisiest, FRAMES, schedule, predict)
    assert (back - latents).square().mean().sqrt() < tolerance


def inverted_to(t, clean, noisiest):
    """In place of a `Source`: its clean latents, and those that its inversion ended with, at timestep t."""
    return SimpleNamespace(
        latents=lambda _, frames: clean[frames],
        noisiest_latents=noisiest.__getitem__,
        noisiest_timestep=t,
    )


def test_what_sdedit_starts_from_pure_noise():
    """The whole schedule starts from the inversion's latents themselves, which are all noise."""
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = zero_terminal_snr()
    config = SDEditConfig(data_path="a.mp4", prompt="a dog", n_timesteps=10, start=1)
    technique = SDEdit(
        config, Schedule.of(scheduler, 10), inverted_to(999, clean, noise), scheduler
    )
    torch.testing.assert_close(technique.start(torch.arange(3)), noise)


def test_what_sdedit_starts_from(sd):
    """The inversion's own noise, or one random noise that all frames share."""
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    schedule, alphas = Schedule.of(sd.scheduler, 10), sd.scheduler.alphas_cumprod
    inverted = alphas[901].sqrt() * clean + (1 - alphas[901]).sqrt() * noise
    source = inverted_to(901, clean, inverted)

    def noise_of(use_ddim_noise):
        needed = {"data_path": "a.mp4", "prompt": "a dog", "n_timesteps": 10, "start": 0.5}
        config = SDEditConfig(**needed, use_ddim_noise=use_ddim_noise)
        technique = SDEdit(config, schedule, source, sd.scheduler)
        assert technique.schedule.timesteps == (401, 301, 201, 101, 1)
        started = torch.cat([technique.start(torch.tensor(f)) for f in ([0, 1], [2])])
        return (started - alphas[401].sqrt() * clean) / (1 - alphas[401]).sqrt()

    torch.testing.assert_close(noise_of(True), noise, atol=1e-4, rtol=1e-4)
    shared = noise_of(False)
    torch.testing.assert_close(shared[1:], shared[:1].expand(2, -1, -1, -1), atol=1e-4, rtol=1e-4)
    assert 0.8 < shared.std() < 1.2 and (shared - noise).abs().mean() > 0.5


@pytest.mark.parametrize("inversion", ["ddim", "fixed_point"])
def test_latents_do_not_depend_on_the_batch_size(checkpoint, clip, tmp_path, inversion):
    # A network of random weights amplifies rounding and has no fixed point to find.
    model = SHAPES_CHECKPOINT if inversion == "fixed_point" else checkpoint
    flags = ["--data_path", clip, "--model", model, "--H", 128, "--W", 128, "--n_frames", 5]
    flags += ["--inversion", inversion, "--steps", 5, "--save_steps", 5, "--dtype", "float32"]
    flags += ["--no_reconstruction", "--keep_source", "false"]

    def latents(batch_size):
        batches = ["--batch_size", batch_size, "--save_dir", f"by_{batch_size}"]
        folder = tmp_path / last_line(run("preprocess.py", *flags, *batches, cwd=tmp_path))
        return [np.load(path) for path in sorted((folder / "latents").iterdir())]

    for some, all_at_once in zip(latents(2), latents(5), strict=True):
        assert some.shape == (5, 4, 16, 16) and some.dtype == np.float32
        # Frames that were mixed up would differ by about 1.
        np.testing.assert_allclose(some, all_at_once, atol=5e-3)


def test_evaluations_of_an_inversion(clip, tmp_path, monkeypatch):
    """On the trained checkpoint most steps take one for each frame, whose features are recorded in it."""
    seen, predict_noise = [], StableDiffusion.predict_noise

    def counted(self, latents, *args):
        seen.append(len(latents))
        return predict_noise(self, latents, *args)

    monkeypatch.setattr(StableDiffusion, "predict_noise", counted)
    flags = ["--data_path", clip, "--model", SHAPES_CHECKPOINT, "--H", 64, "--W", 64]
    flags += ["--n_frames", 3, "--batch_size", 2, "--keyframe_interval", 2]  # two chunks
    result = run("preprocess.py", *flags, cwd=tmp_path)
    assert last_line(result) and sum(seen) <= 3 * 104
    of_inversion = sum(seen) - 3 * 50  # of the reconstruction
    assert of_inversion <= 3 * 53 and "did not converge" not in result.stderr
    mean = float(re.search(r"took (\S+) UNet evaluations for each step", result.stderr)[1])
    assert abs(of_inversion - mean * 3 * 50) < 1


@torch.no_grad()
def test_few_sizes_pass_where_each_is_planned(sd, monkeypatch):
    """Batches are padded to sizes that passed before; the noise is equal, and a CPU passes no more."""
    latents, seen, forward = draw_latents(9), [], sd.unet.forward

    def noted(batch, *args, **kwargs):
        seen.append(len(batch))
        return forward(batch, *args, **kwargs)

    monkeypatch.setattr(sd.unet, "forward", noted)
    for planned, sizes in ((False, [9, 8, 6, 2, 1, 7]), (True, [9, 9, 9, 2, 1, 9])):
        seen.clear()
        predictor = VideoNoisePredictor(dataclasses.replace(sd, compiled=planned), "", Batches(9))
        for n in (9, 8, 6, 2, 1, 7):
            noise = predictor(latents[:n], 500, FRAMES[:n])
            expected = sd.predict_noise(latents[:n], 500, predictor.text.expand(n))
            seen.pop()
            torch.testing.assert_close(noise, expected, atol=1e-5, rtol=1e-4)
        assert seen == sizes


def test_non_finite_values_stop_the_run():
    schedule = Schedule.of(build_scheduler(), 5)

    def overflowing(x, t, frames):
        return x * (float("inf") if t > 200 else 1)

    with pytest.raises(FloatingPointError, match=r"timestep 201 .*--dtype"):
        invert(draw_latents(), schedule, overflowing)
    check_finite(torch.ones(1), "ones")


def test_the_name_of_a_video(tmp_path, monkeypatch):
    """That of a folder whole, since what follows a dot is no suffix there; also where it is not spelt out."""
    inside = tmp_path / "frames.v2" / "inside"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    names = {"..": "frames.v2", "../": "frames.v2", ".": "inside", "../clip.v1.mp4": "clip.v1"}
    assert {path: name_video(path) for path in names} == names
