"""Words: a token for each of the most common words, which are what white space separates, and for
the end of a line. It suits text whose sentences are lines and whose punctuation stands apart."""

import re
from collections import Counter

import numpy as np

from configurator import UserError

WORD = re.compile(r"\n|\S+")
LINE_END, UNKNOWN = "\n", "<unk>"  # the ids 0 and 1


def words_spec(texts, vocab_size):
    """Return the spec of a Words tokenizer for an iterable of texts: the end of a line, <unk>, and
    the most common words. Raises UserError for a vocab_size without room for a word."""
    if vocab_size < 3:
        raise UserError(f"vocab_size={vocab_size}: words need at least 3, for the end of a line, "
                        f"{UNKNOWN} and one word")
    counts = Counter()
    for text in texts:
        counts.update(WORD.findall(text))
    for token in (LINE_END, UNKNOWN):
        counts.pop(token, None)
    # The most common first; of equally common words, those that come first in the alphabet.
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return {"kind": "words", "words": [LINE_END, UNKNOWN, *ranked[:vocab_size - 2]]}


class Words:
    """Ids are places in the list of words. Other words become <unk>, and white space is not kept:
    `decode_bytes` writes a space before each word. The end of a line also begins a document."""

    def __init__(self, spec):
        self.tokens, self.eot = spec["words"], 0
        self.vocab_size = len(self.tokens)
        self.id_of = {word: i for i, word in enumerate(self.tokens)}

    def encode(self, text):
        unknown = self.id_of[UNKNOWN]
        return np.array([self.id_of.get(word, unknown) for word in WORD.findall(text)], int)

    def decode_bytes(self, ids):
        words = [self.tokens[i] for i in ids]
        return "".join(word if word == LINE_END else f" {word}" for word in words).encode()
