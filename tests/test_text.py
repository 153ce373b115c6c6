"""Prompts: what is cut from one that is too long, and layers of the text encoder that are skipped."""

import copy
import logging
from dataclasses import replace

import pytest
import torch

from tokenflow.diffusion.prompts import find_cut_words, split_weights
from tokenflow.errors import UserError


def test_a_long_prompt_is_cut_and_says_where(sd, caplog):
    """What remains is encoded as if nothing followed it, and what is lost is named as it was written."""
    length = sd.tokenizer.model_max_length
    kept = " ".join(["red"] * (length - 2))  # one token a word, and two that begin and end a text
    assert find_cut_words(sd.tokenizer, kept) == find_cut_words(sd.tokenizer, "") == ""
    assert find_cut_words(sd.tokenizer, f"{kept} Blue circle, 'É'") == "Blue circle, 'É'"
    with caplog.at_level(logging.WARNING, "tokenflow"):
        whole = sd.encode_text(kept)
        assert not caplog.records
        assert torch.equal(sd.encode_text(f"{kept} Blue circle").tokens, whole.tokens)
    assert f"{length} tokens" in caplog.text and "'Blue circle'" in caplog.text


def test_clip_skip_is_a_text_encoder_of_fewer_layers(sd):
    shorter = copy.deepcopy(sd.text_encoder)
    del shorter.encoder.layers[-1]
    expected = replace(sd, text_encoder=shorter).encode_text("a red circle").tokens
    skipped = replace(sd, clip_skip=1).encode_text("a red circle").tokens
    torch.testing.assert_close(skipped, expected)
    assert not torch.allclose(skipped, sd.encode_text("a red circle").tokens, atol=0.1)
    with pytest.raises(UserError, match="clip_skip: 2, .* 2 layers in all; use at most 1"):
        replace(sd, clip_skip=2)


def test_weights_move_tokens_from_those_of_no_prompt(sd):
    """As ComfyUI weighs them; a prompt without weights is encoded as ever, and so is a weight of 1."""
    prompt, weights = split_weights("a (Big blue:1.3) dog, (old:.5)")
    assert prompt == "a Big blue dog, old" and weights == [(2, 10, 1.3), (16, 19, 0.5)]
    for plain in ("a (blue) dog", "at (10:30)", "(a:1.2", "(:1)", "1:2"):
        assert split_weights(plain) == (plain, [])
    plain, empty = (sd.encode_text(prompt).tokens for prompt in ("a red circle", ""))
    ids = sd.tokenizer("a red circle").input_ids
    start = len(sd.tokenizer("a").input_ids) - 1
    end = len(sd.tokenizer("a red").input_ids) - 1
    assert start < end < len(ids)
    for weight in (1.3, 0.5, 0, 1):
        weighted = sd.encode_text(f"a (red:{weight}) circle").tokens
        expected = plain.clone()
        expected[:, start:end] = empty[:, start:end] + weight * (plain - empty)[:, start:end]
        torch.testing.assert_close(weighted, expected)
        assert torch.equal(weighted, plain) == (weight == 1)


@pytest.mark.parametrize(
    "prompt, other",
    [
        ("a ((blue)) dog", "(blue)"),
        ("a [blue] dog", "[blue]"),
        ("a dog <lora:mine:0.8>", "<lora:mine:0.8>"),
        ("embedding:easynegative, a dog", "embedding:easynegative,"),
        ("a blue++ dog", "blue++"),
        ("a (blue:1.3) dog -- in 3+ well-known colours, 2 < 3", ""),
    ],
)
def test_what_others_do_not_read_as_words(sd, caplog, prompt, other):
    with caplog.at_level(logging.WARNING, "tokenflow"):
        sd.encode_text(prompt)
    assert [f"{other!r} in the prompt" in message for message in caplog.messages] == (
        [True] if other else []
    )
