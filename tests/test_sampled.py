"""sampled.py: an estimate of the cross-entropy, which training alone uses."""

import itertools
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ladder.mlp import MLP
from ladder.recurrent import Recurrent
from ladder.sampled import Sampler

N, C, V = 7, 5, 31
TOKENS = np.repeat(np.arange(V), np.arange(V) ** 2)  # token i occurs i * i times, 0 never


def make():
    torch.manual_seed(1)
    head = nn.Linear(C, V)
    nn.init.normal_(head.weight)
    return head, torch.randn(N, C), torch.randint(V, (N,))


def test_a_draw_of_all_is_the_cross_entropy():
    head, x, targets = make()
    sampler = Sampler(TOKENS, V, 10 ** 6)
    assert (sampler.included == 1).all()
    targets[2] = -1
    expected = F.cross_entropy(head(x), targets, ignore_index=-1, reduction="none")
    torch.testing.assert_close(sampler.losses(head, x, targets), expected)


def test_the_true_probabilities_are_the_best_logits():
    """Over all 16 draws of 4 tokens, each with its probability, the gradient at log p is 0, and at
    other logits it is not."""
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    sampler = Sampler(np.zeros(0, int), 4, 1)
    sampler.included = torch.tensor([0.3, 0.9, 0.5, 1.0])
    for shift, is_best in ((0.0, True), (1.0, False)):
        head = nn.Linear(1, 4)
        head.bias.data = p.log() + shift * torch.tensor([1.0, 0, 0, 0])
        total = 0
        for draw in itertools.product([0.0, 1.0], repeat=4):
            inside = torch.tensor(draw)
            chance = (inside * sampler.included + (1 - inside) * (1 - sampler.included)).prod()
            uniform = torch.where(inside > 0, -1.0, 2.0)  # below and above all chances
            with mock.patch.object(torch, "rand", return_value=uniform):
                losses = sampler.losses(head, torch.zeros(4, 1), torch.arange(4))
            total += chance * (p * losses).sum()
        total.backward()
        assert (head.bias.grad.abs().max() < 1e-6) == is_best


def test_tokens_are_drawn_by_their_frequency():
    sampler = Sampler(TOKENS, V, 13)
    frequencies = (np.arange(V) ** 2 + 1.0) ** 0.75
    expected = 13 * frequencies / frequencies.sum()
    assert expected.max() > 1
    np.testing.assert_allclose(sampler.included, expected.clip(max=1), rtol=1e-5)


@pytest.mark.parametrize("make_model", [lambda: MLP(V, order=3, channels=C, width=C),
                                        lambda: Recurrent(V, "gru", 1, C)])
def test_only_training_draws(make_model):
    torch.manual_seed(1)
    model, tokens = make_model(), torch.randint(V, (2, N))
    whole = model(tokens, tokens)
    model.sampler = Sampler(TOKENS, V, 11)
    assert not torch.equal(model(tokens, tokens), whole)
    assert torch.equal(model.eval()(tokens, tokens), whole)
