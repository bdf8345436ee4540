"""AdamW with GPT-2's parameter groups, and the learning-rate schedule. Needs torch alone."""

import math

import torch

FUSED = ("cuda", "cpu", "mps", "xpu")  # devices with a one-kernel AdamW in torch 2.9 and later


def adamw(model, learning_rate, weight_decay, betas):
    """Return AdamW over two groups: matrices and embeddings decay, biases and LayerNorms do not.

    Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization". Every parameter that
    requires a gradient is in exactly one group.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in FUSED for p in parameters)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def lr_at(iter_num, learning_rate, min_lr, warmup_iters, lr_decay_iters):
    """Return the learning rate of one iteration: linear warm-up, then a cosine down to min_lr.

    The first iteration is already above 0, the peak is reached at warmup_iters, min_lr at
    lr_decay_iters (Radford et al. 2018; nanoGPT's get_lr).
    """
    if iter_num < warmup_iters:
        return learning_rate * (iter_num + 1) / (warmup_iters + 1)
    if iter_num >= lr_decay_iters:
        return min_lr
    progress = (iter_num - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)
