"""The neural n-gram of Bengio, Ducharme, Vincent and Jauvin 2003, "A Neural Probabilistic Language
Model", Journal of Machine Learning Research 3.

    model = MLP(vocab_size, order=5)

Like an n-gram it predicts a token from the n - 1 before it. But those go in as vectors, which are
learned: tokens that are used alike get vectors alike, so that what was learned of one context helps
in all those like it, also in those that were never seen. Equation 1 of the paper, with the vectors
of the context side by side as x:

    y = b + W x + U tanh(d + H x)        and the probabilities are softmax(y)

W, the direct connections, is left out here, as the paper allows (section 2).
Sizes: B batch, T time, C channels of a token's vector, M hidden units, V vocabulary.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ladder.sampled import token_losses

CHUNK = 1024  # tokens that `losses` reads at once


class MLP(nn.Module):
    """Equation 1, for each place of a text at once."""

    sampler = None  # for training with a large vocabulary: sampled.py

    def __init__(self, vocab_size, order=5, channels=64, width=200, dropout=0.0):
        """order: n, the context with the token that it predicts."""
        super().__init__()
        self.context, self.blank = order - 1, vocab_size  # blank: the id before the text begins
        # the vectors C of the paper, its H and d, its U and b
        self.embedding = nn.Embedding(vocab_size + 1, channels)
        nn.init.normal_(self.embedding.weight, std=0.3)  # torch's 1.0 is much for SGD to move
        self.hidden = nn.Linear(self.context * channels, width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, vocab_size)

    def features(self, contexts):
        """Contexts (..., n - 1) of token ids, the latest last, to hidden units (..., M)."""
        # the vectors of the context, side by side
        x = self.embedding(contexts).flatten(-2)  # (..., (n - 1) C)
        # a layer of hidden units
        x = torch.tanh(self.hidden(self.dropout(x)))  # (..., M)
        return self.dropout(x)

    def contexts(self, tokens):
        """Return (B, T, n - 1): for each of the tokens (B, T) it and those before it, with blanks
        where the row has not begun."""
        padded = F.pad(tokens, (self.context - 1, 0), value=self.blank)  # (B, T + n - 2)
        return padded.unfold(1, self.context, 1)  # (B, T, n - 1)

    def forward(self, tokens, targets):
        """Return the cross-entropy in nats of each target, (B, T), as model.GPT's forward does."""
        return token_losses(self, self.features(self.contexts(tokens)), targets)

    def advance(self, tokens, targets, state=None):
        """Return (losses (B, T), None): nothing is carried from batch to batch."""
        return self(tokens, targets), None

    # ------------------------------------------------------------------ as every rung has it

    @torch.no_grad()
    def losses(self, tokens):
        """Return the nats (N - 1,), float64, of each token but the first."""
        tokens = torch.as_tensor(np.asarray(tokens, np.int64)).to(self.head.weight.device)
        contexts, targets = self.contexts(tokens[None, :-1])[0], tokens[1:]  # (N-1, n-1), (N-1,)
        # a part at a time, as the logits of all need too much memory
        losses = []
        for first in range(0, len(targets), CHUNK):
            chunk = slice(first, first + CHUNK)
            logits = self.head(self.features(contexts[chunk]))  # (CHUNK, V)
            losses.append(F.cross_entropy(logits, targets[chunk], reduction="none").double())
        return torch.cat(losses).cpu().numpy()

    def start(self):
        """Return the state before any token: a context of blanks."""
        return (self.blank,) * self.context

    @torch.no_grad()
    def step(self, token_id, state):
        """Return (log-probabilities of the next token (V,), float64, the new context)."""
        # the context moves on by one
        state = (*state[1:], token_id)
        x = self.features(torch.tensor(state, device=self.head.weight.device))  # (M,)
        return F.log_softmax(self.head(x).double(), -1).cpu().numpy(), state

    def size(self):
        return sum(p.numel() for p in self.parameters()), "parameters"
