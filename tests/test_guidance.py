"""Guidance from the keyframes: which streams are evaluated when, and what frames take from where."""

from dataclasses import replace

import pytest
import torch
from reference import propagate_by_hand
from test_tokenflow import edit_of, predict_by_reference, record, source_of, video_of

from tokenflow.config import PnPConfig
from tokenflow.diffusion.ddim import predict_x0
from tokenflow.diffusion.layouts import count_tokens, features_shape
from tokenflow.editing.checkpoint import EditCheckpoint
from tokenflow.editing.consensus import Consensus, choose_steps
from tokenflow.editing.denoise import TokenFlowDenoiser, denoise
from tokenflow.editing.relevance import COMPARED
from tokenflow.editing.steps import Guidance, plan_guidance
from tokenflow.runtime.distributed import Processes
from tokenflow_utils import SourceFeatures, attention, extended_attention

NONE, EVERY_FRAME, KEYFRAMES, REUSED, ALONE = Guidance


def config_of(**options):
    return PnPConfig(data_path="", prompt="x", **options)


def test_which_steps_are_guided_how():
    averaged = choose_steps(25, 3)
    assert plan_guidance(config_of(), 25, averaged) == [KEYFRAMES] * 14 + (
        [REUSED, EVERY_FRAME] * 5 + [REUSED]
    )
    for option in ({"guidance": "every_frame"}, {"propagation": "previous"}):
        assert set(plan_guidance(config_of(**option), 25, averaged)) == {EVERY_FRAME}
    assert set(plan_guidance(config_of(guidance_scale=1), 25, averaged)) == {NONE}
    assert plan_guidance(config_of(), 1, [0]) == [KEYFRAMES]
    alone = plan_guidance(config_of(alternate=True), 25, averaged)
    skipped = {step for step, guidance in enumerate(alone) if guidance is ALONE}
    assert len(skipped) == 8 and min(skipped) == 7
    assert not skipped & {*averaged, 24} and not skipped & {step + 1 for step in skipped}
    assert set(alone) == {KEYFRAMES, ALONE}


class NoFeatures:
    """In place of kept `SourceFeatureFiles`: all tokens are found in the first one; zeros are injected."""

    def __init__(self, unet, shape):
        self.tokens, self.injected = count_tokens(unet, shape), features_shape(unet, shape)

    def read(self, t, frames, injected, device):
        nearest = {
            name: torch.zeros(len(frames), 2, n_tokens, dtype=torch.long)
            for name, n_tokens in self.tokens.items()
        }
        return SourceFeatures(nearest, torch.zeros(len(frames), *self.injected))


@pytest.mark.parametrize(
    "options, steps, most",
    [({}, 50, 80), ({"alternate": True}, 25, 28), ({"guidance_scale": 1.0}, 50, 55)],
    ids=str,
)
@torch.no_grad()
def test_evaluations_of_a_frame(sd, tmp_path, monkeypatch, options, steps, most):
    """Of an edit of 40 frames by Plug-and-Play, whose source features are kept; no UNet is needed.

    With those that find out where the prompts differ, unless nothing is guided.
    """
    latents = torch.randn(40, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    source = source_of(latents, NoFeatures(sd.unet, latents.shape))
    injects = steps // 2, int(0.8 * steps)
    edit = edit_of(sd, source, latents, injects, n_timesteps=steps, **options)
    averaged = Consensus(sd, None, choose_steps(steps, 3))
    evaluated = []
    monkeypatch.setattr(Consensus, "at", lambda self, step: None)  # evaluates no UNet

    def count(self, edited, t, frames, streams, together):
        evaluated.append(len(frames) * len(streams))
        return {stream: torch.zeros_like(edited) for stream in streams}

    monkeypatch.setattr(TokenFlowDenoiser, "predict_noise", count)
    run(replace(edit, consensus=averaged), tmp_path)
    compared = 2 * len(COMPARED) if edit.config.guidance_scale != 1 else 0
    assert most - 10 < sum(evaluated) / 40 + compared <= most


@torch.no_grad()
def test_a_difference_is_reused(sd):
    """It is added to the noise under the prompt, as an edit without guidance predicts it."""
    source, latents = video_of(7)
    memory = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    unguided = predict_at(edit_of(sd, source_of(source), latents, guidance_scale=1.0), latents)
    reused = predict_at(edit_of(sd, source_of(source), latents), latents, REUSED, memory)
    torch.testing.assert_close(reused, unguided + memory)
    # A memory that a damaged file has lost is done without.
    lost = predict_at(edit_of(sd, source_of(source), latents), latents, REUSED, None)
    propagated = predict_at(edit_of(sd, source_of(source), latents), latents, KEYFRAMES)
    assert torch.equal(lost, propagated)


@torch.no_grad()
def test_keyframes_alone_move_the_others(sd, tmp_path):
    """By hand: what the keyframes' predicted x0 changes is propagated; kept features give the same."""
    source, latents = video_of(7)
    memory = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    edit = edit_of(sd, source_of(source), latents, keyframe_interval=3)
    found = predict_at(edit, latents, ALONE, memory)
    guided, nearest, keyframes = predict_by_reference(edit, source, latents)
    alpha = edit.technique.schedule.alphas[0]
    change = predict_x0(latents, guided, alpha)[keyframes] - memory[keyframes]
    moved = memory + propagate_by_hand(change, nearest, 7)
    expected = (latents - alpha**0.5 * moved) / (1 - alpha) ** 0.5
    expected[keyframes] = guided[keyframes]
    close = torch.isclose(found, expected, atol=1e-4, rtol=1e-3)
    assert close.float().mean() > 0.999
    files, _ = record(sd, tmp_path, source, 3, batch_size=7, chunk=7)
    kept = predict_at(replace(edit, source=source_of(source, files)), latents, ALONE, memory)
    assert torch.isclose(kept, found, atol=1e-3, rtol=1e-2).float().mean() > 0.999


def test_own_tokens_count_several_times():
    """As if they stood there so often; of frames that were edited before, none is the frame's own."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 5, 8, generator=generator)
    key, value = torch.randn(2, 4, 5, 8, generator=generator)  # two were edited before
    weighted = extended_attention(query, key, value, heads=2, own_weight=3.0)
    for frame in range(2):
        own = 2 + frame
        keys, values = (torch.cat([*x, x[own], x[own]])[None] for x in (key, value))
        expected = attention(query[frame : frame + 1], keys, values, heads=2)
        torch.testing.assert_close(weighted[frame : frame + 1], expected)


def test_a_killed_edit_resumes_with_its_memory(sd, tmp_path):
    """Stopped after any step, an edit whose steps take something of the step before ends the same."""
    source, latents = video_of(7)
    for name, options in (("late", {}), ("alternate", {"alternate": True})):
        edit = edit_of(sd, source_of(source), latents, n_timesteps=6, **options)
        whole = run(edit, tmp_path / name)
        for stop in range(6):
            run(edit, tmp_path / f"{name}_killed", stop)
        assert torch.equal(run(edit, tmp_path / f"{name}_killed"), whole)


def predict_at(edit, latents, guidance=None, memory=None):
    """The guided noise (N, 4, h, w) of all frames at the first step, if it has that guidance."""
    noise = torch.empty_like(latents)
    with TokenFlowDenoiser.install(edit) as denoiser:
        denoiser.steps.guidance[0] = guidance or denoiser.steps.guidance[0]
        for frames, predicted, _ in denoiser.predict(latents, 0, denoiser.divide(0), memory):
            noise[frames] = predicted
    return noise


@torch.no_grad()
def run(edit, folder, stop=None):
    """Denoise whole, or until `stop` steps are done; returns the edited latents (N, 4, h, w)."""
    frames = torch.arange(edit.source.n_frames)
    shape = edit.technique.start(frames).shape
    checkpoint = EditCheckpoint(folder, shape, Processes(torch.device("cpu")))
    with TokenFlowDenoiser.install(edit) as denoiser:
        for done in denoise(denoiser, checkpoint):
            if done == stop:
                break
    return checkpoint.latents(done)[frames]
