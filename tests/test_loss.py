"""training/loss.py: the loss in chunks has the values and gradients of the loss at once."""

import pytest
import torch
from test_model import BLOCK, B, V, batch, make

from model import IGNORE
from training import loss as loss_module
from training.loss import chunk_losses

WEIGHTS = torch.rand(B, BLOCK, generator=torch.Generator().manual_seed(2))


def gradients_of(model, chunk, weights=None, dtype=torch.float32):
    """Return the losses of B x BLOCK tokens, 3 without a target, and all gradients of their
    weighted sum; chunk: the logits at a time."""
    tokens, targets = batch(BLOCK)
    targets[0, 1] = targets[1, 4] = targets[1, 5] = IGNORE
    model.zero_grad()
    chunk_losses(model, chunk)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        losses = model(tokens, targets)
    loss = losses.sum() / 23 if weights is None else (losses * weights).sum()
    loss.backward()
    return [losses.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["sum", "weighted"])
@pytest.mark.parametrize("chunk", [1, 5 * V, B * BLOCK * V - 1])
@pytest.mark.parametrize("changes", [{}, {"softcap": 2.0}, {"tied": False}],
                         ids=["gpt2", "softcap", "untied"])
def test_losses_in_chunks_are_those_at_once(changes, chunk, weights):
    model = make(spread=0.3, **changes)
    at_once = gradients_of(model, B * BLOCK * V, weights)
    in_chunks = gradients_of(model, chunk, weights)
    assert at_once[0].count_nonzero() == 23 and not torch.equal(at_once[2], in_chunks[2])
    for a, b in zip(at_once, in_chunks, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["sum", "weighted"])
def test_losses_in_chunks_are_as_exact_in_bfloat16(weights):
    model = make(spread=0.3, softcap=5.0)
    expected = gradients_of(model, B * BLOCK * V, weights)
    off = {}
    for chunk in (B * BLOCK * V, 5 * V):
        found = gradients_of(model, chunk, weights, torch.bfloat16)
        assert all(f.dtype == torch.float32 for f in found)
        off[chunk] = [(f - e).norm() / e.norm() for f, e in zip(found, expected, strict=True)]
    for at_once, in_chunks in zip(*off.values(), strict=True):
        assert in_chunks < 1.5 * at_once + 2e-3 and in_chunks < 0.05


def test_losses_in_chunks_never_have_all_logits():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            for x in out if isinstance(out, tuple) else [out]:
                self.size = max(self.size, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    model = make(vocab_size=400, n_embd=3, n_head=1)  # its weight has 1,200 numbers
    for chunk, largest in ((B * BLOCK * 400, B * BLOCK * 400), (4 * 400, 4 * 400)):
        with Largest() as seen:
            gradients_of(model, chunk)
        assert seen.size == largest


def test_losses_in_chunks_need_no_gradient(monkeypatch):
    model, (tokens, targets) = make(), batch()
    expected = model(tokens, targets)
    chunk_losses(model, 3 * V)
    calls, own = [], loss_module.losses_and_gradients
    monkeypatch.setattr(loss_module, "losses_and_gradients",
                        lambda *args: calls.append(args[-1]) or own(*args))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, targets), expected.detach())
    assert calls == [None]
