"""The transformer, train.py's own model, as the top rung: it reads all tokens of a block at once,
and what a token looks at is learned (Vaswani et al. 2017; the model: model.py, GPT).

    model = Transformer.load("out/ladder_stdlib/gpt")
    losses = model.losses(validation_tokens)

Sizes: T block_size, S the stride of the windows, W windows, V vocabulary.
"""

import numpy as np
import torch

from formats.checkpoint import find_checkpoint, load_model
from formats.run_folder import read_metrics
from model import IGNORE

BATCH_SIZE = 16  # windows that are computed together


class Transformer:
    """A GPT as a rung of the ladder: a text of any length, where the GPT reads at most T tokens."""

    def __init__(self, gpt):
        self.gpt = gpt.eval()

    @classmethod
    def load(cls, folder):
        """Return that of a run of train.py: its checkpoint with the lowest validation loss."""
        return cls(load_model(find_checkpoint(folder, "best")))

    @torch.no_grad()
    def losses(self, tokens):
        """Return the loss of each token of a text but the first, in nats: (N,) ids to (N - 1,)
        float64. Windows overlap by half, so that from the second one on a token is predicted from
        at least T / 2 others."""
        # The windows begin at multiples of S; the last one is padded.
        tokens = np.asarray(tokens, np.int64)
        T, N = self.gpt.config.block_size, len(tokens)
        S = T // 2
        padded = np.pad(tokens, (0, T + S))
        targets = np.pad(tokens[1:], (0, T + S + 1), constant_values=IGNORE)
        starts = np.arange(0, max(1, N - 1 - (T - S)), S)  # (W,)
        places = starts[:, None] + np.arange(T)  # (W, T)

        # Of all windows but the first, the last S targets are those that no other window had.
        found = []
        for first in range(0, len(starts), BATCH_SIZE):
            batch = places[first:first + BATCH_SIZE]  # (B, T)
            losses = self.gpt(torch.from_numpy(padded[batch]), torch.from_numpy(targets[batch]))
            found.append(losses.double().numpy())
        found = np.concatenate(found)  # (W, T)
        return np.concatenate([found[0], found[1:, -S:].ravel()])[:N - 1]

    def start(self):
        """Return the state before the first token: the window of tokens that are read, and the
        cache of what was computed of them (model.GPT.make_cache)."""
        return [], self.gpt.make_cache(1)

    @torch.no_grad()
    def step(self, token, state):
        """Read a token; return the log-probabilities of the next, (V,) float64, and the state. The
        states of one `start` share a cache: go on from the newest."""
        window, cache = state
        window, cached = [*window, token], len(window)
        # A window that is full becomes its newest half, which is read again.
        if len(window) > self.gpt.config.block_size:
            window, cached = window[len(window) // 2:], 0
        x = self.gpt.hidden(torch.tensor([window[cached:]]), cache, cached)  # (1, T, C)
        log_p = torch.log_softmax(self.gpt.head(x[0, -1]).double(), -1)  # (V,)
        return log_p.numpy(), (window, cache)

    def size(self):
        return sum(p.numel() for p in self.gpt.parameters()), "parameters"


def learning_curve(folder):
    """Return [(seconds of training, validation loss)] of a run, without the time of evaluations."""
    curve, seconds, last = [], 0.0, -1
    for row in read_metrics(folder / "metrics.jsonl"):
        if "val_loss" in row:
            curve.append((round(seconds, 2), row["val_loss"]))
        else:  # a line stands for all iterations since the one before
            seconds += row["ms"] / 1000 * (row["iter"] - last)
            last = row["iter"]
    return curve
