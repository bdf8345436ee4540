"""Quantized weights: int8 in place of the float32 of a GPT's matrices. A quarter of the memory, and
faster sampling, as each new token needs all of the weights once.

    quantize(model)                # changes a GPT in place; afterwards it can only be used
    replace_matrices(model)        # the same without values, for those of a file to be loaded into

A matrix W (N, K) becomes integers (N, K) from -127 to 127 and scales (N,) in float32: W is about
integers * scales, each row with a scale of its own, max |W| / 127 (LLM.int8() without its outliers,
Dettmers et al. 2022, section 2.1). Quantized are the matrices in the blocks, the head, and the
tables of tokens; position embeddings, norms, biases and what is small stay in float32. The names in
model.safetensors: "transformer.h.0.attn.c_attn.integers" and "....c_attn.scales".

On a CPU, a product with few rows is torch's own kernel for such weights, which multiplies in
bfloat16 and is not vectorized for any other number format (experiments/weights.md). A product with
many rows, and all on other devices, turn the weights into floats first, which torch.compile fuses
with the product on CUDA.
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from runtime.cpu import with_softcap

KINDS = ("int8",)
LINEARS = ("c_attn", "c_proj", "c_fc", "lm_head")
TABLES = ("wte", "value_embed")
FEW_ROWS = 16  # up to so many the kernel is faster than turning the weights into floats
COLUMNS_AT_ONCE = 64  # it reads beyond a row whose length is no multiple of its vectors', and dies


class QuantizedMatrix(nn.Module):
    """The integers and scales of a matrix (N, K). `weight` is what they stand for."""

    def __init__(self, layer):
        """layer: the Linear or the Embedding whose place it takes; its values are not read."""
        super().__init__()
        (N, K), device = layer.weight.shape, layer.weight.device
        self.register_buffer("integers", torch.empty(N, K, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.empty(N, device=device))
        self.bias = getattr(layer, "bias", None)

    @torch.no_grad()
    def fill(self, weight):
        """Round a matrix (N, K) to the nearest integers times scales."""
        scales = weight.abs().amax(1) / 127  # (N,)
        scales = scales.clamp(min=torch.finfo(torch.float32).tiny)  # of a row of zeros
        self.integers.copy_((weight / scales[:, None]).round())
        self.scales.copy_(scales)

    @property
    def weight(self):
        return self.integers * self.scales[:, None]  # (N, K), float32

    def multiply(self, x):
        """Return what a Linear with this matrix (N, K) returns for x (..., K): (..., N), in
        autocast's number format where that is on."""
        rows = x.numel() // x.shape[-1]
        # Many rows, or none that the kernel can read: multiply in floats.
        has_kernel = x.device.type == "cpu" and x.shape[-1] % COLUMNS_AT_ONCE == 0
        if not has_kernel or rows > FEW_ROWS:
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        # the kernel; with scales of 1, because it would round ours to bfloat16
        ones = torch.ones_like(self.scales, dtype=torch.bfloat16)
        y = torch._weight_int8pack_mm(x.reshape(rows, -1).bfloat16(), self.integers, ones)
        y = y * self.scales
        if self.bias is not None:
            y = y + self.bias
        # the number format of a Linear
        dtype = x.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        return y.to(dtype).view(*x.shape[:-1], -1)


class QuantizedLinear(QuantizedMatrix):
    def forward(self, x):
        return self.multiply(x)


class QuantizedEmbedding(QuantizedMatrix):
    def forward(self, tokens):
        return self.integers[tokens] * self.scales[tokens][..., None]  # (B, T, C)


def quantize(model):
    """Quantize the matrices of a GPT, in place."""
    # Each new matrix gets the values of the one whose place it has taken.
    for name, layer in replace_matrices(model).items():
        model.get_submodule(name).fill(layer.weight)


def replace_matrices(model):
    """Put quantized matrices, whose values are not set, in the place of a GPT's. Return {name: the
    Linear or Embedding that was there}."""
    replaced = {}
    for name, layer in list(model.named_modules()):
        # What a layer is, its name says.
        last = name.rpartition(".")[2]
        if last in LINEARS:
            model.set_submodule(name, QuantizedLinear(layer))
        elif last in TABLES:
            model.set_submodule(name, QuantizedEmbedding(layer))
        else:
            continue
        replaced[name] = layer
    # The head of a tied model is the table of tokens, which now multiplies.
    model.head = partial(quantized_head, model)
    return replaced


def quantized_head(model, x):
    """What GPT.head computes, without turning the head's integers into floats for each token."""
    head = model.transformer.wte
    if not model.config.tied:
        head = model.lm_head
    return with_softcap(model, head.multiply(x))  # (..., V)
