"""Another VAE than the checkpoint's: it is read from a folder or a file, and belongs to the inversion."""

import shutil

import pytest
import torch
from ldm import single_file
from safetensors.torch import load_file, save_file
from test_cli import last_line, refusal, run

from tokenflow.diffusion.checkpoint import Checkpoint

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
PREFIX = "first_stage_model."


@pytest.fixture(scope="module")
def vae(checkpoint, tmp_path_factory):
    """A folder of the tiny checkpoint's VAE with other weights, in diffusers layout."""
    folder = shutil.copytree(checkpoint / "vae", tmp_path_factory.mktemp("vaes") / "mine")
    weights = load_file(folder / WEIGHTS)
    save_file({name: 0.9 * weight for name, weight in weights.items()}, folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def files(checkpoint, vae):
    """Files of the same VAE: under its original names, as a whole checkpoint has it, and as diffusers."""
    whole = shutil.copytree(checkpoint, vae.parent / "whole")
    shutil.copytree(vae, whole / "vae", dirs_exist_ok=True)
    weights = single_file(whole)
    alone = {k.removeprefix(PREFIX): v for k, v in weights.items() if k.startswith(PREFIX)}
    files = [vae.parent / f"{name}.safetensors" for name in ("alone", "whole")]
    for file, content in zip(files, (alone, weights), strict=True):
        save_file(content, file)
    return [*files, vae / WEIGHTS]


def test_folder_and_files_hold_the_same_networks(checkpoint, vae, files):
    expected, own = load_file(vae / WEIGHTS), Checkpoint.find(str(checkpoint))
    identities = {own.identity}
    for path in (vae, *files):
        found = Checkpoint.find(str(checkpoint), vae=str(path))
        weights = found.load(CPU, torch.float32).vae.state_dict()
        torch.testing.assert_close(weights, expected, rtol=0, atol=0)
        identities.add(found.identity)
    assert len(identities) == 5
    assert all(identity.startswith(own.identity) for identity in identities)


def test_an_edit_takes_the_vae_of_its_inversion(checkpoint, vae, clip, tmp_path):
    shared = ["--data_path", clip, "--model", checkpoint, "--n_frames", 2]
    inverting = ["--H", 64, "--W", 64, "--steps", 2, "--save_steps", 2, "--no_reconstruction"]
    editing = ["--prompt", "a dog", "--n_inversion_steps", 2, "--n_timesteps", 2]
    inverted = last_line(run("preprocess.py", *shared, *inverting, "--vae", vae, cwd=tmp_path))
    result = run("run_tokenflow_pnp.py", *shared, *editing, cwd=tmp_path)
    refusal(
        result, f"vae: none, but the latents in {inverted} are of {vae}; use that, or recompute"
    )
    shutil.copytree(vae, tmp_path / "elsewhere")
    edited = run("run_tokenflow_pnp.py", *shared, *editing, "--vae", "elsewhere", cwd=tmp_path)
    assert last_line(edited).name == "edited.mp4"
    result = run("preprocess.py", *shared, *inverting, cwd=tmp_path)
    refusal(result, "an inversion with another model or VAE; --overwrite replaces it")
