"""ladder/transformer.py: a GPT over a text of any length, all at once or token by token."""

import json

import numpy as np
import pytest
import torch

from ladder.transformer import Transformer, learning_curve
from model import GPT, GPTConfig

T, V = 7, 13


@pytest.fixture(name="rung")
def small_gpt():
    config = GPTConfig(block_size=T, vocab_size=V, n_layer=2, n_head=3, n_embd=15)
    return Transformer(GPT(config, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("count", [2, T, T + 1, T + 2, 29, 31])
def test_each_token_is_predicted_once_from_half_a_window_at_least(rung, count):
    tokens = np.random.default_rng(0).integers(V, size=count)
    losses = rung.losses(tokens)
    assert losses.shape == (count - 1,)
    for i in range(1, count):
        # the window of token i: the first one, or the one in whose last T // 2 targets it is
        number = max(0, -(-(i - T) // (T // 2)))
        window = torch.tensor(tokens[number * (T // 2):i])[None]
        log_p = torch.log_softmax(rung.gpt.logits(window)[0, -1].double(), -1)
        assert losses[i - 1] == pytest.approx(-log_p[tokens[i]].item(), rel=1e-5)


def test_steps_equal_reading_the_window_at_once(rung):
    tokens, state = np.random.default_rng(0).integers(V, size=3 * T), rung.start()
    for i, token in enumerate(tokens.tolist()):
        log_p, state = rung.step(token, state)
        assert abs(np.exp(log_p).sum() - 1) < 1e-12
        window = torch.tensor(state[0])[None]
        assert len(state[0]) <= T and window[0].tolist() == tokens[:i + 1][-len(state[0]):].tolist()
        expected = torch.log_softmax(rung.gpt.logits(window)[0, -1].double(), -1)
        np.testing.assert_allclose(log_p, expected.detach().numpy(), atol=1e-5)


def test_the_curve_counts_the_time_of_iterations_alone(tmp_path):
    rows = [{"iter": 0, "val_loss": 5.0}, {"iter": 0, "ms": 500}, {"iter": 10, "ms": 100},
            {"iter": 11, "val_loss": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert learning_curve(tmp_path) == [(0, 5.0), (1.5, 3.0)]
