"""GPT-2, and ten switches to what came later: the maths of the model and its first weights.

    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128))
    losses = model(tokens, targets)   # (B, T) loss of each target; 0 where the target is IGNORE
    logits = model.logits(tokens)     # (B, T, V)

To feed it one token at a time, keep the keys and values of the tokens before:

    cache = model.make_cache(B)
    x = model.hidden(tokens, cache, start)[:, -1]  # tokens are at positions start, start + 1, ...

or give each row of the batch a start of its own.

Needs torch alone. Weights on disk: formats/checkpoint.py. Training: train.py. Sampling: sample.py.

Sizes, everywhere: B batch, T time, C channels (n_embd), H heads, K heads of keys and values, D head
dimension, M channels inside the MLP, V vocabulary, S positions that the cache holds, R rows of
positions: B, or 1 where all sequences are at the same positions.
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; the details are those
of OpenAI's code, github.com/openai/gpt-2, src/model.py.
"""

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

IGNORE = -1  # a target that has no loss


@dataclass
class GPTConfig:
    """Sizes and switches of a model; the defaults are GPT-2 124M. Raises ValueError for sizes that
    do not fit together."""
    block_size: int = 1024  # longest sequence, tokens
    vocab_size: int = 50304  # rows of the embedding: GPT-2's 50257, padded to a multiple of 128
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2
    # ten switches, each of which works alone; what each is worth: experiments/recipe.md
    rope: bool = False  # rotary positions instead of learned ones (Su et al. 2021)
    rmsnorm: bool = False  # RMSNorm without weights (Zhang, Sennrich 2019), of the embedding too
    qk_norm: bool = False  # RMSNorm of queries and keys (Henry et al. 2020)
    mlp: str = "gelu"  # or gelu_exact, relu2 (So et al. 2021, Primer), swiglu (Shazeer 2020)
    tied: bool = True  # the head's matrix is the token embedding (Press, Wolf 2017)
    zero_init: bool = False  # each block starts as the identity: see GPT.init_weights
    softcap: float = 0.0  # logits stay within +-softcap (Gemma Team 2024, Gemma 2); 0: no limit
    n_kv_head: int = 0  # heads of keys and values, shared by groups (Ainslie et al. 2023); 0: all
    value_embeds: bool = False  # a token table added to every other layer's values (@KoszarskyB)
    residual_scalars: bool = False  # a block reads a x + b x0, x0 the embedding (@Grad62304977)

    def __post_init__(self):
        # whole numbers: at least 1, but n_kv_head may be 0
        for field in fields(self):
            value = getattr(self, field.name)
            smallest = 0 if field.name == "n_kv_head" else 1
            if field.type is int and (not isinstance(value, int) or value < smallest):
                raise ValueError(f"{field.name}={value}: must be a whole number and at least "
                                 f"{smallest}")
        # the heads share out the channels
        if self.n_embd % self.n_head:
            divisors = [h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0]
            nearest = min(divisors, key=lambda h: abs(h - self.n_head))
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; "
                             f"the nearest n_head that divides it is {nearest}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}")
        if self.rope and self.head_dim % 2:
            raise ValueError(f"rope=True rotates pairs of channels: n_embd / n_head = "
                             f"{self.head_dim} must be even")
        # other ranges
        if self.n_layer > 10_000:
            raise ValueError(f"n_layer={self.n_layer}: must be at most 10000")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be at least 0 and below 1")
        if not 0 <= self.softcap < math.inf:
            raise ValueError(f"softcap={self.softcap}: must be at least 0, and finite")
        if self.mlp not in ACTIVATIONS:
            raise ValueError(f"mlp={self.mlp!r:.60}: choose {', '.join(ACTIVATIONS)}")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head


def gelu(x):
    return F.gelu(x, approximate="tanh")  # the approximation that GPT-2 was trained with


def relu2(x):
    return F.relu(x).square()


def swiglu(x):
    gate, x = x.chunk(2, -1)  # each (B, T, M)
    return F.silu(gate) * x  # (B, T, M)


ACTIVATIONS = {"gelu": gelu, "gelu_exact": F.gelu, "relu2": relu2, "swiglu": swiglu}


def make_norm(config):
    if config.rmsnorm:
        return nn.RMSNorm(config.n_embd, eps=1e-6, elementwise_affine=False)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


def rotation_angles(positions, head_dim):
    """Return (cos, sin), each (R, 1, T, D/2), of the angle by which each pair of channels is
    rotated at positions (R, T)."""
    channels = torch.arange(0, head_dim, 2, device=positions.device)  # (D/2,)
    angles = positions[:, None, :, None] * 10000.0 ** -(channels / head_dim)  # (R, 1, T, D/2)
    return angles.cos(), angles.sin()  # each (R, 1, T, D/2)


def rotate(x, cos, sin):
    """Rotate channel i of x (..., T, D) with channel i + D/2 (the pairs of GPT-NeoX)."""
    a, b = x.chunk(2, -1)  # each (..., T, D/2)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)  # (..., T, D)


def write_to_cache(cache, x, positions):
    """Write keys or values x (B, K, T, D) at positions (R, T) of a cache (B, K, S, D)."""
    if len(positions) == 1:  # the same in all rows
        cache.index_copy_(2, positions[0], x)
    else:
        rows = torch.arange(len(x), device=x.device)[:, None]  # (B, 1)
        cache[rows, :, positions] = x.transpose(1, 2)  # (B, T, K, D)


class Context(NamedTuple):
    """What every block needs to know besides its input."""
    tokens: torch.Tensor  # ids (B, T), for the value embeddings
    positions: torch.Tensor  # of the tokens in their sequences, (R, T)
    rotation: tuple | None  # cos and sin, each (R, 1, T, D/2); None: learned positions
    mask: torch.Tensor | None  # True where attention may look; None: each token sees those before


class CausalSelfAttention(nn.Module):
    """Each position attends to itself and to the positions before it."""

    attend = staticmethod(F.scaled_dot_product_attention)  # may be replaced, as in runtime/cpu.py

    def __init__(self, config, has_value_embedding=False):
        super().__init__()
        H, K, D = config.n_head, config.kv_heads, config.head_dim
        self.sizes = H, K, D
        self.c_attn = nn.Linear(config.n_embd, (H + 2 * K) * D, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.value_embed = None
        if has_value_embedding:
            self.value_embed = nn.Embedding(config.vocab_size, K * D)
            self.gate = nn.Linear(min(12, config.n_embd), K, bias=False)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.dropout = config.dropout
        self.qk_norm = config.qk_norm
        # normalised queries and keys need a sharper softmax than 1/sqrt(D) (nanochat: 1.2 * 1.2)
        self.scale = 1.44 / math.sqrt(D) if config.qk_norm else None

    def forward(self, x, context, cache=None):
        """x: (B, T, C). cache: the layer's keys and values, each (B, K, S, D), or None."""
        B, T, C = x.shape
        H, K, D = self.sizes
        # queries, keys and values of all heads
        heads = self.c_attn(x).view(B, T, H + 2 * K, D).transpose(1, 2)  # (B, H + 2*K, T, D)
        qk, v = heads.split((H + K, K), 1)  # (B, H + K, T, D), (B, K, T, D)
        # switches that change them
        if self.qk_norm:
            qk = F.rms_norm(qk, (D,), eps=1e-6).to(v.dtype)  # (B, H + K, T, D)
        if context.rotation is not None:
            qk = rotate(qk, *context.rotation).to(v.dtype)  # (B, H + K, T, D)
        if self.value_embed is not None:
            gate = 2 * torch.sigmoid(self.gate(x[..., :12])).transpose(1, 2)  # (B, K, T)
            table = self.value_embed(context.tokens).view(B, T, K, D)  # (B, T, K, D)
            v = v + (gate[..., None] * table.transpose(1, 2)).to(v.dtype)  # (B, K, T, D)
        q, k = qk.split((H, K), 1)  # (B, H, T, D), (B, K, T, D)
        # write the new positions into the cache, then read all of them
        if cache is not None:
            write_to_cache(cache[0], k, context.positions)
            write_to_cache(cache[1], v, context.positions)
            k, v = cache  # each (B, K, S, D)
        # a weighted mean of the values; without a mask each token sees those before it
        y = self.attend(
            q, k, v, attn_mask=context.mask, dropout_p=self.dropout if self.training else 0.0,
            is_causal=context.mask is None and T > 1, scale=self.scale,
            enable_gqa=K != H)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return self.resid_dropout(self.c_proj(y))  # (B, T, C)


class MLP(nn.Module):
    """Four times as wide inside; SwiGLU, which has two matrices there, 8/3 times."""

    def __init__(self, config):
        super().__init__()
        # SwiGLU's gate is a second matrix of the first layer; 8/3 makes up for it
        C = config.n_embd
        M, matrices = 4 * C, 1
        if config.mlp == "swiglu":
            M, matrices = math.ceil(C / 3) * 8, 2
        self.c_fc = nn.Linear(C, M * matrices, bias=config.bias)
        self.c_proj = nn.Linear(M, C, bias=config.bias)
        self.activation = ACTIVATIONS[config.mlp]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.activation(self.c_fc(x))  # (B, T, M)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream after a norm of its input."""

    def __init__(self, config, has_value_embedding=False):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, has_value_embedding)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)
        self.has_scalars = config.residual_scalars
        if self.has_scalars:
            self.resid_lambda = nn.Parameter(torch.empty(1))
            self.x0_lambda = nn.Parameter(torch.empty(1))

    def forward(self, x, x0, context, cache=None):
        """x: the residual stream (B, T, C); x0: what it was before the first block."""
        if self.has_scalars:
            x = self.resid_lambda * x + self.x0_lambda * x0  # (B, T, C)
        x = x + self.attn(self.ln_1(x), context, cache)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class GPT(nn.Module):
    """The transformer. Its parameters have nanoGPT's names; a tied head is the token embedding."""

    document_start = None  # a token id: attention does not look back beyond it (without a cache)

    def __init__(self, config, generator=None):
        """generator: a CPU torch.Generator for the first weights; None: torch's global one."""
        super().__init__()
        self.config = config
        # the blocks
        layers = []
        for i in range(config.n_layer):
            # value embeddings: in every other layer, the last one among them
            has_value_embedding = config.value_embeds and (config.n_layer - i) % 2 == 1
            layers.append(Block(config, has_value_embedding))
        # around them: embeddings before, a norm and the head after
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, config.n_embd)})
        if not config.rope:
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer["drop"] = nn.Dropout(config.dropout)
        self.transformer["h"] = nn.ModuleList(layers)
        self.transformer["ln_f"] = make_norm(config)
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """Draw the first weights from N(0, s), with s =  GPT-2                zero_init
            c_proj, which writes to the residual stream   0.02 / sqrt(2 n_layer)   0
            lm_head, where it is not tied                 0.02                     0
            wte, where it is not tied                     0.02                     1
            wte, where it is tied; wpe                    0.02                     0.02
            c_attn, c_fc, value_embed                     0.02                     1 / sqrt(3 C)
        Biases, gate and x0_lambda start at 0, LayerNorm's weights and resid_lambda at 1.
        GPT-2: Radford et al. 2019, section 2.3. zero_init: KellerJordan/modded-nanogpt, track 3;
        at GPT-2's width 1 / sqrt(3 C) is 0.02 again."""
        # the standard deviation of each matrix, by the last part of its name
        config = self.config
        scales = {"c_proj": 0.02 / math.sqrt(2 * config.n_layer)}
        if config.zero_init:
            inner = (3 * config.n_embd) ** -0.5
            scales = {"c_proj": 0.0, "lm_head": 0.0, "c_attn": inner, "c_fc": inner,
                      "value_embed": inner, "wte": 0.02 if config.tied else 1.0}
        # draw them, in the order of the parameters
        for name, p in self.named_parameters():
            layer = name.removesuffix(".weight").rpartition(".")[2]
            if layer in ("bias", "gate", "x0_lambda"):
                p.zero_()
            elif p.dim() == 2:
                p.normal_(0.0, scales.get(layer, 0.02), generator=generator)
            else:  # LayerNorm, resid_lambda
                p.fill_(1.0)

    def make_cache(self, batch_size, dtype=None, length=None):
        """Return room for the keys and values of `batch_size` sequences of `length` tokens (None:
        block_size): for each layer a pair (B, K, length, D), on the weights' device. dtype: of the
        matrix products, which under autocast is not that of the weights (None: the weights')."""
        c = self.config
        size = (batch_size, c.kv_heads, length or c.block_size, c.head_dim)
        zeros = partial(self.transformer.wte.weight.new_zeros, size, dtype=dtype)
        return [(zeros(), zeros()) for _ in range(c.n_layer)]

    def hidden(self, tokens, cache=None, start=0):
        """Token ids (B, T) to the last hidden states (B, T, C).

        cache: from make_cache. The tokens are then at positions start to start + T - 1; they are
        written into the cache and attend to what it holds before them. start: an int; or an int64
        tensor, (B,) with a start for each sequence or () with one for all, with which all shapes
        are the same at every position, as a CUDA graph needs: the whole cache is then read, under a
        mask. Raises ValueError for positions beyond block_size (a tensor is not checked).
        """
        T, block_size = tokens.shape[1], self.config.block_size
        if isinstance(start, torch.Tensor):
            end = cache[0][0].shape[2]
            start = start.view(-1, 1)  # (R, 1)
        else:
            end = start + T
        if end > block_size:
            raise ValueError(f"a sequence of {end} tokens is longer than the model's "
                             f"block_size={block_size}; give it at most that many")
        positions = torch.arange(T, device=tokens.device)[None] + start  # (R, T)
        # the embedding: of the tokens, and of the positions unless attention rotates them in
        x = self.transformer.wte(tokens)  # (B, T, C)
        rotation = None
        if self.config.rope:
            rotation = rotation_angles(positions, self.config.head_dim)  # each (R, 1, T, D/2)
        else:
            x = x + self.transformer.wpe(positions)  # (B, T, C)
        if self.config.rmsnorm:
            x = self.transformer.ln_f(x)  # (B, T, C): it has no weights, so one serves both ends
        x = x0 = self.transformer.drop(x)  # each (B, T, C)
        # the blocks
        context = Context(tokens, positions, rotation,
                          self.attention_mask(tokens, positions, cache, start, end))
        for i, block in enumerate(self.transformer.h):
            layer_cache = None
            if cache is not None:
                layer_cache = [part[:, :, :end] for part in cache[i]]  # each (B, K, S, D)
            x = block(x, x0, context, layer_cache)  # (B, T, C)
        return self.transformer.ln_f(x)  # (B, T, C)

    def attention_mask(self, tokens, positions, cache, start, end):
        """Return where attention may look, as `scaled_dot_product_attention` takes it; None where
        each token sees those before it, or where a single token sees the whole cache."""
        # without a cache: all tokens, or those of the same document
        if cache is None:
            if self.document_start is None:
                return None
            documents = (tokens == self.document_start).cumsum(1)  # (B, T)
            same = documents[:, :, None] == documents[:, None]  # (B, T, T)
            return same.tril()[:, None]  # (B, 1, T, T)
        # with a cache: several tokens after others, or shapes that are the same everywhere
        if isinstance(start, torch.Tensor) or (start > 0 and tokens.shape[1] > 1):
            seen = torch.arange(end, device=tokens.device) <= positions[..., None]  # (R, T, S)
            return seen[:, None]  # (R, 1, T, S)
        return None

    @property
    def head_weight(self):
        """The head's matrix (V, C)."""
        if self.config.tied:
            return self.transformer.wte.weight
        return self.lm_head.weight

    def head(self, x):
        """Hidden states (..., C) to logits (..., V)."""
        logits = F.linear(x, self.head_weight)  # (..., V)
        if self.config.softcap:
            logits = self.config.softcap * torch.tanh(logits / self.config.softcap)  # (..., V)
        return logits  # (..., V)

    def logits(self, tokens):
        """Token ids (B, T) to the logits of the next token, (B, T, V)."""
        return self.head(self.hidden(tokens))  # (B, T, V)

    def token_losses(self, x, targets):
        """Hidden states (N, C) and targets (N,) to losses (N,). training/loss.py puts a version in
        its place that needs less memory."""
        logits = self.head(x).float()  # (N, V)
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")  # (N,)

    def forward(self, tokens, targets):
        """Return the cross-entropy in nats of each target, (B, T), float32; 0 where IGNORE.

        tokens, targets: (B, T) int64. The caller divides the sum by the number of targets, which
        it alone knows when a batch is accumulated or shared out over devices.
        """
        x = self.hidden(tokens).flatten(0, 1)  # (B*T, C)
        return self.token_losses(x, targets.flatten()).view_as(targets)  # (B, T)

    def parameter_count(self):
        """The number of parameters, without the position embedding (nanoGPT's way of counting)."""
        return sum(p.numel() for name, p in self.named_parameters() if "wpe" not in name)
