"""LoRA: it equals merged weights, changes the edit alone, and is refused if it does not fit."""

import copy
from dataclasses import replace

import pytest
import torch
from loras import ALPHA, RANK, compute_results, kohya, write_tensors
from test_cli import last_line, run
from test_tokenflow import edit_of, predicted, record, source_of, video_of

import util
from tokenflow.diffusion.lora import use_loras


def diffusers(factors):
    """The same in diffusers' format, which has no alpha here: the factors hold it."""
    prefixes = {"unet": "unet.", "text_encoder": "text_encoder.text_model."}
    tensors = {}
    for part, layers in factors.items():
        for name, (up, down) in layers.items():
            tensors[f"{prefixes[part]}{name}.lora_A.weight"] = down
            tensors[f"{prefixes[part]}{name}.lora_B.weight"] = ALPHA / RANK * up
    return tensors


@pytest.fixture(scope="module", params=[kohya, diffusers])
def lora(request, tmp_path_factory, factors):
    path = tmp_path_factory.mktemp("loras") / f"{request.param.__name__}.safetensors"
    return write_tensors(path, request.param(factors))


def copied(sd):
    """The networks that a LoRA changes, as copies."""
    return replace(sd, unet=copy.deepcopy(sd.unet), text_encoder=copy.deepcopy(sd.text_encoder))


@torch.no_grad()
def test_equals_merged_weights(sd, lora, factors):
    merged, scale = copied(sd), 0.7
    for part, layers in factors.items():
        modules = dict(getattr(merged, part).named_modules())
        for name, (up, down) in layers.items():
            change = up.flatten(1) @ down.flatten(1)
            weight = modules[name].weight
            weight += scale * ALPHA / RANK * change.view_as(weight)
    plain, expected, path = compute_results(sd), compute_results(merged), str(lora)
    once = use_loras(copied(sd), [path], [scale])
    twice = use_loras(copied(sd), [path, path], [0.4, 0.3])
    nothing = use_loras(copied(sd), [path], [0.0])
    for ours, theirs in ((once, expected), (twice, expected), (nothing, plain)):
        torch.testing.assert_close(compute_results(ours), theirs, atol=1e-4, rtol=1e-4)
    with once.original():
        torch.testing.assert_close(compute_results(once), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compute_results(once), expected, atol=1e-4, rtol=1e-4)
    assert all((a - b).abs().mean() > 0.01 for a, b in zip(plain, expected, strict=True))
    # Others take its place, and without any the networks are what they were.
    other = use_loras(once, [path], [0.0])
    torch.testing.assert_close(compute_results(other), plain, atol=1e-5, rtol=1e-5)
    bare, untouched = use_loras(other, [], []), copied(sd)
    assert not bare.adapted
    for part in ("unet", "text_encoder"):
        ours, theirs = (getattr(of, part) for of in (bare, untouched))
        assert str(ours) == str(theirs)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), atol=0, rtol=0)


@torch.no_grad()
def test_the_source_is_without_it(sd, factors, tmp_path):
    """Source features kept without LoRA give an edit with LoRA what it computes without them."""
    lora = write_tensors(tmp_path / "lora.safetensors", kohya(factors))
    source, latents = video_of(7)
    files, _ = record(sd, tmp_path / "source", source, 2, batch_size=4, chunk=7)
    adapted = use_loras(copied(sd), [str(lora)], [1.0])

    def noise(sd, features=None):
        changes = {"batch_size": 2, "keyframe_interval": 2}
        edit = edit_of(sd, source_of(source, features), latents, **changes)
        return predicted(edit, latents)

    kept = noise(adapted, files)
    denoised_along = noise(adapted)
    everywhere = noise(replace(adapted, adapted=()))
    # Injected features are kept in half precision, and tokens may tie.
    assert torch.isclose(kept, denoised_along, atol=1e-3, rtol=1e-2).float().mean() > 0.999
    error = (kept - denoised_along).square().mean()
    for other in (everywhere, noise(sd)):
        assert (other - denoised_along).square().mean() > 100 * error


def test_edits_of_one_inversion(small, factors, tmp_path):
    """An edit with a LoRA uses the source features that were kept without."""
    folder, flags = small
    path = write_tensors(tmp_path / "of mine.safetensors", kohya(factors))

    def edited(*more):
        given = [*flags, *more, "--output_path", tmp_path]
        result = run("run_tokenflow_pnp.py", *given, cwd=folder)
        assert "denoised along" not in result.stderr
        edit = last_line(result).parent
        return edit.name, util.load_frames(edit / "frames", range(4))

    plain = edited()
    name, frames = edited("--lora", path)
    assert name == "pnp_clip_2" and (frames != plain[1]).any()
    assert edited("--lora", path)[0] == name
    name, frames = edited("--lora", path, path, "--lora_scale", 0.5, -0.5)
    assert name == "pnp_clip_3" and abs(frames.astype(int) - plain[1]).max() <= 1
    write_tensors(path, diffusers(factors))  # another file of the same name is another edit
    assert edited("--lora", path)[0] == "pnp_clip_4"
