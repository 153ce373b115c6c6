"""Textual inversion (Gal et al., arXiv 2208.01618): words of a prompt that stand for learned embeddings."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from tokenflow.diffusion.stable_diffusion import StableDiffusion
from tokenflow.errors import UserError, blame
from tokenflow.runtime.digests import digest_files


def use_embeddings(sd: StableDiffusion, files: Sequence[str]) -> StableDiffusion:
    """`sd`, in whose prompts `<name>` stands for the embeddings in a file of that name without its ending.

    Its tokenizers and text encoders learn these words. Raises UserError for a file that they cannot use.
    """
    words = {}
    encoders = [(sd.tokenizer, sd.text_encoder), (sd.tokenizer_2, sd.text_encoder_2)]
    for file in files:
        embeddings, word = read_embeddings(file), _name_word(file)
        for tokenizer, encoder in (pair for pair in encoders if pair[1]):
            width = encoder.config.hidden_size
            fitting = [vectors for vectors in embeddings if vectors.shape[1] == width]
            if len(fitting) != 1:
                widths = ", ".join(str(vectors.shape[1]) for vectors in embeddings)
                raise UserError(
                    f"embeddings: {file} is for another version: its embeddings have {widths} numbers, but a "
                    f"text encoder takes {width}"
                )
            tokens = [word, *(f"{word}_{index}" for index in range(1, len(fitting[0])))]
            tokenizer.add_tokens(tokens)
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            weight = encoder.get_input_embeddings().weight
            weight.data[tokenizer.convert_tokens_to_ids(tokens)] = fitting[0].to(weight)
            words[word] = " ".join(tokens)
    return replace(sd, words=words)


def read_embeddings(file: str) -> list[torch.Tensor]:
    """The embeddings (n, d) in a file, one for each text encoder. Raises UserError."""
    path = Path(file)
    with blame(f"embeddings: {path} is no textual inversion"):
        is_safe = path.suffix.lower() == ".safetensors"
        content = load_file(path) if is_safe else torch.load(path, "cpu", weights_only=True)
        content = content.get("string_to_param", content)  # of the web interface of AUTOMATIC1111
        embeddings = [torch.atleast_2d(tensor) for tensor in content.values()]
        if not embeddings or any(tensor.ndim != 2 for tensor in embeddings):
            raise ValueError("it holds no embeddings")
        return embeddings


def identify_embeddings(file: str) -> str:
    """What tells textual inversions apart: the word, and a digest of the file."""
    return f"{_name_word(file)} {digest_files({'': Path(file)})}"


def _name_word(file: str) -> str:
    return f"<{Path(file).stem}>"
