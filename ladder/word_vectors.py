"""Word vectors: skip-gram with negative sampling (Mikolov, Sutskever, Chen, Corrado and Dean 2013,
"Distributed Representations of Words and Phrases and their Compositionality", section 2.2).

    vectors = WordVectors(channels=100)
    vectors.fit(*words_of(tokens, tokenizer), epochs=1)
    vectors.neighbours("king", 5)                    # [("queen", 0.71), ...]
    vectors.complete("man", "king", "woman", 5)      # man is to king as woman is to ...

It predicts no next word: a word w gets a vector v_w such that those of the words around it are
likely. Each of these, c, has a second vector u_c; K words n_1 ... n_K are drawn at random, and

    loss = - log sigmoid(u_c . v_w) - sum over k of log sigmoid(- u_nk . v_w)

Words that are used alike get vectors alike, the idea of the neural n-gram without its network.
Sizes: N words of text, W words of the vocabulary, C channels, P pairs of a batch, K negatives.
"""

import difflib
import re

import numpy as np
import torch

from configurator import UserError

LETTERS = re.compile(r"[^\W\d_]+")
PIECE = 1 << 20  # tokens that become text at once
CHUNK = 10_000  # words that are read at once; pairs never reach beyond, as in word2vec
PAIRS = 1000  # of a batch: few, as its pairs all see the same vectors, and their steps add up
MIN_COUNT = 5  # rarer words get no vector


def words_of(tokens, tokenizer):
    """Return the words of a text, in small letters: their ids (N,), and {word: count}, the most
    common first. tokens: ids of any tokenizer. Raises UserError where no word is frequent."""
    # Number the words as they come. A word that a piece cuts in two is two others.
    number_of, pieces = {}, []
    for first in range(0, len(tokens), PIECE):
        text = tokenizer.decode(tokens[first:first + PIECE].tolist()).lower()
        words = LETTERS.findall(text)
        pieces.append(np.array([number_of.setdefault(word, len(number_of)) for word in words], int))
    numbers = np.concatenate(pieces)
    counts = np.bincount(numbers, minlength=len(number_of))

    # Keep the frequent words, and number them by how common they are.
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] >= MIN_COUNT]
    if len(order) < 2:
        raise UserError(f"the text has {len(order)} words that occur {MIN_COUNT} times or more, "
                        "and word vectors need two; give more text")
    ids = np.full(len(counts), -1)
    ids[order] = np.arange(len(order))
    names = list(number_of)
    vocabulary = {names[i]: int(counts[i]) for i in order}
    numbers = ids[numbers]
    return numbers[numbers >= 0], vocabulary


class WordVectors:
    """A vector v for each word, and the second one, u: (W, C) each, after `fit`."""

    def __init__(self, channels=100, seed=1337):
        self.channels, self.rng = channels, np.random.default_rng(seed)

    def fit(self, ids, vocabulary, epochs=1, window=5, negatives=5, subsample=1e-3,
            learning_rate=0.025, show_progress=None):
        """Train on a text by plain gradient descent; its rate falls to 0 in a line.

        ids: (N,), places in the vocabulary, {word: count}. window: at most so many words before and
        after; each time a random number up to it. subsample: of words that are more frequent than
        this share of the text, most are skipped (equation 5, as word2vec.c has it).
        """
        # As in word2vec, v starts small and random, u at 0.
        self.words, self.id_of = list(vocabulary), {word: i for i, word in enumerate(vocabulary)}
        size = (len(self.words), self.channels)
        self.v = torch.from_numpy((self.rng.random(size, np.float32) - 0.5) / self.channels)
        self.u = torch.zeros(size)
        # How frequent each word is decides how often it is skipped, and drawn as a negative.
        counts = np.array(list(vocabulary.values()), np.float64)
        frequency = counts / counts.sum()
        kept_share = np.minimum(1, np.sqrt(subsample / frequency) + subsample / frequency)
        noise = np.cumsum(counts ** 0.75)  # negatives come from this distribution
        starts = [(epoch * len(ids) + first, first) for epoch in range(epochs)
                  for first in range(0, len(ids), CHUNK)]
        for done, first in starts:
            # The rate falls from the first chunk to the last.
            share = done / (epochs * len(ids))
            rate = learning_rate * max(1e-4, 1 - share)
            if show_progress:
                show_progress(share)
            # Skip frequent words; then pair each word with its neighbours, in random order.
            chunk = ids[first:first + CHUNK]
            chunk = chunk[self.rng.random(len(chunk)) < kept_share[chunk]]
            pairs = self.rng.permutation(skip_gram_pairs(chunk, window, self.rng))  # (pairs, 2)
            # A batch is so small that few words occur in it twice.
            batches = -(-len(pairs) // min(PAIRS, len(self.words)))
            for batch in np.array_split(pairs, max(1, batches)):
                uniform = self.rng.random((len(batch), negatives)) * noise[-1]
                self.update(batch, np.searchsorted(noise, uniform, side="right"), rate)

    def update(self, pairs, negatives, rate):
        """One step down the gradient of the loss. pairs: (P, 2), a word and one near it; negatives:
        (P, K). A negative that is the near word itself does not count."""
        # The vectors of the words, of those near them and of the negatives.
        words = torch.from_numpy(pairs[:, 0])  # (P,)
        others = np.concatenate([pairs[:, 1:], negatives], axis=1)  # (P, 1 + K)
        is_void = torch.from_numpy(others == pairs[:, 1:])
        is_void[:, 0] = False
        others = torch.from_numpy(others)  # (P, 1 + K)
        v, u = self.v[words], self.u[others]  # (P, C), (P, 1 + K, C)

        # The loss of a pair falls with u . v where the label is 1, and rises where it is 0.
        label = torch.zeros(others.shape)  # (P, 1 + K)
        label[:, 0] = 1
        scores = torch.einsum("pkc,pc->pk", u, v)  # (P, 1 + K)
        step = rate * (label - torch.sigmoid(scores)).masked_fill(is_void, 0)  # (P, 1 + K)
        self.v.index_add_(0, words, torch.einsum("pk,pkc->pc", step, u))
        self.u.index_add_(0, others.flatten(), (step[:, :, None] * v[:, None]).flatten(0, 1))

    def unit(self):
        """Return all v with length 1, (W, C) float32: products of these are cosines."""
        return torch.nn.functional.normalize(self.v).numpy()

    def ids(self, *words):
        """Return the ids of words. Raises UserError for one that the vocabulary lacks."""
        for word in words:
            if word not in self.id_of:
                near = difflib.get_close_matches(word, self.words, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "choose words of the text"
                raise UserError(f"words: the vocabulary of {len(self.words):,} lacks {word!r}; "
                                f"{hint}")
        return np.array([self.id_of[word] for word in words])

    def neighbours(self, word, count):
        """Return the [(word, cosine)] that are nearest to a word."""
        return self.nearest(self.unit()[self.ids(word)[0]], count, [word])

    def complete(self, a, b, c, count):
        """Return the [(word, cosine)] that are to c as b is to a: nearest to b - a + c."""
        a_unit, b_unit, c_unit = self.unit()[self.ids(a, b, c)]
        return self.nearest(b_unit - a_unit + c_unit, count, [a, b, c])

    def nearest(self, vector, count, excluded):
        # The words asked for are no answer.
        cosines = self.unit() @ (vector / np.linalg.norm(vector))
        cosines[self.ids(*excluded)] = -np.inf
        best = np.argsort(-cosines, kind="stable")[:min(count, len(cosines) - len(excluded))]
        return [(self.words[i], float(cosines[i])) for i in best]

    def flat(self, words):
        """Return words in the two dimensions in which they differ most, (len(words), 2)."""
        # The first two principal components.
        points = self.unit()[self.ids(*words)]
        points = points - points.mean(axis=0)
        _, _, directions = np.linalg.svd(points, full_matrices=False)
        return points @ directions[:2].T

    def state_dict(self):
        words = np.frombuffer("\n".join(self.words).encode(), np.uint8).copy()
        return {"v": self.v, "u": self.u, "words": words}

    def load_state_dict(self, tensors):
        self.v, self.u = tensors["v"], tensors["u"]
        self.words = bytes(tensors["words"].numpy()).decode().split("\n")
        self.id_of = {word: i for i, word in enumerate(self.words)}

    def size(self):
        return self.v.numel() + self.u.numel(), "parameters"


def skip_gram_pairs(ids, window, rng):
    """Return (pairs, 2): each word with those at most b before and after it, where b is drawn anew
    for each word, from 1 to window: nearer words weigh more."""
    reach = rng.integers(1, window + 1, len(ids))
    found = []
    for distance in range(1, min(window, len(ids) - 1) + 1):
        left, right = ids[:-distance], ids[distance:]
        from_left, from_right = reach[:-distance] >= distance, reach[distance:] >= distance
        found.append(np.stack([left[from_left], right[from_left]], axis=1))
        found.append(np.stack([right[from_right], left[from_right]], axis=1))
    if not found:
        return np.empty((0, 2), int)
    return np.concatenate(found)
