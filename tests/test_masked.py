"""masked.py: what is hidden and how often, what the encoder sees, filling blanks."""

import numpy as np
import pytest
import torch

from configurator import UserError
from ladder.masked import (
    MaskedGPT,
    blank_losses,
    choose_blanks,
    encode_blanks,
    fill_blanks,
    hide_tokens,
    masked_batches,
    special_ids,
)
from ladder.training import random_windows, train
from model import IGNORE
from text.tokenizer import Tokenizer

V, T = 23, 13
SIZES = dict(block_size=T, n_layer=2, n_head=3, n_embd=21)
LETTERS = Tokenizer({"kind": "chars", "alphabet": "abcdefg ", "documents": True})


def make(vocab_size=V, **sizes):
    generator = torch.Generator().manual_seed(1)
    return MaskedGPT(vocab_size, generator, **{**SIZES, **sizes}).eval()


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def test_selected_tokens_are_80_10_10():
    """Of 200,000 tokens 15% are selected: 80% hidden, 10% replaced, 10% kept; each within four
    standard deviations. A replacement may be the token itself."""
    tokens = torch.randint(2, V, (200, 1000), generator=generator(1))
    tokens[:, ::10] = 1  # special
    hidden, targets = hide_tokens(tokens, V, [0, 1], generator())
    ordinary, selected = tokens != 1, targets != IGNORE
    assert not selected[~ordinary].any() and torch.equal(targets[selected], tokens[selected])
    assert torch.equal(hidden[~selected], tokens[~selected])

    def near(count, total, share):
        return abs(count - total * share) < 4 * (total * share * (1 - share)) ** 0.5

    total = int(selected.sum())
    assert near(total, int(ordinary.sum()), 0.15)
    masked, kept = hidden == V, hidden == tokens
    assert near(int((masked & selected).sum()), total, 0.8)
    assert near(int((kept & selected).sum()), total, 0.1 + 0.1 / 21)
    replaced = hidden[selected & ~masked & ~kept]
    assert replaced.min() == 2 and replaced.max() == V - 1
    counts = torch.bincount(replaced, minlength=V)[2:]
    assert all(near(int(count), len(replaced), 1 / 21) for count in counts)


def test_only_selected_tokens_have_a_loss():
    model, tokens = make(), torch.randint(V, (5, T), generator=generator(1))
    hidden, targets = hide_tokens(tokens, model.mask_id, [], generator())
    losses, state = model.advance(hidden, targets)
    assert state is None and torch.equal(losses != 0, targets != IGNORE)


def test_both_sides_are_seen():
    model, tokens = make(), torch.randint(V, (1, T), generator=generator(1))
    probabilities = model.log_probabilities(tokens)
    assert probabilities.shape == (1, T, V)
    torch.testing.assert_close(probabilities.exp().sum(-1), torch.ones(1, T).double(), rtol=0,
                               atol=1e-12)
    for place in (0, 6, T - 1):
        changed = tokens.clone()
        changed[:, place] = (tokens[:, place] + 1) % V
        assert (model.log_probabilities(changed) != probabilities).any(-1).all()


@pytest.fixture(scope="module")
def runs_model():
    """A model of a text in which a letter stands many times: its neighbours give a blank away."""
    text = np.repeat(np.arange(40) * 3 % 8, 29)
    model, never = make(LETTERS.vocab_size, n_layer=1), special_ids(LETTERS)
    windows = random_windows(text, 17, T, generator(1))
    train(model, masked_batches(windows, model.mask_id, never, generator(2)), lambda: 0, 1e-2,
          max_iters=100, warmup_iters=10)
    return model, text


def fill(model, prompt, count=5):
    return fill_blanks(model, encode_blanks(model, LETTERS, prompt), special_ids(LETTERS), count)


def test_blanks_are_filled(runs_model):
    filled, choices = fill(runs_model[0], "[MASK]bbb[MASK]bb", count=3)
    assert LETTERS.decode(filled) == "bbbbbbb" and [len(found) for found in choices] == [3, 3]
    for found in choices:
        shares = [share for _, share in found]
        assert found[0][0] == 1 and shares == sorted(shares, reverse=True)
        assert 0.5 < shares[0] <= 1


def test_the_most_certain_blank_is_filled_first():
    """A model that is certain of the second blank, and of the first once the second is filled."""
    class Stub(MaskedGPT):
        def log_probabilities(self, tokens):
            probabilities = torch.full((1, tokens.shape[1], 9), 0.1)
            probabilities[0, 3, 4] = 0.5  # the second: e
            probabilities[0, 0, 6] = 0.2  # the first: g, unless there is an e
            if tokens[0, 3] == 4:
                probabilities[0, 0, 2] = 0.9  # c
            return probabilities.log()

    filled, choices = fill(Stub(LETTERS.vocab_size, **SIZES), "[MASK]ab[MASK]", count=1)
    assert LETTERS.decode(filled) == "cabe"
    assert choices == [[(2, pytest.approx(0.9))], [(4, pytest.approx(0.5))]]


def test_special_tokens_fill_no_blank(runs_model):
    _, choices = fill(runs_model[0], "ab[MASK]", count=50)
    assert len(choices[0]) == 9  # the vocabulary
    assert dict(choices[0])[8] == 0 and special_ids(LETTERS) == [8]


def test_a_blank_s_loss_is_from_the_rest_of_its_block(runs_model):
    model, text = runs_model
    text = text[:3 * T + 5]
    places = choose_blanks(text, [8], np.random.default_rng(3))
    nats = blank_losses(model, text, places)
    assert len(places) == len(nats) > 0 and nats.dtype == np.float64
    row = places[0] // T
    block = torch.tensor(text[row * T:(row + 1) * T])[None]
    in_row = places[places // T == row] % T
    block[0, in_row] = model.mask_id
    expected = -torch.log_softmax(model.logits(block)[0, in_row[0]], -1)[text[places[0]]]
    assert nats[0] == pytest.approx(expected.item(), abs=1e-5)
    assert nats.mean() < 0.7


def test_blanks_are_15_percent_and_neither_first_nor_special():
    tokens = np.resize([0, 1, 2, 3, 4], 100_000)
    places = choose_blanks(tokens, [2], np.random.default_rng(3))
    assert abs(len(places) - 12_000) < 400 and (np.diff(places) > 0).all()
    assert set(tokens[places]) == {0, 1, 3, 4}
    assert all(0 not in choose_blanks(tokens[:30], [], np.random.default_rng(i)) for i in range(50))


def test_a_model_that_sees_its_targets_is_found_out():
    """Where what is to be predicted stays in sight, a blank's loss is high: the task has taught
    the model to copy. This is what 80/10/10 is for, and what a leak would look like."""
    rng = np.random.default_rng(1)
    text = rng.integers(0, 8, 3000)  # nothing to predict but by copying
    model = make(LETTERS.vocab_size)
    leaking = ((tokens, tokens) for tokens, _ in random_windows(text, 17, T, generator(1)))
    train(model, leaking, lambda: 0, 1e-2, max_iters=60, warmup_iters=10)
    tokens = torch.tensor(text[:T])[None]
    assert model(tokens, tokens).mean() < 0.1
    places = choose_blanks(text, [8], np.random.default_rng(3))
    assert blank_losses(model, text, places).mean() > 1.9


@pytest.mark.parametrize("prompt, message", [
    ("abc", r"'abc' has no blank to fill: write \[MASK\] in place of a token"),
    ("[MASK]" + "ab" * 7, "has 15 tokens, the model reads at most 13: shorten it"),
    ("[MASK]x", "the vocabulary of 9 characters lacks 'x'")])
def test_a_prompt_that_cannot_be_filled(prompt, message):
    with pytest.raises(UserError, match=message):
        encode_blanks(make(LETTERS.vocab_size), LETTERS, prompt)
