"""The loss of a large vocabulary in little memory.

    chunk_losses(model)   # from then on the model's losses never need all logits at once

GPT-2 has 50,304 logits per token: a micro-batch of 12 x 1,024 tokens makes 2.5 GB of them in
float32, and as much again for each of the steps to their gradient. Here they are made a chunk at a
time, and the gradients of the hidden states and of the head are computed with the losses, while the
chunk's logits are there. torch.utils.checkpoint would do the same in eight lines, but computes the
logits twice and takes 1.4 times as long (experiments/speed.md): so the backward pass below is
written by hand.
"""

from functools import partial

import torch
from torch.nn import functional as F

from model import IGNORE

LOGITS_AT_ONCE = 2**25  # 128 MB in float32


def chunk_losses(model, logits_at_once=LOGITS_AT_ONCE):
    """Let a GPT compute its losses in chunks of at most so many logits."""
    rows = max(1, logits_at_once // model.config.vocab_size)
    model.token_losses = partial(chunked_losses, model, type(model).token_losses, rows)


def chunked_losses(model, whole_losses, rows, x, targets):
    """Return the losses (N,) of hidden states x (N, C) and targets (N,), in chunks of `rows`.

    whole_losses: the model's own way, for what is small, and for a compiled graph: it fuses the
    loss with the head, and keeps no float32 logits either.
    """
    if len(x) <= rows or torch.compiler.is_compiling():
        return whole_losses(model, x, targets)
    return ChunkedLosses.apply(x, model.head_weight, targets, model.config.softcap, rows,
                               torch.is_grad_enabled())


class ChunkedLosses(torch.autograd.Function):
    """The cross-entropy of the head for N tokens, in chunks of tokens.

    The gradients are computed for the sum of the losses. Where a caller takes the sum, all losses
    have the same gradient, which autograd passes as one number, expanded: the gradients then only
    need to be scaled. Any other gradient computes them again.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, softcap, rows, needs_gradients):
        """x: hidden states (N, C); weight (V, C); targets (N,). Return the losses (N,)."""
        ctx.softcap, ctx.rows = softcap, rows
        ctx.dtypes = x.dtype, weight.dtype
        # the products are done in autocast's number format, all else in float32
        device, dtype = x.device.type, weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        scale = torch.ones_like(targets, dtype=torch.float32) if needs_gradients else None
        with torch.autocast(device, enabled=False):
            losses, *gradients = losses_and_gradients(x, weight, targets, softcap, rows, scale)
        ctx.save_for_backward(x, weight, targets, *gradients)
        return losses  # (N,)

    @staticmethod
    def backward(ctx, scale):
        """scale: (N,) the gradient of the losses."""
        x, weight, targets, *gradients = ctx.saved_tensors
        if scale.stride() == (0,):  # one number, expanded
            dx, dw = [gradient * scale[0] for gradient in gradients]
        else:
            _, dx, dw = losses_and_gradients(x, weight, targets, ctx.softcap, ctx.rows, scale)
        return dx.to(ctx.dtypes[0]), dw.to(ctx.dtypes[1]), None, None, None, None


def losses_and_gradients(x, weight, targets, softcap, rows, scale=None):
    """Return (losses (N,), gradient of x (N, C), gradient of weight (V, C)); the losses alone where
    scale is None. The products are in the number format of x and weight, all else in float32.

    scale: (N,) the gradient of each loss.
    """
    losses, dx = [], []
    if scale is not None:
        dw = torch.zeros_like(weight, dtype=torch.float32)  # (V, C)
    for first in range(0, len(x), rows):
        chunk = slice(first, first + rows)
        # the losses of this chunk of n tokens; an ignored target counts as token 0, times 0
        counts = (targets[chunk, None] != IGNORE).float()  # (n, 1)
        target = targets[chunk, None].clamp(min=0)  # (n, 1)
        logits = F.linear(x[chunk], weight).float()  # (n, V)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)  # (n, V)
        log_probs = F.log_softmax(logits, -1)  # (n, V)
        losses.append((-log_probs.gather(-1, target) * counts)[:, 0])
        if scale is None:
            continue
        # the gradient of the logits: the probabilities, and 1 less for the target
        slope = log_probs.exp_()  # (n, V)
        slope.scatter_add_(-1, target, -torch.ones_like(target, dtype=slope.dtype))
        slope *= counts * scale[chunk, None]
        if softcap:  # tanh' = 1 - tanh^2
            slope *= 1 - (logits / softcap).square_()
        # the gradients of the product
        slope = slope.to(x.dtype)  # (n, V)
        dx.append(slope @ weight)  # (n, C)
        dw += slope.T @ x[chunk]  # (V, C)
    if scale is None:
        return [torch.cat(losses)]
    return torch.cat(losses), torch.cat(dx), dw
