"""Training with a large vocabulary: a part of the softmax, drawn by lot.

    model.sampler = Sampler(training_tokens, vocab_size, count=1000)   # for training alone

Of a word-level model's work nine tenths are the logits of its 10,000 words, of which only one is
right. Here the right one is compared with a part of the others: each is in it with a probability of
its own. Subtracting the logarithm of this probability from the logit makes up for it, so that the
best logits are those of the whole softmax (McFadden 1978, "Modelling the Choice of Residential
Location", the sampling of alternatives; in language models Bengio and Senecal 2003, Jean et al.
2015, arXiv:1412.2007). What it is worth: experiments/ladder.md.
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
    """Includes each token with a probability that grows with its frequency to the power of 3/4 (as
    Mikolov et al. 2013): a frequent token is a likely mistake, but rare ones have to be seen too.
    """

    def __init__(self, tokens, vocab_size, count):
        """tokens: the training text (N,). count: how many are drawn, about."""
        # the probability of each token to be in a draw; frequent ones are in all draws
        frequencies = np.bincount(tokens, minlength=vocab_size) + 1.0  # (V,): none is impossible
        weights = frequencies ** 0.75
        included = (count * weights / weights.sum()).clip(max=1)  # (V,)
        self.included = torch.as_tensor(included).float()

    def losses(self, head, x, targets):
        """Return the losses (N,) of hidden states x (N, C) and targets (N,), 0 where IGNORE. All
        tokens share a draw. head: nn.Linear from C to V."""
        # draw, from torch's global generator
        drawn = (torch.rand(len(self.included)) < self.included).nonzero()[:, 0]  # (K,)
        drawn, log_included = drawn.to(x.device), self.included.to(x.device).log()
        # the logits of the targets and of what was drawn, corrected
        target = targets.clamp(min=0)  # (N,)
        right = (x * head.weight[target]).sum(-1) + head.bias[target] - log_included[target]  # (N,)
        wrong = F.linear(x, head.weight[drawn], head.bias[drawn]) - log_included[drawn]  # (N, K)
        # a target that was drawn is not wrong
        wrong = wrong.masked_fill(drawn == target[:, None], -torch.inf)  # (N, K)
        losses = torch.cat([right[:, None], wrong], 1).logsumexp(1) - right  # (N,)
        return losses.where(targets != IGNORE, 0.0)
