"""ladder/training.py: the loop, its schedule and history; windows and contiguous chunks."""

from itertools import islice

import numpy as np
import pytest
import torch

from configurator import UserError
from ladder import training
from ladder.mlp import MLP
from ladder.recurrent import Recurrent
from ladder.training import contiguous_chunks, random_windows, train

V = 11
TEXT = np.tile(np.arange(V), 50)


def windows(seed=1):
    return random_windows(TEXT, 3, 7, torch.Generator().manual_seed(seed))


def measure(model):
    return lambda: model.losses(TEXT).mean()


def make(kind):
    torch.manual_seed(1)
    if kind == "mlp":
        return MLP(V, order=3, channels=5, width=13), windows()
    return Recurrent(V, kind, 1, 13, dropout=0.1), contiguous_chunks(TEXT, 3, 7)


@pytest.mark.parametrize("kind", ["mlp", "rnn", "gru", "lstm"])
def test_a_model_learns_and_its_history_says_so(kind):
    model, batches = make(kind)
    history = train(model, batches, measure(model), 2e-2, max_iters=120, warmup_iters=5)
    assert [row["iter"] for row in history] == list(range(0, 121, 12))
    assert "train_loss" not in history[0] and history[0]["val_loss"] == pytest.approx(2.4, abs=0.2)
    assert history[-1]["val_loss"] < 0.3 and not model.training
    assert history[-1]["val_loss"] == measure(model)()
    seconds = [row["seconds"] for row in history]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_equal_seeds_give_equal_weights(kind):
    weights = []
    for _ in range(2):
        model, batches = make(kind)
        train(model, batches, measure(model), 1e-2, max_iters=7)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_sgd_is_plain_gradient_descent():
    model, batches = make("mlp")
    before = model.head.bias.detach().clone()
    loss = model(*next(windows())).mean()
    gradient, = torch.autograd.grad(loss, [model.head.bias])
    train(model, batches, lambda: 0, 0.1, max_iters=1, sgd=True, warmup_iters=0, grad_clip=1e9)
    torch.testing.assert_close(model.head.bias.detach(), before - 0.1 * gradient)


def test_the_budget_may_be_seconds():
    model, batches = make("mlp")
    history = train(model, batches, measure(model), 1e-2, seconds=0.3)
    assert 0.3 <= history[-1]["seconds"] < 3 and history[-1]["iter"] > 10


def test_evaluating_changes_nothing(monkeypatch):
    weights = []
    for evaluations in (10, 2):
        monkeypatch.setattr(training, "EVALUATIONS", evaluations)
        model, batches = make("lstm")
        history = train(model, batches, measure(model), 1e-2, max_iters=10)
        assert len(history) == evaluations + 1
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_a_budget_is_needed_and_a_loss_that_explodes_is_named():
    model, batches = make("rnn")
    with pytest.raises(UserError, match="seconds=0 and max_iters=0: give the training one"):
        train(model, batches, measure(model), 1e-2)
    torch.nn.init.constant_(model.head.bias, torch.inf)
    with pytest.raises(UserError, match="rnn: the loss of iteration 0 is not finite; lower its"):
        train(model, batches, measure(model), 1e-2, max_iters=3, label="rnn")


# ---------------------------------------------------------------------- batches


def test_windows_are_of_the_text_and_targets_come_next():
    seen = set()
    for tokens, targets in islice(windows(), 60):
        assert tokens.shape == targets.shape == (3, 7)
        assert torch.equal((tokens + 1) % V, targets)
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        seen |= set(tokens[:, 0].tolist())
    assert seen == set(range(V))
    assert torch.equal(next(windows(2))[0], next(windows(2))[0])
    assert not torch.equal(next(windows(2))[0], next(windows(3))[0])


def test_a_window_may_be_the_whole_text():
    tokens, targets = next(random_windows(np.arange(8), 2, 7, torch.Generator()))
    assert tokens.tolist() == [list(range(7))] * 2 and targets[0].tolist() == list(range(1, 8))


def test_a_chunk_goes_on_where_the_one_before_it_ended():
    text = np.arange(3 * 14 + 3)  # 3 streams of 14, of which one token is left over
    batches = list(islice(contiguous_chunks(text, 3, 5), 4))
    for row in range(3):
        inputs = torch.cat([tokens[row] for tokens, _ in batches[:2]])
        assert inputs.tolist() == list(range(row * 14, row * 14 + 10))
        targets = torch.cat([targets[row] for _, targets in batches[:2]])
        assert torch.equal(targets, inputs + 1)
    assert torch.equal(batches[2][0], batches[0][0])  # from the beginning again


@pytest.mark.parametrize("make_batches, needed", [
    (lambda text: random_windows(text, 3, 7, torch.Generator()), 8),
    (lambda text: contiguous_chunks(text, 3, 7), 22)])
def test_a_text_that_is_too_short_is_refused(make_batches, needed):
    next(make_batches(np.zeros(needed, int)))
    with pytest.raises(UserError, match=f"has {needed - 1} tokens, a batch needs {needed}"):
        next(make_batches(np.zeros(needed - 1, int)))
