"""GPT-2: the maths of the model, its first weights, and its weights on disk. Needs torch alone.

    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128))
    losses = model(tokens, targets)   # (B, T) loss of each token; 0 where the target is IGNORE
    logits = model.logits(tokens)     # (B, T, V)
    cache = model.make_cache(B)       # keys and values, to give it one token more at a time:
    x = model.hidden(tokens, cache, start)[:, -1]  # tokens are at positions start, start + 1, ...

Sizes, everywhere: B batch, T time, C channels (n_embd), H heads, D head dim, V vocabulary,
S positions that keys and values are kept of.
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; the details are those
of OpenAI's code, github.com/openai/gpt-2, src/model.py.
"""

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

IGNORE = -1  # a target that has no loss


@dataclass
class GPTConfig:
    """Sizes and switches of a model; the defaults are GPT-2 124M."""
    block_size: int = 1024  # longest sequence, tokens
    vocab_size: int = 50304  # rows of the embedding: GPT-2's 50257, padded to a multiple of 128
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{field.name}={value}: must be 1 or more, a whole number")
        if self.n_embd % self.n_head:
            near = min((h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0),
                       key=lambda h: abs(h - self.n_head))
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; "
                             f"the nearest n_head that divides it is {near}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be at least 0 and below 1")


class CausalSelfAttention(nn.Module):
    """Each position attends to itself and to the positions before it."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x, cache=None, positions=None, mask=None):
        B, T, C = x.shape
        qkv = self.c_attn(x)  # (B, T, 3*C)
        q, k, v = qkv.view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is not None:  # (2, B, H, S, D): write the new positions, read them all
            cache[0].index_copy_(2, positions, k)
            cache[1].index_copy_(2, positions, v)
            k, v = cache  # each (B, H, S, D)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p,
                                           is_causal=mask is None and T > 1)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        y = self.c_proj(y)  # (B, T, C)
        return F.dropout(y, self.dropout, self.training)  # (B, T, C)


class MLP(nn.Module):
    """Four times wider inside; GPT-2's GELU is the tanh approximation."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4*C)
        x = self.c_proj(x)  # (B, T, C)
        return F.dropout(x, self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream after a LayerNorm of its input."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, positions=None, mask=None):
        x = x + self.attn(self.ln_1(x), cache, positions, mask)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class GPT(nn.Module):
    """The transformer. Its parameters bear nanoGPT's names; the head is the token embedding."""

    def __init__(self, config, generator=None):
        """generator: a CPU torch.Generator for the first weights; None takes torch's own."""
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """GPT-2's: N(0, 0.02), biases 0; the two projections into the residual stream are scaled
        by 1/sqrt(2 n_layer), one for each addition to it (Radford et al. 2019, section 2.3)."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                p.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer), generator=generator)
            elif p.dim() == 2:
                p.normal_(0.0, 0.02, generator=generator)
            elif name.endswith("bias"):
                p.zero_()
            else:  # LayerNorm
                p.fill_(1.0)

    def make_cache(self, batch_size, dtype=None):
        """Room for the keys and values of `batch_size` sequences of block_size tokens,
        (n_layer, 2, B, H, block_size, D), for `hidden`; of the weights' device. dtype: that of the
        matrix products (under autocast not the weights')."""
        c = self.config
        return self.transformer.wpe.weight.new_zeros(
            c.n_layer, 2, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head, dtype=dtype)

    def hidden(self, tokens, cache=None, start=0):
        """Token ids (B, T) to the last hidden states (B, T, C). Raises ValueError for a position
        beyond block_size: there are none there.

        cache: from make_cache; tokens are then those at positions start to start + T - 1, which
        are written into it and attend to what it holds before them. start: an int; or an int64
        tensor () below block_size, unchecked, for the same shapes, and one CUDA graph, at every
        position: the whole cache is then read, under a mask.
        """
        B, T = tokens.shape
        size = self.config.block_size
        fixed = isinstance(start, torch.Tensor)
        end = size if fixed else start + T
        if end > size:
            raise ValueError(f"a sequence of {end} tokens is longer than the model's "
                             f"block_size={size}; give it at most that many")
        positions = torch.arange(T, device=tokens.device) + start  # (T,)
        mask = None  # which means causal, or all that there is for a single token
        if cache is not None and (fixed or start > 0 and T > 1):
            mask = torch.arange(end, device=tokens.device) <= positions[:, None]  # (T, S)
        x = self.transformer.wte(tokens) + self.transformer.wpe(positions)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)  # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            layer = None if cache is None else cache[i, ..., :end, :]  # (2, B, H, S, D)
            x = block(x, layer, positions, mask)  # (B, T, C)
        return self.transformer.ln_f(x)  # (B, T, C)

    def head(self, x):
        """Hidden states (..., C) to logits (..., V), with the token embedding as the matrix."""
        return F.linear(x, self.transformer.wte.weight)  # (..., V)

    def logits(self, tokens):
        """Token ids (B, T) to the logits of the next token, (B, T, V)."""
        return self.head(self.hidden(tokens))  # (B, T, V)

    def forward(self, tokens, targets):
        """Return the cross-entropy in nats of each target, (B, T), float32; 0 where IGNORE.

        tokens, targets: (B, T) int64. The caller divides the sum by the number of targets, which
        it alone knows when a batch is accumulated or shared out over devices.
        """
        logits = self.logits(tokens)  # (B, T, V)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                                 ignore_index=IGNORE, reduction="none")  # (B*T,)
        return losses.view_as(targets)  # (B, T)

    def crop_block_size(self, block_size):
        """Forget the positions from `block_size` on, to train or sample with shorter sequences."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size}: this model has positions 1 to "
                             f"{self.config.block_size}")
        self.config = replace(self.config, block_size=block_size)  # others may share the old one
        weight = self.transformer.wpe.weight[:block_size].detach().clone()
        self.transformer.wpe = nn.Embedding.from_pretrained(weight, freeze=False)

    def parameter_count(self):
        """The number of parameters, without the position embedding (nanoGPT's way of counting)."""
        return sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()

    def flops_per_token(self):
        """FLOPs of a forward and a backward pass for one token of a sequence of block_size:
        6 N + 12 n_layer C T (Chowdhery et al. 2022, PaLM, appendix B)."""
        c = self.config
        return 6 * self.parameter_count() + 12 * c.n_layer * c.n_embd * c.block_size


def save_weights(model, folder):
    """Write a model's weights into an existing folder, as model.safetensors."""
    from safetensors.torch import save_file

    path = Path(folder) / "model.safetensors"
    weights = {name: p.detach().cpu().contiguous() for name, p in model.state_dict().items()}
    save_file(weights, path)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets the owner alone read it


def load_model(folder, dropout=0.0):
    """Return the GPT of a checkpoint folder: its config from meta.json, its weights from
    model.safetensors. Raises ValueError where either is missing, damaged or of another model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = GPTConfig(**json.loads((folder / "meta.json").read_text("utf-8"))["model"])
        weights = load_file(folder / "model.safetensors")
    except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a checkpoint ({type(error).__name__}: {error})") from error
    return from_weights(replace(config, dropout=dropout), weights, folder)


def from_weights(config, weights, place):
    """Return the GPT with these weights, {name: tensor}, in float32. Raises ValueError, naming
    the place that they are from, where a name or a size does not fit."""
    with torch.device("meta"):  # no memory, no first weights: the given ones take their place
        model = GPT(config)
    # a copy, because safetensors' tensors are the file itself, mapped into memory
    weights = {name: p.to(torch.float32, copy=True) for name, p in weights.items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{place}: the weights are another model's ({reason})") from error
    return model


def find_checkpoint(path, which="latest"):
    """Return the checkpoint folder that `path` names: itself, or, in a run's folder, the one of
    iter_000250/ and so on whose name is in the file `latest` or `best`. Raises ValueError where
    there is none."""
    path = Path(path)
    if (path / "model.safetensors").is_file():
        return path
    pointer = path / which
    if not pointer.is_file():
        raise ValueError(f"{path}: no checkpoint here ({pointer} is missing); train one, or name "
                         "another folder with --out_dir= or --init_from=")
    name = Path(pointer.read_text("utf-8", "replace").strip()).name  # never outside
    if name in ("", "..") or not (path / name).is_dir():
        raise ValueError(f"{pointer} names {name!r}, which is not there")
    return path / name
