"""The one loop that trains the neural rungs of the ladder, and where its batches come from.

    batches = random_windows(tokens, 32, 64, generator)    # for the MLP and the masked model
    batches = contiguous_chunks(tokens, 20, 35)            # for what carries a state: recurrent.py
    history = train(model, batches, measure, learning_rate=3e-3, seconds=60, label="lstm")

`measure` is a function without arguments that returns the validation loss. A model has

    advance(tokens, targets, state) -> (losses (B, T), the state after these tokens)

and the state begins the next batch; it is None where a model has none. AdamW and the schedule are
those of train.py; everything is in float32.
"""

import math
import time

import numpy as np
import torch

from configurator import UserError
from model import IGNORE
from runtime.terminal import Progress, say
from training.optim import adamw, lr_at

EVALUATIONS = 10  # during a run, for the picture


def train(model, batches, measure, learning_rate, seconds=0.0, max_iters=0, sgd=False,
          grad_clip=1.0, warmup_iters=100, label="training"):
    """Train a model for max_iters iterations, or, where that is 0, until `seconds` of training have
    passed; the cosine schedule ends there, at a hundredth of learning_rate.

    batches: yields (tokens, targets), each (B, T) int64. sgd: instead of AdamW. Return the history,
    a list of {"seconds", "iter", "train_loss", "val_loss"}, losses in nats per token: train_loss
    since the row before it, val_loss by `measure`, which costs no `seconds`.
    Raises UserError where the loss is not finite any more.
    """
    if not seconds and not max_iters:
        raise UserError("seconds=0 and max_iters=0: give the training one of the two")
    device = next(model.parameters()).device
    optimizer = adamw(model, learning_rate, 0.0, (0.9, 0.99))
    if sgd:
        optimizer = torch.optim.SGD(model.parameters(), learning_rate)
    history, losses_seen, state, iter_num, used, clock = [], [], None, 0, 0.0, 0.0
    progress = Progress(label, lambda: used)
    model.train()
    for tokens, targets in batches:
        # how much of the budget is used, and the learning rate there
        used = iter_num / max_iters if max_iters else clock / seconds
        # every tenth of the budget, and at the end: evaluate, while the clock stands still
        if used >= len(history) / EVALUATIONS:
            row = evaluation(model, measure, clock, iter_num, losses_seen)
            history.append(row)
            losses_seen = []
            say(f"{label}: iteration {iter_num:,}, {clock:.0f} s, val loss {row['val_loss']:.4f}")
        if used >= 1:
            break
        rate = lr_at(iter_num, learning_rate, learning_rate / 100, warmup_iters, 0,
                     budget_used=used)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # one update
        began = time.perf_counter()
        losses, state = model.advance(tokens.to(device), targets.to(device), state)
        loss = losses.sum() / (targets != IGNORE).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses_seen.append(loss.item())
        clock += time.perf_counter() - began
        # count it, and look at it
        if not math.isfinite(losses_seen[-1]):
            raise UserError(f"{label}: the loss of iteration {iter_num} is not finite; lower its "
                            f"learning rate, {learning_rate}")
        iter_num += 1
        progress.show()
    model.eval()
    return history


def evaluation(model, measure, seconds, iter_num, losses_seen):
    """Return a row of the history; train_loss is missing before the first iteration."""
    row = {"seconds": round(seconds, 2), "iter": iter_num}
    if losses_seen:
        row["train_loss"] = float(np.mean(losses_seen))
    model.eval()
    row["val_loss"] = float(measure())
    model.train()
    return row


# ---------------------------------------------------------------------- batches


def random_windows(tokens, batch_size, length, generator):
    """Yield (tokens, targets), each (B, T) int64, of windows at random places, without end.

    tokens: (N,) integers. generator: a torch.Generator. Raises UserError for too few tokens.
    """
    check_length(tokens, length + 1)
    tokens = torch.as_tensor(np.asarray(tokens, np.int64))  # (N,)
    while True:
        # a start for each row, then the tokens from there
        starts = torch.randint(len(tokens) - length, (batch_size, 1), generator=generator)  # (B, 1)
        rows = tokens[starts + torch.arange(length + 1)]  # (B, T + 1)
        yield rows[:, :-1], rows[:, 1:]


def contiguous_chunks(tokens, batch_size, length):
    """Yield (tokens, targets), each (B, T) int64: row b of each batch goes on where row b of the
    batch before it ended. Without end: after the last chunk comes the first again.

    The text is cut into B streams of equal length, so that a state that is carried from batch to
    batch is always that of the text just before. Raises UserError for too few tokens.
    """
    check_length(tokens, batch_size * length + 1)
    stream_length = (len(tokens) - 1) // batch_size
    used = batch_size * stream_length
    # row b is stream b; targets are the inputs, one token further
    tokens = torch.as_tensor(np.asarray(tokens, np.int64))  # (N,)
    inputs = tokens[:used].view(batch_size, stream_length)  # (B, S)
    targets = tokens[1:used + 1].view(batch_size, stream_length)  # (B, S)
    while True:
        # from the beginning of the streams to their end, chunk by chunk
        for first in range(0, stream_length - length + 1, length):
            chunk = slice(first, first + length)
            yield inputs[:, chunk], targets[:, chunk]


def check_length(tokens, needed):
    if len(tokens) < needed:
        raise UserError(f"the training split has {len(tokens):,} tokens, a batch needs {needed:,}; "
                        "prepare more text")
