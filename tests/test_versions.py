"""Every version of Stable Diffusion: its layers by name, its configuration end to end, its single files."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from diffusers.models.attention_processor import SlicedAttnProcessor
from ldm import write_single_file
from safetensors.torch import save_file
from test_cli import last_line, run

import util
from shapes.versions import CONFIGURATIONS, build_narrow, build_on_meta
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.device import choose_device
from tokenflow.diffusion.layouts import count_tokens, features_shape
from tokenflow.diffusion.lora import use_loras
from tokenflow.errors import UserError
from tokenflow_utils import JointEdit, install_tokenflow

CPU = torch.device("cpu")
# What Plug-and-Play injects, at latents of 64 x 64: tokens and width of each self-attention, by block of the
# decoder, and the shape of the features.
INJECTED = {
    "1 or 2": ({1: [(256, 1280)] * 2, 2: [(1024, 640)] * 3, 3: [(4096, 320)] * 3}, (1280, 16, 16)),
    "XL": ({0: [(256, 1280)] * 30}, (1280, 16, 16)),
}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """Narrow random checkpoints by version, each made once."""
    made = {}

    def of(version: str) -> Path:
        if version not in made:
            made[version] = build_narrow(tmp_path_factory.mktemp("narrow") / version, version)
        return made[version]

    return of


@pytest.mark.parametrize("has_units", [True, False])
def test_the_natural_precision_of_a_processor(monkeypatch, has_units):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_units)
    natural = torch.bfloat16 if has_units else torch.float32
    assert choose_device("cpu", "auto") == (CPU, natural)
    assert choose_device("cpu", "float16") == (CPU, torch.float16)


@pytest.mark.parametrize("version", CONFIGURATIONS)
@torch.no_grad()
def test_layers_of_the_real_configurations(version):
    """On the meta device: every layer that the code names is there and has the shape that it expects."""
    unet, _ = build_on_meta(version)
    config, n = CONFIGURATIONS[version], 1
    shape = (n, unet.config.in_channels, 64, 64)
    with torch.device("meta"):
        arguments = {"encoder_hidden_states": torch.zeros(n, 77, unet.config.cross_attention_dim)}
        if config.is_xl:
            pooled = torch.zeros(n, config.texts[1]["projection_dim"])
            sizes = {"text_embeds": pooled, "time_ids": torch.zeros(n, 6)}
            arguments["added_cond_kwargs"] = sizes
        latents = torch.zeros(shape)
    assert sum(text["hidden_size"] for text in config.texts) == unet.config.cross_attention_dim

    seen, injected, features = {}, {}, []
    with install_tokenflow(unet):
        for name, processor in unet.attn_processors.items():
            if getattr(processor, "injected", False):
                injected.setdefault(int(name.split(".")[1]), []).append(name)
    layers = [name for name in unet.attn_processors if name.endswith(".attn1.processor")]
    for name in layers:
        layer = unet.get_submodule(name.removesuffix(".processor"))
        layer.to_q.register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: tuple(output.shape[1:])})
        )
    block = 0 if config.is_xl else 1
    unet.up_blocks[block].resnets[block].conv2.register_forward_hook(
        lambda module, args, output: features.append(tuple(output.shape[1:]))
    )
    unet(latents, torch.zeros((), device="meta"), **arguments)

    expected, feature_shape = INJECTED["XL" if config.is_xl else "1 or 2"]
    assert {b: [seen[name] for name in names] for b, names in injected.items()} == expected
    assert features == [feature_shape] and features_shape(unet, shape) == feature_shape
    assert {name: tokens for name, (tokens, _) in seen.items()} == count_tokens(unet, shape)
    assert len(layers) == (70 if config.is_xl else 16)


@pytest.mark.parametrize("version", [name for name in CONFIGURATIONS if name != "depth"])
def test_every_technique(narrow, clip, tmp_path, version):
    """A checkpoint of exactly the version's keys is inverted, and edited with every technique."""
    checkpoint = narrow(version)
    shared = ["--data_path", clip, "--model", checkpoint, "--n_frames", 3, "--dtype", "float32"]
    flags = ["--H", 64, "--W", 64, "--steps", 2, "--save_steps", 2, "--keyframe_interval", 2]
    last_line(run("preprocess.py", *shared, *flags, "--inversion_prompt", "a circle", cwd=tmp_path))
    controls = ["--controlnet", checkpoint / "controlnet"]
    edits = {"pnp": [], "sdedit": ["--start", 1], "controlnet": controls}
    for technique, own in edits.items():
        flags = ["--n_inversion_steps", 2, "--n_timesteps", 2, "--keyframe_interval", 2, *own]
        script = f"run_tokenflow_{technique}.py"
        result = run(script, *shared, *flags, "--prompt", "a red circle", cwd=tmp_path)
        frames = util.load_frames(tmp_path / last_line(result).parent / "frames", range(3))
        assert frames.shape == (3, 64, 64, 3) and frames.std() > 1
        if technique != "controlnet":
            assert "denoised along" not in result.stderr


def test_sides_that_versions_were_trained_on(narrow):
    sides = {
        version: Checkpoint.find(str(narrow(version))).trained_side for version in CONFIGURATIONS
    }
    assert sides == {"1.5": 512, "2.1": 512, "2.1-768": 768, "depth": 512, "XL": 1024}
    Checkpoint.find(str(narrow("XL"))).check_size(96, 96)  # halved five times, not six


@torch.no_grad()
def test_xl_is_told_what_diffusers_tells_it(narrow):
    """Both text encoders, the pooled embedding, sizes, and zeros for no prompt."""
    folder = narrow("XL")
    sd, pipeline = Checkpoint.find(str(folder)).load(CPU, torch.float32), None
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    tokens, nothing, pooled, no_pooled = pipeline.encode_prompt("a red circle")
    text, empty = sd.encode_text("a red circle"), sd.encode_text("")
    assert torch.equal(text.tokens, tokens) and torch.equal(text.pooled, pooled)
    assert torch.equal(empty.tokens, nothing) and torch.equal(empty.pooled, no_pooled)
    assert not empty.tokens.any() and not empty.pooled.any()
    skipped, *_ = pipeline.encode_prompt("a red circle", clip_skip=1)
    assert torch.equal(replace(sd, clip_skip=1).encode_text("a red circle").tokens, skipped)
    weighted = sd.encode_text("a (red:1.5) circle")  # by both text encoders
    assert torch.equal(weighted.pooled, pooled)
    differ = (weighted.tokens != tokens).view(tokens.shape[1], 2, -1).any(-1)
    assert torch.equal(differ[:, 0], differ[:, 1]) and 0 < differ[:, 0].sum() < 4
    with pytest.raises(UserError, match="clip_skip: 2, .* 3 layers in all; use at most 1"):
        replace(sd, clip_skip=2)

    latents = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[64, 96, 0, 0, 64, 96.0]])
    added = {"text_embeds": pooled, "time_ids": sizes}
    theirs = pipeline.unet(latents, 500, encoder_hidden_states=tokens, added_cond_kwargs=added)[0]
    torch.testing.assert_close(sd.predict_noise(latents, 500, text), theirs)


@torch.no_grad()
def test_xl_with_a_lora(narrow, tmp_path):
    """One in kohya's format, by the original names of the layers, is a change of three networks' weights."""
    plain, adapted, merged = (
        Checkpoint.find(str(narrow("XL"))).load(CPU, torch.float32) for _ in range(3)
    )
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, layer in {
        "unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": merged.unet.down_blocks[1]
        .attentions[0]
        .transformer_blocks[0]
        .attn2.to_k,
        "te1_text_model_encoder_layers_0_mlp_fc1": merged.text_encoder.encoder.layers[0].mlp.fc1,
        "te2_text_model_encoder_layers_0_mlp_fc1": merged.text_encoder_2.text_model.encoder.layers[
            0
        ].mlp.fc1,
    }.items():
        width, takes = layer.weight.shape
        up, down = (torch.randn(s, generator=generator) for s in ((width, 2), (2, takes)))
        tensors |= {f"lora_{name}.lora_{k}.weight": v for k, v in (("up", up), ("down", down))}
        tensors[f"lora_{name}.alpha"] = torch.tensor(1.0)
        layer.weight += 0.3 * 1 / 2 * up @ down
    save_file(tensors, tmp_path / "lora.safetensors")
    adapted = use_loras(adapted, [str(tmp_path / "lora.safetensors")], [0.3])
    assert len(adapted.adapted) == 3

    latents = torch.randn(1, 4, 8, 8, generator=generator)

    def results(sd):
        text = sd.encode_text("a red circle")
        return text.tokens, text.pooled, sd.predict_noise(latents, 500, text)

    expected = results(merged)
    torch.testing.assert_close(results(adapted), expected, atol=1e-4, rtol=1e-4)
    with adapted.original():
        torch.testing.assert_close(results(adapted), results(plain), atol=1e-5, rtol=1e-5)
    assert all((a - b).abs().mean() > 1e-3 for a, b in zip(results(plain), expected, strict=True))


def test_xl_vae_in_half_precision(narrow):
    """The VAE of XL overflows in float16; the other networks do not."""
    sd = Checkpoint.find(str(narrow("XL"))).load(CPU, torch.float16)
    assert sd.vae.dtype == torch.float32 and sd.unet.dtype == torch.float16
    assert sd.encode_frames(np.zeros((1, 64, 64, 3), np.uint8)).isfinite().all()
    assert Checkpoint.find(str(narrow("2.1"))).load(CPU, torch.float16).vae.dtype == torch.float16


def link(checkpoint: Path, folder: Path, **scheduler) -> Path:
    """A copy of a checkpoint whose scheduler has other keys; the weights are links."""
    folder.mkdir()
    for path in checkpoint.resolve().iterdir():
        if path.name == "scheduler":
            shutil.copytree(path, folder / path.name)
            file = folder / path.name / "scheduler_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | scheduler))
        else:
            (folder / path.name).symlink_to(path)
    return folder


@torch.no_grad()
def test_epsilon_and_velocity_predict_the_same_noise(sd):
    """The same network, once as it is and once made to predict the velocity of what it predicts."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text, forward = sd.encode_text("a circle").expand(2), sd.unet.forward

    def predict_velocity(sample, timestep, *args, **kwargs):
        output = forward(sample, timestep, *args, **kwargs)
        alpha = scheduler.alphas_cumprod[timestep]
        clean = (sample - (1 - alpha).sqrt() * output.sample) / alpha.sqrt()
        output.sample = scheduler.get_velocity(clean, output.sample, timestep[None])
        return output

    expected = sd.predict_noise(latents, 500, text)
    scheduler = DDIMScheduler.from_config(sd.scheduler.config, prediction_type="v_prediction")
    velocity = replace(sd, unet=copy.deepcopy(sd.unet), scheduler=scheduler)
    velocity.unet.forward = predict_velocity
    ours = velocity.predict_noise(latents, 500, text)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_zero_terminal_snr_from_end_to_end(narrow, clip, tmp_path):
    """A schedule that ends in pure noise is inverted into, and edited and reconstructed from."""
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    model = link(narrow("2.1-768"), tmp_path / "zero", **changes)
    shared = ["--data_path", clip, "--n_frames", 3, "--model"]
    inverting = ["--H", 64, "--W", 64, "--steps", 2, "--save_steps", 2]
    editing = ["--n_inversion_steps", 2, "--n_timesteps", 2, "--prompt", "a blue circle"]
    for script, flags in (("preprocess.py", inverting), ("run_tokenflow_pnp.py", editing)):
        folder = last_line(run(script, *shared, model, *flags, cwd=tmp_path)).parent
        assert util.load_frames(tmp_path / folder / "frames", range(3)).std() > 1
    inversion = tmp_path / "latents/sd_zero/clip/steps_2/nframes_3"
    assert (inversion / "latents/noisy_latents_999.npy").exists()


def write_beside(folder: Path, path: Path) -> Path:
    """Write a checkpoint as a single file, and its configuration without weights beside it."""
    write_single_file(folder, path)
    for part in folder.iterdir():
        if part.is_dir() and part.name != "controlnet":
            shutil.copytree(
                part,
                path.with_suffix("") / part.name,
                ignore=shutil.ignore_patterns("*.safetensors"),
            )
    return path


@pytest.mark.parametrize(
    "version, suffix", [("1.5", ".ckpt"), ("2.1", ".safetensors"), ("XL", ".safetensors")]
)
def test_single_file_holds_the_same_networks(narrow, tmp_path, version, suffix):
    file = write_beside(narrow(version), tmp_path / f"mine{suffix}")
    ours, theirs = (
        Checkpoint.find(str(p)).load(CPU, torch.float32) for p in (file, narrow(version))
    )
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if expected := getattr(theirs, part):
            found = getattr(ours, part).state_dict()
            assert set(found) == set(expected.state_dict())
            assert all(torch.equal(found[k], v) for k, v in expected.state_dict().items())
    assert ours.scheduler.config.prediction_type == theirs.scheduler.config.prediction_type


def test_weights_of_half_precision_alone(checkpoint, tmp_path):
    half = shutil.copytree(checkpoint, tmp_path / "half")
    networks = Checkpoint.find(str(checkpoint)).load(CPU, torch.float16)
    for part in ("unet", "vae", "text_encoder"):
        shutil.rmtree(half / part)
        getattr(networks, part).save_pretrained(half / part, variant="fp16")
    loaded = Checkpoint.find(str(half)).load(CPU, torch.float32)
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(networks, part).float().state_dict()
        torch.testing.assert_close(getattr(loaded, part).state_dict(), expected, atol=0, rtol=0)


@torch.no_grad()
def test_processors_of_others_do_not_undo_ours(sd):
    """Slicing before the installation changes nothing; what replaces ours later is noticed at once."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text, before = sd.encode_text("a circle").expand(6), dict(sd.unet.attn_processors)

    def joint() -> torch.Tensor:
        with install_tokenflow(sd.unet) as tokenflow:
            tokenflow.task = JointEdit([0, 1], inject_attention=True)
            return sd.predict_noise(latents.repeat(3, 1, 1, 1), 500, text)

    expected = joint()
    try:
        sd.unet.set_attention_slice(1)
        torch.testing.assert_close(joint(), expected, atol=1e-5, rtol=1e-4)
        after = sd.unet.attn_processors.values()
        assert all(isinstance(processor, SlicedAttnProcessor) for processor in after)
        with install_tokenflow(sd.unet) as tokenflow:
            tokenflow.task = JointEdit([0, 1])
            sd.unet.set_attention_slice(2)
            with pytest.raises(RuntimeError, match="replaced"):
                sd.predict_noise(latents.repeat(3, 1, 1, 1), 500, text)
    finally:
        sd.unet.set_attn_processor(before)
    assert torch.equal(joint(), expected)
