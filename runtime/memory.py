"""How much memory training needs, how much there is, and how to need less."""

import os
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(model):
    """Let the backward pass compute each block again, with the same dropout, instead of keeping
    what is inside it (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost")."""
    for block in model.transformer.h:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def estimate_memory(model, batch_size, dtype, recompute=False):
    """Return an estimate of the bytes that training holds at its peak: (weights, gradients and
    AdamW's two moments, with autocast's copies; what a micro-step keeps for its backward pass).

    Per token and layer about 17 numbers of the model's width (Korthikanti et al. 2022, "Reducing
    Activation Recomputation"), and with dropout its two masks; attention's matrix where it is kept,
    which is with dropout on a CPU: three times. recompute: per layer its input alone, and one layer
    whole. Of the logits, the float32 log-softmax, its gradient and theirs, of a chunk at the most.
    """
    config, half = model.config, dtype != torch.float32
    on_cpu = next(model.parameters()).device.type == "cpu"
    state = (18 if half else 16) * sum(p.numel() for p in model.parameters())
    wide = 38 if half else 68  # bytes, of which half: some are float32 all the same
    layer = wide * config.n_embd
    if config.dropout:
        layer += (8 if on_cpu else 2) * config.n_embd
        layer += 12 * config.n_head * config.block_size if on_cpu else 0
    tokens = batch_size * config.block_size
    logits = min(tokens * config.vocab_size, model.chunk) * 12
    layers = tokens * (layer + 4 * config.n_embd * config.n_layer if recompute
                       else layer * config.n_layer)
    return state, layers + logits


def available_memory(device):
    """Return the bytes of the device's memory that are free or ours, or None: not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
