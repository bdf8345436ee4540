"""What is done on a CPU only, each with what it is worth (experiments/speed.md).

    print(tune_cpu(device))            # once, at the start
    use_fast_dropout(model, device)    # in a model that is trained with dropout, not compiled
    use_fast_products(model, device)   # in a model that is used in float32, not trained
"""

import ctypes
import math
import platform
import sys
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

LARGE = 2**19  # numbers in a matrix, from which on oneDNN repays what calling it costs, 20 us
FEW_ROWS = 64  # up to so many rows it is faster


def tune_cpu(device):
    """Set what is faster on a CPU; do nothing on another device. Return a line that says what is
    on, or ''."""
    if device.type == "cpu" and keep_freed_memory():
        return "cpu: freed memory is kept"
    return ""


@cache
def keep_freed_memory():
    """Tell glibc to keep freed memory for the next allocation; return whether it does.

    Otherwise it returns each large tensor to the system, and the system has to map and clear the
    pages of the next one. Worth: less time in the system at batch size 64; nothing at batch
    size 12. It can cost memory, as glibc does not reuse an aligned block exactly.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    # The numbers are those of glibc's malloc.h; mallopt returns 1 for success.
    results = (
        mallopt(-4, 0),  # M_MMAP_MAX: large blocks come from the heap too
        mallopt(-1, -1),  # M_TRIM_THRESHOLD: the heap is never given back
        mallopt(-2, 1 << 26),  # M_TOP_PAD: the heap grows by 64 MB at a time
    )
    return results == (1, 1, 1)


def use_fast_dropout(model, device):
    """Let a GPT on a CPU draw its dropout masks by `dropout_by_bits`, those of attention too. A
    model without dropout, or on another device, stays as it is."""
    if device.type != "cpu":
        return
    # The modules stay in the model, under their names; what they call is another function.
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.forward = partial(apply_dropout, module)
        if hasattr(module, "attend") and module.dropout > 0:
            module.attend = attention_with_dropout


def apply_dropout(module, x):
    return dropout_by_bits(x, module.p, module.training)


def attention_with_dropout(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                           enable_gqa=False):
    """Return what F.scaled_dot_product_attention returns, with masks of `dropout_by_bits`.

    Without dropout it is that function. With dropout torch has no fused kernel for CPUs either: it
    computes what stands below, with (B, H, T, T) draws of its own.
    """
    if dropout_p == 0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal,
                                              scale=scale, enable_gqa=enable_gqa)
    if is_causal:
        attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()  # (T, T)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    # As torch does it: in float32, with the root of the scale on each side.
    root, dtype = math.sqrt(scale), q.dtype
    q, k, v = q.float(), k.float(), v.float()
    if enable_gqa:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # (B, H, T, D)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)  # (B, H, T, D)
    # A weight for each pair of positions that may see each other, some of them dropped.
    with torch.autocast("cpu", enabled=False):
        scores = (q * root) @ (k.mT * root)  # (B, H, T, T)
        if attn_mask is not None:
            scores = scores.masked_fill_(~attn_mask, -math.inf)
        weights = dropout_by_bits(torch.softmax(scores, -1), dropout_p)  # (B, H, T, T)
        return (weights @ v).to(dtype)  # (B, H, T, D)


def dropout_by_bits(x, p, training=True):
    """Return x with each element zeroed with probability p and the others divided by 1 - p, as
    F.dropout does. 1 - p is rounded to a multiple of 2**-16.

    p: at least 0 and below 1. The random numbers are those of torch's CPU generator: 16 bits decide
    about one element, a quarter of a draw, where torch takes two draws.
    Worth: with torch's own dropout a 6 x 384 model with dropout 0.2 takes 1.17 times as long.
    """
    # Below 2**-17 the probability is rounded to 0.
    if not training or p <= 2**-17:
        return x
    # Four numbers of 16 bits from each draw of 64.
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None)
    numbers = draws.view(torch.int16)[:x.numel()].view(x.shape)
    # Keep an element where its number, from -2**15 to 2**15 - 1, is among the smallest.
    kept = numbers < round((1 - p) * 2**16) - 2**15
    return x * kept.to(x.dtype).div_(1 - p)


def use_fast_products(model, device):
    """Let a GPT on a CPU multiply few tokens by its large matrices with oneDNN: for inference.

    What limits such a product is reading the matrix, once for each new token of a text. For float32
    torch calls MKL, which on an AMD EPYC reads at half of what the memory gives; on an Intel Xeon
    it is at the limit, and stays.
    Worth: GPT-2 124M samples 1.3 times as fast, 8 samples 1.5 times (experiments/sampling.md).
    """
    if device.type != "cpu" or not mkl_is_slow():
        return
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(apply_linear, module)
    # The head of a tied model is no module of its own. A quantized one has its own product.
    if model.head_weight.is_floating_point():
        model.head = partial(apply_head, model)


@cache
def mkl_is_slow():
    """Return whether float32 products go to MKL on a processor of AMD's, and oneDNN is there."""
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    # Linux says who made the processor in a file, Windows in the processor's name.
    maker = platform.processor()
    with suppress(OSError):
        maker += Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return "AuthenticAMD" in maker


def apply_linear(module, x):
    return multiply(x, module.weight, module.bias)


def apply_head(model, x):
    return with_softcap(model, multiply(x, model.head_weight))


def with_softcap(model, logits):
    """Return the logits (..., V) of the head's products, as GPT.head does."""
    softcap = model.config.softcap
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


def multiply(x, weight, bias=None):
    """Return what F.linear returns: x (..., K), weight (N, K), bias (N,) or None, to (..., N)."""
    # Whether oneDNN is faster, and can take the place of what autocast and the compiler see.
    rows = x.numel() // x.shape[-1]
    is_float32 = x.dtype == weight.dtype == torch.float32
    suits = is_float32 and rows <= FEW_ROWS and weight.numel() >= LARGE
    if not suits or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    # torch's own compiler calls it so; "none": no activation after the product.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
