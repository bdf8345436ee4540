"""ladder/ngram.py: probabilities that sum to 1, the same by dictionaries, published figures."""

import gzip
import re
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT

from configurator import UserError
from ladder.ngram import SMOOTHINGS, NGram, modified_discounts

V, ORDER, BOUNDARY = 11, 3, 7
SHARED = ROOT.parent / "shared/data"


def random_text(length, seed=0):
    """Return random tokens (length,), the frequent ones far more often than the rare."""
    rng = np.random.default_rng(seed)
    return np.minimum(rng.geometric(0.3, length), V - 1)  # 0 never occurs


def fitted(smoothing, boundary=None, order=ORDER):
    model = NGram(order, V, smoothing, boundary=boundary)
    model.fit(random_text(509))
    return model


def shared(path):
    if not (SHARED / path).is_file():
        pytest.skip(f"{SHARED / path} is missing")
    return SHARED / path


@pytest.mark.parametrize("boundary", [None, BOUNDARY])
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_steps_sum_to_1_and_are_the_losses(smoothing, boundary):
    model, tokens = fitted(smoothing, boundary), random_text(211, seed=1)
    tokens[101:103] = 0  # a token, and so a history, that was never seen
    losses, state = model.losses(tokens), model.start()
    for i, token in enumerate(tokens[:-1]):
        log_p, state = model.step(token, state)
        assert abs(np.exp(log_p).sum() - 1) < 1e-12
        assert -log_p[tokens[i + 1]] == losses[i]


def test_histories_end_at_a_boundary():
    model, tokens = fitted("kneser_ney", BOUNDARY), random_text(211, seed=1)
    place = np.flatnonzero(tokens == BOUNDARY)[0]
    np.testing.assert_array_equal(model.losses(tokens)[place:], model.losses(tokens[place:]))
    without = fitted("kneser_ney")
    assert not np.array_equal(without.losses(tokens)[place:], without.losses(tokens[place:]))


@pytest.mark.parametrize("boundary", [None, BOUNDARY])
def test_dictionaries_give_the_same(boundary):
    train, tokens = random_text(509).tolist(), random_text(211, seed=1)
    p = kneser_ney_by_dictionary(train, boundary)
    losses = []
    for i in range(1, len(tokens)):
        history = tokens[max(0, i - ORDER + 1):i].tolist()
        while boundary in history[1:]:
            history = history[1:]
        losses.append(-np.log(p(tuple(history), tokens[i])))
    np.testing.assert_allclose(fitted("kneser_ney", boundary).losses(tokens), losses, rtol=1e-12)


def kneser_ney_by_dictionary(train, boundary):
    """Return p(history, token), from the definitions: counts of tuples in dictionaries."""
    grams = {k: Counter() for k in range(1, ORDER + 1)}
    at_start = {k: Counter() for k in range(1, ORDER + 1)}
    for i in range(len(train)):
        for k in range(1, min(ORDER, i + 1) + 1):
            gram = tuple(train[i - k + 1:i + 1])
            if boundary in gram[1:-1]:
                continue
            grams[k][gram] += 1
            is_first = i == k - 1 and (boundary is None or k > 1 or gram[0] != boundary)
            if is_first or (k > 1 and gram[0] == boundary):
                at_start[k][gram] += 1
    counts = {ORDER: grams[ORDER]}
    for k in range(1, ORDER):
        counts[k] = Counter(gram[1:] for gram in grams[k + 1])
        for gram, count in at_start[k].items():
            counts[k][gram] = max(count, counts[k][gram])

    def p(history, token):
        k = len(history) + 1
        below = 1 / V if k == 1 else p(history[1:], token)
        after = {gram[-1]: count for gram, count in counts[k].items() if gram[:-1] == history}
        if not after:
            return below
        discounts = modified_discounts(np.array(list(counts[k].values())))
        count, taken = after.get(token, 0), sum(discounts[min(c, 3)] for c in after.values())
        kept = count - discounts[min(count, 3)]
        return (kept + taken * below) / sum(after.values())

    return p


def test_maximum_likelihood_and_add_k_are_counts():
    tokens = np.array([1, 2, 1, 2, 1, 3, 1])
    for smoothing, added in (("maximum_likelihood", 0), ("add_k", 0.5)):
        model = NGram(2, 5, smoothing, added)
        model.fit(tokens)
        np.testing.assert_allclose(
            np.exp(model.step(1, model.start())[0]),
            (np.array([0, 0, 2, 1, 0]) + added) / (3 + 5 * added), rtol=1e-12)
    # the boundary that begins the text is a history and no event
    model = NGram(1, 5, "maximum_likelihood", boundary=4)
    model.fit(np.array([4, 1, 4]))
    np.testing.assert_array_equal(np.exp(model.step(4, model.start())[0]), [0, 0.5, 0, 0, 0.5])


def test_tables_are_all_there_is():
    model, again = fitted("kneser_ney"), NGram(ORDER, V)
    again.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(model.losses(random_text(211)), again.losses(random_text(211)))
    assert model.size() == (sum(table.nbytes for table in model.state_dict().values()), "bytes")


def test_an_order_beyond_the_text_is_refused():
    with pytest.raises(UserError, match="order=7: the training text has 7 tokens; choose an order"):
        NGram(7, V).fit(random_text(7))


# ---------------------------------------------------------------------- published figures


def test_penn_treebank():
    """Order 5: perplexity 141.2 on the test part (Mikolov and Zweig 2012), of 82,430 events."""
    ids, parts = {"\n": 0}, {}
    for part in ("train", "valid", "test"):
        text = gzip.open(shared(f"ptb/{part}.txt.gz"), "rt").read()
        words = ["\n", *re.findall(r"\n|\S+", text)]
        parts[part] = np.array([ids.setdefault(word, len(ids)) for word in words])
    model = NGram(5, len(ids), boundary=0)
    model.fit(parts["train"])
    losses = model.losses(parts["test"])
    assert (len(ids), len(losses)) == (10000, 82430)
    assert np.exp(losses.mean()) == pytest.approx(141.186, abs=1e-3)


def test_names():
    """EurekaLabsAI/ngram's README: 2.106370 on the test part, of the places with 3 before them."""
    parts = {p: shared(f"names/{p}.txt").read_text() for p in ("train", "test")}
    alphabet = sorted(set(parts["train"]))
    ids = {p: np.array([alphabet.index(c) for c in names]) for p, names in parts.items()}
    model = NGram(4, len(alphabet), "add_k", added=0.1)
    model.fit(ids["train"])
    assert model.losses(ids["test"])[2:].mean() == pytest.approx(2.106370, abs=1e-6)
