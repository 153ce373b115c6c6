"""What is written in a prompt besides words: weights such as `(blue:1.3)`, and what is not understood."""

import re

import torch
from transformers import CLIPTokenizer

WEIGHTED = re.compile(r"\(([^()]+):(\d?\.\d+|\d)\)")
# What web interfaces read as emphasis, as a LoRA, or as the name of a textual inversion.
OTHER = re.compile(r"\([^()]*\)|\[[^][]*\]|<[^<>]+>|embedding:\S+|\S+(?:\+\+|--)(?!\S)")

Span = tuple[int, int, float]


def split_weights(prompt: str) -> tuple[str, list[Span]]:
    """The words of a prompt, and its weights: where in the words each begins and ends, and its value."""
    words, spans, end = "", [], 0
    for match in WEIGHTED.finditer(prompt):
        words += prompt[end : match.start()]
        spans.append((len(words), len(words) + len(match[1]), float(match[2])))
        words += match[1]
        end = match.end()
    return words + prompt[end:], spans


def find_other_syntax(words: str) -> str:
    """What web interfaces do not read as words, and this code does; empty if there is nothing."""
    match = OTHER.search(words)
    return match[0] if match else ""


def weights_of_tokens(tokenizer: CLIPTokenizer, words: str, spans: list[Span]) -> torch.Tensor:
    """The weight of each token (l,) of the words, cut or padded to the tokenizer's length."""
    length = tokenizer.model_max_length
    tokens = tokenizer(
        words, padding="max_length", max_length=length, truncation=True, return_offsets_mapping=True
    )
    weights = torch.ones(length)
    for place, (first, last) in enumerate(tokens.offset_mapping):
        for start, end, weight in spans:
            if first < last and start <= first < end:
                weights[place] = weight
    return weights


def find_cut_words(tokenizer: CLIPTokenizer, words: str) -> str:
    """The end of a prompt that is beyond the tokenizer's length; empty if all of it fits."""
    spans = tokenizer(words, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    kept = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    return words[spans[kept][0] :] if len(spans) > kept else ""
