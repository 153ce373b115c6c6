"""Checkpoints: what tells them apart, which are refused, and what is no fault of theirs."""

import builtins
import errno
import json
import shutil
from pathlib import Path

import av
import huggingface_hub
import pytest
import torch
from ldm import single_file, write_single_file
from test_depth import build_depth_model

from tokenflow.control.depth import load_depth_model
from tokenflow.diffusion import checkpoint as checkpoints
from tokenflow.diffusion import lora
from tokenflow.diffusion import single_file as single_files
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.parts import Repository
from tokenflow.errors import UserError
from tokenflow.runtime import digests
from tokenflow.video.read import decode_frames

CPU = torch.device("cpu")


def copy(checkpoint: Path, folder: Path) -> Path:
    """A copy of a checkpoint with an index of its parts."""
    shutil.copytree(checkpoint, folder)
    (folder / "model_index.json").write_text("{}")
    return folder


def test_identity_is_of_all_files_that_are_read(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path / "mine")
    found = {Checkpoint.find(str(folder)).identity}
    names = "model_index.json", "vae/config.json", "scheduler/scheduler_config.json"
    names += "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
    names += "text_encoder/model.safetensors", "tokenizer/tokenizer.json"
    for count, name in enumerate(names, start=2):
        content = bytearray((folder / name).read_bytes())
        if name.endswith(".json"):
            content += b" "
        else:
            content[-1] ^= 1
        (folder / name).write_bytes(content)
        found.add(Checkpoint.find(str(folder)).identity)
        assert len(found) == count, name


def test_identity_is_not_where_a_checkpoint_lies(checkpoint, tmp_path, monkeypatch):
    folder = copy(checkpoint, tmp_path / "mine")
    write_single_file(folder, tmp_path / "mine.ckpt")
    shutil.copytree(folder, tmp_path / "far" / "other")
    shutil.copy(tmp_path / "mine.ckpt", tmp_path / "far" / "other.ckpt")
    monkeypatch.chdir(tmp_path)
    for suffix in ("", ".ckpt"):
        paths = [f"mine{suffix}", f"./mine{suffix}", tmp_path / f"mine{suffix}"]
        paths += [f"far/../mine{suffix}", f"far/other{suffix}"]
        assert len({Checkpoint.find(str(path)).identity for path in paths}) == 1
    # A file takes its configuration from beside it.
    before = Checkpoint.find("mine.ckpt").identity
    assert Checkpoint.find("mine").identity != before
    (folder / "scheduler" / "scheduler_config.json").open("a").write(" ")
    assert Checkpoint.find("mine.ckpt").identity != before


def test_identity_of_what_is_large_and_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "BLOCKS", 4)
    monkeypatch.setattr(digests, "BLOCK_BYTES", 8)
    large, found = tmp_path / "large.safetensors", set()
    for place in (None, 0, 33, 99):  # the first byte, one in the middle, the last
        content = bytearray(100)
        if place is not None:
            content[place] = 1
        large.write_bytes(content)
        found.add(Repository(str(tmp_path)).identify())
    assert len(found) == 4
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--someone--model"
    for revision in ("a" * 40, "b" * 40):
        (cached / "snapshots" / revision).mkdir(parents=True)
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / "main").write_text(revision)
        assert Repository("someone/model").identify() == revision


def test_identity_of_the_lora_that_is_loaded(tmp_path):
    folder = tmp_path / "loras"
    folder.mkdir()
    for name in ("checkpoint-9", "a", "pytorch_lora_weights", "z"):
        (folder / f"{name}.safetensors").write_text(name)
    assert lora.find_lora(str(folder)).stem == "pytorch_lora_weights"
    before = lora.identify_lora(str(folder))
    (folder / "a.safetensors").write_text("b")
    assert lora.identify_lora(str(folder)) == before
    (folder / "pytorch_lora_weights.safetensors").write_text("other")
    assert lora.identify_lora(str(folder)) != before
    (folder / "pytorch_lora_weights.safetensors").unlink()
    assert lora.find_lora(str(folder)).stem == "a"


def test_a_vae_without_scaling_factor_has_that_of_version_1(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path / "mine")
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text())
    del config["scaling_factor"]
    file.write_text(json.dumps(config))
    sd = Checkpoint.find(str(folder)).load(CPU, torch.float32)
    assert sd.vae.config.scaling_factor == 0.18215


def test_a_small_vocabulary_is_sound(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path / "mine")
    file = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    special = [token["content"] for token in content["added_tokens"]]
    kept = [token for token in vocabulary if token not in special][:152]
    content["model"]["vocab"] = {token: vocabulary[token] for token in [*kept, *special]}
    content["model"]["merges"] = []
    file.write_text(json.dumps(content))
    sd = Checkpoint.find(str(folder)).load(CPU, torch.float32)
    assert len(sd.tokenizer.get_vocab()) == 154
    assert sd.encode_text("a dog").tokens.isfinite().all()


@pytest.mark.parametrize("name", ["mine.pt", "mine.pth", "MINE.CKPT", "mine.SafeTensors"])
def test_names_of_single_files(checkpoint, tmp_path, name):
    folder = copy(checkpoint, tmp_path / name.partition(".")[0])
    weights = single_file(checkpoint)
    if name.endswith("s"):
        write_single_file(checkpoint, tmp_path / "a.safetensors")
        (tmp_path / "a.safetensors").rename(tmp_path / name)
    else:
        torch.save({"state_dict": weights}, tmp_path / name)
    found = Checkpoint.find(str(tmp_path / name))
    assert found.weights.configuration == Repository(str(folder)) != found.weights


def test_parts_that_a_single_file_lacks_are_taken_from_beside_it(checkpoint, tmp_path):
    copy(checkpoint, tmp_path / "mine")
    weights = {k: v for k, v in single_file(checkpoint).items() if "first_stage" not in k}
    torch.save(weights, tmp_path / "mine.ckpt")
    sd = Checkpoint.find(str(tmp_path / "mine.ckpt")).load(CPU, torch.float32)
    expected = Checkpoint.find(str(checkpoint)).load(CPU, torch.float32).vae.state_dict()
    assert all(torch.equal(sd.vae.state_dict()[key], value) for key, value in expected.items())


def test_what_runs_out_is_blamed_on_no_file(checkpoint, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    copy(checkpoint, tmp_path / "mine")
    file = tmp_path / "mine.safetensors"
    write_single_file(checkpoint, file)
    unet = checkpoints.UNet2DConditionModel
    for owner, name, path in (
        (unet, "load_config", checkpoint),
        (unet, "from_pretrained", checkpoint),
        (checkpoints.DDIMScheduler, "from_config", checkpoint),
        (single_files, "load_file", file),
        (unet, "from_single_file", file),
    ):
        with monkeypatch.context() as patched, pytest.raises(OSError, match="Too many open files"):
            patched.setattr(owner, name, fail)
            Checkpoint.find(str(path)).load(CPU, torch.float32)
    monkeypatch.setattr(lora.Loader, "lora_state_dict", fail)
    with pytest.raises(OSError, match="Too many open files"):
        lora.check_loras([str(file)], {})


def test_what_runs_out_is_no_fault_of_a_video(clip, monkeypatch):
    def fail(*args, **kwargs):
        raise av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(av, "open", fail)
    with pytest.raises(MemoryError):
        next(decode_frames(clip))


def test_a_model_with_code_of_its_own_is_not_asked_about(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "mine"
    build_depth_model(folder, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mine"}
    code = {"AutoConfig": "code.Config", "AutoModelForDepthEstimation": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": code}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr(builtins, "input", lambda *args: "y")
    with pytest.raises(UserError, match="depth_model: .*mine needs code of its own, .* never run"):
        load_depth_model(str(folder), CPU)
    assert not (tmp_path / "ran").exists() and capsys.readouterr().out == ""
