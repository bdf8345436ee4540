"""recurrent.py: torch's cells are the equations, causality, the state that is carried."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ladder import recurrent
from ladder.recurrent import Recurrent, gru_cell, lstm_cell, rnn_cell

B, T, C, V, LAYERS = 2, 7, 5, 11, 3
CELLS = pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])


def make(cell, **sizes):
    torch.manual_seed(1)
    model = Recurrent(V, **{**dict(cell=cell, layers=LAYERS, width=C), **sizes})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)  # so that each place depends on much
    return model.eval()


def draw_tokens(*shape, seed=2):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


@CELLS
def test_torchs_modules_compute_the_equations(cell):
    model = make(cell)
    tokens = draw_tokens(B, T)
    found, _ = model.hidden(tokens)
    x = model.head.weight[tokens]  # (B, T, C)
    for layer in range(LAYERS):
        weights = [getattr(model.cells, f"{name}_l{layer}")
                   for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        h, c, states = torch.zeros(B, C), torch.zeros(B, C), []
        for t in range(T):
            if cell == "lstm":
                h, c = lstm_cell(x[:, t], h, c, *weights)
            else:
                h = {"rnn": rnn_cell, "gru": gru_cell}[cell](x[:, t], h, *weights)
            states.append(h)
        x = torch.stack(states, 1)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-6)


@CELLS
def test_a_later_token_changes_no_earlier_loss(cell):
    model, tokens = make(cell), draw_tokens(B, T)
    changed = tokens.clone()
    changed[:, 4] = (tokens[:, 4] + 1) % V
    targets = draw_tokens(B, T, seed=3)
    before, after = model(tokens, targets), model(changed, targets)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).all()


@CELLS
def test_a_carried_state_is_one_long_pass(cell):
    model, tokens, targets = make(cell), draw_tokens(B, T), draw_tokens(B, T, seed=3)
    whole = model(tokens, targets)
    first, state = model.advance(tokens[:, :3], targets[:, :3])
    rest, _ = model.advance(tokens[:, 3:], targets[:, 3:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-5, atol=1e-6)
    forgotten = model(tokens[:, 3:], targets[:, 3:])
    assert (rest - forgotten).abs().min() > 1e-4


@CELLS
def test_gradients_end_where_a_batch_begins(cell):
    model, tokens = make(cell), draw_tokens(B, T)
    _, state = model.advance(tokens, tokens)
    parts = state if cell == "lstm" else [state]
    assert all(part.shape == (LAYERS, B, C) and not part.requires_grad for part in parts)


@CELLS
def test_losses_and_steps_agree_with_a_pass_over_all(cell, monkeypatch):
    monkeypatch.setattr(recurrent, "CHUNK", 5)
    model, tokens = make(cell), draw_tokens(23)
    expected = model(tokens[None, :-1], tokens[None, 1:])[0].double().detach().numpy()
    found = model.losses(tokens.numpy())
    assert found.dtype == np.float64 and found.shape == (22,)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    state = model.start()
    for place, token in enumerate(tokens[:-1].tolist()):
        log_probabilities, state = model.step(token, state)
        assert math.fsum(np.exp(log_probabilities)) == pytest.approx(1, abs=1e-12)
        assert -log_probabilities[tokens[place + 1]] == pytest.approx(expected[place], abs=1e-5)


def test_a_long_text_is_read_as_several_rows(monkeypatch):
    model, tokens = Recurrent(V, "lstm", 1, C).eval(), draw_tokens(207).numpy()
    torch.nn.init.normal_(model.head.weight)
    expected = model.losses(tokens)
    monkeypatch.setattr(recurrent, "ROW", 61)  # four rows
    monkeypatch.setattr(recurrent, "WARM_UP", 43)
    np.testing.assert_allclose(model.losses(tokens), expected, atol=1e-4)
    monkeypatch.setattr(recurrent, "WARM_UP", 1)
    assert abs(model.losses(tokens) - expected).max() > 1e-3


def test_dropout_leaves_the_state_alone():
    """With all that goes up from layer to layer dropped, the states still change from token to
    token; in evaluation nothing is dropped."""
    model, tokens = make("lstm", dropout=0.999), draw_tokens(B, T)
    assert torch.equal(model(tokens, tokens), model(tokens, tokens))
    h = model.train().cells.weight_hh_l0
    x, (_, c) = model.hidden(tokens)
    assert (x == 0).float().mean() > 0.9
    model.zero_grad()
    c[0].sum().backward()
    assert (h.grad != 0).all()


def test_the_size_and_the_first_loss():
    model = Recurrent(V, "lstm", 2, C)
    number, unit = model.size()
    assert (number, unit) == (V * C + V + 2 * (2 * 4 * C * C + 2 * 4 * C), "parameters")
    loss = model(draw_tokens(B, T), draw_tokens(B, T, seed=3)).mean().item()
    assert loss == pytest.approx(math.log(V), abs=0.1)
    assert torch.sigmoid(model.cells.bias_ih_l0.chunk(4)[1] + model.cells.bias_hh_l0.chunk(4)[1]
                         ).min() > 0.7


def test_ignored_targets_have_no_loss():
    model, tokens = make("rnn"), draw_tokens(B, T)
    targets = tokens.clone()
    targets[:, 3] = -1
    losses = model(tokens, targets)
    assert (losses[:, 3] == 0).all() and (losses[:, 4] > 0).all()
    logits = model.head(model.hidden(tokens)[0])
    torch.testing.assert_close(losses[:, 4], F.cross_entropy(logits[:, 4], tokens[:, 4],
                                                             reduction="none"))
