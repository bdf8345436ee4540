"""N-grams: predict a token from the n - 1 before it, by counting how often that happened.

    model = NGram(order=5, vocab_size=257, smoothing="kneser_ney")
    model.fit(training_tokens)
    losses = model.losses(validation_tokens)

A history h of k - 1 tokens gives the probabilities of order k, which use those of the order below:

    p_k(w | h) = (c(h w) - D + free(h) * p_k-1(w | h without its first token)) / total(h)

    p_0             1 / V, for each of the V tokens of the vocabulary
    c(h w)          how often w came after h in the training text (below: another count)
    D               the discount: what is taken from each count, for tokens never seen after h
    free(h)         what was taken from all counts after h
    total(h)        the sum of the counts after h; where it is 0, p_k is p_k-1

    maximum_likelihood   takes nothing. What was never seen is impossible: its loss is infinite
    add_k                adds `added` to each of the V counts; no lower orders
    kneser_ney           Chen and Goodman 1998, interpolated and modified: three discounts, for
                         counts of 1, of 2, and of 3 or more. Orders below the highest do not count
                         how often an n-gram occurs but how many different tokens come before it:
                         "Francisco" is frequent, yet only after "San"

The tables are sorted arrays. A k-gram's number is its place in the array of k-grams; its key there
is (the number of its first k - 1 tokens) * V + (its last token). So looking up k tokens is k binary
searches, and what followed a history is one slice of the array.
"""

import numpy as np

from configurator import UserError

SMOOTHINGS = ("maximum_likelihood", "add_k", "kneser_ney")


class NGram:
    """An n-gram model over the ids 0 to vocab_size - 1.

    boundary: the id that ends a sentence, or begins a document: no history looks beyond it, though
    it is the first token of those after it. None: there is none.
    """

    def __init__(self, order, vocab_size, smoothing="kneser_ney", added=0.1, boundary=None):
        self.order, self.vocab_size, self.boundary = order, vocab_size, boundary
        self.smoothing, self.added = smoothing, added
        # {order: array}: the sorted keys of its n-grams, and their counts; D for a count of 0, 1, 2
        # and more; total and free of each history
        self.keys, self.counts, self.discounts, self.totals, self.free = {}, {}, {}, {}, {}
        # which orders the probabilities are made of
        self.orders_used = [order] if smoothing == "add_k" else range(1, order + 1)

    def fit(self, tokens, show_progress=None):
        """Count the n-grams of a text, (N,) ids. Raises UserError where it is too short."""
        V, N = self.vocab_size, len(tokens)
        if N <= self.order:
            raise UserError(f"order={self.order}: the training text has {N:,} tokens; choose an "
                            "order below that")
        before = self.tokens_before(tokens)
        # The number of the k-gram that ends at each token, at first for k = 1.
        numbers = tokens.astype(np.int32)
        self.keys[1] = np.arange(V)
        is_counted = np.ones(N, bool)
        is_counted[0] = tokens[0] != self.boundary  # the first boundary is only a history
        occurrences = np.bincount(tokens[is_counted], minlength=V)

        for k in range(2, self.order + 1):
            if show_progress:
                show_progress((k - 2) / (self.order - 1))
            # Sort the k-grams; the first of each kind gives a key (np.unique takes more memory).
            ends = np.flatnonzero(before >= k - 1).astype(np.int32)
            keys = numbers[ends - 1] * np.int64(V) + tokens[ends]
            places = np.argsort(keys)
            keys, ends = keys[places], ends[places]
            is_first = np.append(True, keys[1:] != keys[:-1])
            first, self.keys[k] = np.flatnonzero(is_first).astype(np.int32), keys[is_first]
            longer_occurrences = np.diff(first, append=np.int32(len(keys)))
            del keys, places

            # The counts of the order below: of occurrences, or of different tokens before it. An
            # n-gram at the beginning, which has no token before it, keeps its occurrences.
            if self.smoothing == "kneser_ney":
                size = len(self.keys[k - 1])
                different = np.bincount(numbers[ends[first]], minlength=size)
                at_start = np.flatnonzero((before == k - 2) & is_counted)
                occurrences = np.maximum(different, np.bincount(numbers[at_start], minlength=size))
            self.set_counts(k - 1, occurrences)
            occurrences = longer_occurrences
            numbers = np.full(N, -1, np.int32)
            numbers[ends] = np.cumsum(is_first, dtype=np.int32) - 1
            del ends, is_first, first
        self.set_counts(self.order, occurrences)

    def set_counts(self, k, counts):
        """Keep the counts of an order, and what follows from them for each history."""
        V = self.vocab_size
        self.counts[k] = counts.astype(np.int32)
        self.discounts[k] = np.zeros(4)
        if self.smoothing == "kneser_ney":
            self.discounts[k] = modified_discounts(counts)
        history = self.keys[k] // V
        size = len(self.keys.get(k - 1, [0]))  # how many histories there are
        self.totals[k] = np.bincount(history, counts, size).astype(np.int32)
        taken = self.discounts[k][np.minimum(counts, 3)]
        self.free[k] = np.bincount(history, taken, size)
        # Adding to every count is the same as a share of the uniform distribution.
        if self.smoothing == "add_k":
            self.totals[k] = self.totals[k] + self.added * V
            self.free[k] += self.added * V

    def tokens_before(self, tokens):
        """Return how many tokens each may look back to, (N,): those after the last boundary, and
        the boundary itself; at most `order`."""
        places = np.arange(len(tokens), dtype=np.int32)
        boundaries = np.where(tokens == self.boundary, places, 0)
        last = np.maximum.accumulate(boundaries)
        last[1:] = last[:-1]  # the last boundary before each token, not the token itself
        return np.minimum(places - last, self.order).astype(np.uint8)

    def losses(self, tokens):
        """Return the loss of each token of a text but the first, given those before it, in nats:
        (N,) ids to (N - 1,) float64."""
        tokens = np.asarray(tokens, np.int64)
        probabilities = np.full(len(tokens), 1 / self.vocab_size)  # by order 0
        numbers = np.zeros(len(tokens), np.int64)  # of the k-grams that end there, for k = 0
        for k in range(1, self.order + 1):
            # A history is the shorter n-gram that ends one token before. Nothing ever followed one
            # with a boundary at its end, unless that is all of it.
            history = np.roll(numbers, 1)
            history[:k - 1] = -1
            numbers = self.find(k, history, tokens)
            if k in self.orders_used:
                count = np.where(numbers >= 0, self.counts[k][numbers], 0)
                probabilities = self.interpolate(k, history, count, probabilities)
        with np.errstate(divide="ignore"):
            return -np.log(probabilities[1:])

    def find(self, k, history, token):
        """Return the numbers of k-grams, -1 where one was never seen: those of the history's number
        and the token, arrays or integers."""
        keys = self.keys[k]
        wanted = history * self.vocab_size + token
        places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        was_seen = (history >= 0) & (keys[places] == wanted)
        return np.where(was_seen, places, -1)

    def interpolate(self, k, history, count, below):
        """Return p_k for histories, the counts of tokens after them, and p_k-1 (see above)."""
        kept = count - self.discounts[k][np.minimum(count, 3)]
        total = self.totals[k][history]
        is_known = (history >= 0) & (total > 0)
        p = (kept + self.free[k][history] * below) / np.where(is_known, total, 1)
        return np.where(is_known, p, below)

    def start(self):
        """Return the state before the first token: the number of the last k tokens among the
        k-grams, for k = 0 to n - 1; -1 where there are fewer, or they were never seen."""
        return [0] + [-1] * (self.order - 1)

    def step(self, token, state):
        """Read a token; return the log-probabilities of the next, (V,) float64, and the state."""
        state = [0] + [int(self.find(k, state[k - 1], token)) for k in range(1, self.order)]

        # From the lowest order to the highest: what followed this history is one slice.
        p = np.full(self.vocab_size, 1 / self.vocab_size)
        for k in self.orders_used:
            history = state[k - 1]
            first_key = history * self.vocab_size
            start, end = np.searchsorted(self.keys[k], [first_key, first_key + self.vocab_size])
            count = np.zeros(self.vocab_size, np.int32)
            count[self.keys[k][start:end] - first_key] = self.counts[k][start:end]
            p = self.interpolate(k, history, count, p)
        with np.errstate(divide="ignore"):
            return np.log(p), state

    def state_dict(self):
        """Return {name: array} of all tables, by which another NGram gets them."""
        tables = {}
        for name in ("keys", "counts", "discounts", "totals", "free"):
            for k, table in getattr(self, name).items():
                tables[f"{name}.{k}"] = table
        return tables

    def load_state_dict(self, tables):
        for name, table in tables.items():
            kind, k = name.split(".")
            getattr(self, kind)[int(k)] = np.asarray(table)

    def size(self):
        return sum(table.nbytes for table in self.state_dict().values()), "bytes"


def modified_discounts(counts):
    """Return D for a count of 0, 1, 2, and 3 or more (Chen and Goodman 1998, equation 26), by how
    many n-grams have counts of 1 to 4. Tiny texts may have none: D stays between 0 and count."""
    n1, n2, n3, n4 = (max(1, np.sum(counts == count)) for count in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    wanted = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.array([0, *np.clip(wanted, 0.01, [0.99, 1.99, 2.99])])
