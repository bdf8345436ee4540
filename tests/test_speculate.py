"""inference/speculate.py: the text is that of plain sampling, in fewer passes."""

import pytest
import torch
from test_generate import BLOCK, CPU, V, random_model

from inference.generate import generate
from inference.sampling import Sampling
from inference.speculate import Draft, Lookup, generate_with_proposals

PROMPT = [3, 1, 4, 3, 1]


def plain(model, sampling, seeds, count, end=None):
    """The text of each seed, drawn together."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    steps = generate(model, [PROMPT] * len(seeds), generators, count, sampling, end, CPU)
    return [[i for i in row if i is not None] for row in zip(*steps, strict=True)]


def faster(model, source, sampling, seed, count, end=None, passes=None):
    generator = torch.Generator().manual_seed(seed)
    return [i for i, in generate_with_proposals(model, source, PROMPT, generator, count, sampling,
                                                end, CPU, passes)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_text_is_that_of_plain_sampling(temperature):
    """200 seeds, past the block size, which is 7; with and without the other settings."""
    model, drafter, passes = random_model(layers=1), random_model(seed=2, layers=1), []
    sampling = Sampling(temperature, 0, 1.0, V)
    for seed, expected in enumerate(plain(model, sampling, range(160), 5)):
        assert faster(model, Lookup(), sampling, seed, 5, passes=passes) == expected
    assert max(passes) > 1 and min(passes) == 1
    sampling = Sampling(temperature, 5, 0.9, V, 0.01, 1.2)
    for seed, expected in enumerate(plain(model, sampling, range(40), 5, end=9)):
        source = [Lookup(), Draft(drafter, sampling, CPU)][seed % 2]
        assert faster(model, source, sampling, seed, 5, end=9) == expected


def test_greedy_text_too():
    sampling = Sampling(0.0, 0, 1.0, V)
    for seed in range(1, 6):
        model, passes = random_model(seed=seed), []
        expected, = plain(model, sampling, [1], 31)
        assert faster(model, Lookup(), sampling, 1, 31, passes=passes) == expected
        assert sum(passes) == 31


def test_a_model_that_is_its_own_draft_is_always_right():
    for temperature in (0.0, 1.0):
        sampling, passes = Sampling(temperature, 0, 1.0, V), []
        model = random_model()
        text = faster(model, Draft(model, sampling, CPU), sampling, 1, 23, passes=passes)
        assert [text] == plain(model, sampling, [1], 23)
        assert sum(passes) == 23 and len(passes) < 12
        assert passes[0] == BLOCK - len(PROMPT) + 1  # no further than the window has room


def test_lookup_proposes_what_followed_last():
    lookup = Lookup()
    assert lookup.propose([1, 2, 3], [0.0]) == []
    assert lookup.propose([1, 2, 3, 1, 2], [0.0] * 2) == [3, 1]
    assert lookup.propose([1, 2, 3, 1, 2, 7, 1, 2], [0.0] * 3) == [7, 1, 2]
    assert lookup.propose([1, 2, 3, 1, 2, 7, 1, 2, 9, 9, 9], [0.0] * 5) == [9] * 5  # a copy's copy
    longer = [1, 2, 3, 4, 5, 6, 3, 4, 7, 1, 2, 3, 4]
    assert Lookup().propose(longer, [0.0]) == [5]  # after 1 2 3 4, not after the later 3 4
