"""sampled.py: an estimate of the cross-entropy, which training alone uses."""

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


def test_with_many_draws_it_is_the_cross_entropy():
    head, x, targets = make()
    expected = F.cross_entropy(head(x), targets, reduction="none")
    found = Sampler(TOKENS, V, 300_000).losses(head, x, targets)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)
    few = torch.stack([Sampler(TOKENS, V, 20).losses(head, x, targets) for _ in range(9)])
    assert few.std(0).mean() > 0.05


def test_tokens_are_drawn_as_often_as_the_correction_says():
    sampler = Sampler(TOKENS, V, 100_000)
    head = nn.Linear(C, V)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    # without logits, what is drawn adds up to what it stands for: V tokens of weight 1
    losses = sampler.losses(head, torch.zeros(1, C), torch.tensor([3]))
    assert losses.exp().item() == pytest.approx(V, rel=0.05)
    frequencies = (np.arange(V) ** 2 + 1.0) ** 0.75
    expected = 100_000 * frequencies / frequencies.sum()
    np.testing.assert_allclose(sampler.log_expected.exp(), expected, rtol=1e-5)


def test_a_drawn_target_is_not_wrong_and_an_ignored_one_has_no_loss():
    head, x, targets = make()
    sampler = Sampler(np.array([4, 4]), V, 5)
    sampler.cumulative = torch.ones(V, dtype=torch.float64)  # draws are all of token 0
    targets[:] = 0
    targets[2] = -1
    losses = sampler.losses(head, x, targets)
    assert torch.equal(losses, torch.zeros(N))


@pytest.mark.parametrize("make_model", [lambda: MLP(V, order=3, channels=C, width=C),
                                        lambda: Recurrent(V, "gru", 1, C)])
def test_only_training_draws(make_model):
    torch.manual_seed(1)
    model, tokens = make_model(), torch.randint(V, (2, N))
    whole = model(tokens, tokens)
    model.sampler = Sampler(TOKENS, V, 11)
    assert not torch.equal(model(tokens, tokens), whole)
    assert torch.equal(model.eval()(tokens, tokens), whole)
