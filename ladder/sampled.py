"""Training with a large vocabulary: a part of the softmax, drawn by lot.

    model.sampler = Sampler(training_tokens, vocab_size, count=1000)   # for training alone

Of a word-level model's work nine tenths are the logits of its 10,000 words, of which only one is
right. Bengio and Senecal (2003, "Quick Training of Probabilistic Neural Nets by Importance
Sampling") compare the right one with K others, drawn from a distribution q. Each of them stands for
1 / (K q) tokens, so that the sum of the exponentials is right on average, and the loss tends to the
real one as K grows. (See also Jean et al. 2015, arXiv:1412.2007.)
Sizes: N tokens, K draws, C channels, V vocabulary.
"""

import numpy as np
import torch
from torch.nn import functional as F

from model import IGNORE


def token_losses(model, x, targets):
    """Return the cross-entropies (B, T) of hidden states x (B, T, C) and targets (B, T), 0 where
    IGNORE: by model.head, or in training by model.sampler, if there is one."""
    x, flat = x.flatten(0, 1), targets.flatten()  # (B*T, C), (B*T,)
    if model.training and model.sampler:
        losses = model.sampler.losses(model.head, x, flat)  # (B*T,)
    else:
        losses = F.cross_entropy(model.head(x), flat, ignore_index=IGNORE, reduction="none")
    return losses.view_as(targets)


class Sampler:
    """Draws token ids in proportion to their frequency to the power of 3/4 (as Mikolov et al.
    2013): a frequent token is a likely mistake, but the rare ones have to be seen as well."""

    def __init__(self, tokens, vocab_size, count):
        frequencies = np.bincount(tokens, minlength=vocab_size) + 1.0  # (V,): none is impossible
        weights = frequencies ** 0.75
        self.cumulative = torch.as_tensor((weights / weights.sum()).cumsum())  # (V,)
        self.log_expected = torch.as_tensor(np.log(count * weights / weights.sum())).float()  # (V,)
        self.count = count

    def losses(self, head, x, targets):
        """Return an estimate of the cross-entropies (N,), with K draws that all tokens share.

        head: nn.Linear from C to V. x: hidden states (N, C). targets: (N,).
        """
        # draw, from torch's global generator
        uniform = torch.rand(self.count, dtype=torch.float64)  # (K,)
        drawn = torch.searchsorted(self.cumulative, uniform).clamp(max=len(self.cumulative) - 1)
        drawn, log_expected = drawn.to(x.device), self.log_expected.to(x.device)
        # the logits of the targets; those of what was drawn, less the log of how often it is
        target = targets.clamp(min=0)  # (N,)
        right = (x * head.weight[target]).sum(-1) + head.bias[target]  # (N,)
        wrong = F.linear(x, head.weight[drawn], head.bias[drawn]) - log_expected[drawn]  # (N, K)
        # a target that was drawn is not wrong
        wrong = wrong.masked_fill(drawn == target[:, None], -torch.inf)  # (N, K)
        losses = torch.cat([right[:, None], wrong], 1).logsumexp(1) - right  # (N,)
        return losses.where(targets != IGNORE, 0.0)
