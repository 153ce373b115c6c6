"""Whole edits, from frames to edited frames, against the authors' published algorithm and the paper's.

The published side uses diffusers' scheduler and the slow reference. Of the code under test it uses only the
loading of checkpoints.
"""

import numpy as np
import pytest
import torch
from reference import Reference
from test_cli import last_line, run
from test_tokenflow import INJECTED_LAYERS

import util

STEPS, N_FRAMES, BATCH_SIZE, SEED, GUIDANCE = 5, 6, 2, 3, 5.0
SOURCE_PROMPT, PROMPT, NEGATIVE = "a red square", "a blue circle", "ugly"


@pytest.fixture(scope="module")
def frames(clip_frames):
    """Uint8 RGB (6, 128, 128, 3), whose texture makes nearest neighbours unambiguous."""
    noise = np.random.default_rng(0).integers(-25, 25, (128, 128 + 5 * N_FRAMES, 3))
    large = clip_frames[:N_FRAMES].repeat(2, 1).repeat(2, 2).astype(int)
    moved = [noise[:, 5 * i : 5 * i + 128] for i in range(N_FRAMES)]
    return (large + np.stack(moved)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def work(tmp_path_factory, frames, checkpoint):
    folder = tmp_path_factory.mktemp("published")
    (folder / "clip").mkdir()
    util.save_frames(folder / "clip", 0, frames)
    flags = ["--data_path", "clip", "--model", checkpoint, "--H", 128, "--W", 128, "--steps", STEPS]
    flags += ["--save_steps", STEPS, "--n_frames", N_FRAMES, "--inversion_prompt", SOURCE_PROMPT]
    flags += ["--inversion", "ddim", "--dtype", "float32"]
    video = last_line(run("preprocess.py", *flags, cwd=folder))
    return folder, util.load_frames(folder / video.parent / "frames", range(N_FRAMES))


class Published:
    """The authors' two scripts, in a few lines and in fp32."""

    def __init__(self, sd, frames):
        self.sd, self.scheduler = sd, sd.scheduler
        self.scheduler.set_timesteps(STEPS)
        images = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
        posterior = sd.vae.encode(2 * images - 1).latent_dist
        self.clean = posterior.mean * sd.vae.config.scaling_factor
        self.saved, latents = {}, self.clean
        alphas, before = self.scheduler.alphas_cumprod, self.scheduler.final_alpha_cumprod
        for t in reversed(self.scheduler.timesteps.tolist()):
            noise = self.noise(latents, t, SOURCE_PROMPT)
            x0 = (latents - (1 - before) ** 0.5 * noise) / before**0.5
            latents = alphas[t] ** 0.5 * x0 + (1 - alphas[t]) ** 0.5 * noise
            self.saved[t], before = latents, alphas[t]

    def embed(self, prompt):
        length = self.sd.tokenizer.model_max_length
        tokens = self.sd.tokenizer(
            prompt, padding="max_length", max_length=length, return_tensors="pt"
        )
        return self.sd.text_encoder(tokens.input_ids).last_hidden_state

    def noise(self, latents, t, prompt):
        text = self.embed(prompt).repeat(len(latents), 1, 1)
        return self.sd.unet(latents, t, encoder_hidden_states=text).sample

    def decode(self, latents):
        images = self.sd.vae.decode(latents / self.sd.vae.config.scaling_factor).sample
        return ((images / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()

    def reconstruct(self):
        latents = self.saved[self.scheduler.timesteps[0].item()]
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(self.noise(latents, t, SOURCE_PROMPT), t, latents)[0]
        return self.decode(latents)

    def edit(self, propagation, timesteps, attention_steps, feature_steps):
        noisiest = max(self.saved)
        alpha = self.scheduler.alphas_cumprod[noisiest]
        noise = (self.saved[noisiest] - alpha**0.5 * self.clean) / (1 - alpha) ** 0.5
        latents = self.scheduler.add_noise(self.clean, noise, timesteps[:1])
        text = torch.cat([self.embed(p) for p in (SOURCE_PROMPT, NEGATIVE, PROMPT)])
        reference = Reference(self.sd.unet, BATCH_SIZE, propagation, INJECTED_LAYERS)
        torch.manual_seed(SEED)
        for step, t in enumerate(timesteps.tolist()):
            draws = torch.randint(BATCH_SIZE, (N_FRAMES // BATCH_SIZE,))
            keyframes = (draws + torch.arange(0, N_FRAMES, BATCH_SIZE)).tolist()
            injects = step < attention_steps, step < feature_steps
            _, uncond, cond = reference.predict(
                self.saved[t], latents, t, text, keyframes, *injects
            )
            guided = uncond + GUIDANCE * (cond - uncond)
            latents = self.scheduler.step(guided, t, latents)[0]
        return self.decode(latents)


def assert_same_video(ours, theirs):
    """Assert 44 dB, and 98 % of the values within one grey level; ties account for the rest."""
    difference = np.abs(ours.astype(float) - theirs)
    assert 10 * np.log10(255**2 / (difference**2).mean()) > 44
    assert (difference <= 1).mean() > 0.98


@torch.no_grad()
def test_reconstruction(work, sd, frames):
    assert_same_video(work[1], Published(sd, frames).reconstruct())


@pytest.mark.parametrize(
    "technique, propagation", [("pnp", "previous"), ("sdedit", "previous"), ("pnp", "flanking")]
)
@torch.no_grad()
def test_edit(work, sd, frames, checkpoint, technique, propagation):
    folder, _ = work
    flags = ["--data_path", "clip", "--model", checkpoint, "--n_inversion_steps", STEPS]
    flags += ["--n_timesteps", STEPS, "--n_frames", N_FRAMES, "--batch_size", BATCH_SIZE]
    flags += ["--prompt", PROMPT, "--negative_prompt", NEGATIVE, "--seed", SEED]
    flags += ["--guidance_scale", GUIDANCE, "--propagation", propagation, "--dtype", "float32"]
    if propagation == "flanking":
        flags += ["--consensus", 0, "--fuse", 0]  # with previous they are the default
    if technique == "pnp":
        flags += ["--pnp_attn_t", 0.4, "--pnp_f_t", 0.8]
    else:
        flags += ["--start", 0.8]
    video = last_line(run(f"run_tokenflow_{technique}.py", *flags, cwd=folder))
    ours = util.load_frames(folder / video.parent / "frames", range(N_FRAMES))

    published = Published(sd, frames)
    timesteps = published.scheduler.timesteps
    if technique == "pnp":
        theirs = published.edit(propagation, timesteps, attention_steps=2, feature_steps=4)
    else:
        theirs = published.edit(propagation, timesteps[1:], attention_steps=0, feature_steps=0)
    assert_same_video(ours, theirs)
