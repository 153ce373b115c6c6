"""Prompts: what is cut from one that is too long, and layers of the text encoder that are skipped."""

import copy
import logging
from dataclasses import replace

import pytest
import torch

from tokenflow.diffusion.stable_diffusion import find_cut_words
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
