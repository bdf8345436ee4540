"""mlp.py: the equation of the paper, causality, the context."""

import math

import numpy as np
import pytest
import torch

from ladder import mlp
from ladder.mlp import MLP

B, T, C, M, V, ORDER = 2, 7, 3, 5, 11, 4


def make(**sizes):
    torch.manual_seed(1)
    return MLP(V, **{**dict(order=ORDER, channels=C, width=M), **sizes}).eval()


def draw_tokens(*shape, seed=2):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def test_a_prediction_is_equation_1_of_the_paper():
    model, context = make(), [4, 9, 2]
    vectors = model.embedding.weight.detach().double().numpy()
    x = np.concatenate([vectors[i] for i in context])
    H, d, U, b = (p.detach().double().numpy() for p in (
        model.hidden.weight, model.hidden.bias, model.head.weight, model.head.bias))
    y = b + U @ np.tanh(d + H @ x)
    expected = y - np.log(np.exp(y).sum())
    found, _ = model.step(2, (0, 4, 9))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert math.fsum(np.exp(found)) == pytest.approx(1, abs=1e-12)


def test_a_context_is_the_last_tokens_in_their_order():
    contexts = make().contexts(torch.tensor([[3, 5, 7, 9]]))
    assert contexts.tolist() == [[[V, V, 3], [V, 3, 5], [3, 5, 7], [5, 7, 9]]]


def test_a_token_changes_the_next_losses_and_no_others():
    model, tokens, targets = make(), draw_tokens(B, T), draw_tokens(B, T, seed=3)
    changed = tokens.clone()
    changed[:, 2] = (tokens[:, 2] + 1) % V
    same = model(tokens, targets) == model(changed, targets)  # (B, T)
    assert same.tolist() == [[True, True, False, False, False, True, True]] * B


def test_losses_and_steps_agree_with_a_pass_over_all(monkeypatch):
    monkeypatch.setattr(mlp, "CHUNK", 5)
    model, tokens = make(), draw_tokens(23)
    expected = model(tokens[None, :-1], tokens[None, 1:])[0].double().detach().numpy()
    found = model.losses(tokens.numpy())
    assert found.dtype == np.float64 and found.shape == (22,)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    state = model.start()
    for place, token in enumerate(tokens[:-1].tolist()):
        log_probabilities, state = model.step(token, state)
        assert -log_probabilities[tokens[place + 1]] == pytest.approx(expected[place], rel=1e-5)


def test_the_size_and_the_first_loss():
    model = make()
    assert model.size() == ((V + 1) * C + M * 3 * C + M + V * M + V, "parameters")
    loss = model(draw_tokens(B, T), draw_tokens(B, T, seed=3)).mean().item()
    assert loss == pytest.approx(math.log(V), abs=0.4)


def test_dropout_is_off_when_losses_are_measured():
    model, tokens = make(dropout=0.5), draw_tokens(23).numpy()
    assert np.array_equal(model.losses(tokens), model.losses(tokens))
