"""Where the prompts of source and edit differ, and how relevant guidance is there."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from reference import find_relevance_by_hand

from tokenflow.editing.relevance import PromptDifference, Relevance

FRAMES = torch.arange(3)


def test_differences_are_where_prompts_differ():
    """Two prompts whose noise differs in one corner, twice as much in the second frame.

    The source's own is predicted by the original network, without LoRAs.
    """
    networks = ["adapted"]

    @contextmanager
    def original():
        networks.append("original")
        yield
        networks.pop()

    def predict(network, extra, latents):
        assert networks[-1] == network
        return latents + extra

    extra = torch.zeros(3, 4, 8, 8)
    extra[..., :2, :2] = torch.tensor([1.0, 2.0, 1.0])[:, None, None, None]
    source = SimpleNamespace(latents=lambda t, frames: torch.zeros(3, 4, 8, 8)[frames])
    difference = PromptDifference(
        SimpleNamespace(original=original),
        source,
        timesteps=(5, 3),
        unedited=lambda latents, t, frames: predict("original", 0, latents),
        edited=lambda latents, t, frames: predict("adapted", extra, latents),
    )
    found = difference.measure(FRAMES)[:, 0]
    assert torch.equal(found[:, :2, :2], extra[:, 0, :2, :2])
    assert found[:, 2:].max() == 0 == found[:, :, 2:].max()
    extra[1, 0, 5, 5] = math.inf  # as float16 overflows
    with pytest.raises(FloatingPointError, match="prompts are compared at timestep 5"):
        difference.measure(FRAMES)


def test_relevance_equals_the_reference():
    """Of weak differences and strong ones, with noise: float32, but in 256 levels where groups are found."""
    differences = torch.rand(3, 1, 12, 16, generator=torch.Generator().manual_seed(0)) / 50
    differences[..., 3:9, 5:11] += 0.1
    expected = find_relevance_by_hand(differences[:, 0])
    found = Relevance(differences, strength=1.0).at(FRAMES)
    torch.testing.assert_close(found[:, 0], expected, atol=0.01, rtol=0)
    weaker = Relevance(differences, strength=0.4).at(FRAMES[1:])
    torch.testing.assert_close(weaker, 1 - 0.4 * (1 - found[1:]))


def test_guidance_where_prompts_differ():
    """Prompts agree in the left half of a frame: there guidance is not relevant, in the right half it is."""
    differences = torch.zeros(3, 1, 12, 12)
    differences[:2, ..., 6:] = 0.5  # in the third frame nothing is to change
    relevance = Relevance(differences, strength=1.0).at(FRAMES)
    assert (relevance[..., :4] == 0).all() and (relevance[:2, ..., 8:] == 1).all()
    assert (relevance[2] == 0).all()
    assert 0 < relevance[0, 0, 5, 4] < relevance[0, 0, 5, 5] < 1
    # Now the prompts differ everywhere, in half of each frame a little less.
    differences[:], differences[..., :6] = 0.5, 0.4
    everywhere = Relevance(differences, strength=1.0).at(FRAMES)
    assert (everywhere[..., :4] - 0.86).abs().max() < 0.05
    same = Relevance(torch.full_like(differences, 7), strength=1.0).at(FRAMES)
    assert (same == 1).all()
