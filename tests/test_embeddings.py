"""Textual inversion: a word of the prompt stands for embeddings that were learned, and changes no other."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from test_cli import last_line, run

import util
from shapes.versions import build_narrow
from tokenflow.diffusion.checkpoint import Checkpoint
from tokenflow.diffusion.embeddings import use_embeddings

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
    told = ("a <Mine> on a dog", "a (<Mine>:1.3), <one>")
    for prompt, tokens in zip(told, expected[:2], strict=True):
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


def test_an_edit(loaded, small, tmp_path):
    folder, flags = small
    path = tmp_path / "mine.safetensors"
    save_file({"x": vectors_of(loaded, "dog")}, path)

    def edited(*more):
        given = [*flags, *more, "--output_path", tmp_path]
        edit = last_line(run("run_tokenflow_pnp.py", *given, cwd=folder)).parent
        return edit.name, util.load_frames(edit / "frames", range(4))

    plain = edited("--prompt", "a dog")
    name, frames = edited("--prompt", "a <mine>", "--embeddings", path)
    assert name == "pnp_clip_2" and abs(frames.astype(int) - plain[1]).max() <= 1
    save_file({"x": vectors_of(loaded, "cat")}, path)
    assert edited("--prompt", "a <mine>", "--embeddings", path)[0] == "pnp_clip_3"
