"""The algorithm against its slow reference, and properties that must hold."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import (
    Predictor,
    finest_layer,
    injected_layers,
    propagate_by_hand,
)
from test_cli import ROOT

from tokenflow.config import PnPConfig
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.ddim import Schedule
from tokenflow.editing.denoise import Edit, TokenFlowDenoiser
from tokenflow.editing.relevance import Relevance
from tokenflow.editing.source import Source
from tokenflow.editing.techniques import Technique
from tokenflow.editing.windows import (
    choose_anchors,
    divide_into_windows,
    find_shared,
    plan_joint_edits,
)
from tokenflow.errors import UserError
from tokenflow.inversion.predictor import VideoNoisePredictor
from tokenflow.inversion.recording import RecordingPredictor
from tokenflow.inversion.source_features import SourceFeatureFiles, bytes_needed
from tokenflow.propagation.cache import BlendedRows, KeyframeCache
from tokenflow.propagation.keyframes import KeyframeSchedule
from tokenflow.propagation.nearest import find_nearest, find_nearest_in_blocks
from tokenflow.runtime.ahead import WriteBehind, in_parallel, read_ahead
from tokenflow.runtime.batching import Batches, Limits
from tokenflow_utils import (
    JointEdit,
    Propagation,
    TokenFlowAttention,
    attention,
    extended_attention,
    find_correspondences,
    flanking_blend,
    install_tokenflow,
    previous_blend,
    propagate,
)

INJECTED_LAYERS = {
    f"up_blocks.{block}.attentions.{index}.transformer_blocks.0.attn1"
    for block, index in [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)]
}
N_FRAMES, BATCH_SIZE, SEED = 7, 3, 5  # the last chunk is short
FIRST = 901  # timestep of ten steps
PROMPTS = "a circle", "ugly", "a red circle"


def video_of(n_frames):
    """Latents of a source, whose frames resemble each other, and of an edit: (n, 4, 16, 16) each."""
    generator = torch.Generator().manual_seed(0)
    base, changes, edited = torch.randn(3, n_frames, 4, 16, 16, generator=generator)
    return base[:1] + 0.3 * changes, edited


@pytest.fixture(scope="module")
def video():
    return video_of(N_FRAMES)


class Latents:
    """In place of an `Inversion`: the same latents (N, 4, h, w) at every timestep, and no depth."""

    depth = None

    def __init__(self, latents):
        self.of_all = latents

    def latents(self, name):
        return self.of_all


def source_of(latents, features=None, flow=None):
    """A source whose latents are the same at every timestep."""
    return Source(Latents(latents), len(latents), features, flow)


def edit_of(sd, source, latents, injects=(True, True), relevance=None, **changes):
    """An edit that starts from the latents and injects into so many steps."""
    config = PnPConfig(
        **{"data_path": "", "prompt": "x", "seed": SEED, "n_timesteps": 10} | changes
    )
    schedule = Schedule.of(sd.scheduler, config.n_timesteps)
    technique = Technique(schedule, source)
    technique.attention_steps, technique.feature_steps = map(int, injects)
    return Edit(sd, technique, source, PROMPTS, config, relevance=relevance)


def record(sd, folder, source, interval, batch_size, chunk):
    """Source features at the first step, recorded as an inversion does, chunk by chunk; and the noise."""
    files, noise = SourceFeatureFiles(folder), torch.empty(source.shape)
    files.create(sd.unet, source.shape, [FIRST])
    keyframes = KeyframeSchedule(len(source), interval, (FIRST,), SEED)
    predictor = VideoNoisePredictor(sd, PROMPTS[0], Batches(batch_size, adapts=False))
    with WriteBehind() as writer:
        recorder = RecordingPredictor(predictor, keyframes, files, writer)
        with recorder.install():
            for frames in recorder.plan(FIRST, len(source), chunk):
                for passing in recorder.begin(FIRST, frames):
                    noise[passing] = recorder(source[passing], FIRST, passing)
    return files, noise


def predicted(edit, latents):
    """TokenFlow's guided noise of all frames at the first step."""
    with TokenFlowDenoiser.install(edit) as denoiser:
        return predict_all(denoiser, latents)


def predict_all(denoiser, latents):
    """The guided noise of all frames at the first step."""
    noise = torch.empty(latents.shape)
    for frames, predicted, _ in denoiser.predict(latents, 0, denoiser.divide(0)):
        noise[frames] = predicted
    return noise


PLAIN = {"guidance": "every_frame", "own_weight": 1}
RELEVANCE = Relevance(
    torch.rand(N_FRAMES, 1, 16, 16, generator=torch.Generator().manual_seed(2)), strength=0.8
)


@pytest.mark.parametrize(
    "options, injects",
    [
        *(({}, injects) for injects in itertools.product((False, True), repeat=2)),
        ({"guidance": "every_frame", "relevance": RELEVANCE}, (True, True)),
        ({"relevance": RELEVANCE, "own_weight": 2.0}, (True, True)),
        *((PLAIN, injects) for injects in ((False, False), (True, True))),
        *(({"propagation": "previous"}, injects) for injects in ((False, False), (True, True))),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
@torch.no_grad()
def test_equals_reference(sd, video, options, injects):
    source, latents = video
    edit = edit_of(sd, source_of(source), latents, injects, keyframe_interval=BATCH_SIZE, **options)
    assert_same_noise(predicted(edit, latents), edit, source, latents)


@pytest.mark.parametrize("propagation", ["flanking", "previous"])
@pytest.mark.parametrize("window, together", [(7, True), (10, False)])
@torch.no_grad()
def test_windows_equal_the_reference(sd, monkeypatch, propagation, window, together):
    """Anchors, shared boundaries and inner keyframes, with all streams in one pass or one by one."""
    monkeypatch.setattr("tokenflow.editing.denoise.FILLED_CPU", 1 << 12 if together else 1)
    source, latents = video_of(21)
    sizes = {"batch_size": 3, "keyframe_interval": 2, "keyframe_window": window}
    edit = edit_of(sd, source_of(source), latents, propagation=propagation, **sizes)
    with TokenFlowDenoiser.install(edit) as denoiser:
        ours = predict_all(denoiser, latents)
        # The noise is the same however processes divide the chunks.
        chunks = denoiser.divide(0)
        for part in (chunks[: len(chunks) // 2], chunks[len(chunks) // 2 :]):
            for frames, noise, _ in denoiser.predict(latents, 0, part):
                assert torch.equal(noise, ours[frames])
    assert_same_noise(ours, edit, source, latents)


@torch.no_grad()
def test_a_joint_edit_that_does_not_fit_is_divided(sd, monkeypatch, most=4):
    """Streams pass one by one, down to one stream of four keyframes: the noise is equal."""
    source, latents = video_of(14)

    def noise(sd):
        options = {"keyframe_interval": 2, "keyframe_window": 6}  # of seven
        return predicted(edit_of(sd, source_of(source), latents, **options), latents)

    expected, seen, forward = noise(sd), [], sd.unet.forward

    def fits_few(latents, *args, **kwargs):
        seen.append(len(latents))
        if len(latents) > most:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        return forward(latents, *args, **kwargs)

    monkeypatch.setattr(sd.unet, "forward", fits_few)
    limited = dataclasses.replace(sd, limits=Limits())
    torch.testing.assert_close(noise(limited), expected, atol=1e-4, rtol=1e-4)
    assert seen[0] > most and limited.limits.of("joint") == 1
    seen.clear()
    noise(limited)
    assert max(seen) <= most  # what failed is not tried again


@pytest.mark.parametrize("n_keyframes, size", [(1, 8), (8, 8), (9, 8), (15, 8), (50, 12), (7, 6)])
def test_windows_share_one_keyframe_each(n_keyframes, size):
    keyframes = torch.arange(n_keyframes) * 4 + 1
    blend = flanking_blend(torch.arange(4 * n_keyframes), keyframes)
    found = divide_into_windows(blend, n_keyframes, size)
    assert torch.equal(torch.cat([w.frames for w in found]), torch.arange(4 * n_keyframes))
    attending = [{*w.positions, *choose_anchors(n_keyframes)} for w in found]
    assert all(len(positions) <= size for positions in attending)
    for one, following in zip(found[:-1], found[1:], strict=True):
        assert one.positions[-1] == following.positions[0]
    for window in found:
        assert set(blend.positions[window.frames].flatten().tolist()) <= set(window.positions)
    assert len(found) == (1 if n_keyframes <= size else -(-(n_keyframes - 1) // (size - 5)))


@pytest.mark.parametrize(
    "batch_size, window, together", [(2, 16, True), (7, 16, False), (2, 6, False), (7, 6, True)]
)
@torch.no_grad()
def test_two_streams_equal_the_reference(sd, tmp_path, monkeypatch, batch_size, window, together):
    """With source features recorded in the inversion's passes, an edit needs no source stream."""
    monkeypatch.setattr("tokenflow.editing.denoise.FILLED_CPU", 1 << 12 if together else 1)
    source, latents = video_of(13)
    files, noise = record(sd, tmp_path, source, 2, batch_size, chunk=5)
    plain = sd.predict_noise(source, FIRST, sd.encode_text(PROMPTS[0]).expand(13))
    torch.testing.assert_close(noise, plain, atol=1e-3, rtol=1e-3)

    known = source_of(source, files)
    edit = edit_of(sd, known, latents, batch_size=2, keyframe_interval=2, keyframe_window=window)
    # Injected features are kept in half precision.
    assert_same_noise(predicted(edit, latents), edit, source, latents, tolerance=1e-2)
    written = sum(path.stat().st_size - 128 for path in tmp_path.glob(f"*_{FIRST}.npy"))
    assert written == bytes_needed(sd.unet, source.shape, 1)


@pytest.mark.parametrize(
    "n_frames, interval, size", [(13, 2, 4), (13, 5, 1), (9, 1, 4), (40, 8, 16)]
)
def test_keyframes_pass_before_the_frames_that_blend_them(n_frames, interval, size):
    """Each frame passes once, and keyframes again if the chunk that they are in did not pass."""
    keyframes = KeyframeSchedule(n_frames, interval, (FIRST,), SEED)
    recorder = RecordingPredictor(None, keyframes, None, None)
    chunks = recorder.plan(FIRST, n_frames, size)
    assert [recorder.begin(FIRST, frames) for frames in chunks] == [[frames] for frames in chunks]
    order = torch.cat(chunks)
    assert torch.equal(order.sort().values, torch.arange(n_frames))
    (drawn,) = keyframes.draw().values()
    passed_at = order.argsort()
    blended = drawn[flanking_blend(order, drawn).positions]
    assert (passed_at[blended] <= torch.arange(n_frames)[:, None]).all()
    recorder.plan(FIRST, n_frames, size)
    *before, frames = recorder.begin(FIRST, chunks[-1])
    needed = drawn[flanking_blend(frames, drawn).positions].unique()
    assert torch.equal(torch.cat(before + [needed[:0]]), needed[~torch.isin(needed, frames)])
    assert recorder.plan(1, n_frames, size)[0][0] == 0  # no timestep of the schedule


def assert_same_noise(ours, edit, source, latents, tolerance=1e-3, motion=None):
    """Assert the reference's guided noise, except for tokens whose nearest neighbours tie."""
    theirs, _, _ = predict_by_reference(edit, source, latents, motion)
    close = torch.isclose(ours, theirs, atol=tolerance / 10, rtol=tolerance)
    assert close.float().mean() > 0.999
    assert (ours - theirs).square().mean() < tolerance**2 * theirs.square().mean()


def predict_by_reference(edit, source, latents, motion=None):
    """The guided noise of all frames at the first step, by the slow reference.

    And the correspondences of its finest layer, and the keyframes.
    """
    sd, config, technique = edit.sd, edit.config, edit.technique
    reference = Predictor(
        sd.unet,
        config.keyframe_interval,
        config.propagation,
        window=config.keyframe_window,
        motion=motion,
        own_weight=int(config.resolve("own_weight")),
    )
    n_frames, interval = len(source), config.keyframe_interval
    keyframes = KeyframeSchedule(n_frames, interval, (FIRST,), SEED).draw()[FIRST]
    injects = technique.attention_steps > 0, technique.feature_steps > 0
    text = torch.cat([sd.encode_text(prompt).tokens for prompt in PROMPTS])
    passed = source, latents, FIRST, text, keyframes.tolist(), *injects
    _, uncond, cond = reference.predict(*passed)
    nearest = reference.nearest[finest_layer(sd.unet)]
    stronger = config.guidance_scale - 1
    if edit.relevance:
        stronger = stronger * edit.relevance.at(torch.arange(n_frames))
    if config.resolve("guidance") == "every_frame":
        return cond + stronger * (cond - uncond), nearest, keyframes
    difference = (stronger * (cond - uncond))[keyframes]
    return cond + propagate_by_hand(difference, nearest, n_frames), nearest, keyframes


@torch.no_grad()
def test_the_reference_tells_the_modes_apart(sd, video):
    """The reference differs between modes and injections; else comparing with it would show nothing."""
    source, latents = video
    text = torch.cat([sd.encode_text(prompt).tokens for prompt in PROMPTS])
    outputs = [
        Predictor(sd.unet, BATCH_SIZE, mode).predict(
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
def test_a_compiled_unet_predicts_the_same(sd, checkpoint, video, monkeypatch):
    """While TokenFlow's layers and hook come and go. To take seconds, two modules are compiled, whose graphs
    are run as torch finds them."""
    compile, config = torch.nn.Module.compile, torch._dynamo.config

    def compile_parts(unet):
        block = unet.up_blocks[1]
        for part in (block.resnets[1], block.attentions[1]):  # both are injected into
            compile(part, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_parts)
    for name in ("skip_nnmodule_hook_guards", "recompile_limit"):
        monkeypatch.setattr(config, name, getattr(config, name))  # restored at the end
    compiled = Checkpoint.find(str(checkpoint)).load(
        torch.device("cpu"), torch.float32, compiled=True
    )
    torch._dynamo.utils.counters.clear()
    source, latents = (part[:3] for part in video)
    samples, blend = (
        torch.cat([source, latents, latents]),
        flanking_blend(torch.arange(3), torch.arange(3)),
    )

    def noises(sd):
        text = sd.encode_text(PROMPTS[0]).expand(9)
        yield sd.predict_noise(samples, FIRST, text)
        for injects in ((False, False), (True, True)):
            with install_tokenflow(sd.unet) as tokenflow:
                tokenflow.task = JointEdit(
                    [0, 1, 2], inject_attention=injects[0], inject_features=injects[1]
                )
                yield sd.predict_noise(samples, FIRST, text)
                rows = tokenflow.cache.rows(blend.positions)
                blended = BlendedRows.of(rows, blend.weights, sd.device)
                tokenflow.task = Propagation(blended, injects[1])
                yield sd.predict_noise(samples, FIRST, text)

    for found, expected in zip(noises(compiled), noises(sd), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 2
    torch._dynamo.reset()


@torch.no_grad()
def test_single_frame_is_the_untouched_unet(sd, video):
    source, latents = video
    text = sd.encode_text("a red circle")
    plain = sd.predict_noise(latents[:1], 500, text)
    streams = torch.cat([source[:1], latents[:1], latents[:1]])
    with install_tokenflow(sd.unet) as tokenflow:
        tokenflow.task = JointEdit([0])
        joint = sd.predict_noise(streams, 500, text.expand(3))
        rows, weights = torch.zeros(1, 2, dtype=torch.long), torch.tensor([[1.0, 0.0]])
        tokenflow.task = Propagation(BlendedRows.of(rows, weights, sd.device))
        propagated = sd.predict_noise(streams, 500, text.expand(3))
    torch.testing.assert_close(joint[2:], plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(propagated[2:], plain, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_every_frame_may_be_a_keyframe(sd, video):
    """With intervals of one frame, no frame is left to propagate to."""
    source, latents = video[0][:2], video[1][:2]
    edit = edit_of(sd, source_of(source), latents, (False, False), keyframe_interval=1)
    assert torch.isfinite(predicted(edit, latents)).all()


def test_unet_is_restored(sd, video):
    latents, text = video[1][:1], sd.encode_text("a red circle")
    before = sd.predict_noise(latents, 500, text)
    processors = dict(sd.unet.attn_processors)

    def use_and_fail():
        with install_tokenflow(sd.unet) as tokenflow:
            tokenflow.task = JointEdit([0], inject_attention=True, inject_features=True)
            sd.predict_noise(latents.repeat(3, 1, 1, 1), 500, text.expand(3))
            with pytest.raises(RuntimeError, match="already installed"), install_tokenflow(sd.unet):
                pass
            raise KeyError("anything")

    with pytest.raises(KeyError):
        use_and_fail()
    assert dict(sd.unet.attn_processors) == processors
    assert not sd.unet.up_blocks[1].resnets[1].conv2._forward_hooks
    assert torch.equal(sd.predict_noise(latents, 500, text), before)


def test_refuses_other_networks(sd):
    with (
        pytest.raises(UserError, match="up_block_types is None"),
        install_tokenflow(sd.controlnet.nets[0]),
    ):
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
    assert set(injected_layers(sd.unet)) == INJECTED_LAYERS
    every = {name for name in sd.unet.attn_processors if ".attn1." in name}
    assert set(installed) == every and len(every) == 16


def test_extended_attention_sees_all_frames():
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 5, 8, generator=generator)
    changed = value.clone()
    changed[1] += 1.0
    for attend, sees in ((extended_attention, True), (attention, False)):
        change = attend(query, key, changed, heads=2) - attend(query, key, value, heads=2)
        assert ((change[0].abs() > 0.1).all() if sees else (change[0] == 0).all()).item()


def test_blend_of_the_paper():
    blend = flanking_blend(torch.arange(7), torch.tensor([1, 4]))
    third = 1 / 3
    weights = [[1, 0], [1, 0], [2 * third, third], [third, 2 * third], [1, 0], [1, 0], [1, 0]]
    torch.testing.assert_close(blend.weights, torch.tensor(weights))
    assert blend.positions[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert blend.positions[2:4, 1].tolist() == [1, 1]
    assert blend.whole.tolist() == [0, 0, -1, -1, 1, 1, 1]


def test_blend_of_the_authors_code():
    blend = previous_blend(torch.arange(8), interval=4)
    assert blend.weights[:4].tolist() == [[1, 0]] * 4 and blend.positions[:4, 0].tolist() == [0] * 4
    own = torch.sigmoid(torch.tensor([2 / 4, 3 / 4, 4 / 4, 5 / 6]))  # d2 / (d1 + d2)
    torch.testing.assert_close(blend.weights[4:], torch.stack([own, 1 - own], dim=1))
    assert blend.positions[4:].tolist() == [[1, 0]] * 4


def test_propagation_by_hand():
    """Two frames of two tokens; the first blends both keyframes, the second takes one alone."""
    right, down = [1.0, 0.0], [0.0, 1.0]
    key_tokens = torch.tensor([[right, down], [down, right]])  # k s d
    tokens = torch.tensor([[[3.0, 1.0], [1.0, 4.0]], [[0.0, 2.0], [0.1, 0.3]]])  # n s d
    rows, weights = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]])
    blended = BlendedRows.of(rows, weights, torch.device("cpu"))
    nearest = find_correspondences(tokens, key_tokens, blended)
    assert nearest.tolist() == [[[0, 1], [1, 0]], [[0, 0], [0, 0]]]
    outputs = torch.tensor([[[10.0], [20.0]], [[100.0], [200.0]]])  # k s d
    propagated = propagate(outputs, nearest, blended)
    expected = [[0.75 * 10 + 0.25 * 200], [0.75 * 20 + 0.25 * 100]], [[100.0], [100.0]]
    torch.testing.assert_close(propagated, torch.tensor(expected))


@pytest.mark.parametrize("n_keyframes, size", [(1, 8), (8, 8), (9, 8), (15, 8), (50, 12), (7, 6)])
def test_joint_passes_are_the_references(sd, n_keyframes, size):
    """For a process that edits all windows, and for processes that edit only the later ones."""
    blend = flanking_blend(torch.arange(4 * n_keyframes), torch.arange(n_keyframes) * 4 + 1)
    reference = Predictor(sd.unet, 4, "flanking", window=size)
    expected = {
        position: set(group + attended)
        for group, attended in reference._groups(n_keyframes)
        for position in group
    }
    all_windows = divide_into_windows(blend, n_keyframes, size)
    for first in range(len(all_windows)):
        cache, seen_together = KeyframeCache(), {}
        for window in all_windows[first:]:
            seen = find_shared(window, n_keyframes)
            cache.keep([position for position in cache.positions if position in seen])
            for joint in plan_joint_edits(window, n_keyframes, cache.positions):
                assert set(joint.attended) <= set(cache.positions)
                assert not set(joint.edited) & set(cache.positions)
                together = {*joint.edited, *joint.attended}
                seen_together |= dict.fromkeys(joint.edited, together)
                cache.positions += joint.edited
            assert set(window.positions) <= set(cache.positions)
        assert all(seen_together[position] == expected[position] for position in seen_together)
        assert first or set(seen_together) == set(expected)


def test_rows_of_the_cache():
    cache = KeyframeCache()
    cache.positions += [7, 2]
    cache.write("a", [7, 2], torch.tensor([[7.0], [2.0]]))
    cache.positions += [5]
    cache.write("a", [5], torch.tensor([[0.0]]))
    cache.write("a", [5], torch.tensor([[5.0]]))  # writing a row again replaces it
    assert cache.rows(torch.tensor([[5, 7], [2, 5]])).tolist() == [[2, 0], [1, 2]]
    cache.keep([2, 5])
    assert cache.tensor("a").tolist() == [[2.0], [5.0]] and cache.positions == [2, 5]
    assert cache.read("a", [5])[0].tolist() == [5.0]


def test_nearest_tokens_in_blocks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 10, 6, generator=generator)
    keys = torch.nn.functional.normalize(torch.randn(8, 6, generator=generator), dim=-1)
    whole = find_nearest(tokens, keys)
    monkeypatch.setattr(
        "tokenflow.propagation.nearest.SIMILARITY_BLOCK", 8 * 7
    )  # does not divide the tokens
    assert torch.equal(find_nearest(tokens, keys), whole)
    similarity = torch.nn.functional.cosine_similarity(tokens[:, :, None], keys, dim=-1)
    assert torch.equal(whole, similarity.argmax(-1))


def test_fused_nearest_tokens_equal_the_blocked_ones():
    """In triton's interpreter; skipped without triton. `benchmarks.sizes` compares them on a GPU."""
    kernel = pytest.importorskip("tokenflow.propagation.nearest_triton")
    generator = torch.Generator().manual_seed(0)
    for tiles, dtype in [
        (kernel.FULL, torch.float32),
        (kernel.FULL, torch.float16),
        (kernel.HALF, torch.float16),
    ]:
        for n, s, k, d in [(2, 64, 64, 32), (3, 100, 130, 40), (1, 7, 300, 80)]:
            tokens, keys = (
                torch.randn(*shape, generator=generator).to(dtype) for shape in ((n, s, d), (k, d))
            )
            found, expected = (
                kernel.find_nearest_fused(tokens, keys, tiles),
                find_nearest_in_blocks(tokens, keys),
            )
            assert torch.equal(found, expected), (tiles, dtype)
        same = torch.ones(1, 3, 8, dtype=dtype)
        assert kernel.find_nearest_fused(same, same[0], tiles).tolist() == [
            [0, 0, 0]
        ]  # the first of ties


def test_a_kernel_that_does_not_compile_is_not_used(monkeypatch):
    """But where memory runs out while it is tried, it may still run later, so that ends the pass."""
    kernel = pytest.importorskip("tokenflow.propagation.nearest_triton")
    failures = iter([RuntimeError("no ptxas"), torch.OutOfMemoryError("CUDA out of memory")])

    def fail(*args):
        raise next(failures)

    monkeypatch.setattr(kernel, "find_nearest_fused", fail)
    assert not kernel.runs_on(torch.device("cpu"), torch.float32)
    with pytest.raises(torch.OutOfMemoryError):
        kernel.runs_on(torch.device("cpu"), torch.float64)


def test_the_kernel_compiles_for_every_gpu():
    """Ahead of time, which needs no GPU, for what torch runs on: shared memory within each one's bounds."""
    pytest.importorskip("triton")
    code = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tokenflow.propagation import nearest_triton as kernel

names = kernel._nearest_kernel.arg_names
spelt = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
more = {75: [], 80: [torch.float32], 86: [], 89: [], 90: [torch.bfloat16]}  # than fp16
for arch, shared in {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}.items():
    for dtype in (torch.float16, *more[arch]):
        tiles = kernel.choose_tiles(dtype, divmod(arch, 10))
        kinds = [spelt[dtype]] * 2 + ["*fp32", "*i32", "i32", "i32"] + ["constexpr"] * 5
        signature = dict(zip(names, kinds, strict=True))
        constants = dict(zip(names[6:], (320, *tiles[:4]), strict=True))
        source = ASTSource(kernel._nearest_kernel, signature, constants)
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
        compiled = triton.compile(source, GPUTarget("cuda", arch, 32), options)
        assert compiled.asm["cubin"] and compiled.metadata.shared <= shared * 1024
        assert ("mma" in compiled.asm["ptx"]) == (arch >= 80)  # the tensor cores are used
"""
    env = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_work_in_parallel_comes_in_order():
    assert list(in_parallel(lambda x: x * x, range(50))) == [x * x for x in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(in_parallel(lambda x: 1 // x, [1, 0, 2]))
    begun = []
    results = in_parallel(begun.append, range(1000))
    next(results)
    results.close()
    assert 1 <= len(begun) < 100  # few are held in memory


def test_reading_ahead():
    """What is read is the same, at most one item ahead, and errors reach whoever asks for the result."""
    read_so_far, used = [], []

    def read(item):
        read_so_far.append(item)
        return 1 // (item - 4)

    with pytest.raises(ZeroDivisionError):
        for item, coming in read_ahead(read, [7, 6, 5, 4, 3]):
            used.append((item, coming.result()))
            assert len(read_so_far) <= len(used) + 1
    assert used == [(7, 0), (6, 0), (5, 1)] and read_so_far[:4] == [7, 6, 5, 4]


def test_writing_behind():
    """All is written in order at the end, and an error ends the block that writes."""
    written = []
    with WriteBehind() as writer:
        for item in range(5):
            writer.later(written.append, item)
        writer.flush()
        assert written == [0, 1, 2, 3, 4]
        writer.later(written.append, 5)
    assert written[-1] == 5
    with pytest.raises(OSError), WriteBehind() as writer:
        writer.later(Path("no/such/folder/file").write_text, "x")


def test_keyframes_are_one_an_interval_and_repeatable():
    plans = [KeyframeSchedule(11, 4, (9, 5), seed).draw() for seed in range(50)]
    draws = [keyframes for plan in plans for keyframes in plan.values()]
    assert all((draw // 4).tolist() == [0, 1, 2] and draw[-1] <= 10 for draw in draws)
    assert {draw[0].item() for draw in draws} == {0, 1, 2, 3}
    assert any(not torch.equal(plan[9], plan[5]) for plan in plans)
    again = KeyframeSchedule(11, 4, (9, 5), 3).draw()
    assert all(torch.equal(again[t], plans[3][t]) for t in again)
