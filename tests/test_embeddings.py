"""Textual inversion: a word of the prompt stands for embeddings that were learned, and changes no other."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from test_cli import last_line, refusal, run

import util
from shapes.versions import build_narrow
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.embeddings import use_embeddings
from tokenflow.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def loaded(checkpoint):
    """The tiny checkpoint, whose text encoder may change."""
    return Checkpoint.find(str(checkpoint)).load(CPU, torch.float32)


def vectors_of(sd, words):
    """The embeddings of the tokens of words."""
    ids = sd.tokenizer(words, add_special_tokens=False).input_ids
    return sd.text_encoder.get_input_embeddings().weight[ids].detach().clone()


def test_a_word_stands_for_embeddings(loaded, tmp_path, caplog):
    """Those of other words, so that it must be read as they are."""
    vectors = vectors_of(loaded, "red circle")
    save_file({"emb_params": vectors}, tmp_path / "Mine.safetensors")
    a1111 = {"string_to_param": {"*": vectors[:1]}, "name": "x", "step": 1}
    torch.save(a1111, tmp_path / "one.pt")
    prompts = ("a red circle on a dog", "a (red circle:1.3), red", "")
    expected = [loaded.encode_text(prompt).tokens for prompt in prompts]
    files = [str(tmp_path / name) for name in ("Mine.safetensors", "one.pt")]
    sd = use_embeddings(loaded, files)
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert torch.equal(sd.encode_text(prompt).tokens, tokens)
    for prompt, tokens in zip(
        ("a <Mine> on a dog", "a (<Mine>:1.3), <one>"), expected[:2], strict=True
    ):
        torch.testing.assert_close(sd.encode_text(prompt).tokens, tokens)
    assert not caplog.messages
    sd.encode_text("a <mine> dog")
    assert "'<mine>' in the prompt" in caplog.text


def test_both_text_encoders_of_xl(tmp_path):
    sd = Checkpoint.find(str(build_narrow(tmp_path / "xl", "XL"))).load(CPU, torch.float32)
    vectors = {
        "clip_l": vectors_of(sd, "red circle"),
        "clip_g": vectors_of(replace(sd, text_encoder=sd.text_encoder_2), "red circle"),
    }
    expected = sd.encode_text("a red circle on a dog")
    save_file(vectors, tmp_path / "mine.safetensors")
    told = use_embeddings(sd, [str(tmp_path / "mine.safetensors")])
    found = told.encode_text("a <mine> on a dog")
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.pooled, expected.pooled)


def test_what_is_refused(sd, tmp_path):
    save_file({"emb_params": torch.zeros(2, 5)}, tmp_path / "wide.safetensors")
    save_file({"lora": torch.zeros(2, 3, 3, 3)}, tmp_path / "lora.safetensors")
    (tmp_path / "broken.pt").write_bytes(b"none")
    for name, words in {
        "wide.safetensors": "have 5 numbers, but a text encoder takes 32",
        "lora.safetensors": "holds no embeddings",
        "broken.pt": "is no textual inversion",
        "none.pt": "is no textual inversion",
    }.items():
        with pytest.raises(UserError, match=f"embeddings: .*{name} .*{words}") as refused:
            use_embeddings(replace(sd), [str(tmp_path / name)])
        assert "\n" not in str(refused.value)


def test_an_edit(loaded, checkpoint, clip, tmp_path):
    common = ["--data_path", clip, "--model", checkpoint, "--n_frames", 2]
    size = ["--H", 64, "--W", 64, "--steps", 2, "--save_steps", 2, "--no_reconstruction"]
    last_line(run("preprocess.py", *common, *size, cwd=tmp_path))
    edit = [*common, "--n_inversion_steps", 2, "--n_timesteps", 2]
    save_file({"x": vectors_of(loaded, "dog")}, tmp_path / "mine.safetensors")

    def edited(*flags):
        folder = last_line(run("run_tokenflow_pnp.py", *edit, *flags, cwd=tmp_path)).parent
        return folder.name, util.load_frames(tmp_path / folder / "frames", range(2))

    plain = edited("--prompt", "a dog")
    name, frames = edited("--prompt", "a <mine>", "--embeddings", "mine.safetensors")
    assert name == "pnp_clip_2" and abs(frames.astype(int) - plain[1]).max() <= 1
    save_file({"x": vectors_of(loaded, "cat")}, tmp_path / "mine.safetensors")
    assert edited("--prompt", "a <mine>", "--embeddings", "mine.safetensors")[0] == "pnp_clip_3"
    refusal(
        run("run_tokenflow_pnp.py", *edit, "--prompt", "a", "--embeddings", clip, cwd=tmp_path),
        "is no textual inversion",
    )
