"""The algorithm against its slow reference, and what must hold around it."""

import pytest
import torch
from reference import Reference

from config import PnPConfig
from diffusion import Schedule
from editor import Technique, TokenFlowDenoiser
from tokenflow_utils import (
    TokenFlowAttention,
    draw_keyframes,
    extended_attention,
    flanking_weights,
    install_tokenflow,
    nearest_tokens,
    previous_weights,
)

INJECTED_LAYERS = {
    f"up_blocks.{block}.attentions.{index}.transformer_blocks.0.attn1"
    for block, index in [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)]
}
N_FRAMES, BATCH_SIZE, SEED = 7, 3, 5  # the last chunk is short


@pytest.fixture(scope="module")
def video():
    generator = torch.Generator().manual_seed(0)
    base, changes, edited = torch.randn(3, N_FRAMES, 4, 16, 16, generator=generator)
    return base[:1] + 0.3 * changes, edited  # frames of the source resemble each other


@pytest.mark.parametrize("propagation", ["flanking", "previous"])
@pytest.mark.parametrize("injects", [(False, False), (True, False), (False, True), (True, True)])
@torch.no_grad()
def test_equals_reference(sd, video, propagation, injects):
    source, latents = video
    schedule = Schedule.of(sd.scheduler, 10)
    t = schedule.timesteps[0]
    config = PnPConfig(
        data_path="", prompt="", batch_size=BATCH_SIZE, propagation=propagation, seed=SEED
    )
    technique = Technique(latents, schedule, int(injects[0]), int(injects[1]))
    prompts = "a circle", "ugly", "a red circle"
    with install_tokenflow(sd.unet) as flow:
        denoiser = TokenFlowDenoiser(sd, flow, technique, lambda t, f: source[f], prompts, config)
        ours = denoiser.predict_noise(latents, t)

    keyframes = draw_keyframes(N_FRAMES, BATCH_SIZE, torch.Generator().manual_seed(SEED)).tolist()
    text = torch.cat([sd.encode_text(prompt) for prompt in prompts])
    reference = Reference(sd.unet, BATCH_SIZE, propagation, INJECTED_LAYERS)
    _, uncond, cond = reference.predict(source, latents, t, text, keyframes, *injects)
    theirs = uncond + config.guidance_scale * (cond - uncond)
    # Similarities that tie to the last bit may choose another token here and there.
    close = torch.isclose(ours, theirs, atol=1e-4, rtol=1e-3)
    assert close.float().mean() > 0.999
    assert (ours - theirs).square().mean() < 1e-6 * theirs.square().mean()


@torch.no_grad()
def test_the_reference_tells_the_modes_apart(sd, video):
    """What the test above compares differs between modes and injections, or it would show nothing."""
    source, latents = video
    text = torch.cat([sd.encode_text(prompt) for prompt in ("a circle", "ugly", "a red circle")])
    outputs = [
        Reference(sd.unet, BATCH_SIZE, mode, INJECTED_LAYERS).predict(
            source, latents, 901, text, [1, 3, 6], attention, features
        )[1:]
        for mode in ("flanking", "previous")
        for attention in (False, True)
        for features in (False, True)
    ]
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert (a - b).square().mean() > 1e-5 * a.square().mean()


@torch.no_grad()
def test_single_frame_is_the_untouched_unet(sd, video):
    source, latents = video
    text = sd.encode_text("a red circle")
    plain = sd.predict_noise(latents[:1], 500, text)
    streams = torch.cat([source[:1], latents[:1], latents[:1]])
    with install_tokenflow(sd.unet) as flow:
        flow.begin_joint_edit(inject_attention=False, inject_features=False)
        joint = sd.predict_noise(streams, 500, text.expand(3, -1, -1))
        flow.begin_propagation(torch.ones(1, 1), inject_features=False)
        propagated = sd.predict_noise(streams, 500, text.expand(3, -1, -1))
    torch.testing.assert_close(joint[2:], plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(propagated[2:], plain, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_every_frame_may_be_a_keyframe(sd, video):
    """With chunks of one frame nothing is left to propagate to."""
    source, latents = video[0][:2], video[1][:2]
    config = PnPConfig(data_path="", prompt="", batch_size=1)
    technique = Technique(latents, Schedule.of(sd.scheduler, 10))
    with install_tokenflow(sd.unet) as flow:
        denoiser = TokenFlowDenoiser(
            sd, flow, technique, lambda t, f: source[f], ("", "", ""), config
        )
        assert torch.isfinite(denoiser.predict_noise(latents, 901)).all()


def test_unet_is_restored(sd, video):
    latents, text = video[1][:1], sd.encode_text("a red circle")
    before = sd.predict_noise(latents, 500, text)
    processors = dict(sd.unet.attn_processors)

    def use_and_fail():
        with install_tokenflow(sd.unet) as flow:
            flow.begin_joint_edit(inject_attention=True, inject_features=True)
            sd.predict_noise(latents.repeat(3, 1, 1, 1), 500, text.expand(3, -1, -1))
            with pytest.raises(RuntimeError, match="already installed"), install_tokenflow(sd.unet):
                pass
            raise KeyError("anything")

    with pytest.raises(KeyError):
        use_and_fail()
    assert dict(sd.unet.attn_processors) == processors
    assert not sd.unet.up_blocks[1].resnets[1].conv2._forward_hooks
    assert torch.equal(sd.predict_noise(latents, 500, text), before)


def test_refuses_other_networks(sd):
    with pytest.raises(ValueError, match="no self-attention"), install_tokenflow(sd.controlnet):
        pass
    with install_tokenflow(sd.unet):
        pass  # the failed installation left nothing behind


def test_injected_layers_by_name(sd):
    with install_tokenflow(sd.unet):
        installed = {
            name: processor
            for name, processor in sd.unet.attn_processors.items()
            if isinstance(processor, TokenFlowAttention)
        }
    injected = {name for name, processor in installed.items() if processor.injected}
    assert injected == {f"{name}.processor" for name in INJECTED_LAYERS}
    every = {name for name in sd.unet.attn_processors if ".attn1." in name}
    assert set(installed) == every and len(every) == 16


def test_extended_attention_sees_all_frames_but_in_the_source():
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 3, 2, 5, 8, generator=generator)
    before = extended_attention(query, key, value, heads=2)
    value[:, 1] += 1.0
    change = (extended_attention(query, key, value, heads=2) - before).abs().amax((2, 3))
    assert change[0, 0] == 0 and (change[1:, 0] > 0.1).all()


def test_weights_of_the_paper():
    weights = flanking_weights(torch.arange(7), torch.tensor([1, 4]))
    third = 1 / 3
    expected = [[1, 0], [1, 0], [2 * third, third], [third, 2 * third], [0, 1], [0, 1], [0, 1]]
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_weights_of_the_authors_code():
    weights = previous_weights(torch.arange(8), torch.tensor([1, 6]), batch_size=4)
    assert weights[:4].tolist() == [[1, 0]] * 4
    own = torch.sigmoid(torch.tensor([2 / 4, 3 / 4, 4 / 4, 5 / 6]))  # d2 / (d1 + d2)
    torch.testing.assert_close(weights[4:], torch.stack([1 - own, own], dim=1))


def test_nearest_tokens_in_blocks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 10, 6, generator=generator)
    keys = torch.nn.functional.normalize(torch.randn(8, 6, generator=generator), dim=-1)
    whole = nearest_tokens(tokens, keys)
    monkeypatch.setattr("tokenflow_utils.SIMILARITY_BLOCK", 8 * 7)  # does not divide the tokens
    assert torch.equal(nearest_tokens(tokens, keys), whole)
    similarity = torch.nn.functional.cosine_similarity(tokens[:, :, None], keys, dim=-1)
    assert torch.equal(whole, similarity.argmax(-1))


def test_keyframes_are_one_a_chunk_and_repeatable():
    draws = [draw_keyframes(11, 4, torch.Generator().manual_seed(s)) for s in range(50)]
    assert all((draw // 4).tolist() == [0, 1, 2] and draw[-1] <= 10 for draw in draws)
    assert {draw[0].item() for draw in draws} == {0, 1, 2, 3}
    assert torch.equal(draws[3], draw_keyframes(11, 4, torch.Generator().manual_seed(3)))
