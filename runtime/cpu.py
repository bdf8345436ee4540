"""What is faster on a CPU."""

import ctypes
import sys
import warnings
from functools import cache

import torch


def tune_cpu(device):
    """Choose what is faster on a CPU, and on no other device: what happens to freed memory, and how
    dropout draws (experiments/speed.md)."""
    if device.type == "cpu":
        keep_freed_memory()
        draw_dropout_by_bits()


@cache
def keep_freed_memory():
    """Tell glibc to keep what is freed for the next allocation. Else it gives each large tensor
    back to the system, and the next one's pages are mapped and zeroed again, with a fault each.
    Return whether there is a glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt if sys.platform == "linux" else None
    except AttributeError:  # musl
        mallopt = None
    # of malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD (never), M_TOP_PAD; 1 is success
    return bool(mallopt) and all([mallopt(-4, 0), mallopt(-1, -1), mallopt(-2, 1 << 26)])


@cache
def draw_dropout_by_bits():
    """Let torch's bernoulli_ on the CPU, which is dropout's mask, take 16 random bits for each
    number: a quarter of a draw of the generator instead of two whole ones. Probabilities are then
    multiples of 2**-16. Return what must be kept for as long as that is to last."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it replaces torch's own
        library.impl("bernoulli_.float", bernoulli_by_bits, "CPU", allow_override=True)
    return library


def bernoulli_by_bits(x, p=0.5, *, generator=None):
    """Fill x with 1 where a random 16-bit number is among the p * 2**16 smallest, else with 0."""
    if not 0 <= p <= 1:
        raise RuntimeError(f"bernoulli_ expects p to be in [0, 1], but got p={p}")
    ones = round(p * 2**16) - 2**15
    if ones == 2**15:
        return x.fill_(1)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64)
    bits = draws.random_(-2**63, None, generator=generator).view(torch.int16)
    return x.copy_((bits[:x.numel()] < ones).view(x.shape))
