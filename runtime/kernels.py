"""Compilation, the choice of attention's kernel, 8-bit floats."""

import atexit
import math
import os
import statistics
import time
import warnings
from contextlib import ExitStack

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from configurator import UserError
from runtime.device import describe

# attention without its matrix (T, T) in memory, by names of our own
FUSED = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
         "efficient": SDPBackend.EFFICIENT_ATTENTION}
PICKED = ExitStack()  # holds the order that pick_attention found


def compile_model(model, choice, runtime):
    """Return torch.compile(model) where `choice` and the machine allow it, else the model.

    choice: 'auto' (on CUDA, unless a probe fails), 'True' (raises ValueError where it fails) or
    'False'. On CPU and MPS 'auto' is off: compiling takes longer than short runs save.
    """
    choice = choice.lower()
    if choice not in ("auto", "true", "1", "false", "0"):
        raise UserError(f"compile={choice!r}: choose auto, True or False")
    if choice in ("false", "0") or choice == "auto" and runtime.device.type != "cuda":
        return model
    try:
        probe = torch.compile(lambda x: (x * x).sin() + 1)
        probe(torch.ones(8, device=runtime.device))
    except Exception as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        if choice != "auto":
            raise UserError(f"compile=True does not work here ({cause}); "
                             "use --compile=False") from error
        runtime.print_main(f"compile: off, a probe failed ({cause})")
        return model
    return torch.compile(model)


def pick_attention(config, batch_size, runtime, repeats=10):
    """Time attention, forward and backward, at the model's sizes with each fused kernel; let torch
    try the fastest first from now on, on all processes alike; return a line that says so.

    What a kernel does not take, such as a mask, goes to the next, at last to the one that is not
    fused. A compiled graph keeps the kernel that was first when it was traced; torch's cache of
    graphs does not know of kernels (pytorch issue 185449), so its key gets a tag.
    """
    PICKED.close()
    H, K = config.n_head, config.kv_heads
    heads = torch.randn(batch_size, config.block_size, H + 2 * K, config.head_dim,
                        device=runtime.device, dtype=runtime.dtype).transpose(1, 2)
    q, k, v = (part.detach().requires_grad_() for part in heads.split([H, K, K], 1))

    def seconds(kernel):
        times = []
        try:
            for _ in range(2 + repeats):
                runtime.synchronize()
                began = time.perf_counter()
                with sdpa_kernel(kernel):
                    y = F.scaled_dot_product_attention(q, k, v, dropout_p=config.dropout,
                                                       is_causal=True, enable_gqa=K != H)
                torch.autograd.grad(y, (q, k, v), y)
                runtime.synchronize()
                times.append(time.perf_counter() - began)
        except RuntimeError:  # it does not take these, or memory is short
            return math.inf
        return statistics.median(times[2:])  # the first ones set it up

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why a kernel does not take these
        times = dict(zip(FUSED, runtime.all_max(*map(seconds, FUSED.values())), strict=True))
    best = min(times.values())  # as fast up to noise: as listed, the same in each run
    order = sorted(FUSED, key=lambda name: times[name] > 1.05 * best)
    PICKED.enter_context(sdpa_kernel([*(FUSED[name] for name in order), SDPBackend.MATH],
                                     set_priority=True))
    atexit.register(PICKED.close)  # before torch is taken down
    torch.compiler.config.cache_key_tag = " ".join(
        [os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", ""), *order])
    return "attention: " + ", ".join(
        f"{name} {1000 * times[name]:.2f} ms" if math.isfinite(times[name]) else f"not {name}"
        for name in order)


def use_fp8(model, runtime, emulate=False):
    """Let torchao multiply the blocks' matrices as 8-bit floats, each tensor scaled to its largest
    number (Micikevicius et al. 2022, "FP8 Formats for Deep Learning"), but for sizes that are no
    multiple of 16. Fast where compiled. The weights, as optimizers and checkpoints see them, stay
    the same tensors of the same names. emulate: rounds alike, on any device.

    Raises UserError where the device cannot, or torchao is missing."""
    if not emulate and (runtime.device.type != "cuda"
                        or torch.cuda.get_device_capability(runtime.device) < (8, 9)):
        raise UserError("fp8=True needs a CUDA GPU of compute capability 8.9 or higher (Ada, H100 "
                         f"and later), here is {describe(runtime)}; leave fp8 out")
    if model.config.block_size % 16:
        raise UserError(f"fp8=True with block_size={model.config.block_size}: it must be a "
                         "multiple of 16, as all sizes of such products")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError(f"fp8=True needs torchao ({error}); pip install torchao==0.18.0, or leave "
                         "fp8 out") from error
    convert_to_float8_training(
        model.transformer.h, config=Float8LinearConfig(emulate=emulate),
        module_filter_fn=lambda m, name: m.in_features % 16 == m.out_features % 16 == 0)
