"""ladder/word_vectors.py and word_scores.py: the gradient, what is learned, analogies."""

import numpy as np
import pytest
import torch

from configurator import UserError
from ladder import word_vectors
from ladder.word_scores import analogy_score, describe, ranks, similarity_score
from ladder.word_vectors import WordVectors, skip_gram_pairs, words_of
from text.tokenizer import Tokenizer

W, C, K, P = 11, 5, 3, 7


def with_vectors(**vectors):
    """Return WordVectors with these v's."""
    found = WordVectors()
    words = np.frombuffer("\n".join(vectors).encode(), np.uint8).copy()
    v = torch.tensor(list(vectors.values()), dtype=torch.float32)
    found.load_state_dict({"v": v, "u": v, "words": torch.from_numpy(words)})
    return found


def test_words_are_runs_of_letters_in_small_ones(monkeypatch):
    monkeypatch.setattr(word_vectors, "PIECE", 50)  # cut after whole lines
    text = "Ab, the_b2 ab!\nxyz the'\n.\n" * 5 + "The x " + 19 * "-"
    tokenizer = Tokenizer({"kind": "bytes"})
    ids, vocabulary = words_of(tokenizer.encode(text), tokenizer)
    assert vocabulary["ab"] + vocabulary["the"] > 15 and "x" not in vocabulary
    assert [*vocabulary.values()] == sorted(vocabulary.values(), reverse=True)
    np.testing.assert_array_equal(np.bincount(ids), [*vocabulary.values()])
    with pytest.raises(UserError, match="the text has 1 words that occur 5 times or more"):
        words_of(tokenizer.encode("a " * 9 + "b"), tokenizer)


def test_pairs_are_near_and_nearer_ones_are_more():
    rng, found = np.random.default_rng(0), np.zeros(20)
    for _ in range(200):
        pairs = skip_gram_pairs(np.arange(20), 4, rng)
        distances = np.abs(pairs[:, 0] - pairs[:, 1])
        assert 1 <= distances.min() and distances.max() <= 4
        found += np.bincount(distances, minlength=20)
    np.testing.assert_allclose(found[1:5] / found[1], [1, 3 / 4 * 18 / 19, 2 / 4 * 17 / 19,
                                                       1 / 4 * 16 / 19], atol=0.02)
    assert skip_gram_pairs(np.array([3]), 4, rng).shape == (0, 2)


def test_an_update_is_a_step_down_the_gradient_of_the_loss():
    vectors, rng = WordVectors(), np.random.default_rng(1)
    vectors.v, vectors.u = torch.randn(2, W, C, generator=torch.Generator().manual_seed(1))
    v, u = vectors.v.clone().requires_grad_(), vectors.u.clone().requires_grad_()
    pairs, negatives = rng.integers(W, size=(P, 2)), rng.integers(W, size=(P, K))
    negatives[2, 1] = pairs[2, 1]  # the near word itself: not a negative
    loss = 0
    for (word, near), others in zip(pairs, negatives, strict=True):
        loss = loss - torch.nn.functional.logsigmoid(u[near] @ v[word])
        for other in others[others != near]:
            loss = loss - torch.nn.functional.logsigmoid(-(u[other] @ v[word]))
    loss.backward()
    vectors.update(pairs, negatives, rate=0.1)
    torch.testing.assert_close(vectors.v, v.detach() - 0.1 * v.grad)
    torch.testing.assert_close(vectors.u, u.detach() - 0.1 * u.grad)


def test_words_that_are_used_alike_become_alike_the_same_each_time():
    rng = np.random.default_rng(0)
    topics = np.repeat(rng.integers(2, size=200), 7)  # each with 23 words of its own
    ids = topics * 23 + rng.integers(23, size=len(topics))
    vocabulary = {f"{i // 23} {i}": int(count) for i, count in enumerate(np.bincount(ids))}
    fitted = []
    for _ in range(2):
        vectors = WordVectors(channels=C, seed=3)
        vectors.fit(ids, vocabulary, epochs=5, subsample=1, learning_rate=0.1)
        fitted.append(vectors)
    for word in ("0 3", "1 29"):
        assert {near[0] for near, _ in fitted[0].neighbours(word, 17)} == {word[0]}
    torch.testing.assert_close(fitted[0].v, fitted[1].v, rtol=0, atol=0)


def test_analogies_leave_out_the_words_of_the_question():
    vectors = with_vectors(man=[1, 0, 0.1], king=[1, 1, 0.1], woman=[1, 0, 0.15], queen=[1, 1, 0.3],
                           apple=[-1, 0, 0])
    # king itself is the nearest
    best = max(vectors.words, key=lambda w: vectors.unit()[vectors.id_of[w]] @ (
        vectors.unit()[1] - vectors.unit()[0] + vectors.unit()[2]))
    assert best == "king"
    assert vectors.complete("man", "king", "woman", 1)[0][0] == "queen"
    questions = [("man", "king", "woman", "queen"), ("man", "king", "woman", "apple"),
                 ("man", "king", "woman", "duchess")]
    assert analogy_score(vectors, questions) == (1, 2)


def test_judgements_are_compared_by_rank():
    assert ranks([3, 1, 3, 7]).tolist() == [2.5, 1, 2.5, 4]
    vectors = with_vectors(a=[1, 0], b=[1, 0.1], c=[1, 1], d=[-1, 0])
    pairs = [("a", "b", 9.0), ("a", "c", 5.0), ("a", "d", 1.0), ("a", "x", 1.0)]
    assert similarity_score(vectors, pairs) == (pytest.approx(1), 3)


def test_wrong_input(tmp_path):
    vectors = with_vectors(hello=[1, 0], world=[0, 1])
    with pytest.raises(UserError, match="vocabulary of 2 lacks 'helo'; did you mean 'hello'"):
        describe(vectors, "world helo")
    (tmp_path / "x").write_text("one two three\n")
    with pytest.raises(UserError, match="'one two three' is not four words"):
        describe(vectors, "", analogies=f"{tmp_path}/x")
    with pytest.raises(UserError, match="is not two words and a number"):
        describe(vectors, "", judgements=f"{tmp_path}/x")
    with pytest.raises(UserError, match="cannot be read as text"):
        describe(vectors, "", judgements=f"{tmp_path}/none")
