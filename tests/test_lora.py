"""LoRA: it equals merged weights, changes the edit alone, and is refused if it does not fit."""

import copy
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from test_cli import last_line, refusal, run
from test_tokenflow import edit_of, predicted, record, source_of, video_of

import util
from tokenflow.diffusion.lora import use_loras
from tokenflow.errors import UserError

RANK, ALPHA = 4, 2.0
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "resnets.1.conv2", "proj_in")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # as kohya's scripts train


@pytest.fixture(scope="module")
def factors(sd):
    """Random factors (up, down) of a LoRA, by network and layer."""
    generator = torch.Generator().manual_seed(0)

    def pair(weight):
        shape = RANK, *weight.shape[1:]
        up, down = (RANK, len(weight)), shape
        down, up = (0.8 * torch.randn(s, generator=generator) / s[1] ** 0.5 for s in (down, up))
        return up.T.reshape(len(weight), RANK, *[1] * (weight.dim() - 2)), down

    wanted = (("unet", sd.unet, LAYERS), ("text_encoder", sd.text_encoder, TEXT_LAYERS))
    return {
        part: {
            name: pair(module.weight)
            for name, module in network.named_modules()
            if name.endswith(layers)
        }
        for part, network, layers in wanted
    }


def kohya(factors):
    """The tensors of a LoRA file as kohya's scripts write it."""
    tensors, prefixes = {}, {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
    for part, layers in factors.items():
        for name, (up, down) in layers.items():
            key = prefixes[part] + name.replace(".", "_")
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    return tensors


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
    return write(path, request.param(factors))


def write(path, tensors):
    """Write the file of a LoRA; returns its path."""
    safetensors.torch.save_file({key: t.contiguous() for key, t in tensors.items()}, path)
    return path


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
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def results(sd):
        text = sd.encode_text("a red circle")
        return text.tokens, sd.predict_noise(latents, 500, text.expand(2))

    plain, expected, path = results(sd), results(merged), str(lora)
    once = use_loras(copied(sd), [path], [scale])
    twice = use_loras(copied(sd), [path, path], [0.4, 0.3])
    nothing = use_loras(copied(sd), [path], [0.0])
    for ours, theirs in ((once, expected), (twice, expected), (nothing, plain)):
        torch.testing.assert_close(results(ours), theirs, atol=1e-4, rtol=1e-4)
    with once.original():
        torch.testing.assert_close(results(once), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results(once), expected, atol=1e-4, rtol=1e-4)
    assert all((a - b).abs().mean() > 0.01 for a, b in zip(plain, expected, strict=True))
    # Others take its place, and without any the networks are what they were.
    other = use_loras(once, [path], [0.0])
    torch.testing.assert_close(results(other), plain, atol=1e-5, rtol=1e-5)
    bare, untouched = use_loras(other, [], []), copied(sd)
    assert not bare.adapted
    for part in ("unet", "text_encoder"):
        ours, theirs = (getattr(of, part) for of in (bare, untouched))
        assert str(ours) == str(theirs)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), atol=0, rtol=0)


@torch.no_grad()
def test_the_source_is_without_it(sd, factors, tmp_path):
    """Source features kept without LoRA give an edit with LoRA what it computes without them."""
    lora = write(tmp_path / "lora.safetensors", kohya(factors))
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


def wrong_loras(factors):
    """Tensors of files that are no LoRA for the tiny checkpoint, and what must be said of each."""
    right = kohya(factors)
    key = next(iter(right))
    other = {name.replace("down_blocks_0", "down_blocks_7"): right[name] for name in right}
    wide = right | {k: torch.cat([t] * 2, 1) for k, t in right.items() if "lora_down" in k}
    stray = right | {"unet.proj.lora_A.weight": torch.ones(2, 2)}
    return {
        "other": (other, "belong to none of its layers"),
        "wide": (wide, "does not fit the model"),
        "stray": (stray, "does not fit the model"),
        "none": ({"weight": torch.ones(3)}, "does not fit the model"),
        "part": ({key: right[key]}, ""),
    }


@pytest.mark.parametrize("kind", ["other", "wide", "stray", "none", "part"])
def test_a_wrong_one_is_refused(sd, factors, tmp_path, kind):
    tensors, words = wrong_loras(factors)[kind]
    path = write(tmp_path / f"{kind}.safetensors", tensors)
    with pytest.raises(UserError, match=f"lora: .*{kind}.safetensors .*{words}") as refused:
        use_loras(copied(sd), [str(path)], [1.0])
    assert "\n" not in str(refused.value)


def test_edits_of_one_inversion(tmp_path, checkpoint, clip, factors):
    """An edit with a LoRA uses the source features that were kept without; mistakes leave nothing behind."""
    common = ["--data_path", clip, "--model", checkpoint, "--n_frames", 3]
    size = ["--H", 64, "--W", 64, "--steps", 2, "--save_steps", 2, "--no_reconstruction"]
    last_line(run("preprocess.py", *common, *size, cwd=tmp_path))
    edit = [*common, "--prompt", "a dog", "--n_inversion_steps", 2, "--n_timesteps", 2]
    path = write(tmp_path / "of mine.safetensors", kohya(factors))

    def edited(*flags):
        result = run("run_tokenflow_pnp.py", *edit, *flags, cwd=tmp_path)
        assert "denoised along" not in result.stderr
        folder = tmp_path / last_line(result).parent
        return folder.name, util.load_frames(folder / "frames", range(3))

    plain = edited()
    name, frames = edited("--lora", path)
    assert name == "pnp_clip_2" and (frames != plain[1]).any()
    assert edited("--lora", path)[0] == name
    name, frames = edited("--lora", path, path, "--lora_scale", 0.5, -0.5)
    assert name == "pnp_clip_3" and abs(frames.astype(int) - plain[1]).max() <= 1

    before = sorted(tmp_path.rglob("*"))
    for flags, words in (
        (["--lora", "none.safetensors"], ["none.safetensors is neither"]),
        (["--lora", clip], [clip, "is no LoRA"]),
        (["--lora", path, "--lora_scale", 1, 1], ["lora_scale: 2 numbers for 1 of lora"]),
        (["--lora", path, "--lora_scale", "much"], ["lora_scale", "a number"]),
    ):
        refusal(run("run_tokenflow_pnp.py", *edit, *flags, cwd=tmp_path), *words)
    assert sorted(tmp_path.rglob("*")) == before
    write(path, diffusers(factors))  # another file of the same name is another edit
    assert edited("--lora", path)[0] == "pnp_clip_4"
