"""Draw the next token of each row of a batch from the model's logits.

    settings = stack_settings([Sampling(0.8, 200, 1.0, V), Sampling(1.0, 0, 0.9, V)], device)
    ids, is_finite = sample_ids(logits, uniforms, settings)

Sizes: B rows, V vocabulary, k candidates.
"""

from typing import NamedTuple

import torch


class Sampling(NamedTuple):
    """How to draw the next token from the model's logits."""
    temperature: float  # divides the logits; 0: always take the most probable token
    top_k: int  # draw among this many most probable tokens; 0: among all
    top_p: float  # nucleus sampling: the smallest set of tokens with this total probability; 1: off
    vocab_size: int  # ids from here on only pad the embedding and are never drawn
    min_p: float = 0.0  # draw among tokens with this share of the largest probability; 0: off
    repetition_penalty: float = 1.0  # of the logits of tokens that the text has; 1: off

    @property
    def is_greedy(self):
        return self.temperature == 0 or self.top_k == 1


class Settings(NamedTuple):
    """The Sampling of each row as tensors (B, 1), float64, and what all rows together need."""
    temperature: torch.Tensor  # 1 where the row is greedy
    top_k: torch.Tensor  # int64; V where all tokens are candidates
    top_p: torch.Tensor
    min_p: torch.Tensor
    repetition_penalty: torch.Tensor
    is_greedy: torch.Tensor  # bool
    vocab_size: int
    all_greedy: bool
    sorted_count: int  # how many of the largest logits decide what a row leaves out; 0: none


def stack_settings(samplings, device):
    """Return the Settings of rows, each with a Sampling of its own for the same vocabulary."""
    # What is not in use is written as a value that changes nothing.
    vocab_size = samplings[0].vocab_size
    top_k, temperature, sorted_count = [], [], 0
    for sampling in samplings:
        k = vocab_size
        if sampling.top_k > 0:
            k = min(sampling.top_k, vocab_size)
        top_k.append(k)
        temperature.append(1.0 if sampling.is_greedy else sampling.temperature)
        # A row that leaves out tokens needs its largest logits in order.
        if k < vocab_size or sampling.top_p < 1:
            sorted_count = max(sorted_count, k)

    # One column for each setting.
    def column(values, dtype=torch.float64):
        return torch.tensor(values, dtype=dtype, device=device)[:, None]  # (B, 1)

    return Settings(
        column(temperature), column(top_k, torch.int64), column([s.top_p for s in samplings]),
        column([s.min_p for s in samplings]), column([s.repetition_penalty for s in samplings]),
        column([s.is_greedy for s in samplings], torch.bool), vocab_size,
        all(s.is_greedy for s in samplings), sorted_count)


def sample_ids(logits, uniforms, settings, seen=None):
    """Draw one id for each row of logits (B, V). Return (ids (B,) int64, are all logits finite ()).

    The distribution is softmax(logits / temperature), cut to the top_k most probable tokens and
    those as probable as the last of them, then to the nucleus of top_p (Holtzman et al. 2020,
    section 3.1), and to tokens with min_p times the largest probability (Nguyen et al. 2024). It is
    drawn from by inversion: uniforms, (B,) float64 in [0, 1), is looked up in the cumulative
    distribution over the ids in their order. So a seed, which gives the uniforms, means the same on
    every device, for every batch size and whatever the other rows' settings are. The drawing
    happens on the uniforms' device. seen: True for the ids that a row's text has, (B, V), where a
    row has a repetition penalty (Keskar et al. 2019, section 4.1).
    """
    # Leave out the ids that only pad the vocabulary.
    logits = logits[:, :settings.vocab_size].float().to(uniforms.device)  # (B, V)
    is_finite = logits.sum().isfinite()  # (): one pass, where isfinite().all() takes two
    # Make tokens that the text has less probable.
    if seen is not None:
        penalty = settings.repetition_penalty.float()  # (B, 1)
        penalized = torch.where(logits > 0, logits / penalty, logits * penalty)  # (B, V)
        logits = torch.where(seen, penalized, logits)  # (B, V)
    # Greedy: nothing is drawn.
    most_probable = logits.argmax(-1)  # (B,)
    if settings.all_greedy:
        return most_probable, is_finite

    # Weights in proportion to the probabilities; that of the most probable token is 1.
    largest = logits.amax(-1, keepdim=True)  # (B, 1)
    weights = weights_of(logits, largest, settings)  # (B, V)
    weights = weights.where(weights >= settings.min_p, 0)
    if settings.sorted_count > 0:
        limit = smallest_logit(logits, largest, settings)  # (B, 1)
        weights = weights.where(logits >= limit, 0)

    # Draw: the first id whose cumulative weight is above the uniform number's share of the total.
    cumulative = weights.cumsum(-1)  # (B, V)
    share = uniforms[:, None] * cumulative[:, -1:]  # (B, 1)
    drawn = torch.searchsorted(cumulative, share, right=True)  # (B, 1)
    drawn = drawn.clamp(max=settings.vocab_size - 1)[:, 0]  # (B,): no id is found among NaN
    return torch.where(settings.is_greedy[:, 0], most_probable, drawn), is_finite


def weights_of(logits, largest, settings):
    """Return exp((logits - largest) / temperature), (B, k): without the subtraction, a tiny
    temperature would overflow."""
    return torch.exp((logits - largest).double() / settings.temperature)  # (B, k)


def smallest_logit(logits, largest, settings):
    """Return the smallest logit (B, 1) that top_k and top_p leave in each row."""
    ordered = logits.topk(settings.sorted_count).values  # (B, k), the largest first
    k = ordered.shape[-1]
    top_k = settings.top_k.clamp(max=k)  # (B, 1)
    # Weights beyond top_k are no part of the nucleus.
    ranks = torch.arange(k, device=logits.device)  # (k,)
    weights = weights_of(ordered, largest, settings).where(ranks < top_k, 0)  # (B, k)
    # The nucleus ends at the first token at which the probabilities sum to top_p.
    cumulative = weights.cumsum(-1)  # (B, k)
    end = torch.searchsorted(cumulative, settings.top_p * cumulative[:, -1:])  # (B, 1)
    limit = ordered.gather(-1, torch.minimum(end, top_k - 1))  # (B, 1)
    # Rows that leave out nothing have no limit.
    cuts = (settings.top_p < 1) | (settings.top_k < settings.vocab_size)  # (B, 1)
    return limit.where(cuts, -torch.inf)
