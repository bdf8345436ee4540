"""How probable a model finds a continuation after its context: what all tasks are scored by.

    scorer = Scorer(model, tokenizer, runtime)
    scorer.score([("The sky is", " blue"), ("The sky is", " green")])
    # [Score(log_likelihood=-2.1, is_greedy=True), Score(log_likelihood=-5.3, is_greedy=False)]

The protocol is that of EleutherAI's lm-evaluation-harness (version 0.4.13, lm_eval/api/model.py and
models/huggingface.py), so the numbers are comparable with what others publish.

The choices of a question have the same context, which is computed once: contexts of equal length
are read together, without padding, into a cache of keys and values; each continuation then goes on
from a copy of its context's, together with others of about its length.

Sizes: G contexts of L tokens, R continuations of at most T tokens, V ids in the vocabulary.
"""

import sys
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch

from configurator import UserError
from model import IGNORE
from runtime.processes import gathered

LOGITS_AT_ONCE = 2**24  # 64 MB in float32


class Score(NamedTuple):
    """Of a continuation."""
    log_likelihood: float  # in nats, the sum over its tokens
    is_greedy: bool  # whether each of its tokens is the model's most probable one


class Window(NamedTuple):
    """A context and a continuation as the model sees them: token ids, cut to its block size."""
    context: tuple  # at least one
    continuation: tuple  # at least one


class Scorer:
    """Scores texts, or token ids, with a model on its device.

    tokens_at_once: limits a batch. share_out: let each process score a share of the batches; with
    FSDP all must score all, since they gather the weights together. Afterwards `cut` is the number
    of requests that were longer than the model's block_size and lost their first tokens.
    """

    def __init__(self, model, tokenizer, runtime, tokens_at_once=8192, share_out=True):
        self.model, self.tokenizer, self.runtime = model, tokenizer, runtime
        self.tokens_at_once, self.share_out = tokens_at_once, share_out
        self.cut = 0

    def score(self, requests, progress=None):
        """Return the Score of each request (context, continuation), two texts."""
        return self.score_ids([self.encode(*request) for request in requests], progress)

    def encode(self, context, continuation):
        """Return the token ids of a context and of its continuation, two lists.

        Both are encoded as one text, and the continuation gets the tokens after the context's own:
        "the" + " cat" gives the token " cat", as in a text that the model was trained on. Spaces at
        the end of the context go to the continuation for the same reason.
        """
        stripped = context.rstrip()
        continuation = context[len(stripped):] + continuation
        if not stripped:
            return [self.end_of_text()], self.tokenizer.encode(continuation).tolist()
        context_ids = self.tokenizer.encode(stripped).tolist()
        ids = self.tokenizer.encode(stripped + continuation).tolist()
        # where the context's last token takes in the whole continuation, that token is scored
        if len(ids) <= len(context_ids):
            return ids[:-1] or [self.end_of_text()], ids[-1:]
        return context_ids, ids[len(context_ids):]

    def end_of_text(self):
        if self.tokenizer.eot is None:
            raise UserError("a text without a context needs the end-of-text token in front of it, "
                            "and this model's tokenizer has none; prepare the text as documents, "
                            "or with --tokenizer=bytes, and train again")
        return self.tokenizer.eot

    def score_ids(self, pairs, progress=None):
        """Return the Score of each pair (context ids, continuation ids), each at least one id.

        progress: called with the share that is done, after each batch.
        """
        # Put equal contexts together, then contexts of equal length.
        windows = [self.cut_to_block_size(*pair) for pair in pairs]
        batches = make_batches(windows, self.tokens_at_once)
        first, step = 0, 1
        if self.share_out:
            first, step = self.runtime.rank, self.runtime.world_size

        # Score this process's share of the batches.
        results = torch.zeros(len(pairs), 2, dtype=torch.float64)  # log-likelihood, is greedy
        done = 0
        with (evaluating(self.model), gathered(self.model), torch.no_grad(),
              self.runtime.autocast()):
            for batch in batches[first::step]:
                numbers, scores = self.score_batch(batch, windows)
                results[numbers] = scores
                done += len(numbers)
                if progress:
                    progress(done * step / len(pairs))

        # All processes get all results: each left 0 where another has scored.
        if step > 1:
            results = self.runtime.sum(results.to(self.runtime.device)).cpu()
        return [Score(log_likelihood, bool(greedy)) for log_likelihood, greedy in results.tolist()]

    def cut_to_block_size(self, context, continuation):
        """Return the Window of the last block_size + 1 ids, of which the last is only a target."""
        size = self.model.config.block_size + 1
        if len(context) + len(continuation) > size:
            self.cut += 1
            continuation = continuation[-(size - 1):]
            context = context[-(size - len(continuation)):]
        return Window(tuple(context), tuple(continuation))

    def score_batch(self, groups, windows):
        """Return the results of the windows that the groups name by their numbers: the numbers, and
        (R, 2) float64 on the CPU, log-likelihood, and 1 where greedy. The windows of a group have
        the same context, and all contexts are of one length."""
        rows = []  # of each continuation: its group, its number
        for i, group in enumerate(groups):
            rows += [(i, number) for number in group]
        # The longest continuation first.
        rows.sort(key=lambda row: len(windows[row[1]].continuation), reverse=True)
        numbers = [number for _, number in rows]

        # Read the contexts, but for their last ids, from which the continuations go on.
        contexts = [windows[group[0]].context for group in groups]
        L, cache = len(contexts[0]), None
        if L > 1:
            prefixes = torch.tensor(contexts, device=self.runtime.device)[:, :-1]  # (G, L - 1)
            T = len(windows[numbers[0]].continuation)
            cache = self.model.make_cache(len(groups), self.runtime.dtype, L - 1 + T)
            self.model.hidden(prefixes, cache, 0)

        # Read the continuations, those of about the same length together. Each has a copy of its
        # context's cache.
        results = []
        lengths = [len(windows[number].continuation) for number in numbers]
        for first, last in split_by_length(lengths, self.tokens_at_once // 32):
            own_cache = None
            if cache:
                group_of = torch.tensor([i for i, _ in rows[first:last]])
                group_of = group_of.to(self.runtime.device)  # (n,)
                end = L - 1 + lengths[first]
                own_cache = [(k[group_of, :, :end], v[group_of, :, :end]) for k, v in cache]
            last_ids = [contexts[i][-1] for i, _ in rows[first:last]]
            continuations = [windows[number].continuation for number in numbers[first:last]]
            results.append(self.score_continuations(last_ids, continuations, own_cache, L - 1))
        return numbers, torch.cat(results)

    def score_continuations(self, last_ids, continuations, cache, start):
        """Return (R, 2) as score_batch does, of continuations that follow last_ids, the last id of
        each context. cache: of what is before these, `start` ids, or None where there is nothing.
        The first continuation is the longest."""
        # Each continuation is predicted from its context's last id onwards.
        inputs, targets = [], []
        T = len(continuations[0])
        for last_id, ids in zip(last_ids, continuations, strict=True):
            padding = T - len(ids)
            inputs.append([last_id, *ids[:-1]] + [0] * padding)
            targets.append([*ids] + [IGNORE] * padding)
        inputs = torch.tensor(inputs, device=self.runtime.device)  # (R, T)
        targets = torch.tensor(targets, device=self.runtime.device)  # (R, T)
        x = self.model.hidden(inputs, cache, start)  # (R, T, C)

        # Sum up each row's targets.
        is_target = targets != IGNORE  # (R, T)
        log_probs, hits = self.target_log_probs(x[is_target], targets[is_target])  # each (N,)
        rows = is_target.nonzero()[:, 0].cpu()  # (N,)
        sums = torch.zeros(len(inputs), 2, dtype=torch.float64)
        sums[:, 0].index_add_(0, rows, log_probs.cpu().double())
        sums[:, 1].index_add_(0, rows, hits.cpu().double())
        sums[:, 1] = sums[:, 1] == is_target.sum(1).cpu()  # all of them
        return sums

    def target_log_probs(self, x, targets):
        """Return, of hidden states x (N, C) and targets (N,), the log-probability of each target
        and whether it is the most probable id, each (N,). Ids that only pad the vocabulary have no
        probability."""
        V = self.tokenizer.vocab_size
        log_probs, hits = [], []
        rows = max(1, LOGITS_AT_ONCE // V)
        for chunk_x, chunk_targets in zip(x.split(rows), targets.split(rows), strict=True):
            logits = self.model.head(chunk_x)[:, :V].float()  # (n, V)
            all_log_probs = torch.log_softmax(logits, -1)  # (n, V)
            log_probs.append(all_log_probs.gather(-1, chunk_targets[:, None])[:, 0])
            hits.append(logits.argmax(-1) == chunk_targets)
        return torch.cat(log_probs), torch.cat(hits)


def make_batches(windows, tokens_at_once):
    """Return batches: lists of groups, which are lists of numbers of windows with equal contexts.

    The contexts of a batch have one length. Its continuations, each with its context, have at most
    tokens_at_once tokens with their padding, unless a single group has more. The longest come
    first, so that memory runs out at the start or never.
    """
    # Group the windows by their contexts.
    groups = {}
    for number, window in enumerate(windows):
        groups.setdefault(window.context, []).append(number)
    # Sort the groups by the length of the context, then by that of the longest continuation.
    by_length = []
    for context, group in groups.items():
        longest = max(len(windows[number].continuation) for number in group)
        by_length.append((len(context), len(context) + longest, group))
    by_length.sort(reverse=True)

    # Fill one batch after the other. The first group of a batch has the longest continuation.
    batches, batch_length, rows, widest = [], None, 0, 0
    for length, tokens, group in by_length:
        is_full = (rows + len(group)) * widest > tokens_at_once
        if length != batch_length or is_full:
            batches.append([])
            batch_length, rows, widest = length, 0, tokens
        batches[-1].append(group)
        rows += len(group)
    return batches


def split_by_length(lengths, least_tokens):
    """Yield (first, last) of the pieces of a list of descending lengths: a piece ends before a
    length below 4/5 of its longest, which would be mostly padding, but has least_tokens tokens with
    its padding, since a small batch costs almost as much time as a larger one."""
    first = 0
    for i, length in enumerate(lengths):
        tokens = (i - first) * lengths[first]
        if tokens >= least_tokens and length < 0.8 * lengths[first]:
            yield first, i
            first = i
    yield first, len(lengths)


@contextmanager
def evaluating(model):
    """Run a model without dropout, and without compiling it for each new shape."""
    eager = nullcontext()
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and to import it takes seconds
        eager = torch.compiler.set_stance("force_eager")
    was_training = model.training
    model.eval()
    try:
        with eager:
            yield
    finally:
        model.train(was_training)
