"""How fast questions are scored: what bench.py --suite=evaluate measures, of us and of others."""

import time
from types import SimpleNamespace

import numpy as np

from evaluation.scoring import Scorer

VOCAB_SIZE = 50257  # GPT-2's


def time_questions(model, runtime, count, tokens_at_once):
    """Return how many questions the Scorer answers in a second."""
    scorer = Scorer(model, SimpleNamespace(vocab_size=VOCAB_SIZE), runtime, tokens_at_once)
    requests = questions_like_hellaswag(count)
    # Two questions before the clock starts: the first products choose their kernels.
    scorer.score_ids(requests[:8])
    start = time.perf_counter()
    scorer.score_ids(requests)
    return count / (time.perf_counter() - start)


def questions_like_hellaswag(count):
    """Return requests (context ids, continuation ids), four to a question, of random ids.

    Contexts have 15 to 95 tokens and choices 10 to 50, all lengths alike: on average 55 and 30, as
    HellaSwag's have in GPT-2's tokens.
    """
    rng = np.random.default_rng(1)
    requests = []
    for _ in range(count):
        context = rng.integers(0, VOCAB_SIZE, rng.integers(15, 96)).tolist()
        for _ in range(4):
            choice = rng.integers(0, VOCAB_SIZE, rng.integers(10, 51)).tolist()
            requests.append((context, choice))
    return requests
